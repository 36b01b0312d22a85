# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What every family in the table can do, on its tiny random pipeline."""

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model

import tapo_trl
from tapo_trl.cli.main import main
from tapo_trl.data import PromptCache
from tapo_trl.policies import FAMILIES, load_policy
from tests.data.preference_pairs import latent_pairs


PROMPTS, NEGATIVE, LENGTH = ["red cat", "a blue dog that runs"], "gray", 24
FRAMES = 5
RECIPES = [
    path
    for folder in (
        "flux1",
        "flux2_klein",
        "flux2_dev",
        "qwen_image",
        "qwen_image21",
        "z_image",
        "wan22_ti2v",
        "wan22_a14b",
        "hunyuan_video",
        "hunyuan_video15",
    )
    for path in Path(__file__).parents[2].joinpath("recipes", folder).glob("*.yaml")
]
GUIDED = 3.0
GUIDANCE = dict.fromkeys(
    ("QwenImagePipeline", "QwenImage21Pipeline"), "true_cfg_scale"
)  # what pipelines call `guidance_scale`
UNCUT = ("QwenImage21Pipeline",)  # prompts are as long as they are
# Tested by `make test-all`
HEAVY = (
    "Flux2KleinPolicy",
    "Flux2Policy",
    "QwenImage21Policy",
    "WanExpertsPolicy",
    "TI2VPolicy",
    "HunyuanVideoPolicy",
    "HunyuanVideo15Policy",
)
LIKE_ANOTHER = ("Flux2Policy", "QwenImage21Policy", "TI2VPolicy", "HunyuanVideo15Policy")  # CI leaves these out
VELOCITY_ATOL, MASKED_ATOL, SAMPLES_ATOL = 2e-6, 1e-6, 1e-5
ROUNDS_TIMES = {"ZImagePipeline": 2e-5}  # computes 1 - sigma from a timestep of 1000 sigma


def redness(samples, prompts):
    return (samples[:, 0] - samples[:, 1]).flatten(1).mean(1)


def generators(count=2):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def size_of(policy, height=32, width=64):
    size = {"height": height, "width": width}
    return size | ({"num_frames": FRAMES} if policy.modality == "video" else {})


