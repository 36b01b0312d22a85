# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
DiNa-LRMs in the authors' format. `dina.safetensors` has the scores that the authors' own code gave, from the folder that it
had saved itself; the weights are by formula, see `make_dina.py`.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tapo_trl import DiNaModel, load_policy, load_reward_model
from tapo_trl.rewards.dina_released import released_name
from tapo_trl.rewards.loading import saved_class
from tests.rewards.pretrained.fixtures.recipes import dina_config, dina_inputs, filled, read
from tests.testing_utils import tiny_sd3_pipeline


ROUNDING = 2e-5


@pytest.fixture(scope="module")
def original():
    return read("dina")


@pytest.fixture(scope="module")
def pipeline(original):
    facts, _, _ = original
    pipeline = tiny_sd3_pipeline(num_layers=4, num_attention_heads=4, caption_projection_dim=32)
    pipeline.transformer.load_state_dict(filled(facts["base"]), strict=False)
    return pipeline


@pytest.fixture(scope="module")
def released(original, tmp_path_factory):
    """The folder as on the Hub: what the authors' code writes for a checkpoint is in `checkpoint`."""
    facts, head, _ = original
    folder = tmp_path_factory.mktemp("released")
    (folder / "checkpoint" / "backbone_lora").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dina_config()))
    (folder / "checkpoint/backbone_lora/adapter_config.json").write_text(json.dumps(facts["adapter_config"]))
    save_file(filled(facts["adapter"]), folder / "checkpoint/backbone_lora/adapter_model.safetensors")
    torch.save(head, folder / "checkpoint/rm_head.pt")
    return folder


@pytest.fixture
def broken(released, tmp_path):
    return shutil.copytree(released, tmp_path / "broken")


