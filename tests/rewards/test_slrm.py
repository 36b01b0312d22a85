# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
import math

import pytest
import torch
from peft import LoraConfig

from tapo_trl.policies import SD3Policy, load_policy
from tapo_trl.rewards.slrm import SLRMModel, enhanced_log_score, log_score, score_distance
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(pipeline_folder):
    return load_policy(str(pipeline_folder))


def inputs(policy, batch_size: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    embeds = policy.encode_prompts(["cat", "dog", "bird"][:batch_size], 16)
    latents = torch.randn(batch_size, 4, 8, 8, generator=generator)
    return latents, torch.linspace(0.2, 0.9, batch_size), embeds.prompt_embeds, embeds.pooled_prompt_embeds


def lora_config(policy, **kwargs) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": policy.lora_target_modules, "init_lora_weights": False} | kwargs
    )


def make(policy, lora: bool = False, **config) -> SLRMModel:
    torch.manual_seed(3)
    model = SLRMModel.from_policy(policy, num_task_tokens=3, **config)
    if lora:
        model.add_lora(lora_config(policy))
    return model


class TestScore:
    def test_eq_7_to_9_in_the_log_domain_equal_the_plain_ones(self):
        torch.manual_seed(0)
        rho, eta = math.log(4), 1.7
        logits = torch.randn(2, 5, dtype=torch.float64)
        velocity, target = torch.randn(2, 2, 5, 4, 3, 3, dtype=torch.float64)
        sigma = torch.full((5,), 0.4, dtype=torch.float64)
        distances = [score_distance(v, t) for v, t in zip(velocity, target, strict=True)]
        plain = [
            z.exp() * (-rho * ((v - t) ** 2).mean(dim=(1, 2, 3))).exp()
            for z, v, t in zip(logits, velocity, target, strict=True)
        ]
        log_scores = [enhanced_log_score(z, d, sigma, rho) for z, d in zip(logits, distances, strict=True)]
        torch.testing.assert_close(torch.stack(log_scores).exp(), torch.stack(plain))

        # Eq. 9: -log(S_w^eta / (S_w^eta + S_l^eta))
        eq_9 = -torch.log(plain[0] ** eta / (plain[0] ** eta + plain[1] ** eta))
        in_log_domain = -torch.nn.functional.logsigmoid(eta * (log_scores[0] - log_scores[1]))
        torch.testing.assert_close(in_log_domain, eq_9)

    def test_additive_enhancement_adds_the_plain_scores(self):
        """S + exp(-rho d) and its loss, in float64, far from where exponentials would overflow in the log domain, too."""
        torch.manual_seed(0)
        rho, eta = math.log(4), 1.7
        logits = (3 * torch.randn(2, 6, dtype=torch.float64)).requires_grad_()
        distance = torch.rand(2, 6, dtype=torch.float64).mul(4).requires_grad_()
        sigma = torch.full((6,), 0.4, dtype=torch.float64)
        plain = logits.exp() + (-rho * distance).exp()
        ours = torch.stack(
            [enhanced_log_score(z, d, sigma, rho, "exp", "additive") for z, d in zip(logits, distance, strict=True)]
        )
        torch.testing.assert_close(ours.exp(), plain, rtol=1e-12, atol=0)
        eq_9 = -torch.log(plain[0] ** eta / (plain[0] ** eta + plain[1] ** eta))
        in_log_domain = -torch.nn.functional.logsigmoid(eta * (ours[0] - ours[1]))
        torch.testing.assert_close(in_log_domain, eq_9, rtol=1e-10, atol=0)
        gradients = (
            torch.autograd.grad(x.sum(), (logits, distance), retain_graph=True) for x in (in_log_domain, eq_9)
        )
        for own, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)

        extreme = torch.tensor([-400.0, 400.0], dtype=torch.float32)
        values = enhanced_log_score(extreme, torch.full((2,), 3.0), torch.ones(2), 1.0, "exp", "additive")
        torch.testing.assert_close(values, torch.tensor([-3.0, 400.0]))

    def test_additive_enhancement_leaves_clean_latents_alone(self):
        logits = torch.tensor([0.5, 0.5], requires_grad=True)
        distance = torch.tensor([float("inf"), 1.0], requires_grad=True)
        values = enhanced_log_score(logits, distance, torch.tensor([0.0, 0.5]), 1.0, "exp", "additive")
        assert values[0] == 0.5 and values[1] > 0.5
        values.sum().backward()
        assert distance.grad[0] == 0 and distance.grad[1] < 0 and torch.isfinite(logits.grad).all()

    def test_unknown_enhancement(self):
        with pytest.raises(ValueError, match="`enhancement` must be 'multiplicative' or 'additive', got 'minus'"):
            enhanced_log_score(torch.zeros(1), torch.zeros(1), torch.ones(1), enhancement="minus")

    def test_softplus_link(self):
        logits = torch.tensor([-100.0, -20.0, -15.0, -3.0, 0.0, 4.0, 80.0], dtype=torch.float64, requires_grad=True)
        values = log_score(logits, "softplus")
        expected = torch.log(torch.log1p(logits.detach().exp()))
        torch.testing.assert_close(values[1:-1].detach(), expected[1:-1], atol=2e-7, rtol=0)
        assert values[0].item() == pytest.approx(-100, abs=1e-6) and values[-1].item() == pytest.approx(math.log(80))
        values.sum().backward()
        assert torch.isfinite(logits.grad).all() and (logits.grad > 0).all()

    def test_unknown_link(self):
        with pytest.raises(ValueError, match="`score_link` must be"):
            log_score(torch.zeros(1), "relu")

    @pytest.mark.parametrize("link", ["exp", "softplus"])
    def test_score_is_logit_minus_rho_times_distance(self, policy, link):
        model = make(policy, score_link=link, rho=0.7)
        args = inputs(policy)
        target = torch.randn_like(args[0])
        with torch.no_grad():
            output, score = model(*args), model.score(*args, velocity_target=target)
            plain = model.score(*args)
        distance = (output.velocity - target).square().mean(dim=(1, 2, 3))
        log_s = output.logits if link == "exp" else torch.log(torch.nn.functional.softplus(output.logits))
        assert (distance > 0.1).all()
        torch.testing.assert_close(score, log_s - 0.7 * distance)
        torch.testing.assert_close(plain, log_s)

    def test_additive_score_of_a_model(self, policy, tmp_path):
        make(policy, enhancement="additive", rho=0.7).save_pretrained(tmp_path)
        model = SLRMModel.from_pretrained(tmp_path)
        args = inputs(policy)
        target = torch.randn_like(args[0])
        with torch.no_grad():
            output, score = model(*args), model.score(*args, velocity_target=target)
        distance = (output.velocity - target).square().mean(dim=(1, 2, 3)).double()
        torch.testing.assert_close(score.double(), (output.logits.double().exp() + (-0.7 * distance).exp()).log())

    def test_without_noise_the_logit_decides_alone(self, policy):
        model = make(policy)
        latents, _, *embeds = inputs(policy)
        target = torch.full_like(latents, float("inf"))
        target[1] = 0
        with torch.no_grad():
            score = model.score(latents, torch.tensor([0.0, 0.5, 0.0099]), *embeds, velocity_target=target)
            logits = model(latents, torch.tensor([0.0, 0.5, 0.0099]), *embeds).logits
        assert score[0] == logits[0] and score[2] == logits[2]
        assert score[1] < logits[1]

    def test_one_sigma_for_all(self, policy):
        model = make(policy)
        latents, _, *embeds = inputs(policy)
        with torch.no_grad():
            scores = model.score(latents, 0.3, *embeds, velocity_target=latents)
            expected = model.score(latents, torch.full((3,), 0.3), *embeds, velocity_target=latents)
        assert torch.equal(scores, expected)

    def test_wrong_target(self, policy):
        latents, sigma, *embeds = inputs(policy)
        with pytest.raises(ValueError, match=r"`velocity_target` has shape \(1, 4, 8, 8\)"):
            make(policy).score(latents, sigma, *embeds, velocity_target=latents[:1])

    def test_masked_velocity_is_the_policys(self, policy):
        latents, sigma, *_ = inputs(policy)
        embeds = policy.encode_prompts(["cat", "dog", "bird"], 16)
        with torch.no_grad():
            expected = policy.velocity(policy.transformer, latents, sigma, embeds)
            output = make(policy)(*inputs(policy), mask_task_tokens=True)
        torch.testing.assert_close(output.velocity, expected, rtol=0, atol=2e-6)


