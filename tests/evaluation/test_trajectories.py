# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import torch

from tapo_trl.evaluation.trajectories import BranchStep, draw_trajectories, sample_trajectories
from tapo_trl.media.pictures import MARK
from tests.rollouts.test_pairs import RecordingReward, first_value, make_sampler, run


PROMPTS = ["fox", "cat"]
OPTIONS = {"num_inference_steps": 6, "num_sde_steps": 3, "num_candidates": 2, "guidance_scale": 3.0}


def test_steps_are_those_of_tapo(tiny_sd3_policy):
    """The best of the winning branch and the worst of the losing one, as TAPO's sampler selects them from the same noise."""
    policy = tiny_sd3_policy
    steps = sample_trajectories(
        policy,
        RecordingReward(first_value),
        PROMPTS,
        policy.latent_shape(32, 32),
        max_sequence_length=3,
        seed=7,
        **OPTIONS,
    )
    sampler = make_sampler(policy, RecordingReward(first_value), num_candidates=2)
    sampler.scheduler, sampler.step_indices = policy.build_scheduler(6, policy.latent_shape(32, 32)), [1, 3, 5]
    pairs = run(sampler, policy, PROMPTS, seeds=[7, 8])
    assert [step.step for step in steps] == [1, 3, 5]
    for number, step in enumerate(steps):
        assert step.sigma == sampler.scheduler.sigmas[step.step + 1].item()
        torch.testing.assert_close(step.rewards, pairs.pair_rewards[number], rtol=0, atol=1e-4)
        # One-step estimates of the kept candidates, decoded
        kept, sigma = pairs.next_latents[number].flatten(0, 1), sampler.scheduler.sigmas[step.step + 1]
        embeds = policy.encode_prompts(PROMPTS * 2, 3)
        with torch.no_grad():
            negative = policy.encode_prompts([""], 3)
            velocity = policy.velocity(policy.transformer, kept, sigma, embeds, negative, 3.0)
            expected = policy.decode(kept - sigma * velocity).unflatten(0, (2, 2))
        torch.testing.assert_close(step.samples, expected, rtol=0, atol=1e-3)
    assert steps[-1].rewards[0].min() > steps[-1].rewards[1].max(), "the branches grow apart"


def test_picture_marks_the_branch_with_the_higher_reward():
    colours = torch.tensor([[0.2, 0.4], [0.6, 0.8]])  # side, prompt
    samples = colours[:, :, None, None, None].expand(2, 2, 3, 16, 16)
    steps = [
        BranchStep(1, 0.9, torch.tensor([[1.0, 0.0], [0.5, 2.0]]), samples),
        BranchStep(5, 0.0, torch.tensor([[1.0, 3.0], [0.5, 2.0]]), samples),
    ]
    picture = draw_trajectories(steps, ["a fox", "an owl"])
    grays = {round(255 * value) for value in colours.flatten().tolist()}
    counted = dict.fromkeys(grays, 0)
    frames = 0
    mark = tuple(int(MARK[i : i + 2], 16) for i in (1, 3, 5))
    for count, colour in picture.getcolors(1 << 24):
        if len(set(colour)) == 1 and colour[0] in grays:
            counted[colour[0]] += count
        frames += count if colour == mark else 0
    assert all(count > 2 * 100 * 100 for count in counted.values())  # each side of each prompt twice, enlarged to 128
    assert frames == 4 * (128**2 - 122**2)  # one branch per prompt and step
