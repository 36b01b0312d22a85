# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What must hold for every trainer of a policy, whatever its algorithm."""

import gc
import math

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from tapo_trl import (
    DiffusionDPOTrainer,
    DiffusionNFTTrainer,
    DiffusionSFTTrainer,
    FlowGRPOTrainer,
    OnlineDiffusionDPOTrainer,
    SLRMConfig,
    SLRMTrainer,
    TAPOTrainer,
)
from tapo_trl.runs.stopping import NonFiniteGuard
from tests.data.preference_pairs import latent_pairs
from tests.testing_utils import tiny_sd3_pipeline
from tests.trainer import (
    test_diffusion_dpo_trainer,
    test_flow_grpo_trainer,
    test_nft_trainer,
    test_online_dpo_trainer,
    test_sft_trainer,
    test_tapo_trainer,
)
from tests.trainer.policy_checks import check_lora_loads_into_diffusers_exactly, trainable
from tests.trainer.test_tapo_trainer import PROMPTS, make_lora, randomize_adapter, redness


METHODS = {
    "tapo": (TAPOTrainer, test_tapo_trainer.make_args),
    "online_dpo": (OnlineDiffusionDPOTrainer, test_online_dpo_trainer.make_args),
    "grpo": (FlowGRPOTrainer, test_flow_grpo_trainer.make_args),
    "nft": (DiffusionNFTTrainer, test_nft_trainer.make_args),
    "dpo": (DiffusionDPOTrainer, test_diffusion_dpo_trainer.make_args),
    "sft": (DiffusionSFTTrainer, test_sft_trainer.make_args),
}
OFFLINE = ("dpo", "slrm", "sft")
SMALL = {"num_inference_steps": 2, "max_steps": 1, "per_device_train_batch_size": 1, "guidance_scale": 1.0}


def latents(method, number, seed=0):
    """Preference pairs, or for supervised fine-tuning one of their sides."""
    pairs = latent_pairs(number, seed=seed)
    return pairs.rename_column("chosen", "image") if method == "sft" else pairs


def make_args(method, tmp_path, **kwargs):
    if method == "slrm":
        return make_slrm_args(tmp_path, **kwargs)
    counts = {
        "tapo": {"num_sde_steps": 1},
        "online_dpo": {"num_noise_levels": 1},
        "nft": {"num_noise_levels": 1},
    }.get(method, {})
    return METHODS[method][1](tmp_path, **SMALL | counts | kwargs)


def make_trainer(
    method, tmp_path, pipeline=None, peft_config=None, eval_dataset=None, optimizers=(None, None), args=None, **kwargs
):
    """The trainer of `method`; `eval_dataset` has prompts or pairs, as it needs."""
    torch.manual_seed(0)
    arguments = [tiny_sd3_pipeline() if pipeline is None else pipeline]
    arguments += [] if method in OFFLINE else [redness]
    return METHODS[method][0](
        *arguments,
        make_args(method, tmp_path, **kwargs) if args is None else args,
        train_dataset=latents(method, 4) if method in OFFLINE else Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=eval_dataset,
        optimizers=optimizers,
        peft_config=peft_config,
    )


