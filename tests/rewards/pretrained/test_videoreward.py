# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
The fixtures were made with the original's `inference.py` and modules (KwaiVGI/VideoAlign, commit 219ab9d, which is no package) in
transformers 4.45.2 and float32, with a made-up instruction: a head with one output and one with three. Frames came from memory
instead of from a video file.
"""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tapo_trl import get_reward
from tapo_trl.rewards.pretrained.videoreward import frames_to_read, merge_lora
from tests.trainer.test_tapo_trainer import make_trainer as make_image_trainer
from tests.trainer.test_tapo_wan import make_trainer

from .checks import check_scorer
from .fixtures import recipes
from .qwen import save_base


LORA = {"lora_r": 4, "lora_alpha": 8, "use_rslora": False}


def save_checkpoint(root, outputs):
    facts, state, scores = recipes.read(f"videoreward_{outputs}")
    (root / "checkpoint-3").mkdir(parents=True)
    (root / "checkpoint-20").mkdir()
    torch.save(state, root / "checkpoint-20" / "model.pth")  # the latest, and not the last by name
    (root / "instruction.txt").write_text(facts["instruction"], newline="")
    save_base(root / "base", facts["config"])
    data = {"fps": 2.0, "max_frame_pixels": 200704, "num_frames": None, "sample_type": "uniform"}
    settings = {"data_config": data, "peft_lora_config": LORA, "inference_config": facts["norm"]}
    (root / "model_config.json").write_text(json.dumps(settings))
    return root, facts, scores


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as VideoReward has it, a base model and an instruction, and what the original made of them."""
    return save_checkpoint(tmp_path_factory.mktemp("videoreward") / "one", 1)


def load(folder, torch_dtype="float32", fps=8.0, **kwargs):
    files = {"base_model": folder / "base", "instruction_file": folder / "instruction.txt"}
    return get_reward("videoreward", weights=folder, torch_dtype=torch_dtype, fps=fps, **files, **kwargs)


def video(index, frames, height, width):
    shots = [recipes.as_pixels(recipes.picture(height, width, 100 * index + frame)) for frame in range(frames)]
    return torch.stack(shots, dim=1)[None]


@pytest.mark.parametrize("outputs", [1, 3])
def test_scores_are_those_of_the_original(tmp_path, outputs):
    folder, facts, expected = save_checkpoint(tmp_path / "checkpoint", outputs)
    reward = load(folder)
    for index, (prompt, size) in enumerate(zip(facts["prompts"], facts["videos"], strict=True)):
        clip = video(index, *size[:3])
        tolerance = 5e-6 if size[1:3] == [308, 336] else 0.01  # the original resizes 8-bit frames
        torch.testing.assert_close(reward.dimensions(clip, [prompt])[0], expected[index, :3], atol=tolerance, rtol=0)
        torch.testing.assert_close(reward(clip, [prompt])[0], expected[index, 3], atol=3 * tolerance, rtol=0)
    assert (expected.std(0) > 0.01).all()


def test_dimensions(published):
    folder, facts, expected = published
    clip = video(0, *facts["videos"][0][:3])
    for column, name in enumerate(("VQ", "MQ", "TA", "overall")):
        found = load(folder, dimension=name)(clip, facts["prompts"][:1])
        torch.testing.assert_close(found[0], expected[0, column], atol=1e-5, rtol=0)


def test_gradients_and_batches(published):
    clips = torch.cat([video(index, 5, 40, 50) for index in range(3)])
    check_scorer(load(published[0]), clips, published[1]["prompts"])


def test_a_lora_beside_the_base_model(tmp_path):
    """LoRA and what else was trained in PEFT's names, the rest from the base model; as the original saves them."""
    facts, _, _ = recipes.read("videoreward_1")
    folder, facts, _ = save_checkpoint(tmp_path / "checkpoint", 1)
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**facts["config"]))
    model.save_pretrained(folder / "base")
    (folder / "base" / "config.json").write_text(json.dumps(facts["config"]))
    modules = ["q_proj", "down_proj"]
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False))
    visual = {name for name, _ in tuned.named_parameters() if ".visual.merger." in name}
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name in visual:
                parameter.add_(0.3)
    old = {".model.visual.": ".visual.", ".model.language_model.": ".model."}  # names of transformers 4.45

    def renamed(name):
        for new, before in old.items():
            name = name.replace(new, before)
        return name

    state = {renamed(name): tensor.detach() for name, tensor in tuned.state_dict().items()}
    adapter = {name.replace(".default.", "."): tensor for name, tensor in state.items() if ".lora_" in name}
    others = {name: tensor for name, tensor in state.items() if ".visual.merger." in name}
    head = torch.randn(1, facts["config"]["hidden_size"])
    others["base_model.model.rm_head.weight"] = head
    latest = folder / "checkpoint-100"
    latest.mkdir()
    torch.save(others, latest / "non_lora_state_dict.pth")
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, latest / "adapter_model.safetensors")
    found = load(folder)
    merged = tuned.merge_and_unload().model
    rows = len(found.tokenizer)
    for name, tensor in found.model.state_dict().items():
        expected = merged.state_dict()[name]
        expected = expected[:rows] if name == "language_model.embed_tokens.weight" else expected
        torch.testing.assert_close(tensor, expected, msg=name)
    assert torch.equal(found.head.weight, head) and len(adapter) == 8 and len(visual) == 6


