# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""`share_backbone`: one set of frozen base weights for policy, reference and reward models."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tapo_trl import TAPOConfig, TAPOTrainer, load_reward_model
from tapo_trl.networks.sharing import all_tensors, base_tensors
from tapo_trl.policies import load_policy
from tapo_trl.rewards import REWARD_MODELS
from tapo_trl.trainer.reward_setup import check_sharing
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline
from tests.trainer.policy_checks import trainable


PIPELINES = {"sd3": tiny_sd3_pipeline, "wan": tiny_wan_pipeline}
CASES = [("slrm", "sd3"), ("lrm", "sd3"), ("dina", "sd3"), ("slrm", "wan"), ("dina", "wan")]


def redness(images, prompts):
    return images[:, 0].flatten(1).mean(1)


def make_lora(**kwargs):
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "init_lora_weights": "gaussian"} | kwargs)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with the pipelines and, of every kind, a reward model that was trained with LoRA and one in full."""
    folder = tmp_path_factory.mktemp("share")
    for family, make in PIPELINES.items():
        make().save_pretrained(folder / family)
        make(seed=1).save_pretrained(folder / f"{family}_other")
    for kind, family in CASES:
        policy = load_policy(str(folder / family))
        for way in ("lora", "full"):
            torch.manual_seed(3)
            model = REWARD_MODELS[kind].from_policy(policy, max_sequence_length=3)
            if way == "lora":
                targets = policy.lora_target_modules
                model.add_lora(LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False))
            model.save_pretrained(folder / f"{family}_{kind}_{way}")
    return folder


def make_trainer(tmp_path, model, reward, share=True, peft_config=None, **kwargs):
    is_wan = "wan" in str(model) or type(model).__name__ == "WanPipeline"
    defaults = {
        "cache_dir": str(tmp_path / "cache"),
        "resolution": 32,
        "num_frames": 5 if is_wan else None,
        "max_sequence_length": 3,
        "num_inference_steps": 5,
        "num_sde_steps": 2,
        "num_candidates": 2,
        "guidance_scale": 2.0,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "share_backbone": share,
    }
    return TAPOTrainer(
        model,
        reward,
        TAPOConfig(str(tmp_path / "out"), **defaults | kwargs),
        train_dataset=Dataset.from_dict({"prompt": ["cat", "dog", "fox", "owl"]}),
        peft_config=make_lora() if peft_config is None else peft_config,
    )


def storages(*modules: torch.nn.Module) -> dict[int, int]:
    """Bytes of each storage that the modules have, by its address."""
    tensors = [tensor for module in modules for _, tensor in all_tensors(module)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def check_shared(trainer) -> None:
    """Every base tensor of the rewards is the policy's, and memory holds one backbone and what is beside it."""
    base = base_tensors(trainer.policy.transformer)
    rewards = [reward.model for reward in trainer.reward.rewards if hasattr(reward, "model")]
    added = 0
    for model in rewards:
        own = base_tensors(model.transformer)
        shared = own.keys() & base.keys()
        assert len(shared) > 30
        assert all(own[name].data_ptr() == base[name].data_ptr() for name in shared)
        in_full = {id(tensor) for tensor in model.trained_in_full().values()}
        for name, tensor in all_tensors(model):
            is_own = id(tensor) in in_full or "lora_" in name
            added += tensor.numel() * tensor.element_size() if is_own else 0
    together = sum(storages(trainer.policy.transformer, *rewards).values())
    assert together == sum(storages(trainer.policy.transformer).values()) + added