def make_slrm_args(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "resolution": 32,
        "max_sequence_length": 3,
        "num_task_tokens": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "eval_sigmas": [0.5],
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return SLRMConfig(**defaults | kwargs)


def make_slrm_trainer(
    tmp_path, pipeline=None, peft_config=None, eval_dataset=None, optimizers=(None, None), args=None, **kwargs
):
    return SLRMTrainer(
        tiny_sd3_pipeline() if pipeline is None else pipeline,
        make_slrm_args(tmp_path, **kwargs) if args is None else args,
        train_dataset=latent_pairs(4),
        eval_dataset=eval_dataset,
        optimizers=optimizers,
        peft_config=peft_config,
    )


def make(method, tmp_path, *args, **kwargs):
    if method == "slrm":
        return make_slrm_trainer(tmp_path, *args, **kwargs)
    return make_trainer(method, tmp_path, *args, **kwargs)


class TestPrecision:
    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_full_fine_tuning_moves_weights_that_come_in_half_precision(self, tmp_path, method, dtype):
        """In half precision, most updates of 1e-5 are rounded away."""
        trainer = make(method, tmp_path, tiny_sd3_pipeline().to(dtype), learning_rate=1e-5)
        before = trainable(trainer)
        trainer.train()
        after = trainable(trainer)
        assert {value.dtype for value in after.values()} == {torch.float32}
        moved = sum((after[name] != value).sum().item() for name, value in before.items())
        assert moved > 0.8 * sum(value.numel() for value in before.values())

    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    @pytest.mark.parametrize("peft", [True, False])
    def test_two_half_precisions_are_refused(self, tmp_path, method, peft):
        peft_config = make_lora() if peft else None
        with pytest.raises(
            ValueError, match="`bf16=True` computes in torch.bfloat16, but the `transformer` of `model`"
        ):
            make(method, tmp_path, tiny_sd3_pipeline().to(torch.float16), peft_config, bf16=True)

    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    @pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
    def test_two_half_precisions_are_refused_before_loading(self, tmp_path, method, name):
        with pytest.raises(ValueError, match=f"`{name}` in `model_init_kwargs` is float16"):
            make(method, tmp_path, "no-such/model", bf16=True, model_init_kwargs={name: "float16"})

    @pytest.mark.parametrize(
        ("dtype", "message"),
        [
            ("fp16", "`torch_dtype` in `model_init_kwargs` is float16"),
            ("torch.half", "`torch_dtype` in `model_init_kwargs` is float16"),
            ({"default": "float32", "transformer": "fp16", "vae": "fp16"}, "`transformer` of `torch_dtype`"),
            ("fp15", "`torch_dtype` must be one of"),
        ],
    )
    def test_half_precisions_in_other_words(self, tmp_path, dtype, message):
        with pytest.raises(ValueError, match=message):
            make("tapo", tmp_path, "no-such/model", bf16=True, model_init_kwargs={"torch_dtype": dtype})

    def test_half_precision_of_text_encoders_alone(self, tmp_path):
        pipeline = tiny_sd3_pipeline()
        pipeline.text_encoder.to(torch.float16)
        with pytest.raises(ValueError, match="the `text_encoder` of `model` is float16"):
            make("tapo", tmp_path, pipeline, bf16=True)


class TestConfiguration:
    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    def test_serves_several_trainers(self, tmp_path, method):
        """What one trainer has done or filled in is not the user's."""
        args = make_args(method, tmp_path, max_sequence_length=None, activation_checkpointing=True)
        before, peft_config = args.to_dict(), LoraConfig(r=2, init_lora_weights="gaussian")
        for _ in range(2):
            trainer = make(method, tmp_path, None, peft_config, args=args)
            assert trainer.policy.transformer.is_gradient_checkpointing or method == "slrm"  # which does so in `train`
            assert args.to_dict() == before and peft_config.target_modules is None
        assert trainer.args.height == 32 and trainer.args.max_sequence_length


def reachable_latents(function) -> list[tuple[int, ...]]:
    """Shapes of the tensors that a function keeps alive, other than numbers per row."""
    found, seen, stack = [], set(), [function]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (type, type(gc))) or type(item).__name__ in ("function", "builtin"):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found += [tuple(item.shape)] if item.ndim > 1 else []
        else:
            stack += gc.get_referents(item)
    return found


class TestMemory:
    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    def test_nothing_of_a_batch_but_its_losses_waits_for_the_update(self, tmp_path, method, monkeypatch):
        kept, watch = [], NonFiniteGuard.watch

        def record(self, values, describe, prompts=()):
            if values.ndim == 1 and "reward" not in getattr(describe, "__name__", repr(describe)):
                kept.append(describe)
            watch(self, values, describe, prompts)

        monkeypatch.setattr(NonFiniteGuard, "watch", record)
        make(method, tmp_path, None, make_lora()).train()
        assert kept and "the loss" in kept[0]((0,))
        assert [shapes for describe in kept if (shapes := reachable_latents(describe))] == []


def lora(**kwargs):
    return LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], **kwargs)


