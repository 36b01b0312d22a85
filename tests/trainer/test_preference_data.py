# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from transformers import TrainerCallback

from tapo_trl import DiffusionDPOConfig, DiffusionDPOTrainer, SLRMConfig, SLRMTrainer, to_preference_pairs
from tests.data.preference_pairs import mixed_pairs
from tests.testing_utils import tiny_sd3_pipeline


TRAINERS = {"slrm": (SLRMTrainer, SLRMConfig), "dpo": (DiffusionDPOTrainer, DiffusionDPOConfig)}


def make(kind, folder, dataset=None, callbacks=None, pipeline=tiny_sd3_pipeline, **kwargs):
    trainer_class, config_class = TRAINERS[kind]
    args = {
        "use_cpu": True,
        "bf16": False,
        "resolution": 32,
        "max_sequence_length": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "eval_sigmas": [0.5],
        "cache_dir": str(folder / "cache"),
        "aspect_ratio_buckets": True,
        "logging_steps": 1,
    }
    torch.manual_seed(0)
    return trainer_class(
        pipeline(),
        config_class(str(folder / "out"), **args | kwargs),
        train_dataset=mixed_pairs(9) if dataset is None else dataset,
        eval_dataset=mixed_pairs(3),
        callbacks=callbacks,
    )


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.step


def seen(trainer):
    """The rows and shapes of the latents of each batch."""
    batches, prepare = [], trainer._prepare_inputs

    def record(inputs):
        inputs = prepare(inputs)
        if trainer.model.training:
            batches.append((inputs["row"].tolist(), tuple(inputs["chosen_latents"].shape[2:])))
        return inputs

    trainer._prepare_inputs = record
    return batches


class TestBuckets:
    @pytest.mark.parametrize(
        ("kind", "cache_latents"), [("slrm", True), ("slrm", False), ("dpo", True), ("dpo", False)]
    )
    def test_training_and_resume(self, kind, cache_latents, tmp_path):
        options = {"cache_latents": cache_latents, "num_train_epochs": 2, "max_steps": -1}
        straight = make(kind, tmp_path / "straight", **options)
        batches = seen(straight)
        straight.train()
        assert len(batches) == 10  # 2 epochs: 2 batches of 24 x 40 (one filled up), 2 of 32 x 32, 1 of 40 x 24
        sizes = {row: size for rows, size in batches for row in rows}
        assert sizes == {row: ((8, 8), (10, 6), (6, 10), (8, 8), (6, 10))[row % 5] for row in range(9)}
        assert batches[:5] != batches[5:]
        assert straight.evaluate()["eval_loss"] > 0

        make(kind, tmp_path / "broken", callbacks=[StopAt(7)], **options).train()
        resumed = make(kind, tmp_path / "broken", **options)
        rest = seen(resumed)
        resumed.train(resume_from_checkpoint=True)
        assert rest == batches[7:]
        for (name, expected), found in zip(
            straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
        ):
            assert torch.equal(found, expected), name

    @pytest.mark.parametrize("reward_model_type", ["lrm", "dina"])
    def test_other_reward_models(self, reward_model_type, tmp_path):
        trainer = make("slrm", tmp_path, reward_model_type=reward_model_type)
        trainer.train()
        assert trainer.state.global_step == 6

    def test_options_that_do_not_go_together(self, tmp_path):
        with pytest.raises(ValueError, match="`aspect_ratio_buckets=True` is for images, and `num_frames` for videos"):
            make("slrm", tmp_path, num_frames=5)
        with pytest.raises(ValueError, match="leave `train_sampling_strategy` at 'random', not 'sequential'"):
            make("dpo", tmp_path, train_sampling_strategy="sequential")


class TestPairs:
    @pytest.mark.parametrize("kind", TRAINERS)
    def test_trainers_take_what_the_conversion_gives(self, kind, tmp_path):
        pairs = mixed_pairs(4)
        votes = pairs.rename_columns({"chosen": "left", "rejected": "right"}).add_column("vote", list("lrlr"))
        converted = to_preference_pairs(
            votes, first="left", second="right", label="vote", label_values={"l": 1, "r": 0}
        )
        trainer = make(kind, tmp_path, converted, aspect_ratio_buckets=False, max_steps=1)
        trainer.train()
        expected = make(kind, tmp_path, pairs, aspect_ratio_buckets=False).train_dataset
        for row, swapped in enumerate([False, True, False, True]):
            side = "rejected_latents" if swapped else "chosen_latents"
            assert torch.equal(trainer.train_dataset[row]["chosen_latents"], expected[row][side])
