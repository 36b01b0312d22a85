# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Which score finds the better candidates of a stochastic step?

    python -m benchmarks.mixture.quality --seeds 3

The truth about a noisy candidate is the true reward of the sample that the ODE makes of it. Three scores are compared with it among 16
candidates of one parent: that of the reward model for the noisy candidate, that of the same model for the one-step estimate at noise level 0,
and the true reward of the one-step estimate. All at the start and at the end of a training of TAPO from the first. Prints the table.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from tapo_trl import SLRMModel
from tapo_trl.callbacks import PolicyCallback
from tapo_trl.rewards.scoring import Candidates

from ..reproduction.statistics import estimate
from .report import table
from .study import best, score_of_estimates, train, true_reward
from .world import PROMPTS, load


NUM_CANDIDATES = 16
PROMPTS_EACH = 4
SCORES = ("noisy candidate", "one-step estimate", "true reward of the estimate")


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """
    Mean over groups of the correlation of ranks.

    Args:
        first (`torch.Tensor` of shape `(groups, size)`): values of the members of each group.
        second (`torch.Tensor` of shape `(groups, size)`): others of the same.
    """
    first, second = (values.argsort(1).argsort(1).float() for values in (first, second))
    first, second = (ranks - ranks.mean(1, keepdim=True) for ranks in (first, second))
    return ((first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))).mean().item()


class _Recorder:
    """A reward that keeps the candidates that it is asked about, with its scores."""

    def __init__(self, reward):
        self.reward, self.kept = reward, []

    def __getattr__(self, name: str):
        return getattr(self.reward, name)

    def __call__(self, candidates: Candidates) -> torch.Tensor:
        scores = self.reward(candidates)
        self.kept.append((candidates, scores))
        return scores


class Quality(PolicyCallback):
    """
    Measures the scores at the start and at the end of a training, in `measured`: one row per stochastic step, the correlation of each of
    [`SCORES`] with the truth.

    Args:
        mixture ([`Mixture`]): the world.
        slrm ([`SLRMModel`]): the reward model.
    """

    def __init__(self, mixture, slrm: SLRMModel):
        super().__init__()
        self.mixture, self.slrm = mixture, slrm
        self.measured: list[list[list[float]]] = []
        self.steps: list[int] = []

    def on_train_begin(self, args, state, control, **kwargs):
        with self.counter.paused():
            self.measured.append(self.measure())

    on_train_end = on_train_begin

    @torch.no_grad()
    def measure(self) -> list[list[float]]:
        trainer, recorder = self.trainer, _Recorder(self.trainer.reward)
        policy, model = trainer.policy, trainer.accelerator.unwrap_model(trainer.model)
        prompts = PROMPTS * PROMPTS_EACH
        embeds = policy.encode_prompts(prompts, max_sequence_length=1)
        self.steps = trainer.sampler.step_indices
        sampler = replace(trainer.sampler, reward=recorder, num_candidates=NUM_CANDIDATES)
        sampler.sample(
            model, prompts, embeds, None, [torch.Generator().manual_seed(5_000 + row) for row in range(len(prompts))]
        )
        score_estimates, judge = score_of_estimates(self.slrm, policy), true_reward(self.mixture)
        rows = []
        for index, (candidates, scores) in zip(sampler.step_indices, recorder.kept, strict=True):
            latents = candidates.latents
            for step in range(index + 1, sampler.scheduler.num_inference_steps):
                velocity = policy.velocity(model, latents, sampler.scheduler.sigma(step), candidates.prompt_embeds)
                latents = sampler.scheduler.ode_step(latents, velocity, step)
            truth = judge(latents, candidates.prompts).view(-1, NUM_CANDIDATES)
            of_prompts = (candidates.denoised, candidates.prompts)
            compared = (scores, score_estimates(*of_prompts), judge(*of_prompts))
            rows.append([correlation(values.view_as(truth), truth) for values in compared])
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="Seeds of reward models and of the trainings.")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/mixture"), help="Base and reward models.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = []
    for seed in range(args.seeds):
        quality = Quality(
            load(args.work_dir / "base")[0], SLRMModel.from_pretrained(str(args.work_dir / f"slrm-{seed}"))
        )
        train(replace(best("TAPO"), seed=seed), args.work_dir, split=1, callbacks=[quality])
        measured.append(quality.measured)
    values = torch.tensor(measured)  # (seeds, start and end, steps, scores)
    rows = [
        [when, step, *(estimate(values[:, time, place, score].tolist()) for score in range(len(SCORES)))]
        for time, when in enumerate(("start", "end"))
        for place, step in enumerate(quality.steps)
    ]
    print(table(["training", "step", *SCORES], rows))


if __name__ == "__main__":
    main()
