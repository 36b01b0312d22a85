# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
What one GPU does: correctness, seconds and memory. Weights are random, so nothing is downloaded. See run.sh.

Every step is a process of its own with a limit of seconds. Its rows go to `gpu.json` as soon as it ends, and into one table. A step that
fails or runs out of time is a row, too, and the others go on.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


ROWS = "GPU_ROW "  # what a step prints a row behind
LORA = 64
Row = dict[str, Any]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_gib() -> float:
    from tapo_trl.benchmark import process_peak_bytes

    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else process_peak_bytes()) / 2**30


def cap_memory(gib: float) -> None:
    """Let PyTorch allocate no more than this."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)


def bench(size: str, **options) -> Iterator[Row]:
    """`tapo-trl bench`: seconds per pair of trajectories, and the share of the matrix-product peak."""
    from tapo_trl.benchmark import matmul_peak
    from tapo_trl.cli.arguments import BenchArguments
    from tapo_trl.cli.bench import make_bench, settings

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    args = BenchArguments(size=size, device=device().type, torch_dtype=dtype, lora_r=LORA, **options)
    peak, measured = matmul_peak(device(), getattr(torch, dtype)), make_bench(args)
    for setting in settings(args):
        m = measured.measure(setting, repeats=args.repeats, warm_up=args.warm_up)
        rollout, update = m.rollout_seconds, m.seconds["update"]
        yield {
            "prompts": setting.prompts,
            "n": setting.num_sde_steps,
            "P": setting.num_candidates,
            **{name: round(value, 3) for name, value in m.seconds.items()},
            "rollout_peak_share": round(m.flops["rollout"] / rollout / peak, 3),
            "update_peak_share": round(m.flops["update"] / update / peak, 3),
            "peak_gib": round(m.peak_bytes / 2**30, 2),
        }


def correctness(tiny: bool) -> Iterator[Row]:
    """Tests that need a GPU. In a rehearsal they compare the CPU with itself."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    environment = os.environ | ({"TAPO_TRL_GPU_TESTS": "cpu"} if tiny else {})
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(result.stdout[-6000:])
    yield {"pytest": result.stdout.strip().splitlines()[-1] if result.stdout else result.stderr[-300:]}
    if result.returncode:
        raise SystemExit("a test failed")


def sd35_pairs(tiny: bool) -> Iterator[Row]:
    """Seconds per pair by n and prompts; the paper's 3.50, 3.91, 4.52 and 6.08 s (n = 2, 4, 8, 16) are sampling and scoring on an A100."""
    options = {"num_sde_steps": [2, 4, 8, 16], "num_candidates": [4], "share_backbone": True, "repeats": 1}
    if tiny:
        yield from bench("tiny", prompts=[1], **options | {"num_sde_steps": [2]})
        return
    for prompts in ([4], [1], [8]):
        yield from bench("sd35", prompts=prompts, transition_batch_size=8, score_batch_size=16, **options)


def memory_24gb(tiny: bool) -> Iterator[Row]:
    """The 24 GB recipe of TAPO under a cap of 22 GiB: shared weights, small chunks."""
    cap_memory(22)
    options = {"num_sde_steps": [8], "num_candidates": [4], "share_backbone": True, "repeats": 1, "prompts": [1]}
    yield from bench("tiny" if tiny else "sd35", transition_batch_size=1, score_batch_size=4, **options)


def random_policy(name: str, tiny: bool):
    """A policy of a family's real size with random weights, or a tiny one."""
    from tapo_trl.benchmark import randomize
    from tapo_trl.estimate.meta_models import make_meta_policy
    from tapo_trl.policies import load_policy
    from tapo_trl.policies.loading import family_of, known_pipelines

    pipeline, components = known_pipelines()[name]
    if tiny:
        policy = load_policy(family_of(pipeline).policy_class.tiny())
        policy.transformer.to(device())
        return policy
    policy = make_meta_policy(pipeline, components)
    randomize(policy, device(), torch.bfloat16)
    return policy