def lora_model(policy):
    """A LoRA with alpha != r that is no longer zero."""
    torch.manual_seed(1)
    model = get_peft_model(
        policy.transformer, LoraConfig(r=2, lora_alpha=6, target_modules=policy.lora_target_modules)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def reward_base(policy):
    """What a latent reward model is made of: of two experts, one."""
    return policy if len(policy.experts) == 1 else policy.only("low")


WAN = next(family for family in FAMILIES if family.pipeline == "WanPipeline")
VARIANTS = [
    replace(WAN, policy="tapo_trl.policies.wan_experts:WanExpertsPolicy"),
    replace(WAN, policy="tests.policies.ti2v:TI2VPolicy"),
]


def marked(family):
    name = family.policy.split(":")[1]
    marks = [pytest.mark.slow] if name in HEAVY else []
    if name in LIKE_ANOTHER:
        marks.append(pytest.mark.exhaustive)
    return pytest.param(family, marks=marks, id=name)


@pytest.fixture(scope="module", params=map(marked, [*FAMILIES, *VARIANTS]))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def world(family):
    """A policy of the family, and inputs of its network."""
    policy = load_policy(family.policy_class.tiny())
    policy.pipeline.set_progress_bar_config(disable=True)
    shape = policy.latent_shape(**size_of(policy))
    torch.manual_seed(0)
    return SimpleNamespace(
        policy=policy,
        shape=shape,
        length=(length := 2 * LENGTH if family.pipeline in UNCUT else LENGTH),
        prompts=policy.encode_prompts(PROMPTS, length),
        negative=policy.encode_prompts([NEGATIVE], length),
        latents=torch.randn(2, *shape),
        sigma=torch.tensor([0.3, 0.9]),
    )


def velocity(policy, model, world, rows=slice(None), guidance_scale=GUIDED):
    inputs = world.latents[rows], world.sigma[rows], world.prompts[rows], world.negative, guidance_scale
    with torch.no_grad():
        return policy.velocity(model, *inputs)


@pytest.fixture(scope="module", params=["unguided", "guided"])
def samples(world, request):
    """Latents of our loop, latents of the pipeline, and its pictures."""
    policy = world.policy
    scale = GUIDED if request.param == "guided" else policy.guidance_off
    options = {"num_inference_steps": 4, "guidance_scale": scale}
    ours = policy.sample(
        policy.transformer,
        world.prompts,
        world.negative,
        latent_shape=world.shape,
        generators=generators(),
        **options,
    )
    pipeline = copy.copy(policy.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):  # a multistep solver
        pipeline.scheduler = policy.build_scheduler(4, world.shape)
    scale = options.pop("guidance_scale")
    if "guider" in pipeline.components:
        pipeline.guider, pipeline.tokenizer_max_length = type(pipeline.guider)(guidance_scale=scale), LENGTH
    else:
        options[GUIDANCE.get(type(pipeline).__name__, "guidance_scale")] = scale
        if type(pipeline).__name__ not in UNCUT:
            options["max_sequence_length"] = world.length
    options |= size_of(policy)
    results = []
    is_klein = type(pipeline).__name__ == "Flux2KleinPipeline"
    if is_klein:  # whose negative prompt is empty unless it comes encoded
        options["negative_prompt_embeds"] = world.negative.expand(2).prompt_embeds
    for kind in ("latent", "pt"):
        if policy.guidance == "classifier_free" and not is_klein:
            options["negative_prompt"] = [NEGATIVE] * 2  # a new list, since Z-Image's pipeline changes it
        if type(pipeline).__name__ == "QwenImage21Pipeline":  # where one prompt changes the samples of others
            options.pop("negative_prompt", None)
            calls = [
                pipeline(prompt=prompt, negative_prompt=NEGATIVE, generator=generator, output_type=kind, **options)[0]
                for prompt, generator in zip(PROMPTS, generators(), strict=True)
            ]
            results.append(torch.cat(calls))
            continue
        results.append(pipeline(prompt=[*PROMPTS], generator=generators(), output_type=kind, **options)[0])
    latents, pictures = results
    if pictures.shape[1] == 4:  # with an opacity
        pictures = pictures[:, :3] * pictures[:, 3:] + 1 - pictures[:, 3:]
    if is_klein:  # which calls those "latent" that its VAE decodes
        latents = policy.to_latents(latents)
    elif latents.ndim < ours.ndim:
        latents = policy.velocity_of(policy.transformer.config, latents, ours)
    return ours, latents, pictures.transpose(1, 2) if policy.modality == "video" else pictures


class TestPipeline:
    def test_loop_equals_the_pipeline(self, family, samples):
        ours, latents, _ = samples
        assert ours.std() > 0.1
        torch.testing.assert_close(ours, latents, rtol=0, atol=ROUNDS_TIMES.get(family.pipeline, SAMPLES_ATOL))

    def test_decode_equals_the_pipeline(self, family, world, samples):
        ours, _, pictures = samples
        torch.testing.assert_close(
            world.policy.decode(ours), pictures, rtol=0, atol=ROUNDS_TIMES.get(family.pipeline, SAMPLES_ATOL)
        )

    def test_guidance_has_an_effect(self, world):
        """Also one of 0.5, where the pipeline has guidance at all scales above 0."""
        scale = (world.policy.guidance_off + 1) / 2 if world.policy.guidance_off < 1 else 2.0
        off, on = (
            velocity(world.policy, world.policy.transformer, world, guidance_scale=s)
            for s in (world.policy.guidance_off, scale)
        )
        assert not torch.allclose(off, on, atol=1e-3)


class TestVelocity:
    def test_batch_mates_do_not_matter(self, family, world):
        """The first prompt is shorter, and is padded beside the second."""
        policy, model = world.policy, world.policy.transformer
        both = velocity(policy, model, world)
        alone = torch.cat([velocity(policy, model, world, [row]) for row in range(2)])
        torch.testing.assert_close(both, alone, rtol=0, atol=ROUNDS_TIMES.get(family.pipeline, VELOCITY_ATOL))

    def test_embeddings_survive_the_cache(self, world, tmp_path):
        cache = PromptCache(world.policy, tmp_path, world.length)
        cache.encode(PROMPTS)
        loaded = cache.load(PROMPTS)
        assert loaded.tensors.keys() == world.prompts.tensors.keys()
        for name, tensor in world.prompts.tensors.items():
            assert torch.equal(loaded.tensors[name], tensor)

    def test_encode_inverts_from_latents(self, world):
        policy = world.policy
        encoded = policy.from_latents(world.latents)
        torch.testing.assert_close(policy.to_latents(encoded), world.latents, rtol=0, atol=1e-6)
        assert policy.encode(policy.decode(world.latents)).shape == world.latents.shape

    def test_weights_in_half_precision(self, world, family):
        """Without autocast, as `tapo-trl sample` runs them."""
        policy = load_policy(family.policy_class.tiny())
        base = reward_base(policy)
        slrm = tapo_trl.SLRMModel.from_policy(base, num_task_tokens=2)
        policy.transformer.to(torch.bfloat16)
        found, expected = (velocity(p, p.transformer, world) for p in (policy, world.policy))
        assert (found - expected).abs().mean() < 0.3 * expected.abs().mean()  # noise levels are rounded, too
        scores = slrm.to(torch.bfloat16).score(world.latents, world.sigma, **world.prompts.tensors)
        assert scores.isfinite().all()

    def test_save_and_load(self, world, family, tmp_path):
        world.policy.pipeline.save_pretrained(tmp_path)
        loaded = load_policy(str(tmp_path))
        assert issubclass(family.policy_class, type(loaded))
        assert torch.equal(
            velocity(loaded, loaded.transformer, world), velocity(world.policy, world.policy.transformer, world)
        )
        again = loaded.encode_prompts(PROMPTS, world.length)
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in world.prompts.tensors.items())


