# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from itertools import permutations

import pytest
import torch

from tapo_trl.policies import PromptEmbeddings
from tapo_trl.rollouts import TrajectoryPairs
from tapo_trl.rollouts.subset import draw_examples


def make_pairs(weights):
    """Pairs of float64 latents of three numbers; `weights` is `(n, N)`."""
    generator = torch.Generator().manual_seed(3)
    n, rows = len(weights), len(weights[0])
    latents = torch.randn(n, 2, rows, 3, dtype=torch.float64, generator=generator)
    return TrajectoryPairs(
        prompt_embeds=PromptEmbeddings(torch.zeros(rows, 1, 1)),
        weights=torch.tensor(weights, dtype=torch.float64),
        rewards=torch.zeros(n, 1, rows, 2),
        step_indices=torch.arange(1, n + 1),
        latents=latents,
        next_latents=latents,
        pair_rewards=torch.zeros(n, 2, rows),
        final_latents=latents[0],
    )


def gradient(pairs, chunk_size):
    """Of a loss that is not linear in what it is trained on, with the trainer's sum over chunks."""
    theta = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64, requires_grad=True)
    loss = 0.0
    for chunk in pairs.transitions(chunk_size):
        losses = torch.nn.functional.softplus((chunk.latents[0] - 2 * chunk.latents[1]) @ theta)
        loss = loss + (chunk.weights * losses).mean() * chunk.share
    (found,) = torch.autograd.grad(loss, theta)
    return torch.cat([loss.detach().view(1), found])


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


WEIGHTS = {
    "all count": [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]],
    "some do not": [[2.0, 0.0], [0.0, 1.5], [1.0, 0.0], [0.5, 0.0]],
    "of one prompt none": [[0.0, 1.0], [0.0, 1.0], [0.0, 3.0], [0.0, 1.0]],
    "two pairs per step": [[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.5]],
}


class TestDrawExamples:
    @pytest.mark.parametrize("number", [1, 2, 3, 4])
    @pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
    def test_the_mean_over_all_draws_is_the_gradient_of_all_pairs(self, monkeypatch, weights, number):
        pairs, found = make_pairs(weights), []
        for order in permutations(range(4)):
            monkeypatch.setattr(torch, "randperm", lambda total, generator: torch.tensor(order))  # noqa: B023
            drawn = draw_examples(pairs, number, generators(0, 1))
            assert drawn.num_examples == len(drawn.examples) == 2 * number
            found.append(gradient(drawn, chunk_size=3))
        torch.testing.assert_close(torch.stack(found).mean(0), gradient(pairs, 8), rtol=1e-12, atol=1e-14)
        if number == 1 and weights is WEIGHTS["all count"]:
            assert torch.stack(found).std(0).min() > 1e-3, "single draws differ"

    def test_every_pair_is_as_likely(self):
        pairs, counts = make_pairs(WEIGHTS["some do not"]), torch.zeros(8)
        for seed in range(2000):
            counts[draw_examples(pairs, 2, generators(seed, 10_000 + seed)).examples] += 1
        counts = counts.view(4, 2).T
        assert counts[0].tolist() == pytest.approx([1333, 0, 1333, 1333], abs=100)
        assert counts[1, 1] == 2000 and counts[1].sum() == 4000, (
            "the only one that counts, and one to make up the number"
        )

    @pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
    def test_all_of_them_are_what_they_were(self, weights):
        pairs = make_pairs(weights)
        drawn = draw_examples(pairs, 4, generators(0, 1))
        assert torch.equal(drawn.weights, pairs.weights) and drawn.examples.tolist() == list(range(8))
        assert torch.equal(gradient(drawn, 3), gradient(pairs, 3)) and pairs.examples is None

    def test_a_prompt_is_given_the_same_pairs_in_any_batch(self):
        pairs = make_pairs([[1.0] * 3] * 6)
        together = draw_examples(pairs, 2, generators(5, 6, 7)).examples
        steps = [[number // 3 for number in together.tolist() if number % 3 == row] for row in range(3)]
        assert len({tuple(of_prompt) for of_prompt in steps}) > 1
        swapped = draw_examples(pairs, 2, generators(7, 5, 6)).examples.tolist()
        assert [number // 3 for number in swapped if number % 3 == 0] == steps[2]

    @pytest.mark.parametrize("number", [0, 5])
    def test_numbers_that_are_not_there(self, number):
        with pytest.raises(ValueError, match=f"has 4 examples, of which {number} cannot be drawn"):
            draw_examples(make_pairs(WEIGHTS["all count"]), number, generators(0, 1))