def passes(name: str, size: tuple[int, ...], batch_size: int, tiny: bool) -> Row:
    """Seconds of one forward, and of one forward and backward of a LoRA network with activation checkpointing."""
    from peft import LoraConfig, get_peft_model

    from tapo_trl.benchmark import seconds
    from tapo_trl.policies import PromptEmbeddings

    policy = random_policy(name, tiny)
    generator, length = torch.Generator().manual_seed(0), 8 if tiny else min(policy.max_sequence_length, 256)
    shapes = policy.prompt_shapes(length)
    prompts = {key: torch.randn(batch_size, *shape, generator=generator) for key, shape in shapes.items()}
    embeds = PromptEmbeddings(**prompts).to(device())
    latents = torch.randn(batch_size, *policy.latent_shape(*size), generator=generator).to(device())
    lora = LoraConfig(r=LORA, lora_alpha=LORA, target_modules=policy.lora_target_modules)
    model = get_peft_model(policy.transformer.requires_grad_(False), lora)
    policy.transformer.enable_gradient_checkpointing()

    def forward():
        with torch.autocast(device().type, torch.bfloat16, enabled=torch.cuda.is_available()):
            return policy.velocity(model, latents, 0.5, embeds)

    def train():
        model.train()
        forward().sum().backward()
        model.zero_grad()

    no_grad = torch.no_grad()(lambda: (model.eval(), forward()))
    took = {}
    for label, program in {"forward": no_grad, "forward_backward": train}.items():
        program()
        took[label] = round(min(seconds(program, device())[0] for _ in range(2)), 4)
    tokens = policy.num_tokens(latents.shape[1:])[0]
    return {
        "model": name.split("/")[-1],
        "size": "x".join(map(str, size)),
        "batch": batch_size,
        "tokens": tokens,
        **took,
    }