def test_lora_round_trip(family, world, tmp_path):
    policy = load_policy(family.policy_class.tiny())
    model = lora_model(policy)
    policy.save_lora_weights(tmp_path, model)
    trained = velocity(policy, model, world)
    ours, others = (load_policy(family.policy_class.tiny()) for _ in range(2))
    ours.load_lora_weights(str(tmp_path))
    for call in policy.lora_calls:  # of the card
        exec(call.replace("{model}", str(tmp_path)), {"pipeline": others.pipeline})
    for other in (ours, others):
        assert torch.equal(velocity(other, other.transformer, world), trained)
    assert not torch.allclose(trained, velocity(world.policy, world.policy.transformer, world), atol=1e-3)


class TestScoreTokens:
    @pytest.mark.parametrize("rank", [None, 2])
    def test_masked_they_leave_the_velocity_of_the_base(self, world, rank):
        policy = reward_base(world.policy)
        slrm = tapo_trl.SLRMModel.from_policy(policy, num_task_tokens=3, task_projection_rank=rank)
        expected = velocity(policy, policy.transformer, world, guidance_scale=None)
        with torch.no_grad():
            masked = slrm(world.latents, world.sigma, **world.prompts.tensors, mask_task_tokens=True)
            seen = slrm(world.latents, world.sigma, **world.prompts.tensors)
            alone = slrm(world.latents[:1], world.sigma[:1], **world.prompts[[0]].tensors)
        torch.testing.assert_close(masked.velocity, expected, rtol=0, atol=MASKED_ATOL)
        torch.testing.assert_close(alone.logits, seen.logits[:1], rtol=0, atol=1e-5)
        assert not torch.allclose(seen.velocity, expected, atol=1e-4)

    @pytest.mark.parametrize("rank", [None, 2])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_every_new_parameter_gets_a_gradient(self, world, rank, checkpointing):
        slrm = tapo_trl.SLRMModel.from_policy(reward_base(world.policy), num_task_tokens=3, task_projection_rank=rank)
        if checkpointing:
            slrm.transformer.enable_gradient_checkpointing()
        new = slrm.transformer.score_parameters()
        with torch.no_grad():  # low-rank updates start at zero, where one factor of the two has no gradient
            [parameter.normal_(std=0.1) for name, parameter in new.items() if ".up." in name]
        slrm.train()(world.latents, world.sigma, **world.prompts.tensors).logits.sum().backward()
        assert not [name for name, parameter in new.items() if parameter.grad is None or not parameter.grad.any()]

    def test_save_and_load(self, world, tmp_path):
        slrm = tapo_trl.SLRMModel.from_policy(reward_base(world.policy), num_task_tokens=3)
        slrm.save_pretrained(tmp_path)
        loaded = tapo_trl.SLRMModel.from_pretrained(tmp_path)
        scores = [m.score(world.latents, world.sigma, **world.prompts.tensors) for m in (slrm, loaded)]
        assert torch.equal(*scores)
        loaded.check_compatible(world.policy)


