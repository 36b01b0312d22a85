# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""What every kind of latent reward model can do. More on SLRM's own in test_slrm.py."""

import json

import pytest
import torch
from peft import LoraConfig

from tapo_trl import DiNaModel, LRMModel, SLRMModel, SPMModel, load_reward_model
from tapo_trl.policies import SD3Policy, WanPolicy, load_policy
from tapo_trl.rewards import REWARD_MODELS, LatentReward
from tapo_trl.rewards.loading import saved_class
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


KINDS = ["lrm", "dina"]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_sd3_pipeline(num_layers=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(pipeline_folder):
    return load_policy(str(pipeline_folder))


def inputs(policy) -> tuple[torch.Tensor, ...]:
    embeds = policy.encode_prompts(["cat", "dog", "bird"], 16)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([0.2, 0.5, 0.9]), embeds.prompt_embeds, embeds.pooled_prompt_embeds


def make(kind: str, policy, lora: bool = False, **config):
    torch.manual_seed(3)
    model = REWARD_MODELS[kind].from_policy(policy, max_sequence_length=16, **config)
    if lora:
        target_modules = policy.lora_target_modules
        model.add_lora(LoraConfig(r=4, lora_alpha=6, target_modules=target_modules, init_lora_weights=False))
    return model


def test_words():
    assert REWARD_MODELS == {"slrm": SLRMModel, "lrm": LRMModel, "dina": DiNaModel, "spm": SPMModel}
    assert all(model_class.kind == word for word, model_class in REWARD_MODELS.items())


@pytest.mark.parametrize("kind", KINDS)
class TestScore:
    def test_depends_on_latents_noise_level_and_prompt_alone(self, kind, policy):
        model, (latents, sigma, prompt_embeds, pooled) = make(kind, policy), inputs(policy)
        with torch.no_grad():
            scores = model.score(latents, sigma, prompt_embeds, pooled)
            assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.isfinite().all()
            alone = model.score(latents[1:2], 0.5, prompt_embeds[1:2], pooled[1:2])
            torch.testing.assert_close(alone, scores[1:2], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(model.score(latents.flip(0), sigma, prompt_embeds, pooled), scores)
            assert not torch.allclose(model.score(latents, sigma, prompt_embeds.flip(0), pooled.flip(0)), scores)
            # Where there are text encoders of CLIP, the embedding of the noise level holds the pooled prompt, too.
            assert not torch.allclose(model.score(latents, sigma.flip(0), prompt_embeds, pooled), scores)

    def test_has_no_velocity(self, kind, policy):
        args = inputs(policy)
        with pytest.raises(ValueError, match="predicts no velocity to compare `velocity_target` to"):
            make(kind, policy).score(*args, velocity_target=args[0])
        assert make(kind, policy).rollout_target(None) == "none"
        with pytest.raises(ValueError, match="`velocity_target='parent'` is for SLRMs.*: leave it unset"):
            make(kind, policy).rollout_target("parent")

    def test_is_named_in_logs(self, kind, policy):
        assert LatentReward(make(kind, policy), "none").__name__ == kind

    def test_half_precision_backbone(self, kind, pipeline_folder):
        full, half = (load_policy(str(pipeline_folder), torch_dtype=dtype) for dtype in (None, torch.bfloat16))
        model, args = make(kind, half, lora=True), inputs(full)
        expected = make(kind, full, lora=True)
        expected.load_state_dict(model.state_dict())
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
        with torch.no_grad():
            difference = (model.score(*args) - expected.score(*args)).abs().max()
        assert 0 < difference < 0.05 * max(1, expected.score(*args).abs().max())


@pytest.mark.parametrize("kind", KINDS)
class TestCheckCompatible:
    def test_itself(self, kind, policy):
        make(kind, policy).check_compatible(policy, max_sequence_length=16)

    @pytest.mark.parametrize(
        ("make_other", "message"),
        [
            (
                lambda: tiny_sd3_pipeline(joint_attention_dim=40),
                "`joint_attention_dim`: 24 in the .*, 40 in the policy",
            ),
            (lambda: tiny_sd3_pipeline(pooled_projection_dim=32), "`pooled_projection_dim`: 20 in the .*, 32"),
            (lambda: tiny_sd3_pipeline(seed=1), "VAE"),
        ],
    )
    def test_another_sd3(self, kind, policy, make_other, message):
        with pytest.raises(ValueError, match=message):
            make(kind, policy).check_compatible(SD3Policy(make_other()))

    def test_another_family(self, kind, policy):
        with pytest.raises(
            ValueError, match="transformer class: SD3Transformer2DModel in the .*, WanTransformer3DModel"
        ):
            make(kind, policy).check_compatible(WanPolicy(tiny_wan_pipeline()))

    def test_another_text_length(self, kind, policy):
        with pytest.raises(ValueError, match="`max_sequence_length`: 16 in the .*, 77 in the policy"):
            make(kind, policy).check_compatible(policy, max_sequence_length=77)


@pytest.mark.parametrize("kind", KINDS)
class TestTraining:
    def test_policy_is_left_as_it_was(self, kind, policy):
        before = {name: p.clone() for name, p in policy.transformer.named_parameters()}
        with torch.no_grad():
            for parameter in make(kind, policy).parameters():
                parameter.add_(1)
        assert all(torch.equal(p, before[name]) for name, p in policy.transformer.named_parameters())

    def test_lora_and_head(self, kind, policy):
        model = make(kind, policy, lora=True)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name in trained if name.startswith("head.")} == {
            name for name, _ in model.named_parameters() if name.startswith("head.")
        }
        assert all("lora_" in name for name in trained if not name.startswith("head."))
        assert any("attn.to_q.lora_A" in name for name in trained)
        with pytest.raises(ValueError, match="has a LoRA already"):
            model.add_lora(LoraConfig(r=2, target_modules=["to_q"]))

    def test_head_alone(self, kind, policy):
        model = make(kind, policy)
        model.requires_grad_(True).freeze_backbone()
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"head"}