def with_adapter(way, tmp_path):
    """A pipeline to which a LoRA came in one of the ways that there are."""
    pipeline = tiny_sd3_pipeline()
    if way == "get_peft_model":
        pipeline.transformer = get_peft_model(pipeline.transformer, lora())
    elif way == "inject":
        get_peft_model(pipeline.transformer, lora())
    elif way in ("add_adapter", "disabled"):
        pipeline.transformer.add_adapter(lora())
        if way == "disabled":
            pipeline.transformer.disable_adapters()
    else:
        pipeline.transformer.add_adapter(lora(init_lora_weights=False))
        layers = get_peft_model_state_dict(pipeline.transformer, adapter_name="default")
        pipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
        pipeline = tiny_sd3_pipeline()
        pipeline.load_lora_weights(tmp_path / "lora")
        if way != "loaded":
            pipeline.fuse_lora()
        if way == "merged":
            pipeline.unload_lora_weights()
    return pipeline


class TestAdapters:
    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    @pytest.mark.parametrize("way", ["get_peft_model", "inject", "add_adapter", "disabled", "loaded", "fused"])
    def test_a_transformer_that_has_one_is_refused(self, tmp_path, method, way):
        pipeline = with_adapter(way, tmp_path)
        for peft_config in (None, lora()):
            with pytest.raises(ValueError, match="has an adapter already"):
                make(method, tmp_path, pipeline, peft_config)

    @pytest.mark.parametrize("peft_config", [None, lora()])
    def test_one_that_was_merged_is_the_base(self, tmp_path, peft_config):
        pipeline = with_adapter("merged", tmp_path)
        name = "transformer_blocks.0.attn.to_q.weight"
        start = pipeline.transformer.get_parameter(name).detach().clone()
        assert not torch.equal(start, tiny_sd3_pipeline().transformer.get_parameter(name))
        trainer = make("tapo", tmp_path, pipeline, peft_config)
        own = trainer.policy.transformer.state_dict()
        assert torch.equal(own[name if peft_config is None else name.replace("weight", "base_layer.weight")], start)

    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    @pytest.mark.parametrize(
        ("peft_config", "message"),
        [
            (
                lora(init_lora_weights="pissa"),
                "`init_lora_weights='pissa'` of `peft_config` starts from other weights",
            ),
            (lora(init_lora_weights="olora"), "`init_lora_weights='olora'`"),
            (
                lora(modules_to_save=["proj_out"]),
                r"`modules_to_save=\['proj_out'\]` of `peft_config` trains or changes more",
            ),
            (lora(bias="lora_only"), "`bias='lora_only'`"),
            (lora(inference_mode=True), "`inference_mode=True` of `peft_config` freezes the LoRA"),
            (
                lora(task_type="FEATURE_EXTRACTION"),
                "`task_type='FEATURE_EXTRACTION'` of `peft_config` is for language models",
            ),
            (lora(alora_invocation_tokens=[1]), r"`alora_invocation_tokens=\[1\]`"),
            (LoHaConfig(r=2, target_modules=["to_q"]), "is a `LoHaConfig`"),
            (LoKrConfig(r=2, target_modules=["to_q"]), "is a `LoKrConfig`"),
            (AdaLoraConfig(target_modules=["to_q"], total_step=10), "is a `AdaLoraConfig`"),
        ],
    )
    def test_one_that_does_not_load_is_refused_before_the_model_is_loaded(
        self, tmp_path, method, peft_config, message
    ):
        with pytest.raises(ValueError, match=message):
            make(method, tmp_path, "no-such/model", peft_config)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("init", [False, "orthogonal"])
    def test_a_policy_that_does_not_start_from_its_reference_is_refused(self, tmp_path, method, init):
        with pytest.raises(ValueError, match="which are the reference: choose one of"):
            make(method, tmp_path, "no-such/model", lora(init_lora_weights=init))

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("tapo", {"loss_type": "hinge"}),
            ("tapo", {"loss_type": "ipo"}),
            ("online_dpo", {}),
            ("grpo", {}),
            ("nft", {}),
            ("dpo", {}),
        ],
    )
    def test_every_loss_finds_out_at_the_start(self, tmp_path, method, options):
        trainer = make(method, tmp_path, None, make_lora(), **options)
        randomize_adapter(trainer)
        with pytest.raises(RuntimeError, match="the policy and the reference differ"):
            trainer.train()

    @pytest.mark.parametrize(
        "options",
        [
            {"use_dora": True},
            {"use_rslora": True},
            {"rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_q": 3}},
            {"target_modules": "all-linear"},
        ],
        ids=str,
    )
    def test_kinds_of_lora_that_load_into_diffusers(self, tmp_path, options):
        peft_config = LoraConfig(**{"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_v"]} | options)
        trainer = make("tapo", tmp_path, None, peft_config)
        trainer.train()
        check_lora_loads_into_diffusers_exactly(trainer, PROMPTS[0], tmp_path / "base")


