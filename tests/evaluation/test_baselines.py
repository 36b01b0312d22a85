# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""`tapo-trl evaluate --baselines`: pipelines that are sampled by their own `__call__`."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tapo_trl.cli.arguments import EvaluateArguments
from tapo_trl.cli.main import main
from tapo_trl.evaluation.baselines import Baseline
from tapo_trl.evaluation.scores import SampleFiles, find_samples
from tapo_trl.policies.tiny import tiny_clip_tokenizer
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def tiny_sdxl_pipeline() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=64,
        cross_attention_dim=32,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    tokenizer = tiny_clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    tiny_sd3_pipeline().save_pretrained(folder / "base")
    tiny_sdxl_pipeline().save_pretrained(folder / "sdxl")
    (folder / "parti.tsv").write_text("Prompt\tCategory\na cat\tAnimals\na cup\tThings\na dog\tAnimals\n")
    return folder


def run(folder, *flags):
    sampling = ["--num_inference_steps", "2", "--resolution", "32", "--max_sequence_length", "8", "--batch_size", "2"]
    rewards = ["--reward_model", f"{__name__}:brightness", "--model_name_or_path", folder / "base"]
    steps = ["--baseline_kwargs", json.dumps({"num_inference_steps": 2})]
    main(["evaluate", *map(str, [*rewards, *sampling, *steps, *flags])])


def test_the_row_of_rewards(folder, tmp_path, capsys):
    flags = ["--prompts", "a cat", "a cup", "a dog", "--seed", 5, "--samples_dir", tmp_path]
    run(folder, *flags, "--baselines", f"sdxl={folder / 'sdxl'}", f"other={folder / 'base'}")
    output = capsys.readouterr()
    header, row = output.err.splitlines()[-2:]
    assert header.split() == ["reward", "sdxl", "other", "mean", "n"] and row.count("±") == 3
    (found,) = json.loads(output.out)["reward_statistics"].values()
    assert found["n"] == 3 and list(found["baselines"]) == ["sdxl", "other"]

    # What the pipeline draws by itself with these seeds
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "sdxl")
    expected = [
        pipeline(prompt, num_inference_steps=2, height=32, width=32, output_type="pt", generator=generator).images[0]
        for prompt, generator in (
            ("a cat", torch.Generator().manual_seed(5)),
            ("a cup", torch.Generator().manual_seed(6)),
            ("a dog", torch.Generator().manual_seed(7)),
        )
    ]
    means = torch.stack(expected).flatten(1).mean(1)
    assert found["baselines"]["sdxl"]["mean"] == pytest.approx(means.mean().item(), abs=1e-4)
    pictures = torch.stack(list(SampleFiles(find_samples(tmp_path / "sdxl"))))
    torch.testing.assert_close(pictures, torch.stack(expected).detach(), atol=2 / 255, rtol=0)
    assert (tmp_path / "overview.png").exists() and len(find_samples(tmp_path / "samples")) == 3
    assert set(json.loads((tmp_path / "scores.json").read_text())["scores"]) == {"samples", "sdxl", "other"}


def test_beside_base_and_aligned_in_another_size(folder, tmp_path, capsys, monkeypatch):
    from peft import LoraConfig, get_peft_model

    from tapo_trl.policies import load_policy

    policy = load_policy(str(folder / "base"))
    lora = LoraConfig(r=2, target_modules=policy.lora_target_modules, init_lora_weights=False)
    policy.save_lora_weights(tmp_path / "lora", get_peft_model(policy.transformer, lora))
    kwargs = json.dumps({"sdxl": {"num_inference_steps": 1, "height": 48}})
    flags = ["--prompts", "a cat", "a dog", "--lora", tmp_path / "lora", "--samples_dir", tmp_path / "samples"]
    run(folder, *flags, "--baselines", f"sdxl={folder / 'sdxl'}", "--baseline_kwargs", kwargs)
    output = capsys.readouterr()
    assert output.err.splitlines()[-2].split()[:5] == ["reward", "sdxl", "base", "aligned", "difference"]
    assert SampleFiles(find_samples(tmp_path / "samples" / "sdxl"))[0].shape == (3, 48, 32)
    assert (tmp_path / "samples" / "overview.png").exists()