class TestWithoutTaskTokens:
    """The similarity of Eq. 4 in place of score tokens: `num_task_tokens=0`."""

    @pytest.fixture
    def model(self, policy):
        torch.manual_seed(3)
        model = SLRMModel.from_policy(policy, num_task_tokens=0)
        with torch.no_grad():
            for parameter in model.transformer.score_head.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def test_score_is_the_similarity_of_features_and_pooled_text(self, policy, model):
        """Against the tokens that the pipeline's own transformer hands to its last norm."""
        args, tokens = inputs(policy), []
        latents, sigma, prompt_embeds, pooled = args
        hook = policy.transformer.norm_out.register_forward_hook(lambda module, read, output: tokens.append(read[0]))
        with torch.no_grad():
            velocity = policy.transformer(
                hidden_states=latents,
                timestep=1000 * sigma,
                encoder_hidden_states=prompt_embeds,
                pooled_projections=pooled,
            ).sample
            output = model(*args)
        hook.remove()
        head = model.transformer.score_head
        visual = tokens[0].double().mean(dim=1) @ head.visual_projection.weight.double().T
        text = pooled.double() @ head.text_projection.weight.double().T
        cosine = (visual * text).sum(dim=1) / (visual.norm(dim=1) * text.norm(dim=1))
        torch.testing.assert_close(
            output.logits.double(), head.logit_scale.double().exp() * cosine, rtol=1e-4, atol=1e-4
        )
        assert torch.equal(output.velocity, velocity)
        target = torch.randn_like(latents)
        enhanced = output.logits - model.config.rho * (velocity - target).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(model.score(*args, velocity_target=target), enhanced)

    @pytest.mark.parametrize("lora", [False, True])
    def test_saved_and_loaded(self, policy, model, lora, tmp_path):
        if lora:
            model.add_lora(lora_config(policy))
            assert set(model.trained_in_full()) == {
                f"score_head.{name}" for name, _ in model.transformer.score_head.named_parameters()
            }
        model.eval().save_pretrained(tmp_path)
        loaded = SLRMModel.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(loaded(*inputs(policy)).logits, model(*inputs(policy)).logits)

    def test_checkpointed_gradients(self, policy, model):
        def gradients():
            model.zero_grad()
            model.score(*inputs(policy), velocity_target=torch.zeros(3, 4, 8, 8)).sum().backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        model.train().requires_grad_(True)
        plain = gradients()
        model.activation_checkpointing_enable()
        again = gradients()
        assert plain.keys() == again.keys() and "transformer.score_head.logit_scale" in plain
        assert all(torch.equal(plain[name], again[name]) for name in plain)

    def test_projections_of_nothing(self, policy):
        with pytest.raises(ValueError, match="leave `task_projection_rank` unset, got 2"):
            SLRMModel.from_policy(policy, num_task_tokens=0, task_projection_rank=2)

    def test_other_families(self):
        with pytest.raises(ValueError, match="SD3 and SD3.5 alone, not for a `WanTransformer3DModel`"):
            SLRMModel.from_policy(load_policy(tiny_wan_pipeline()), num_task_tokens=0)