def eval_splits(method):
    """Two sets of held-out prompts or pairs."""
    if method in OFFLINE:
        return {"near": latents(method, 2, seed=1), "far": latents(method, 3, seed=2)}
    return {
        name: Dataset.from_dict({"prompt": prompts})
        for name, prompts in {"near": ["cat"], "far": ["emu", "yak"]}.items()
    }


def evaluated(metrics, prefix):
    """Metrics of an evaluation, without the times that it took."""
    own = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {name: value for name, value in own.items() if "per_second" not in name and "time" not in name}


class TestEvaluation:
    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    def test_each_of_several_splits_has_metrics_of_its_own(self, tmp_path, method):
        splits = eval_splits(method)
        trainer = make(method, tmp_path, eval_dataset=splits, per_device_eval_batch_size=2)
        metrics = trainer.evaluate()
        names = {"slrm": "accuracy", "dpo": "rewards/accuracies", "sft": "loss/sigma_0.5"}
        name = names.get(method, "reward")
        found = {split: evaluated(metrics, f"eval_{split}_") for split in splits}
        assert found["near"].keys() == found["far"].keys() and {name, "loss"} <= found["near"].keys()
        assert found["near"] != found["far"] and f"eval_{name}" not in metrics
        for split, values in found.items():
            assert values == pytest.approx(evaluated(trainer.evaluate(trainer.eval_dataset[split]), "eval_"))
        logged = [log for log in trainer.state.log_history if f"eval_near_{name}" in log]
        assert len(logged) == 1 and f"eval_far_{name}" not in logged[0]
        assert f"test_{name}" in trainer.predict(trainer.eval_dataset["near"]).metrics

    @pytest.mark.parametrize(("method", "metric"), [("tapo", "eval_far_reward"), ("slrm", "eval_far_margin")])
    def test_the_best_model_is_chosen_by_the_metric_of_a_split(self, tmp_path, method, metric):
        options = {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 2,
        }
        options |= {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": False}
        trainer = make(method, tmp_path, None, make_lora(), eval_splits(method), learning_rate=1e-2, **options)
        trainer.train()
        values = [log[metric] for log in trainer.state.log_history if metric in log]
        assert len(values) == 2 and trainer.state.best_metric == min(values)

    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    def test_a_dataset_that_comes_later(self, tmp_path, method):
        """With prompts that were not there at the start, of a pipeline whose text encoders are the user's."""
        pipeline = tiny_sd3_pipeline()
        trainer = make(method, tmp_path, pipeline, make_lora())
        assert pipeline.text_encoder is not None and pipeline.text_encoder.device.type == "cpu"
        splits = eval_splits(method)
        metrics = trainer.evaluate(splits["far"])
        assert "eval_loss" in metrics and {"eval_near_loss", "eval_far_loss"} <= trainer.evaluate(splits).keys()
        assert metrics["eval_loss"] == pytest.approx(trainer.predict(splits["far"]).metrics["test_loss"])
        expected = make(method, tmp_path, None, make_lora(), splits["far"]).evaluate()
        assert evaluated(metrics, "eval_") == pytest.approx(evaluated(expected, "eval_"))
        prompt = {"prompt": "a newt", "num_inference_steps": 1, "max_sequence_length": 3, "output_type": "latent"}
        assert pipeline(height=32, width=32, **prompt).images.shape == (1, 4, 8, 8)

    @pytest.mark.parametrize("method", METHODS)
    def test_prompts_that_come_when_the_text_encoders_are_gone(self, tmp_path, method):
        tiny_sd3_pipeline().save_pretrained(tmp_path / "base")
        kwargs = {"text_encoder_3": None, "tokenizer_3": None}
        trainer = make(method, tmp_path, str(tmp_path / "base"), make_lora(), model_init_kwargs=kwargs)
        assert trainer.policy.pipeline.text_encoder is None
        with pytest.raises(ValueError, match="was not encoded at the start, and the text encoders have left"):
            trainer.evaluate(eval_splits(method)["far"].map(lambda row: {"prompt": "new"}))
        known = latents(method, 2, seed=1) if method in OFFLINE else Dataset.from_dict({"prompt": PROMPTS[:1]})
        assert "eval_loss" in trainer.evaluate(known)

    def test_a_dataset_that_cannot_be_used(self, tmp_path):
        trainer = make("tapo", tmp_path)
        with pytest.raises(ValueError, match="`eval_dataset` needs a column `prompt`"):
            trainer.evaluate(Dataset.from_dict({"text": ["cat"]}))
        with pytest.raises(ValueError, match="`eval_dataset` lacks the columns"):
            make("dpo", tmp_path).evaluate(Dataset.from_dict({"prompt": ["cat"]}))


class TestTrainingAgain:
    @pytest.mark.parametrize("method", [*METHODS, "slrm"])
    def test_a_second_run_goes_on(self, tmp_path, method):
        options = {} if method in OFFLINE else {"num_iterations": 2, "max_steps": 3}
        trainer = make(method, tmp_path, None, make_lora(), learning_rate=1e-2, **options)
        trainer.train()
        first = trainable(trainer)
        trainer.train()
        assert trainer.state.global_step == trainer.args.max_steps
        assert any(not torch.equal(value, first[name]) for name, value in trainable(trainer).items())
        assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)

    @pytest.mark.parametrize("method", [method for method in METHODS if method != "sft"])  # which has no reference
    def test_a_first_run_that_failed_at_the_start_is_checked_again(self, tmp_path, method):
        trainer = make(method, tmp_path, None, make_lora())
        randomize_adapter(trainer)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the policy and the reference differ"):
                trainer.train()