def test_benchmark_continues(folder, tmp_path, capsys, monkeypatch):
    flags = ["--benchmark", "partiprompts", "--benchmark_prompts", folder / "parti.tsv", "--samples_dir", tmp_path]
    flags += ["--baselines", f"sdxl={folder / 'sdxl'}", "--batch_size", 1]
    run(folder, *flags)
    found = json.loads(capsys.readouterr().out)["benchmark"]
    (ours,), (other,) = found["rewards"].values(), found["baselines"]["sdxl"]["rewards"].values()
    assert ours["all"]["n"] == other["all"]["n"] == 3 and other["Animals"]["n"] == 2
    assert ours["all"]["mean"] != other["all"]["mean"]
    files = sorted((tmp_path / "baselines" / "sdxl").glob("*.png"))
    pictures = [file.read_bytes() for file in files]
    assert len(set(pictures)) == 3

    # What is missing is drawn again, and nothing else
    files[1].unlink()
    drawn, draw = [], Baseline.draw
    monkeypatch.setattr(
        Baseline,
        "draw",
        lambda self, prompts, seeds, **kwargs: drawn.extend(prompts) or draw(self, prompts, seeds, **kwargs),
    )
    run(folder, *flags)
    assert drawn == ["a cup"] and [file.read_bytes() for file in files] == pictures
    with pytest.raises(ValueError, match=r"sdxl has samples with other settings \(options\)"):
        run(folder, *flags, "--baseline_kwargs", '{"num_inference_steps": 3}')


def test_videos(tmp_path):
    tiny_wan_pipeline().save_pretrained(tmp_path)
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 5}
    baseline = Baseline("wan", str(tmp_path), torch.float32, options)
    assert baseline.modality == "video"
    videos = baseline.draw(["a cat"], [3], batch_size=1, device=torch.device("cpu"))
    assert videos.shape == (1, 3, 5, 32, 32) and videos.std() > 0 and 0 <= videos.min() <= videos.max() <= 1


def test_bad_baselines(folder, tmp_path):
    sdxl = str(folder / "sdxl")
    with pytest.raises(ValueError, match="a `StableDiffusionXLPipeline`, cannot be called with `steps`: leave it out"):
        Baseline("x", sdxl, torch.float32, {"steps": 3})
    with pytest.raises(OSError, match="nothing"):
        Baseline("x", str(tmp_path / "nothing"), torch.float32)
    for class_name, message in (
        ("NoPipeline", "is no pipeline"),
        ("CogVideoXImageToVideoPipeline", "nothing of a prompt alone"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
        with pytest.raises(ValueError, match=f"`x` is a `{class_name}`, which .*{message}"):
            Baseline("x", str(tmp_path), torch.float32)
    tiny_wan_pipeline().save_pretrained(tmp_path / "wan")
    with pytest.raises(ValueError, match="`wan` makes videos, but the model makes images"):
        run(folder, "--prompts", "a cat", "--baselines", f"wan={tmp_path / 'wan'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": ["sdxl"]}, "write `NAME=ID`, such as .* not `sdxl`"),
        ({"baselines": ["a b=x"]}, "write `NAME=ID`"),
        ({"baselines": ["..=x"]}, "write `NAME=ID`"),
        ({"baselines": ["base=x"]}, "the name `base` is taken"),
        ({"baselines": ["a=x", "a=y"]}, "the name `a` is taken"),
        ({"baselines": ["a=x"], "prompts": None, "dataset_name": "x"}, "give `prompts` or a `benchmark`"),
        ({"baseline_kwargs": {"height": 3}}, "`baseline_kwargs` has arguments for `height`, but `baselines` is"),
        ({"baselines": ["a=x"], "baseline_kwargs": '{"b": {"height": 3}}'}, "arguments for `b`, but `baselines` is"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluateArguments(**{"reward_model": ["clip"], "prompts": ["a cat"]} | options)
