# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
The peer of `TAPOSampler`: the paper's algorithm written down as a plain loop. Its trajectories are the same, its forwards are
those of single latents. (flow_grpo and Flow-Factory, which have no TAPO, do not install beside this package.)

    python benchmarks/plain_loop.py --size tiny --num_sde_steps 2 8 --prompts 1 4

takes the flags of `tapo-trl bench` and prints seconds per pair of trajectories of both, and the largest difference of their
final latents.
"""

import statistics

import torch

from tapo_trl.benchmark import seconds, seeded_generators
from tapo_trl.cli.bench import make_bench, make_parser, settings
from tapo_trl.policies import PromptEmbeddings
from tapo_trl.rollouts import TAPOSampler
from tapo_trl.schedulers import draw_candidates


@torch.no_grad()
def plain_loop(
    sampler: TAPOSampler, model: torch.nn.Module, embeds: PromptEmbeddings, negative: PromptEmbeddings
) -> torch.Tensor:
    """
    Algorithm 1 as it is written: prompt by prompt, branch by branch, candidate by candidate, the two halves of the guidance
    one after the other, and both branches from the start.

    Returns:
        `torch.Tensor` of shape `(2, B, *latent_shape)`: the clean latents at the end of both branches.
    """
    policy, scheduler = sampler.policy, sampler.scheduler
    device = embeds.prompt_embeds.device

    def velocity(latents, index, embed):
        sigma = scheduler.sigma(index)
        conditional = policy.velocity(model, latents, sigma, embed)
        if sampler.guidance_scale <= 1:
            return conditional
        unconditional = policy.velocity(model, latents, sigma, negative)
        return unconditional + sampler.guidance_scale * (conditional - unconditional)

    reward = sampler.reward.rewards[0].model
    results = []
    for prompt, generator in enumerate(seeded_generators(len(embeds))):
        embed = embeds[prompt : prompt + 1]
        noise = torch.randn(1, *sampler.latent_shape, generator=generator).to(device)
        shape = (2, sampler.num_candidates, *sampler.latent_shape)
        draws = {index: torch.randn(shape, generator=generator).to(device) for index in sampler.step_indices}
        ends = []
        for branch, better in enumerate((torch.gt, torch.lt)):
            latents = noise
            for index in range(scheduler.num_inference_steps):
                v = velocity(latents, index, embed)
                if index not in sampler.step_indices:
                    latents = scheduler.ode_step(latents, v, index)
                    continue
                mean, std = scheduler.sde_mean_std(latents, v, index)
                sigma = scheduler.sigma(index + 1)
                estimate = latents - scheduler.sigma(index) * v
                best, kept = None, None
                for draw in draws[index][branch]:
                    candidate = draw_candidates(mean, std, draw[None, None])[0]
                    target = (candidate - estimate) / sigma if sigma >= 0.01 else None
                    score = reward.score(
                        candidate, sigma, embed.prompt_embeds, embed.pooled_prompt_embeds, velocity_target=target
                    )
                    if best is None or better(score, best):
                        best, kept = score, candidate
                latents = kept
            ends.append(latents[0])
        results.append(torch.stack(ends))
    return torch.stack(results, dim=1)


def main() -> None:
    (args,) = make_parser().parse_args_and_config()
    bench = make_bench(args)
    print("| T | n | P | prompts | ours s | plain s | plain / ours | largest difference |\n|" + "---|" * 8)
    for setting in settings(args):
        sampler, embeds = bench.sampler(setting), bench.embeddings(setting.prompts)

        def ours(sampler=sampler, embeds=embeds) -> torch.Tensor:
            return bench.rollout(sampler, embeds).final_latents

        def plain(sampler=sampler, embeds=embeds) -> torch.Tensor:
            with bench.trainer.accelerator.autocast():
                return plain_loop(sampler, bench.model, embeds, bench.embeddings(1))

        difference = (ours() - plain()).abs().max().item()  # and warm-up
        times = {ours: [], plain: []}
        for _ in range(args.repeats):
            for program, measured in times.items():
                measured.append(seconds(program, bench.device)[0] / setting.prompts)
        fast, slow = (statistics.median(measured) for measured in times.values())
        numbers = (
            f"{setting.num_inference_steps} | {setting.num_sde_steps} | {setting.num_candidates} | {setting.prompts}"
        )
        print(f"| {numbers} | {fast:.3g} | {slow:.3g} | {slow / fast:.3g} | {difference:.1g} |", flush=True)


if __name__ == "__main__":
    main()
