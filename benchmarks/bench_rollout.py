# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Seconds per pair of trajectories, against its forwards and against a plain loop.

    python benchmarks/bench_rollout.py                                            # the emoji world, on a CPU
    python benchmarks/bench_rollout.py --model stabilityai/stable-diffusion-3.5-medium --resolution 512 \
        --device cuda --dtype bfloat16 --max_sequence_length 256                  # full size, random weights, on a GPU
    python benchmarks/bench_rollout.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --height 480 --width 832 --num_frames 17 \
        --device cuda --dtype bfloat16 --prompts 1

Three things are timed for every n and number of prompts, in turns, and the median is reported:

- ours: `TAPOSampler`;
- forwards: the same number of batched forwards of the policy and of the reward model, and nothing else;
- plain: the paper's loop written down branch by branch and candidate by candidate. It must find the same pairs.

Writes `rollout.json` and `rollout.md` into `--output_dir`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tapo_trl import SLRMModel, load_policy
from tapo_trl.cli.known_pipelines import KNOWN_PIPELINES
from tapo_trl.cli.meta_models import load_meta_policy
from tapo_trl.policies import FlowPolicy, PromptEmbeddings
from tapo_trl.rewards import LatentReward, WeightedReward
from tapo_trl.rollouts import TAPOSampler
from tapo_trl.schedulers import draw_candidates, sde_step_indices


EMOJI = Path(__file__).resolve().parents[1] / "examples" / "emoji" / "pipeline"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMOJI), help="A folder, or a known Hub id, which gets random weights.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num_frames", type=int)
    parser.add_argument("--max_sequence_length", type=int, default=16)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--num_sde_steps", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--num_candidates", type=int, default=4)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4], help="Prompts per batch.")
    parser.add_argument("--guidance_scale", type=float, default=4.5)
    parser.add_argument("--score_batch_size", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no_plain", action="store_true", help="Leave the plain loop out.")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def make_policy(args: argparse.Namespace) -> FlowPolicy:
    """The policy of a folder; of a known id, its architecture with random weights and no text encoders."""
    dtype = getattr(torch, args.dtype)
    if args.model not in KNOWN_PIPELINES:
        policy = load_policy(args.model, torch_dtype=dtype)
    else:
        policy, _ = load_meta_policy(args.model)
        generator = torch.Generator(args.device).manual_seed(0)
        policy.pipeline.transformer = policy.transformer.to(dtype).to_empty(device=args.device)
        policy.pipeline.vae = policy.vae.to_empty(device="cpu")
        for name, tensor in policy.transformer.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02, generator=generator)
                if name.endswith(("norm_q.weight", "norm_k.weight")):
                    tensor.fill_(1)
    policy.transformer.to(args.device).eval().requires_grad_(False)
    return policy


def make_embeds(policy: FlowPolicy, count: int, args: argparse.Namespace) -> PromptEmbeddings:
    """Embeddings of `count` prompts, random where there are no text encoders."""
    if args.model not in KNOWN_PIPELINES:
        prompts = ["fox", "cat", "owl", "bee", "pig", "bus", "sun", "car"] * count
        return policy.encode_prompts(prompts[:count], args.max_sequence_length).to(args.device)
    generator = torch.Generator().manual_seed(count)
    config = policy.transformer.config
    pooled = None
    if policy.modality == "image":
        length, dim = 77 + args.max_sequence_length, config.joint_attention_dim
        pooled = torch.randn(count, config.pooled_projection_dim, generator=generator).to(args.device)
    else:
        length, dim = args.max_sequence_length, config.text_dim
    return PromptEmbeddings(torch.randn(count, length, dim, generator=generator).to(args.device), pooled)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@torch.no_grad()
def plain_loop(sampler: TAPOSampler, model, embeds: PromptEmbeddings, negative: PromptEmbeddings) -> torch.Tensor:
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
    for prompt, generator in enumerate(generators(len(embeds))):
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