@pytest.mark.parametrize("method", ["tapo", "online_dpo", "grpo"])
def test_equal_rewards_teach_nothing(tmp_path, method, monkeypatch):
    monkeypatch.setitem(globals(), "redness", lambda images, prompts: [0.5] * len(prompts))
    trainer = make(method, tmp_path, None, make_lora(), max_steps=2, weight_decay=0.0, learning_rate=1e-2)
    before = trainable(trainer)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainable(trainer).items())
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged == ([pytest.approx(0.0)] * 2 if method == "grpo" else [])


class TestLearningRate:
    @pytest.mark.parametrize("method", ["tapo", "grpo"])
    @pytest.mark.parametrize(
        ("rate", "peft", "warns"), [(1e-4, False, True), (1e-5, False, False), (1e-4, True, False)]
    )
    def test_that_of_lora_for_full_fine_tuning(self, tmp_path, caplog, method, rate, peft, warns):
        assert METHODS[method][0].config_class(str(tmp_path), use_cpu=True, bf16=False).learning_rate == 1e-4
        make(method, tmp_path, None, make_lora() if peft else None, learning_rate=rate)
        assert ("set `learning_rate` to 1e-05 or less" in caplog.text) == warns


@pytest.mark.parametrize(("pairing", "beta"), [("tapo", 1000), ("tapo_within", 1000), ("spo", 10), ("lpo", 500)])
def test_beta_is_that_of_the_pairing(tmp_path, pairing, beta):
    assert test_tapo_trainer.make_args(tmp_path, pairing=pairing).beta == beta
    assert test_tapo_trainer.make_args(tmp_path, pairing=pairing, beta=7.0).beta == 7.0