def scores(model: DiNaModel, sigmas: list[float]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(
            [
                model.score(latents, sigma, prompts["encoder_hidden_states"], prompts["pooled_projections"])
                for sigma, (_, latents, prompts) in zip(sigmas, dina_inputs(), strict=True)
            ]
        )


def change_config(folder, **fields) -> None:
    config = dina_config()
    for name, value in fields.items():
        part = config["model"]["reward_head"] if name in config["model"]["reward_head"] else config["model"]
        part[name] = value
    (folder / "config.json").write_text(json.dumps(config))


class TestLoading:
    def test_scores_are_those_of_the_authors_code(self, original, released, pipeline):
        facts, _, expected = original
        model = load_reward_model(released, base_model=pipeline)
        assert type(model) is DiNaModel and not model.training
        torch.testing.assert_close(scores(model, facts["sigmas"]), expected, rtol=0, atol=ROUNDING)
        # They spread enough that a wrong part would show, and they need the LoRA.
        assert expected.std() > 1000 * ROUNDING
        plain = DiNaModel.from_policy(load_policy(pipeline), layers=[1, 2, 3])
        plain.head.load_state_dict(model.head.state_dict())
        assert (scores(plain, facts["sigmas"]) - expected).abs().min() > 100 * ROUNDING

    def test_every_tensor_of_the_file_is_used(self, original, released, pipeline):
        facts, head, _ = original
        model = load_reward_model(released, base_model=pipeline)
        assert {released_name(name) for name, _ in model.head.named_parameters()} == head.keys()
        for name, parameter in model.head.named_parameters():
            assert torch.equal(parameter, head[released_name(name)]), name
        adapter = {name: p for name, p in model.transformer.named_parameters() if "lora_" in name}
        expected = filled(facts["adapter"])
        assert len(adapter) == len(expected)
        for name, parameter in adapter.items():
            assert torch.equal(parameter, expected[f"base_model.model.{name.replace('.default', '')}"]), name

    def test_configuration(self, released, pipeline):
        config = load_reward_model(released, base_model=pipeline).config
        assert (config["layers"], config["num_queries"], config["max_sequence_length"]) == ([1, 2, 3], 4, 128)
        assert (config["resolution"], config["trained"], config["lora"]) == (1024, True, True)
        policy = load_policy(pipeline)
        longer = load_reward_model(released, base_model=policy, max_sequence_length=256)
        longer.check_compatible(policy, max_sequence_length=256)
        with pytest.raises(ValueError, match="`max_sequence_length`: 256 in the DiNa-LRM, 128 in the policy"):
            longer.check_compatible(policy, max_sequence_length=128)

    def test_converted(self, original, released, pipeline, tmp_path):
        """In this library's format every option can read it, such as `share_backbone`."""
        facts, _, expected = original
        load_reward_model(released, base_model=pipeline).save_pretrained(tmp_path)
        converted = load_reward_model(tmp_path, base_model=load_policy(pipeline), share_base=True)
        torch.testing.assert_close(scores(converted, facts["sigmas"]), expected, rtol=0, atol=ROUNDING)
        with pytest.raises(ValueError, match="convert it once with `load_reward_model"):
            saved_class(released)

    def test_base_by_name(self, original, released, pipeline, broken, tmp_path):
        facts, _, expected = original
        pipeline.save_pretrained(tmp_path / "base")
        change_config(broken, backbone_model_id=str(tmp_path / "base"))
        model = load_reward_model(broken)
        assert model.config["base_model_name_or_path"] == str(tmp_path / "base")
        torch.testing.assert_close(scores(model, facts["sigmas"]), expected, rtol=0, atol=ROUNDING)
        half = load_reward_model(broken, torch_dtype="bfloat16")
        assert half.transformer.backbone_dtype == torch.bfloat16
        assert {p.dtype for p in half.head.parameters()} == {torch.float32}
        assert 0 < (scores(half, facts["sigmas"]) - expected).abs().max() < 0.3
        assert all(torch.equal(own, model.head.state_dict()[name]) for name, own in half.head.state_dict().items())


class TestErrors:
    @pytest.mark.parametrize(
        ("field", "value", "expected"),
        [
            ("use_lora", False, True),
            ("freeze_backbone", True, False),
            ("use_logistic", True, False),
            ("text_head_idx", [1, 2], [1, 2, 3]),
            ("num_transformer_layers", 4, 3),
            ("width", 64, -1),
            ("num_attn_heads", 4, 8),
            ("use_proj_in", True, False),
        ],
    )
    def test_other_designs(self, broken, pipeline, field, value, expected):
        change_config(broken, **{field: value})
        with pytest.raises(ValueError) as error:
            load_reward_model(broken, base_model=pipeline)
        assert f"{field}` of its `config.json` is {value}, but `DiNaModel` can only be loaded with {expected}." in str(
            error.value
        )

    def test_head_with_other_tensors(self, broken, pipeline, original):
        _, head, _ = original
        changed = {name: tensor for name, tensor in head.items() if not name.startswith("attn2.to_k")}
        changed |= {"pooling.weight": torch.zeros(1), "head.weight": torch.zeros(2, 32)}
        torch.save(changed, broken / "checkpoint/rm_head.pt")
        with pytest.raises(ValueError) as error:
            load_reward_model(broken, base_model=pipeline)
        assert str(error.value) == (
            f"`{broken}/checkpoint/rm_head.pt` does not fit its `config.json` and the base model: attn2.to_k_vis.bias is missing; "
            "attn2.to_k_vis.weight is missing; pooling.weight is not known; and 1 more."
        )
        torch.save(head | {"head.weight": torch.zeros(2, 32)}, broken / "checkpoint/rm_head.pt")
        with pytest.raises(ValueError, match=r": head.weight has shape \(2, 32\) in place of \(1, 32\).$"):
            load_reward_model(broken, base_model=pipeline)

    def test_adapter_with_other_tensors(self, broken, pipeline):
        file = broken / "checkpoint/backbone_lora/adapter_model.safetensors"
        weights = load_file(file)
        name = "base_model.model.transformer_blocks.2.attn.to_add_out.lora_B.weight"
        weights["base_model.model.transformer_blocks.7.attn.to_q.lora_A.weight"] = weights.pop(name)
        save_file(weights, file)
        with pytest.raises(
            ValueError, match=rf"backbone_lora/adapter_model.safetensors` .*: {name} is missing; .*7.attn.to_q.lora_A"
        ):
            load_reward_model(broken, base_model=pipeline)

    def test_unknown_argument(self, released, pipeline):
        with pytest.raises(ValueError, match="`max_sequence_lenght` is no argument"):
            load_reward_model(released, base_model=pipeline, max_sequence_lenght=128)