class TestFromPolicy:
    def test_copies(self, policy):
        before = {name: p.clone() for name, p in policy.transformer.named_parameters()}
        model = make(policy)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        for name, parameter in policy.transformer.named_parameters():
            assert torch.equal(parameter, before[name])

    def test_config(self, policy, pipeline_folder):
        config = make(policy, rho=0.5, velocity_target="reference").config
        assert config["base_model_name_or_path"] == str(pipeline_folder)
        assert config["transformer_class"] == "SD3Transformer2DModel"
        assert (config["rho"], config["velocity_target"], config["num_task_tokens"]) == (0.5, "reference", 3)
        assert config["vae_fingerprint"] == policy.vae_fingerprint()

    def test_unknown_backbone(self, policy):
        class OtherTransformer(type(policy.transformer)):
            pass

        other = SD3Policy(tiny_sd3_pipeline())
        other.pipeline.transformer.__class__ = OtherTransformer
        with pytest.raises(ValueError, match="no score stream for `OtherTransformer`"):
            SLRMModel.from_policy(other)


class TestCheckCompatible:
    def test_itself(self, policy):
        make(policy).check_compatible(policy, max_sequence_length=256)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"joint_attention_dim": 40}, "`joint_attention_dim`: 24 in the SLRM, 40 in the policy"),
            ({"pooled_projection_dim": 32}, "`pooled_projection_dim`: 20 in the SLRM, 32"),
        ],
    )
    def test_other_text_width(self, policy, config, message):
        with pytest.raises(ValueError, match=message):
            make(policy).check_compatible(SD3Policy(tiny_sd3_pipeline(**config)))

    def test_other_vae(self, policy):
        with pytest.raises(ValueError, match="VAE"):
            make(policy).check_compatible(SD3Policy(tiny_sd3_pipeline(seed=1)))

    def test_other_text_length(self, policy):
        with pytest.raises(ValueError, match="`max_sequence_length`: 256 in the SLRM, 77 in the policy"):
            make(policy).check_compatible(policy, max_sequence_length=77)