class TestSaveAndLoad:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("lora", [False, True])
    def test_exact_and_recognised(self, kind, lora, policy, tmp_path):
        options = {"lrm": {"layer": 2, "guidance_scale": 2.5}, "dina": {"layers": [1, 3], "num_queries": 2}}[kind]
        model = make(kind, policy, lora=lora, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        loaded = load_reward_model(tmp_path)
        assert type(loaded) is REWARD_MODELS[kind] and not loaded.training
        for name, value in options.items():
            assert loaded.config[name] == value
        with torch.no_grad():
            assert torch.equal(loaded.score(*inputs(policy)), model.score(*inputs(policy)))
        loaded.check_compatible(policy)

        other = make(kind, policy, lora=lora, **options)
        other.load_trained_weights(tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name

    @pytest.mark.parametrize("kind", KINDS)
    def test_files(self, kind, policy, pipeline_folder, tmp_path):
        make(kind, policy).save_pretrained(tmp_path / "full")
        assert {file.name for file in (tmp_path / "full").iterdir()} == {
            "config.json",
            "diffusion_pytorch_model.safetensors",
        }
        make(kind, policy, lora=True).save_pretrained(tmp_path / "lora")
        assert {file.name for file in (tmp_path / "lora").iterdir()} == {
            "adapter_config.json",
            "config.json",
            f"{kind}_lora.safetensors",
        }
        config = json.loads((tmp_path / "lora" / "config.json").read_text())
        assert config["base_model_name_or_path"] == str(pipeline_folder)
        with pytest.raises(ValueError, match="only saved as safetensors"):
            make(kind, policy).save_pretrained(tmp_path, safe_serialization=False)

    @pytest.mark.parametrize("kind", KINDS)
    def test_base_of_a_lora_trained_in_memory(self, kind, policy, pipeline_folder, tmp_path):
        model = make(kind, SD3Policy(tiny_sd3_pipeline(num_layers=4)), lora=True)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="pass `base_model`"):
            load_reward_model(tmp_path)
        loaded = load_reward_model(tmp_path, base_model=str(pipeline_folder))
        with torch.no_grad():
            assert torch.equal(loaded.score(*inputs(policy)), model.score(*inputs(policy)))
        with pytest.raises(ValueError, match=r"differs in \['num_layers'\]"):
            load_reward_model(tmp_path, base_model=SD3Policy(tiny_sd3_pipeline(num_layers=5)))

    @pytest.mark.parametrize("kind", ["slrm", "dina"])
    def test_lora_comes_back_on_its_own_base_alone(self, kind, pipeline_folder, tmp_path):
        """A merged LoRA leaves the configuration as it was."""
        torch.manual_seed(0)
        model = make(kind, load_policy(str(pipeline_folder)), lora=True)
        model.save_pretrained(tmp_path)
        other = load_policy(str(pipeline_folder))
        with torch.no_grad():
            weight = other.transformer.transformer_blocks[2].attn.to_q.weight
            weight += 0.01 * weight.std() * torch.randn_like(weight)
        with pytest.raises(ValueError, match="weights are not those that this .* merged LoRA .* `base_model`"):
            load_reward_model(tmp_path, base_model=other)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            load_reward_model(tmp_path, base_model=load_policy(str(pipeline_folder), torch_dtype=dtype))
        load_reward_model(tmp_path, torch_dtype="bf16")

        config = json.loads((tmp_path / "config.json").read_text())
        for name in ("base_fingerprint", "base_revision", "base_variant", "trained"):
            del config[name]  # as in a folder from before
        (tmp_path / "config.json").write_text(json.dumps(config))
        load_reward_model(tmp_path, base_model=other)

    def test_lora_finds_the_files_of_its_base(self, pipeline_folder, tmp_path):
        base = load_policy(str(pipeline_folder), torch_dtype="fp16").pipeline
        base.save_pretrained(tmp_path / "base", variant="fp16")
        model = make("dina", load_policy(str(tmp_path / "base"), variant="fp16", revision="main"), lora=True)
        model.save_pretrained(tmp_path / "lora")
        loaded = load_reward_model(tmp_path / "lora")
        assert (loaded.config.base_variant, loaded.config.base_revision) == ("fp16", "main")

    def test_precision_has_two_names(self, policy, tmp_path):
        make("dina", policy).save_pretrained(tmp_path)
        assert load_reward_model(tmp_path, dtype="bf16").transformer.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="two names of one option"):
            load_reward_model(tmp_path, dtype="bf16", torch_dtype="fp32")
        with pytest.raises(ValueError, match="'auto'` is for pipelines"):
            load_reward_model(tmp_path, torch_dtype="auto")

    def test_slrm_is_recognised(self, policy, tmp_path):
        SLRMModel.from_policy(policy).save_pretrained(tmp_path)
        assert type(load_reward_model(tmp_path)) is SLRMModel

    def test_of_another_class(self, policy, tmp_path):
        make("dina", policy).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds a `DiNaModel`, not a `SLRMModel`.*`load_reward_model`"):
            SLRMModel.from_pretrained(tmp_path)

    def test_no_reward_model(self, policy, tmp_path):
        policy.transformer.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds a `SD3Transformer2DModel`, which is no reward model"):
            saved_class(tmp_path)

    @pytest.mark.parametrize("name", [["SLRMModel"], {"SLRMModel": 1}, None])
    def test_class_that_is_no_name(self, name, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ValueError, match="which is no reward model: those are"):
            saved_class(tmp_path)

    @pytest.mark.parametrize("kind", KINDS)
    def test_weights_of_another_one(self, kind, policy, tmp_path):
        options = {"lrm": {"layer": 1}, "dina": {"num_queries": 2, "layers": [1]}}[kind]
        make(kind, policy, **options).save_pretrained(tmp_path)
        with pytest.raises((ValueError, RuntimeError), match="not those of this|size mismatch"):
            make(kind, policy).load_trained_weights(tmp_path)

    def test_backbone_in_half_precision(self, policy, tmp_path):
        make("dina", policy).save_pretrained(tmp_path)
        loaded = load_reward_model(tmp_path, torch_dtype=torch.bfloat16)
        assert {p.dtype for p in loaded.transformer.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in loaded.head.parameters()} == {torch.float32}
        with torch.no_grad():
            assert loaded.score(*inputs(policy)).isfinite().all()
