# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What is done once, together or in chunks ends where it ends when it is done again, one by one or whole. See also
`TestPlainLoop` (shared prefix, candidates and guidance in batches) and the gradients in test_tapo_trainer.py (chunks).
"""

import pytest
import torch

from tapo_trl.policies import SD3Policy, WanPolicy
from tapo_trl.rewards import LatentReward, SLRMModel, WeightedReward
from tapo_trl.rollouts import TAPOSampler, TrajectoryPairs
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


PROMPTS = ["fox", "cat", "owl"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=["sd3", "wan"])
def policy(request):
    return SD3Policy(tiny_sd3_pipeline()) if request.param == "sd3" else WanPolicy(tiny_wan_pipeline())


class Twins:
    """Runs rollouts of an SLRM that differ in an option only."""

    def __init__(self, policy):
        self.policy, self.latent_shape = (
            policy,
            policy.latent_shape(32, 32, *([5] if policy.modality == "video" else [])),
        )
        self.slrm = SLRMModel.from_policy(policy, num_task_tokens=2)

    def run(self, prompts=PROMPTS, seeds=(0, 1, 2), target="parent", batch_size=None, reward=None) -> TrajectoryPairs:
        sampler = TAPOSampler(
            policy=self.policy,
            scheduler=self.policy.build_scheduler(6, self.latent_shape),
            step_indices=[1, 3],
            num_candidates=3,
            reward=WeightedReward([reward or LatentReward(self.slrm, target, batch_size)]),
            latent_shape=self.latent_shape,
            guidance_scale=3.0,
            score_batch_size=batch_size,
        )
        embeds, negative = self.policy.encode_prompts(prompts, 3), self.policy.encode_prompts([""], 3)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sampler.sample(self.policy.transformer, prompts, embeds, negative, generators)


def check_same(found: TrajectoryPairs, expected: TrajectoryPairs) -> None:
    for name in ("latents", "next_latents", "rewards", "final_latents"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **TOLERANCE, msg=name)


class TestFastPaths:
    def test_the_common_prefix_is_bit_by_bit_that_of_either_branch(self, policy):
        pairs = Twins(policy).run()
        assert torch.equal(pairs.latents[0, 0], pairs.latents[0, 1])
        assert not torch.equal(pairs.latents[1, 0], pairs.latents[1, 1])

    @pytest.mark.parametrize("target", ["parent", "policy"])
    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_score_batch_size(self, policy, target, batch_size):
        twins = Twins(policy)
        check_same(twins.run(target=target, batch_size=batch_size), twins.run(target=target))

    def test_prompts_together_and_alone(self, policy):
        twins = Twins(policy)
        together = twins.run()
        for row, prompt in enumerate(PROMPTS):
            alone = twins.run([prompt], [row])
            torch.testing.assert_close(together.latents[:, :, row : row + 1], alone.latents, **TOLERANCE)
            torch.testing.assert_close(together.rewards[:, :, row : row + 1], alone.rewards, **TOLERANCE)
            torch.testing.assert_close(together.final_latents[:, row : row + 1], alone.final_latents, **TOLERANCE)

    def test_velocities_at_the_candidates_serve_the_next_step(self, policy):
        twins = Twins(policy)

        class AsksForVelocities(LatentReward):
            def __call__(self, candidates):
                assert candidates.velocity.isfinite().all()
                return super().__call__(candidates)

        check_same(twins.run(reward=AsksForVelocities(twins.slrm, "parent")), twins.run())

    @pytest.mark.parametrize("chunk_size", [1, 4])
    def test_transitions_in_chunks_are_bit_by_bit_those_of_one(self, policy, chunk_size):
        pairs = Twins(policy).run()
        (whole,) = pairs.transitions(pairs.num_pairs)
        chunks = list(pairs.transitions(chunk_size))
        assert sum(chunk.share for chunk in chunks) == pytest.approx(1)
        for name in ("latents", "next_latents"):
            assert torch.equal(torch.cat([getattr(chunk, name) for chunk in chunks], dim=1), getattr(whole, name))
        assert torch.equal(torch.cat([chunk.step_indices for chunk in chunks]), whole.step_indices)