class TestLora:
    def test_what_is_trained(self, policy):
        model = make(policy, lora=True)
        trained = {name for name, p in model.transformer.named_parameters() if p.requires_grad}
        score = set(model.transformer.score_parameters())
        assert score < trained
        assert all("lora_" in name for name in trained - score)
        assert any("attn2.to_q.lora_A" in name for name in trained)

    def test_half_precision_base_with_float32_training_weights(self, pipeline_folder):
        half = load_policy(str(pipeline_folder), torch_dtype=torch.bfloat16)
        full = load_policy(str(pipeline_folder))
        model = make(half, lora=True)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
        expected = make(full, lora=True)
        expected.load_state_dict(model.state_dict())
        args = inputs(full)
        with torch.no_grad():
            torch.testing.assert_close(model(*args).logits, expected(*args).logits, atol=0.05, rtol=0.05)

    def test_twice(self, policy):
        with pytest.raises(ValueError, match="has a LoRA already"):
            make(policy, lora=True).add_lora(lora_config(policy))

    def test_reaching_into_the_score_stream(self, policy):
        with pytest.raises(ValueError, match="backbone only"):
            make(policy).add_lora(lora_config(policy, target_modules=["score_projections.query"]))


class TestSaveAndLoad:
    @pytest.mark.parametrize("lora", [False, True])
    def test_exact(self, policy, lora, tmp_path):
        model = make(policy, lora=lora, task_projection_rank=2 if lora else None, rho=0.3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        loaded = SLRMModel.from_pretrained(tmp_path)
        assert not loaded.training
        assert loaded.config["rho"] == 0.3
        args = inputs(policy)
        with torch.no_grad():
            expected, output = model(*args), loaded(*args)
            expected_score = model.score(*args, velocity_target=args[0])
            assert torch.equal(loaded.score(*args, velocity_target=args[0]), expected_score)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.velocity, expected.velocity)
        loaded.check_compatible(policy)

    def test_lora_saves_only_what_was_trained(self, policy, pipeline_folder, tmp_path):
        from safetensors.torch import load_file

        model = make(policy, lora=True)
        model.save_pretrained(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == {
            "adapter_config.json",
            "config.json",
            "slrm_lora.safetensors",
        }
        weights = load_file(tmp_path / "slrm_lora.safetensors")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(tensor.numel() for tensor in weights.values()) == trained
        assert json.loads((tmp_path / "config.json").read_text())["base_model_name_or_path"] == str(pipeline_folder)

    def test_only_safetensors(self, policy, tmp_path):
        make(policy).save_pretrained(tmp_path)
        assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
        with pytest.raises(ValueError, match="safetensors"):
            make(policy).save_pretrained(tmp_path, safe_serialization=False)

    def test_never_unpickles(self, policy, tmp_path):
        model = make(policy)
        model.save_pretrained(tmp_path)
        (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            SLRMModel.from_pretrained(tmp_path)

    def test_unknown_arguments(self, policy, tmp_path):
        SLRMModel.from_policy(policy).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="`revison` is no argument .* Did you mean `revision`?"):
            SLRMModel.from_pretrained(tmp_path, revison="main")

    def test_sharded_weights_load_in_place(self, policy, tmp_path):
        model, other = make(policy), make(policy)
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        with torch.no_grad():
            other.transformer.task_tokens.add_(1)
        other.load_trained_weights(tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name

    def test_weights_of_another_slrm(self, policy, tmp_path):
        SLRMModel.from_policy(policy, num_task_tokens=3, task_projection_rank=2).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="not those of this SLRM"):
            make(policy).load_trained_weights(tmp_path)

    @pytest.mark.parametrize("kind", ["folder", "pipeline", "policy"])
    def test_base_of_a_lora_trained_in_memory(self, kind, pipeline_folder, tmp_path):
        in_memory = SD3Policy(tiny_sd3_pipeline())
        model = make(in_memory, lora=True)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="pass `base_model`"):
            SLRMModel.from_pretrained(tmp_path)
        bases = {"folder": str(pipeline_folder), "pipeline": in_memory.pipeline, "policy": in_memory}
        loaded = SLRMModel.from_pretrained(tmp_path, base_model=bases[kind])
        args = inputs(in_memory)
        with torch.no_grad():
            assert torch.equal(loaded(*args).logits, model(*args).logits)

    def test_wrong_base(self, policy, tmp_path):
        make(policy, lora=True).save_pretrained(tmp_path)
        other = SD3Policy(tiny_sd3_pipeline(num_layers=4))
        with pytest.raises(ValueError, match=r"differs in \['num_layers'\]"):
            SLRMModel.from_pretrained(tmp_path, base_model=other)

    def test_push_to_hub_uploads_the_same_files(self, policy, monkeypatch):
        from types import SimpleNamespace

        from diffusers.utils import hub_utils

        uploaded = {}

        def upload_folder(repo_id, folder_path, **kwargs):
            from pathlib import Path

            uploaded[repo_id] = {file.name for file in Path(folder_path).iterdir()}

        card = SimpleNamespace(save=lambda path: None)
        monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
        monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *args, **kwargs: card)
        monkeypatch.setattr(hub_utils, "populate_model_card", lambda card: card)
        monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
        make(policy, lora=True).push_to_hub("me/slrm-lora")
        make(policy).push_to_hub("me/slrm")
        assert uploaded["me/slrm-lora"] == {"adapter_config.json", "config.json", "slrm_lora.safetensors"}
        assert uploaded["me/slrm"] == {"config.json", "diffusion_pytorch_model.safetensors"}


class TestActivationCheckpointing:
    def test_on_and_off(self, policy):
        model = make(policy)
        model.activation_checkpointing_enable()
        assert model.transformer.gradient_checkpointing
        model.activation_checkpointing_disable()
        assert not model.transformer.gradient_checkpointing

    @pytest.mark.parametrize("kwargs", [{"every_n_layers": 2}, {"offload": True}])
    def test_what_is_not_supported(self, policy, kwargs):
        with pytest.raises(ValueError, match="`every_n_layers` and `offload`"):
            make(policy).activation_checkpointing_enable(**kwargs)