def result(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(set(rewards)) == 3
    return {**trainable(trainer), "rewards": torch.tensor(rewards)}


class TestTraining:
    @pytest.mark.slow
    @pytest.mark.parametrize(("kind", "family"), CASES)
    def test_is_that_of_two_models(self, folders, tmp_path, kind, family):
        folder = str(folders / f"{family}_{kind}_lora")
        # In memory, where the weights of all models start at the same alignment
        make = lambda: load_reward_model(folder, base_model=load_policy(PIPELINES[family]()))  # noqa: E731
        apart = make_trainer(tmp_path, PIPELINES[family](), make(), share=False)
        together = make_trainer(tmp_path, PIPELINES[family](), make())
        check_shared(together)
        before = {name: tensor.clone() for name, tensor in base_tensors(together.policy.transformer).items()}
        expected, found = result(apart), result(together)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        check_shared(together)
        after = base_tensors(together.policy.transformer)
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        assert not any(tensor.requires_grad for tensor in after.values())

    @pytest.mark.slow
    def test_half_precision(self, folders, tmp_path):
        options = {"bf16": True, "reward_model_init_kwargs": {"torch_dtype": "bfloat16"}}
        reward = str(folders / "wan_slrm_lora")
        expected = result(make_trainer(tmp_path, str(folders / "wan"), reward, share=False, **options))
        trainer = make_trainer(tmp_path, str(folders / "wan"), reward, **options)
        assert trainer.policy.transformer.dtype == torch.bfloat16
        found = result(trainer)
        check_shared(trainer)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    @pytest.mark.slow
    def test_by_name_nothing_is_copied(self, folders, tmp_path):
        """Of two rewards, on a policy that is loaded by another name than the one that they were trained from."""
        (tmp_path / "link").symlink_to(folders / "sd3")
        rewards = [str(folders / "sd3_slrm_lora"), str(folders / "sd3_dina_lora"), redness]
        trainer = make_trainer(tmp_path, str(tmp_path / "link"), rewards)
        check_shared(trainer)
        trainer.train()
        check_shared(trainer)

    def test_moving_one_moves_both(self, folders, tmp_path):
        trainer = make_trainer(tmp_path, str(folders / "sd3"), str(folders / "sd3_slrm_lora"))
        model, base = trainer.reward.rewards[0].model, base_tensors(trainer.policy.transformer)
        model.to(torch.float64)
        assert base["transformer_blocks.0.attn.to_q.weight"].dtype == torch.float64

    @pytest.mark.slow
    def test_resume(self, folders, tmp_path):
        def make(name, max_steps):
            options = {"max_steps": max_steps, "save_strategy": "steps", "save_steps": 2}
            return make_trainer(tmp_path / name, str(folders / "sd3"), str(folders / "sd3_slrm_lora"), **options)

        unbroken = make("a", 4)
        unbroken.train()
        resumed = make("b", 4)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
        check_shared(resumed)
        for name, value in trainable(unbroken).items():
            assert torch.equal(trainable(resumed)[name], value), name


class TestRefused:
    @pytest.mark.parametrize(
        ("rewards", "options", "peft_config", "message"),
        [
            (["slrm"], {}, None, "full fine-tuning changes the weights"),
            ([redness], {}, make_lora(), "every `reward_model` is a function"),
            (["slrm"], {"reward_layerwise_casting": True}, make_lora(), "another precision"),
            (["slrm"], {"reward_group_offload": True}, make_lora(), "elsewhere"),
            (["slrm"], {"fsdp": "full_shard"}, make_lora(), "split the policy's weights"),
            (
                ["slrm"],
                {},
                make_lora(init_lora_weights="pissa"),
                "`init_lora_weights='pissa'` of `peft_config` changes",
            ),
            (["slrm"], {}, make_lora(bias="all"), "`bias='all'` of `peft_config` changes"),
        ],
    )
    def test_before_anything_is_loaded(self, tmp_path, rewards, options, peft_config, message):
        args = TAPOConfig(str(tmp_path), use_cpu=True, bf16=False, share_backbone=True, **options)
        with pytest.raises(ValueError, match=message):
            check_sharing(rewards, args, peft_config)
        args.share_backbone = False
        check_sharing(rewards, args, peft_config)

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_reward_trained_in_full(self, folders, tmp_path, in_memory):
        rewards = [str(folders / f"sd3_slrm_{way}") for way in ("lora", "full")]
        if in_memory:
            rewards = [load_reward_model(reward) for reward in rewards]
        with pytest.raises(ValueError, match="the SLRM was trained in full"):
            make_trainer(tmp_path, str(folders / "sd3"), rewards)

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_another_base(self, folders, tmp_path, in_memory):
        reward = str(folders / "sd3_slrm_lora")
        policy = load_policy(str(folders / "sd3"))
        name = "transformer_blocks.2.attn.to_q.weight"
        policy.transformer.get_parameter(name).data[3, 3] += 1e-3
        with pytest.raises(ValueError, match=f"its base is another: `{name}` is the first .* its values differ"):
            make_trainer(tmp_path, policy, load_reward_model(reward) if in_memory else reward)

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_another_precision(self, folders, tmp_path, in_memory):
        reward, options = str(folders / "sd3_slrm_lora"), {"reward_model_init_kwargs": {"torch_dtype": "bfloat16"}}
        if in_memory:
            reward, options = load_reward_model(reward, torch_dtype=torch.bfloat16), {}
        with pytest.raises(ValueError, match="the policy's weights are torch.float32, but the SLRM's torch.bfloat16"):
            make_trainer(tmp_path, str(folders / "sd3"), reward, **options)

    def test_a_base_without_a_name(self, tmp_path):
        policy = load_policy(tiny_sd3_pipeline())
        model = REWARD_MODELS["slrm"].from_policy(policy, max_sequence_length=3)
        model.add_lora(make_lora(target_modules=policy.lora_target_modules))
        model.save_pretrained(tmp_path / "slrm")
        with pytest.raises(ValueError, match="nothing tells whether that was this policy"):
            make_trainer(tmp_path, tiny_sd3_pipeline(), str(tmp_path / "slrm"))
        policy = load_policy(tiny_sd3_pipeline())
        loaded = load_reward_model(tmp_path / "slrm", base_model=policy, share_base=True)
        check_shared(make_trainer(tmp_path, policy, loaded))

    def test_share_base_needs_a_base_in_memory_and_lora(self, folders):
        policy = load_policy(str(folders / "sd3"))
        with pytest.raises(ValueError, match="`share_base=True` needs a SLRM that was trained with LoRA"):
            load_reward_model(folders / "sd3_slrm_full", base_model=policy, share_base=True)
        with pytest.raises(ValueError, match="`base_model` is None"):
            load_reward_model(folders / "sd3_slrm_lora", share_base=True)
