# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import pickle

import pytest
import torch

from tapo_trl.policies import PromptEmbeddings
from tapo_trl.rollouts import SamplePairs, TrajectoryPairs
from tapo_trl.rollouts.base import RolloutBuffer, load_rollouts, save_rollouts


def sample_pairs():
    return SamplePairs(
        prompt_embeds=PromptEmbeddings(torch.randn(2, 3, 4)),
        weights=torch.ones(1, 2),
        rewards=torch.randn(2, 3),
        samples=torch.randn(2, 2, 4),
        sigmas=torch.rand(1, 2),
        noise=torch.randn(1, 2, 4),
    )


def refuse():
    raise AssertionError("nothing to load")


class TestRolloutBuffer:
    def test_rollouts_serve_as_many_steps_as_asked_for(self):
        buffer, rollout = RolloutBuffer(2), sample_pairs()
        assert buffer.begin(0, refuse) and buffer.is_used_up
        buffer.rollouts.append(([3, 5], rollout))
        assert buffer.take([3, 5]) is rollout and buffer.is_used_up
        assert not buffer.begin(0, refuse), "another batch of the same step"
        assert buffer.begin(1, refuse) and not buffer.is_used_up
        assert buffer.take([3, 5]) is rollout
        assert buffer.begin(2, refuse) and buffer.is_used_up and buffer.rollouts == []

    def test_an_interrupted_run_goes_on_with_those_of_its_checkpoint(self):
        buffer, rollout = RolloutBuffer(2), sample_pairs()
        assert buffer.begin(1, lambda: [([0, 1], rollout)])
        assert buffer.take([0, 1]) is rollout

    def test_other_rows_are_a_bug(self):
        buffer = RolloutBuffer(1)
        buffer.begin(0, refuse)
        buffer.rollouts.append(([3, 5], sample_pairs()))
        with pytest.raises(RuntimeError, match=r"rows \[3, 5\] .* the batch has rows \[5, 3\]"):
            buffer.take([5, 3])


class TestFiles:
    def test_come_back_as_they_were(self, tmp_path):
        rollout = sample_pairs()
        save_rollouts(tmp_path, 0, [([3, 5], rollout)])
        ((rows, loaded),) = load_rollouts(tmp_path, 0, torch.device("cpu"), SamplePairs)
        assert rows == [3, 5]
        for name in ("weights", "rewards", "samples", "sigmas", "noise"):
            assert torch.equal(getattr(loaded, name), getattr(rollout, name)), name
        assert torch.equal(loaded.prompt_embeds.prompt_embeds, rollout.prompt_embeds.prompt_embeds)

    def test_of_another_class_are_not_loaded(self, tmp_path):
        save_rollouts(tmp_path, 0, [([3, 5], sample_pairs())])
        with pytest.raises(pickle.UnpicklingError, match="SamplePairs"):
            load_rollouts(tmp_path, 0, torch.device("cpu"), TrajectoryPairs)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_of_version_0_1(self, tmp_path, monkeypatch):
        """Which called the module of the class otherwise."""
        pairs = TrajectoryPairs(
            prompt_embeds=PromptEmbeddings(torch.randn(2, 3, 4)),
            step_indices=torch.tensor([1]),
            latents=torch.randn(1, 2, 2, 4),
            next_latents=torch.randn(1, 2, 2, 4),
            pair_rewards=torch.randn(1, 2, 2),
            final_latents=torch.randn(2, 2, 4),
            weights=torch.ones(1, 2),
            rewards=torch.randn(1, 2, 2, 3),
        )
        with monkeypatch.context() as patch:
            import tapo_trl.rollouts.trajectory  # noqa: F401

            patch.setattr(TrajectoryPairs, "__module__", "tapo_trl.rollouts.trajectory")
            save_rollouts(tmp_path, 0, [([3, 5], pairs)])
        ((_, loaded),) = load_rollouts(tmp_path, 0, torch.device("cpu"), TrajectoryPairs)
        assert type(loaded) is TrajectoryPairs and torch.equal(loaded.latents, pairs.latents)


def test_chunks_carry_their_prompts_and_which_of_them_are_real():
    rollout = sample_pairs()
    chunks = list(rollout.transitions(1, ["cat", "dog"], num_real=1))
    assert [chunk.prompts for chunk in chunks] == [["cat"], ["dog"]]
    assert [chunk.counts.tolist() for chunk in chunks] == [[True], [False]]
    assert "'dog'" in chunks[1].describe_loss((0,))
    assert [chunk.counts.tolist() for chunk in rollout.transitions(2)] == [[True, True]]
