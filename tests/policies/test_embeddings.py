# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import sys
from dataclasses import make_dataclass

import pytest
import torch
from datasets import Dataset

from tapo_trl import FlowGRPOTrainer, TAPOTrainer
from tapo_trl.policies import PromptEmbeddings, SD3Policy
from tapo_trl.rollouts import SamplePairs
from tapo_trl.rollouts.base import load_rollouts, save_rollouts
from tests.testing_utils import tiny_sd3_pipeline
from tests.trainer.test_flow_grpo_trainer import make_args as make_grpo_args
from tests.trainer.test_tapo_trainer import make_args as make_tapo_args


def masked(*lengths, longest=None):
    """Prompts of these lengths: token i of prompt p is 10 p + i + 1."""
    mask = torch.arange(longest or max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = 10 * torch.arange(len(lengths))[:, None] + torch.arange(mask.shape[1]) + 1
    return PromptEmbeddings((tokens * mask)[..., None].float(), torch.zeros(len(lengths), 2), prompt_embeds_mask=mask)


def tokens(embeds):
    return embeds.prompt_embeds[..., 0].tolist()


class TestPromptEmbeddings:
    def test_rows_are_cut_to_the_longest_that_is_present(self):
        embeds = masked(1, 3, 2, longest=5)
        assert tokens(embeds) == [[1, 0, 0], [11, 12, 13], [21, 22, 0]]
        assert tokens(embeds[[0, 2]]) == [[1, 0], [21, 22]] and len(embeds[[0, 2]]) == 2
        assert embeds[1:].tensors["prompt_embeds_mask"].tolist() == [[True] * 3, [True, True, False]]

    def test_lengths_are_mixed_by_padding(self):
        both = PromptEmbeddings.cat([masked(1).expand(2), masked(3, 2)])
        assert tokens(both) == [[1, 0, 0], [1, 0, 0], [1, 2, 3], [11, 12, 0]]
        assert both.tensors["prompt_embeds_mask"].sum(1).tolist() == [1, 1, 3, 2]

    def test_repetition(self):
        embeds = PromptEmbeddings(torch.tensor([[[1.0]], [[2.0]]]))
        assert tokens(embeds.repeat(2)) == [[1], [2], [1], [2]]
        assert tokens(embeds.repeat_interleave(2)) == [[1], [1], [2], [2]]
        assert embeds.pooled_prompt_embeds is None and embeds.device == torch.device("cpu")

    def test_masks_are_moved_and_not_cast(self):
        embeds = masked(1, 3).to("cpu", torch.bfloat16)
        dtypes = {name: tensor.dtype for name, tensor in embeds.tensors.items()}
        expected = {"prompt_embeds": torch.bfloat16, "pooled_prompt_embeds": torch.bfloat16}
        assert dtypes == {**expected, "prompt_embeds_mask": torch.bool}

    def test_rows_hold_the_tokens_of_a_prompt_alone(self):
        rows = masked(1, 3).rows()
        assert [row["prompt_embeds"].shape for row in rows] == [(1, 1), (3, 1)]
        assert tokens(
            PromptEmbeddings.cat([PromptEmbeddings(**{n: t[None] for n, t in row.items()}) for row in rows])
        ) == [
            [1, 0, 0],
            [11, 12, 13],
        ]

    def test_tokens_that_count_come_first(self):
        with pytest.raises(ValueError, match="`prompt_embeds_mask` has tokens that count behind"):
            PromptEmbeddings(torch.zeros(1, 3, 1), prompt_embeds_mask=torch.tensor([[0, 1, 1]]))


# What version 0.1 wrote into checkpoints
Written01 = make_dataclass("PromptEmbeddings", ["prompt_embeds", "pooled_prompt_embeds"])
Written01.__module__ = "tapo_trl.policies.base"


def rollout(embeds):
    one = torch.ones(1, 1)
    return SamplePairs(
        prompt_embeds=embeds,
        weights=one,
        rewards=one,
        samples=torch.zeros(2, 1, 4),
        sigmas=one,
        noise=torch.zeros(1, 1, 4),
    )


class TestCheckpoints:
    @pytest.mark.parametrize("pooled", [None, torch.ones(1, 2)])
    def test_rollouts_of_version_0_1_are_read(self, tmp_path, monkeypatch, pooled):
        monkeypatch.setattr(sys.modules["tapo_trl.policies.base"], "PromptEmbeddings", Written01)
        save_rollouts(tmp_path, 0, [([3], rollout(Written01(torch.full((1, 2, 3), 5.0), pooled)))])
        monkeypatch.undo()
        ((rows, found),) = load_rollouts(tmp_path, 0, torch.device("cpu"), SamplePairs)
        embeds = found.prompt_embeds
        assert rows == [3] and type(embeds) is PromptEmbeddings
        assert torch.equal(embeds[[0]].prompt_embeds, torch.full((1, 2, 3), 5.0))
        assert (
            embeds.pooled_prompt_embeds is None if pooled is None else torch.equal(embeds.pooled_prompt_embeds, pooled)
        )

    def test_masks_come_back(self, tmp_path):
        save_rollouts(tmp_path, 0, [([0], rollout(masked(2)))])
        ((_, found),) = load_rollouts(tmp_path, 0, torch.device("cpu"), SamplePairs)
        assert found.prompt_embeds.tensors["prompt_embeds_mask"].tolist() == [[True, True]]


class MaskedSD3Policy(SD3Policy):
    """Prompts have their own lengths, a token per word, as those of Qwen-Image have."""

    def encode_prompts(self, prompts, max_sequence_length=None):
        embeds = super().encode_prompts(prompts, max_sequence_length)
        lengths = torch.tensor([len(prompt.split(" ")) for prompt in prompts])
        mask = torch.arange(embeds.prompt_embeds.shape[1]) < lengths[:, None]
        masked = embeds.prompt_embeds * mask[..., None]
        return PromptEmbeddings(masked, embeds.pooled_prompt_embeds, prompt_embeds_mask=mask)


@pytest.mark.parametrize(
    ("trainer_class", "make_args", "loss"),
    [(TAPOTrainer, make_tapo_args, 0.693147), (FlowGRPOTrainer, make_grpo_args, 0.0)],
)
def test_trainers_take_prompts_of_different_lengths(tmp_path, trainer_class, make_args, loss):
    lengths = []
    policy = MaskedSD3Policy(tiny_sd3_pipeline())
    policy.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    trainer = trainer_class(
        policy,
        lambda images, prompts: images.mean((1, 2, 3)),
        make_args(tmp_path, guidance_scale=2.0, max_steps=4, max_sequence_length=3, per_device_train_batch_size=1),
        train_dataset=Dataset.from_dict({"prompt": ["a", "a red fox", "a cat", "an old blue dog"]}),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert set(lengths) == {1, 2, 3, 4}