@torch.no_grad()
def forwards_only(sampler: TAPOSampler, model, embeds: PromptEmbeddings, negative: PromptEmbeddings) -> None:
    """The networks' forwards of a rollout, in the same batches."""
    policy, reward, batch_size = sampler.policy, sampler.reward.rewards[0], len(embeds)
    device = embeds.prompt_embeds.device
    first, size = sampler.step_indices[0], 2 * sampler.num_candidates * batch_size
    latents = torch.randn(size, *sampler.latent_shape, device=device)
    repeated, many = embeds.repeat(2), embeds.repeat(2 * sampler.num_candidates)
    chunk_size = reward.batch_size or size
    for index in range(sampler.scheduler.num_inference_steps):
        branches, sigma = 1 if index <= first else 2, sampler.scheduler.sigma(index)
        chosen = embeds if branches == 1 else repeated
        policy.velocity(model, latents[: branches * batch_size], sigma, chosen, negative, sampler.guidance_scale)
        if index in sampler.step_indices:
            for start in range(0, size, chunk_size):
                chunk = slice(start, start + chunk_size)
                embed = many[chunk]
                reward.model.score(
                    latents[chunk],
                    sampler.scheduler.sigma(index + 1),
                    embed.prompt_embeds,
                    embed.pooled_prompt_embeds,
                    velocity_target=latents[chunk],
                )


def seconds(function: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def run(args: argparse.Namespace) -> list[dict]:
    policy = make_policy(args)
    model, device = policy.transformer, torch.device(args.device)
    height, width = args.height or args.resolution, args.width or args.resolution
    latent_shape = policy.latent_shape(height, width, args.num_frames)
    slrm = SLRMModel.from_policy(policy, max_sequence_length=args.max_sequence_length).requires_grad_(False)
    rows = []
    for num_prompts in args.prompts:
        embeds, negative = make_embeds(policy, num_prompts, args), make_embeds(policy, 1, args)
        for num_sde_steps in args.num_sde_steps:
            sampler = TAPOSampler(
                policy=policy,
                scheduler=policy.build_scheduler(args.num_inference_steps, latent_shape, device),
                step_indices=sde_step_indices(args.num_inference_steps, num_sde_steps),
                num_candidates=args.num_candidates,
                reward=WeightedReward([LatentReward(slrm, "parent", args.score_batch_size)]),
                latent_shape=latent_shape,
                guidance_scale=args.guidance_scale,
            )

            def ours(sampler=sampler, embeds=embeds, negative=negative):
                prompts = ["prompt"] * len(embeds)
                return sampler.sample(model, prompts, embeds, negative, generators(len(embeds))).final_latents

            programs = {"ours": ours, "forwards": lambda: forwards_only(sampler, model, embeds, negative)}  # noqa: B023
            if not args.no_plain:
                programs["plain"] = lambda: plain_loop(sampler, model, embeds, negative)  # noqa: B023
            row = {"prompts": num_prompts, "n": num_sde_steps, "P": args.num_candidates}
            if args.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            result = ours()  # and warm-up
            if not args.no_plain:
                row["difference"] = (programs["plain"]() - result).abs().max().item()
            times = {name: [] for name in programs}
            for _ in range(args.repeats):
                for name, program in programs.items():
                    times[name].append(seconds(program, args.device) / num_prompts)
            row |= {name: statistics.median(values) for name, values in times.items()}
            row["ours / forwards"] = row["ours"] / row["forwards"]
            if not args.no_plain:
                row["plain / ours"] = row["plain"] / row["ours"]
            if args.device != "cpu":
                row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            print(row, flush=True)
            rows.append(row)
    return rows


def format_table(rows: list[dict]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    rows = run(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(args).items()} | {"torch": torch.__version__}
    if args.device != "cpu":
        settings["card"] = torch.cuda.get_device_name()
    (args.output_dir / "rollout.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    (args.output_dir / "rollout.md").write_text(format_table(rows) + "\n")
    print(format_table(rows))


if __name__ == "__main__":
    main()