def train(method, family, world, tmp_path, data, rewards=(), bf16=False, model=None, **options):
    """One update of a trainer with LoRA, of a new tiny pipeline or of `model`. Returns it and the loss."""
    arguments = {
        **size_of(world.policy, 32, 32),
        "max_steps": 1,
        "max_sequence_length": LENGTH,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "cache_dir": str(tmp_path / "cache"),
        "use_cpu": True,
        "bf16": bf16,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    if method != "SLRM":
        arguments |= {"num_inference_steps": 4, "guidance_scale": GUIDED, "negative_prompt": NEGATIVE}
    pipeline = model or family.policy_class.tiny()
    torch.manual_seed(0)
    trainer = getattr(tapo_trl, f"{method}Trainer")(
        pipeline.to(torch.bfloat16) if bf16 else pipeline,
        *rewards,
        args=getattr(tapo_trl, f"{method}Config")(str(tmp_path), **arguments | options),
        train_dataset=data,
        peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=world.policy.lora_target_modules),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    loss = trainer.train().training_loss
    after = dict(trainer.model.named_parameters())
    assert not torch.equal(*[torch.cat([v[n].flatten() for n in before if "lora_B" in n]) for v in (before, after)])
    return trainer, loss


@pytest.mark.parametrize("bf16", [False, True])
def test_tapo_starts_at_ln_2(family, world, tmp_path, bf16):
    reward = tapo_trl.SLRMModel.from_policy(reward_base(world.policy), num_task_tokens=2, max_sequence_length=LENGTH)
    options = {"num_sde_steps": 2, "num_candidates": 2, "bf16": bf16}
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer, loss = train("TAPO", family, world, tmp_path, data, [[reward, redness]], **options)
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"{family.pipeline}.from_pretrained" in card
    assert all(call.split("(")[0] in card for call in world.policy.lora_calls)
    assert ('negative_prompt=" "' in card) == (family.pipeline == "QwenImagePipeline")


@pytest.mark.slow
def test_share_backbone(family, world, tmp_path):
    """As the recipes do: TAPO with a reward model that was trained with LoRA on the same base."""
    base, reward = str(tmp_path / "base"), tmp_path / "slrm"
    family.policy_class.tiny().save_pretrained(base)
    pairs = latent_pairs(2, world.policy.latent_shape(**size_of(world.policy, 32, 32)))
    options = {"num_task_tokens": 2, "task_projection_rank": 2}
    if len(world.policy.experts) > 1:
        options["expert"] = "low"
    trainer, _ = train("SLRM", family, world, reward, pairs, model=base, **options)
    trainer.save_model()
    options = {"num_sde_steps": 2, "num_candidates": 2, "share_backbone": True}
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer, loss = train("TAPO", family, world, tmp_path / "tapo", data, [[str(reward)]], model=base, **options)
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    (scored,) = trainer.reward.rewards
    weights = {parameter.data_ptr() for parameter in trainer.policy.transformer.parameters()}
    own = [n for n, p in scored.model.transformer.named_parameters() if p.data_ptr() not in weights]
    assert all(any(part in name for part in ("lora_", "score_", "task_tokens")) for name in own) and own


@pytest.mark.parametrize(
    "method",
    ["OnlineDiffusionDPO", "FlowGRPO", "ReFL", "DiffusionNFT", "DiffusionSFT", "DiffusionDPO", "SLRM", "DiNa"],
)
def test_one_update(family, world, tmp_path, method):
    shape = world.policy.latent_shape(**size_of(world.policy, 32, 32))
    online = method in ("OnlineDiffusionDPO", "FlowGRPO", "ReFL", "DiffusionNFT")
    data = Dataset.from_dict({"prompt": PROMPTS}) if online else latent_pairs(2, shape)
    if method == "DiffusionSFT":
        data = data.rename_column("chosen", world.policy.modality)
    options = {
        "FlowGRPO": {"num_generations": 2},
        "SLRM": {"num_task_tokens": 2},
        "DiNa": {"reward_model_type": "dina"},
    }
    options, trainer_of = options.get(method, {}), "SLRM" if method == "DiNa" else method
    if trainer_of == "SLRM" and len(world.policy.experts) > 1:
        options["expert"] = "high"
    _, loss = train(trainer_of, family, world, tmp_path, data, [redness] if online else [], **options)
    expected = {"OnlineDiffusionDPO": math.log(2), "DiffusionDPO": math.log(2), "FlowGRPO": 0.0}
    rounding = 1e-4 if method == "FlowGRPO" else 1e-5  # its ratios are of other batches than the rollout's
    assert loss == pytest.approx(expected.get(method, loss), abs=rounding) and math.isfinite(loss)


def test_qwen_images_template_is_cut_off():
    """The prompt's bytes are left, and those that end the template: two special tokens, two line breaks and "assistant"."""
    policy = load_policy(FAMILIES[[f.pipeline for f in FAMILIES].index("QwenImagePipeline")].policy_class.tiny())
    lengths = [len(row["prompt_embeds"]) for row in policy.encode_prompts(["red cat", "é"]).rows()]
    assert lengths == [7 + 13, 2 + 13]
    with pytest.raises(ValueError, match="at most 1024"):
        policy.encode_prompts(["red cat"], 2000)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", sorted(RECIPES), ids=lambda path: "-".join(path.parts[-2:]))
def test_recipes_fit_their_gpu(capsys, recipe):
    """By the estimate, with a tenth of the GPU that the recipe names for what is not estimated."""
    gigabytes = re.search(r"For one GPU of (\d+) GB", recipe.read_text())[1]
    assert main([recipe.stem, "--config", str(recipe), "--dry_run", "true"]) == 0
    (total,) = re.findall(r"([0-9.]+) sum ", capsys.readouterr().out)
    assert float(total) < 0.9 * int(gigabytes) * 1e9 / 2**30