@pytest.mark.parametrize("method", ["tapo", "nft", "dpo", "sft", "slrm"])
class TestFinishedAndFailed:
    SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}

    def test_a_complete_run_that_is_resumed_makes_no_step(self, tmp_path, method):
        make(method, tmp_path, None, make_lora(), **self.SAVING).train()
        again = make(method, tmp_path, None, make_lora(), **self.SAVING)
        result = again.train(resume_from_checkpoint=True)
        assert result.global_step == 1
        assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1"]
        changed = [value for name, value in trainable(again).items() if "lora_B" in name and value.any()]
        assert changed  # the weights of the checkpoint are there

    def test_a_start_from_the_beginning_after_a_failure_keeps_checkpoints(self, tmp_path, method, monkeypatch):
        make(method, tmp_path, None, make_lora(), **self.SAVING).train()
        trainer = make(method, tmp_path, None, make_lora(), **self.SAVING)

        def fail(folder):
            raise RuntimeError("the disk is away")

        monkeypatch.setattr(trainer, "_load_training_state", fail)
        with pytest.raises(RuntimeError, match="the disk is away"):
            trainer.train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
            trainer.train(resume_from_checkpoint=False)


@pytest.mark.parametrize("method", [*METHODS, "slrm"])
def test_evaluation_of_what_is_no_dataset(tmp_path, method):
    trainer = make(method, tmp_path, None, make_lora())
    for wrong in ([{"prompt": "cat"}], Dataset.from_dict({"prompt": ["cat"]}).to_iterable_dataset()):
        with pytest.raises((TypeError, ValueError), match="`eval_dataset` must be a `datasets.Dataset`"):
            trainer.evaluate(wrong)
    with pytest.raises(ValueError, match="`eval_dataset='far'` is the name of a split, but"):
        trainer.evaluate("far")


def test_evaluation_on_columns_that_a_reward_does_not_take(tmp_path):
    trainer = make("tapo", tmp_path, None, make_lora())
    with pytest.raises(ValueError, match="called as arguments of the reward function `redness`: .'images'"):
        trainer.evaluate(Dataset.from_dict({"prompt": ["cat"], "images": [1]}))


@pytest.mark.parametrize("method", ["tapo", "online_dpo", "grpo", "nft"])
def test_every_prompt_of_an_update_counts_alike(tmp_path, method):
    """Five prompts in batches of 2, 2 and 1, and in one of 5."""
    prompts = Dataset.from_dict({"prompt": [*PROMPTS, "yak"]})
    options = {"max_steps": -1, "num_train_epochs": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9}
    options |= {"scale_rewards": "group"} if method == "nft" else {}  # otherwise by all samples of a batch
    weights = []
    for size, accumulation in ((2, 3), (5, 1)):
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make(method, tmp_path / str(size), None, make_lora(), **options | batches)
        trainer.train_dataset = trainer._encode_new(prompts, "train_dataset")
        trainer.train()
        assert trainer.state.global_step == 1
        weights.append(trainable(trainer))
    start = trainable(make(method, tmp_path / "start", None, make_lora()))
    moved = max((weights[1][name] - value).abs().max() for name, value in start.items())
    assert moved > 1e-5
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-3 * moved.item(), rtol=0)


@pytest.mark.parametrize("method", ["dpo", "slrm"])
def test_metrics_of_training_are_those_of_all_pairs(tmp_path, method):
    """Also of the last update of an epoch: five pairs in batches of 2, 2 and 1."""
    options = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    trainer = make(method, tmp_path, None, make_lora(), gradient_accumulation_steps=3, **options)
    trainer.train_dataset = trainer._encode_new(latent_pairs(5), "train_dataset")
    numbers, record = [], trainer._record
    name = {"dpo": "rewards/margins", "slrm": "margin"}[method]
    trainer._record = lambda metrics: (
        numbers.append(len(metrics[name])) if name in metrics else None,
        record(metrics),
    )
    trainer.train()
    assert numbers == [2, 2, 1] and trainer.state.global_step == 1
