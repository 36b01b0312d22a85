# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
import torch
from peft import LoraConfig
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tapo_trl import SPMModel, load_reward_model
from tapo_trl.policies import PromptEmbeddings, SD3Policy, WanPolicy, load_policy
from tapo_trl.rewards import Candidates, EstimateReward
from tests.testing_utils import save_tiny_clip, tiny_sd3_pipeline, tiny_wan_pipeline


PROMPTS = ["cat", "dog", "cat"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_sd3_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policy(pipeline_folder):
    return load_policy(pipeline_folder)


def make(policy, clip_folder, lora: bool = False, stir: bool = False, **config) -> SPMModel:
    torch.manual_seed(3)
    model = SPMModel.from_policy(policy, clip_folder, **({"max_sequence_length": 6, "resolution": 32} | config))
    if lora:
        model.add_lora(LoraConfig(r=2, target_modules=SPMModel.lora_target_modules(policy), init_lora_weights=False))
    if stir:
        with torch.no_grad():
            for parameter in model.modulation.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return images, torch.tensor([0.2, 0.5, 0.9]), PROMPTS


class TestScore:
    @pytest.fixture(autouse=True)
    def no_gradients(self):
        with torch.no_grad():
            yield

    def test_is_that_of_plain_clip_at_the_start(self, policy, clip_folder):
        images, sigma, prompts = inputs()
        clip, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
        model = make(policy, clip_folder)
        ids = tokenizer(prompts, padding=True, return_tensors="pt")
        pixel_values = model.pixel_values(images)
        assert pixel_values.shape == (3, 3, 24, 24)
        expected = clip(**ids, pixel_values=pixel_values).logits_per_image.diagonal()
        scores = model.score(images, sigma, prompts)
        assert scores.dtype == torch.float32 and scores.std() > 0.01
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.score(images, 0.0, prompts), expected, rtol=1e-5, atol=1e-5)

    def test_noise_level_reaches_it_once_the_modulation_is_not_zero(self, policy, clip_folder):
        images, sigma, prompts = inputs()
        model = make(policy, clip_folder, stir=True)
        scores = model.score(images, sigma, prompts)
        assert (model.score(images, sigma.flip(0), prompts) - scores)[[0, 2]].abs().min() > 1e-3
        torch.testing.assert_close(model.score(images, sigma.flip(0), prompts)[1], scores[1])
        alone = model.score(images[1:2], 0.5, prompts[1:2])
        torch.testing.assert_close(alone, scores[1:2], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model.score(images, sigma, ["owl", "owl", "owl"]), scores)

    def test_inputs_are_the_decoded_one_step_estimate(self, policy, clip_folder):
        model, pipeline = make(policy, clip_folder, stir=True), policy.pipeline
        latents, sigma = torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 0.9])
        embeds = policy.encode_prompts(PROMPTS, 6)
        read = model.forward_inputs(policy, latents, sigma, PROMPTS, embeds)
        assert not read["pixel_values"].requires_grad
        images = []
        for row in range(3):
            velocity = pipeline.transformer(
                latents[row : row + 1],
                embeds.prompt_embeds[row : row + 1],
                embeds.pooled_prompt_embeds[row : row + 1],
                sigma[row : row + 1] * 1000,
            ).sample
            clean = latents[row : row + 1] - sigma[row] * velocity
            decoded = pipeline.vae.decode(clean / 1.5 + 0.06).sample  # scaling and shift of the fixture
            images.append((decoded / 2 + 0.5).clamp(0, 1))
        expected = model.score(torch.cat(images), sigma, PROMPTS)
        torch.testing.assert_close(model(**read).logits, expected, rtol=1e-4, atol=1e-4)

    def test_text_tower_runs_once_per_prompt(self, policy, clip_folder):
        model, seen = make(policy, clip_folder), []
        model.clip.text_model.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        model.score(*inputs())
        assert seen == [2]

    def test_long_prompts_are_cut(self, policy, clip_folder):
        model = make(policy, clip_folder)
        ids = model.tokenize(["a b c d e f g h i j k l", "a"])
        assert ids.shape == (2, 8) and (ids == model.tokenizer.eos_token_id).any(dim=1).all()

    def test_has_no_velocity(self, policy, clip_folder):
        model = make(policy, clip_folder)
        assert model.rollout_target(None) == "none"
        with pytest.raises(ValueError, match="`velocity_target='parent'` is for SLRMs.*: leave it unset"):
            model.rollout_target("parent")

    def test_half_precision_clip(self, pipeline_folder, clip_folder):
        half = load_policy(pipeline_folder, torch_dtype=torch.bfloat16)
        model, full = make(half, clip_folder, lora=True), make(load_policy(pipeline_folder), clip_folder, lora=True)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        frozen = {p.dtype for name, p in model.named_parameters() if not p.requires_grad and "logit_scale" not in name}
        assert frozen == {torch.bfloat16}
        scale = CLIPModel.from_pretrained(clip_folder).logit_scale
        assert torch.equal(model.clip.logit_scale, scale) and scale.bfloat16().float() != scale
        full.load_state_dict(model.state_dict())
        difference = (model.score(*inputs()) - full.score(*inputs())).abs().max()
        assert 0 < difference < 0.1