def test_whole_model_with_unmerged_lora(published):
    _, state, _ = recipes.read("videoreward_1")
    name = "model.layers.1.self_attn.q_proj"
    down, up = torch.randn(4, 32), torch.randn(32, 4)
    wrapped = {f"base_model.model.{key}": tensor for key, tensor in state.items() if not key.startswith(name)}
    wrapped |= {f"base_model.model.{name}.base_layer.{kind}": state[f"{name}.{kind}"] for kind in ("weight", "bias")}
    wrapped |= {f"base_model.model.{name}.lora_A.default.weight": down}
    wrapped |= {f"base_model.model.{name}.lora_B.default.weight": up}
    merged = merge_lora(wrapped, LORA)
    assert merged.keys() == state.keys()
    torch.testing.assert_close(merged[f"{name}.weight"], state[f"{name}.weight"] + 2 * up @ down)
    assert torch.equal(merged[f"{name}.bias"], state[f"{name}.bias"])
    scaled = merge_lora(wrapped, {**LORA, "use_rslora": True})
    torch.testing.assert_close(scaled[f"{name}.weight"], state[f"{name}.weight"] + 4 * up @ down)


def test_lora_of_embeddings():
    with pytest.raises(
        ValueError, match="linear layers, but the checkpoint has `model.embed_tokens.lora_embedding_A`"
    ):
        merge_lora({"model.embed_tokens.lora_embedding_A": torch.zeros(1)}, LORA)


@pytest.mark.parametrize(
    ("total", "fps", "number"),
    [(81, 16, 10), (49, 16, 6), (9, 8, 4), (5, 8, 4), (3, 8, 2), (2, 8, 2), (300, 30, 20), (33, 16, 4)],
)
def test_number_of_frames(total, fps, number):
    """As `smart_nframes` of the original: 81 frames at 16 per second are 10.125, rounded to an even number."""
    index = frames_to_read(total, fps, 2.0)
    assert len(index) == number and index[0] == 0 and index[-1] == total - 1 and index == sorted(set(index))


def test_frames_are_evenly_spaced():
    assert frames_to_read(13, 8.0, 2.0) == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fps": None}, r"pass `fps=16`"),
        ({"fps": 0.0}, r"pass `fps=16`"),
        ({"dimension": "beauty"}, "`dimension` must be one of overall, VQ, MQ, TA, but it is `beauty`"),
    ],
)
def test_bad_options(published, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load(published[0], **kwargs)


def test_bad_videos(published):
    reward = load(published[0])
    with pytest.raises(ValueError, match="at least 2 frames, but got 1"):
        reward(torch.rand(1, 3, 1, 56, 56), ["a"])
    with pytest.raises(ValueError, match="reads videos"):
        reward(torch.rand(1, 3, 56, 56), ["a"])


def test_other_sampling_of_frames(tmp_path):
    folder, _, _ = save_checkpoint(tmp_path / "checkpoint", 1)
    settings = json.loads((folder / "model_config.json").read_text())
    settings["data_config"]["num_frames"] = 8
    (folder / "model_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="at a fixed rate"):
        load(folder)


def test_no_checkpoint(tmp_path):
    folder, _, _ = save_checkpoint(tmp_path / "checkpoint", 1)
    for step in folder.glob("checkpoint-*"):
        for file in step.iterdir():
            file.unlink()
        step.rmdir()
    with pytest.raises(OSError, match=r"has no `checkpoint-\*`"):
        load(folder)


@pytest.mark.slow
def test_trains_a_policy_of_videos(published, tmp_path):
    folder = published[0]
    files = {"base_model": str(folder / "base"), "instruction_file": str(folder / "instruction.txt")}
    kwargs = {"weights": str(folder), "fps": 8, "torch_dtype": "float32", **files}
    trainer = make_trainer(tmp_path, reward="videoreward", max_steps=1, reward_model_init_kwargs=kwargs)
    trainer.train()
    assert trainer.state.log_history[0]["reward_std"] > 0
    with pytest.raises(ValueError, match="`videoreward` reads videos, but a `SD3Policy` makes images"):
        make_image_trainer(tmp_path, reward="videoreward", reward_model_init_kwargs=kwargs)
