# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tapo_trl.cli.main import main
from tapo_trl.policies import FAMILIES, load_policy
from tapo_trl.policies.comfyui import comfyui_lora
from tapo_trl.policies.qwen_image21 import QwenImage21Policy
from tapo_trl.policies.wan_experts import WanExpertsPolicy
from tests.testing_utils import tiny_wan_pipeline


SLOW = ("Flux2Pipeline", "QwenImagePipeline")
IMAGES = [
    pytest.param(family, marks=pytest.mark.slow if family.pipeline in SLOW else (), id=family.pipeline)
    for family in FAMILIES
    if family.policy_class.modality == "image"
]


def write(family, folder, **lora_options):
    """A pipeline and a LoRA on it, and the weights of both together."""
    policy = load_policy(family.policy_class.tiny())
    policy.pipeline.save_pretrained(folder / "base")
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 6, "target_modules": policy.lora_target_modules} | lora_options
    model = get_peft_model(policy.transformer, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    policy.save_lora_weights(folder / "lora", model)
    base = {name: tensor.clone() for name, tensor in family.policy_class.tiny().transformer.state_dict().items()}
    return base, model.merge_and_unload().state_dict()


def run(folder, *flags):
    names = ["--model_name_or_path", str(folder / "base"), "--lora", str(folder / "lora")]
    return main(["merge", *names, "--output_dir", str(folder / "out"), *flags])


@pytest.mark.parametrize("family", IMAGES)
class TestMerge:
    def test_writes_a_pipeline_with_the_weights_of_both(self, family, tmp_path):
        base, expected = write(family, tmp_path)
        assert run(tmp_path) == 0
        merged = load_policy(str(tmp_path / "out"))
        assert type(merged.pipeline).__name__ == family.pipeline
        weights = merged.transformer.state_dict()
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)
        assert max((weights[name] - tensor).abs().max() for name, tensor in base.items()) > 0.01

    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_k": 3}}], ids=str)
    def test_comfyuis_way_to_apply_the_file_gives_the_same_weights(self, family, tmp_path, options):
        """W + alpha / rank * B A, with the alpha beside the layer, and none from metadata."""
        if not family.policy_class.comfyui_knows_layers:
            pytest.skip("refused: test_layers_that_comfyui_is_not_known_to_find")
        base, expected = write(family, tmp_path, **options)
        assert run(tmp_path, "--format", "comfyui") == 0
        tensors = load_file(tmp_path / "out" / "comfyui_lora.safetensors")
        layers = {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
        assert len(tensors) == 3 * len(layers) > 0
        for layer in layers:
            down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
            update = tensors[f"{layer}.alpha"].item() / len(down) * up @ down
            name = f"{layer.removeprefix('transformer.')}.weight"
            base[name] += update
        for name, tensor in expected.items():
            torch.testing.assert_close(base[name], tensor, rtol=0, atol=1e-6)


def test_precision_of_the_pipeline(tmp_path):
    write(FAMILIES[0], tmp_path)
    run(tmp_path, "--torch_dtype", "bf16")
    weights = load_file(next((tmp_path / "out" / "transformer").glob("*.safetensors")))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_both_experts_are_merged(tmp_path):
    policy = load_policy(WanExpertsPolicy.tiny())
    policy.pipeline.save_pretrained(tmp_path / "base")
    options = {"r": 2, "lora_alpha": 6, "target_modules": policy.lora_target_modules}
    model = get_peft_model(policy.transformer, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    policy.save_lora_weights(tmp_path / "lora", model)
    run(tmp_path)
    merged, base = (load_policy(str(tmp_path / folder)).pipeline for folder in ("out", "base"))
    for expert in ("transformer", "transformer_2"):
        weights, before = (getattr(p, expert).blocks[0].attn1.to_q.weight for p in (merged, base))
        lora = getattr(model.get_base_model(), expert).blocks[0].attn1.to_q
        torch.testing.assert_close(weights, before + lora.get_delta_weight("default"), rtol=0, atol=1e-6)
        assert (weights - before).abs().max() > 0.01


@pytest.mark.parametrize("tiny", [tiny_wan_pipeline, QwenImage21Policy.tiny])
def test_layers_that_comfyui_is_not_known_to_find(tmp_path, tiny):
    pipeline = tiny()
    pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=f"not known to find the layers of a `{type(pipeline).__name__}`"):
        run(tmp_path, "--format", "comfyui")


def test_more_than_lora_matrices():
    with pytest.raises(ValueError, match="`text_encoder.q.lora_A.weight` is no LoRA matrix of a transformer"):
        comfyui_lora({"text_encoder.q.lora_A.weight": torch.zeros(2, 4)}, None)
    with pytest.raises(ValueError, match="is no LoRA matrix"):
        comfyui_lora({"transformer.q.lora_magnitude_vector": torch.zeros(4)}, None)


def test_the_lora_is_needed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["merge", "--model_name_or_path", str(tmp_path)])
    assert "`lora` is missing" in capsys.readouterr().err