def make_candidates(policy, prompts):
    generator = torch.Generator().manual_seed(3)
    latents, clean, noise, velocity = torch.randn(4, len(prompts), 4, 8, 8, generator=generator)
    return Candidates(
        latents=latents,
        sigma=torch.tensor(0.4),
        clean_estimate=clean,
        initial_noise=noise,
        prompts=prompts,
        prompt_embeds=PromptEmbeddings(torch.zeros(len(prompts), 1, 24)),
        columns={},
        predict_velocity=lambda: velocity,
        predict_reference_velocity=lambda: pytest.fail("nobody asked for the reference"),
    )


class TestEstimateReward:
    def test_is_the_score_of_the_candidates_own_estimates(self, policy, clip_folder):
        model, candidates = make(policy, clip_folder, stir=True), make_candidates(policy, ["cat", "dog", "cat", "owl"])
        images = policy.decode(candidates.latents - 0.4 * candidates.velocity)
        with torch.no_grad():
            expected = model.score(images, 0.4, candidates.prompts)
        for batch_size in (None, 3):
            reward = EstimateReward(model, policy, batch_size)
            assert reward.__name__ == "spm"
            scores = reward(candidates)
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
            assert not scores.requires_grad

    def test_each_prompt_is_encoded_once_ever(self, policy, clip_folder):
        model, encoded = make(policy, clip_folder), []
        tokenize = model.tokenize
        model.tokenize = lambda prompts: encoded.append(prompts) or tokenize(prompts)
        reward = EstimateReward(model, policy)
        first = reward(make_candidates(policy, ["cat", "dog", "cat"]))
        reward(make_candidates(policy, ["owl", "cat", "owl"]))
        assert torch.equal(reward(make_candidates(policy, ["cat", "dog", "cat"])), first)
        assert encoded == [["cat", "dog"], ["owl"]]


class TestCheckCompatible:
    def test_itself_at_any_text_length(self, policy, clip_folder):
        make(policy, clip_folder).check_compatible(policy, max_sequence_length=77)

    def test_another_vae(self, policy, clip_folder):
        with pytest.raises(
            ValueError, match="VAE .* in the SPM, .* in the policy. Train a reward model on this policy"
        ):
            make(policy, clip_folder).check_compatible(SD3Policy(tiny_sd3_pipeline(seed=1)))

    def test_another_family(self, policy, clip_folder):
        with pytest.raises(ValueError, match="transformer class: SD3Transformer2DModel .*, WanTransformer3DModel"):
            make(policy, clip_folder).check_compatible(WanPolicy(tiny_wan_pipeline()))