def slrm_24gb(tiny: bool) -> Iterator[Row]:
    """Updates of an SLRM with LoRA on pairs of random latents under a cap of 22 GiB, one pair per forward."""
    import tempfile

    import numpy as np
    from datasets import Dataset
    from peft import LoraConfig

    from tapo_trl import SLRMConfig, SLRMTrainer

    cap_memory(22)
    policy, side = random_policy("stabilityai/stable-diffusion-3.5-medium", tiny), 32 if tiny else 512
    length = 3 if tiny else 77 + 256
    shapes = policy.prompt_shapes(length)
    shape, generator = policy.latent_shape(side, side), np.random.default_rng(0)
    latents = generator.standard_normal((2, 4, *shape)).astype("float32")
    pairs = Dataset.from_dict({"prompt": ["prompt"] * 4, "chosen": latents[0], "rejected": latents[1]})
    from tapo_trl.policies import PromptEmbeddings

    policy.encode_prompts = lambda prompts, max_sequence_length=None: PromptEmbeddings(
        **{key: torch.zeros(len(prompts), *shape) for key, shape in shapes.items()}
    )
    with tempfile.TemporaryDirectory() as folder:
        args = SLRMConfig(
            folder,
            cache_dir=folder,
            resolution=side,
            max_sequence_length=length,
            per_device_train_batch_size=1,
            max_steps=4,
            logging_steps=1,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            eval_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        lora = LoraConfig(r=LORA, lora_alpha=LORA, target_modules=policy.lora_target_modules)
        trainer, start = SLRMTrainer(policy, args, train_dataset=pairs, peft_config=lora), time.perf_counter()
        result = trainer.train()
    yield {
        "updates": result.global_step,
        "seconds_per_pair": round((time.perf_counter() - start) / 4, 3),
        "loss": round(result.training_loss, 4),
        "peak_gib": round(peak_gib(), 2),
    }


def flow_grpo(tiny: bool) -> Iterator[Row]:
    """Flow-GRPO at UniRL's setting (384 x 384, 10 steps, 3 stochastic, LoRA 32): GPU-seconds per sample; 0.47 there on an H20."""
    import tempfile

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from tapo_trl import FlowGRPOConfig, FlowGRPOTrainer
    from tapo_trl.policies import PromptEmbeddings

    policy, side = random_policy("stabilityai/stable-diffusion-3.5-medium", tiny), 32 if tiny else 384
    policy.vae.to(device())
    if not tiny:
        for parameter in policy.vae.parameters():
            torch.nn.init.normal_(parameter, 0, 0.02)
    length = 3 if tiny else 77 + 256
    shapes = policy.prompt_shapes(length)
    policy.encode_prompts = lambda prompts, max_sequence_length=None: PromptEmbeddings(
        **{key: torch.randn(len(prompts), *shape) for key, shape in shapes.items()}
    )
    size = (
        {}
        if tiny
        else {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    )
    config = CLIPVisionConfig(**size | {"image_size": 224, "patch_size": 32 if tiny else 14})
    clip = CLIPVisionModelWithProjection(config).to(device(), torch.float32 if tiny else torch.bfloat16).eval()

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        pixels = torch.nn.functional.interpolate(images, (224, 224)).to(device(), clip.dtype)
        return clip(pixel_values=pixels).image_embeds.float()[:, 0]

    group, steps = (4, 2) if tiny else (16, 3)
    with tempfile.TemporaryDirectory() as folder:
        args = FlowGRPOConfig(
            folder,
            cache_dir=folder,
            resolution=side,
            max_sequence_length=length,
            num_inference_steps=10,
            num_sde_steps=3,
            num_generations=group,
            guidance_scale=1.0 if tiny else 4.5,
            per_device_train_batch_size=2,
            transition_batch_size=8,
            max_steps=steps,
            logging_steps=1,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            activation_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        prompts = Dataset.from_dict({"prompt": [f"prompt {index}" for index in range(8)]})
        trainer = FlowGRPOTrainer(policy, reward, args, prompts, peft_config=LoraConfig(r=32, lora_alpha=64))
        times: list[float] = []
        step = trainer.training_step

        def timed(*arguments):
            start = time.perf_counter()
            result = step(*arguments)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            return result

        trainer.training_step = timed
        trainer.train()
    yield {"seconds_per_sample": round(min(times[1:]) / (2 * group), 3), "peak_gib": round(peak_gib(), 2)}


def wan_passes(tiny: bool) -> Iterator[Row]:
    """Wan2.1-1.3B at 480 x 832: a pair of trajectories is counted from these."""
    for frames in (5,) if tiny else (17, 49, 81):
        size = (32, 32, frames) if tiny else (480, 832, frames)
        yield passes("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", size, 1, tiny)


def large_passes(tiny: bool) -> Iterator[Row]:
    """FLUX.1-dev and Qwen-Image, 1024 x 1024."""
    side = 32 if tiny else 1024
    for name in ("black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image"):
        yield passes(name, (side, side), 1, tiny)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


STEPS: dict[str, tuple[int, Callable[[bool], Iterator[Row]]]] = {  # seconds, in the order of their importance
    "correctness": (150, correctness),
    "sd35_pairs": (170, sd35_pairs),
    "memory_24gb": (50, memory_24gb),
    "slrm_24gb": (40, slrm_24gb),
    "flow_grpo": (60, flow_grpo),
    "wan_passes": (60, wan_passes),
    "large_passes": (80, large_passes),
}


def run_step(name: str, tiny: bool, limit: float) -> dict[str, Any]:
    """A step in a process of its own: its rows up to where it got, its seconds, and what went wrong."""
    command = [sys.executable, __file__, "--step", name, *(["--tiny"] if tiny else [])]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    lines = output.splitlines()
    rows = [json.loads(line.removeprefix(ROWS)) for line in lines if line.startswith(ROWS)]
    problem = None
    if process.returncode:
        last = next((line for line in reversed(lines) if line.strip() and not line.startswith(ROWS)), "")
        problem = f"stopped after {limit:.0f} s" if process.returncode < 0 else last[:300]
    found = {"step": name, "seconds": round(time.perf_counter() - start, 1), "rows": rows, "problem": problem}
    return found | ({"output": output[-3000:]} if problem else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("bench/gpu"), help="Folder of `gpu.json`.")
    parser.add_argument("--tiny", action="store_true", help="Tiny networks: a rehearsal, also on a CPU.")
    parser.add_argument("--seconds", type=float, default=520, help="Limit of all steps together.")
    parser.add_argument(
        "--steps", nargs="+", default=list(STEPS), choices=list(STEPS), help="Which steps, in this order."
    )
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step is not None:
        for row in STEPS[args.step][1](args.tiny):
            print(ROWS + json.dumps(row), flush=True)
        return
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device. `--tiny` rehearses on a CPU.")
    start, found = time.perf_counter(), []
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"card": card, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "tiny": args.tiny}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in args.steps:
        left = args.seconds - (time.perf_counter() - start)
        if left < 10:
            found.append({"step": name, "seconds": 0, "rows": [], "problem": "no time was left"})
        else:
            found.append(run_step(name, args.tiny, min(left, STEPS[name][0])))
        (args.output_dir / "gpu.json").write_text(json.dumps({**about, "steps": found}, indent=1) + "\n")
        print(
            f"{name}: {found[-1]['seconds']} s" + (f", {found[-1]['problem']}" if found[-1]["problem"] else ""),
            flush=True,
        )
    print(f"\n{about}")
    for result in found:
        print(f"\n{result['step']} ({result['seconds']} s)" + (f": {result['problem']}" if result["problem"] else ""))
        for row in result["rows"]:
            print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    if any(result["problem"] for result in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