class TestMaking:
    def test_records_what_it_belongs_to(self, policy, clip_folder, pipeline_folder):
        config = make(policy, clip_folder).config
        assert config.base_model_name_or_path == pipeline_folder and config.clip_model_name_or_path == clip_folder
        assert config.vae_fingerprint == policy.vae_fingerprint()
        assert config.transformer_class == "SD3Transformer2DModel"
        assert (list(config.image_mean), list(config.image_std)) == ([0.4, 0.5, 0.6], [0.3, 0.2, 0.25])
        json.dumps(dict(config))

    def test_videos_are_refused(self, clip_folder):
        with pytest.raises(ValueError, match="An SPM rates images, but a `WanPolicy` makes videos.*`slrm` or `dina`"):
            SPMModel.from_policy(WanPolicy(tiny_wan_pipeline()), clip_folder)

    def test_no_clip(self, policy, tmp_path):
        CLIPTextModel(
            CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        ).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds a model of type 'clip_text_model', but an SPM is made of a CLIP"):
            SPMModel.from_policy(policy, str(tmp_path))

    def test_pickled_weights_are_refused(self, policy, clip_folder, tmp_path):
        for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_text((open(f"{clip_folder}/{name}")).read())
        torch.save(CLIPModel.from_pretrained(clip_folder).state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            SPMModel.from_policy(policy, str(tmp_path))

    def test_what_is_trainable(self, policy, clip_folder):
        model = make(policy, clip_folder)
        model.train_whole()
        assert all(parameter.requires_grad for parameter in model.parameters())
        model.freeze_backbone()
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"modulation"}
        model = make(policy, clip_folder, lora=True)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name or name.startswith("modulation.") for name in trained)
        for tower in ("vision_model", "text_model"):
            assert any(tower in name for name in trained)
        with pytest.raises(ValueError, match="has a LoRA already"):
            model.add_lora(LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("lora", [False, True])
class TestSaveAndLoad:
    def test_exact_and_recognised(self, lora, policy, clip_folder, tmp_path):
        model = make(policy, clip_folder, lora=lora, stir=True)
        model.save_pretrained(tmp_path)
        loaded = load_reward_model(tmp_path)
        assert type(loaded) is SPMModel and not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded.score(*inputs()), model.score(*inputs()))
        loaded.check_compatible(policy)
        other = make(policy, clip_folder, lora=lora)
        other.load_trained_weights(tmp_path)
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())

    def test_files(self, lora, policy, clip_folder, tmp_path):
        make(policy, clip_folder, lora=lora).save_pretrained(tmp_path)
        weights = {"adapter_config.json", "spm_lora.safetensors"} if lora else {"diffusion_pytorch_model.safetensors"}
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "tokenizer"} | weights
        assert {path.suffix for path in (tmp_path / "tokenizer").iterdir()} <= {".json", ".txt"}
        with pytest.raises(ValueError, match="only saved as safetensors"):
            make(policy, clip_folder).save_pretrained(tmp_path, safe_serialization=False)


class TestBaseOfALora:
    def test_of_another_shape(self, policy, clip_folder, tmp_path):
        make(policy, clip_folder, lora=True).save_pretrained(tmp_path / "spm")
        other = save_tiny_clip(tmp_path / "clip", num_hidden_layers=3)
        with pytest.raises(ValueError, match=r"not the CLIP that this SPM was trained from.* \['vision_config'\]"):
            load_reward_model(tmp_path / "spm", base_model=other)

    def test_given_or_nameless(self, policy, clip_folder, tmp_path):
        model = make(policy, clip_folder, lora=True, stir=True)
        model.register_to_config(clip_model_name_or_path="")
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="pass `base_model`"):
            load_reward_model(tmp_path)
        clip = CLIPModel.from_pretrained(clip_folder)
        loaded = load_reward_model(tmp_path, base_model=clip)
        with torch.no_grad():
            assert torch.equal(loaded.score(*inputs()), model.score(*inputs()))
        assert not any("lora_" in name for name, _ in clip.named_parameters())
