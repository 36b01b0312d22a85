# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""`tapo-trl bench`: what a pair of trajectories costs on this machine, with random weights."""

from typing import TYPE_CHECKING, Any

from .parser import RecipeParser


if TYPE_CHECKING:
    from ..benchmark import Bench, Measurement, Setting


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl bench`."""
    from .arguments import BenchArguments

    return RecipeParser((BenchArguments,), prog="tapo-trl bench")


def make_bench(args) -> "Bench":
    """
    The networks to measure.

    Args:
        args ([`BenchArguments`]): Their size, and the options of the rollout.
    """
    import torch

    from ..benchmark import Bench, randomize
    from ..estimate.known_pipelines import SIZES
    from ..estimate.meta_models import make_meta_policy
    from ..policies import load_policy
    from ..policies.loading import parse_dtype
    from ..trainer.tapo_config import TAPOConfig

    device, dtype = torch.device(args.device), parse_dtype(args.torch_dtype)
    if args.model_name_or_path is not None:
        policy = load_policy(args.model_name_or_path, torch_dtype=dtype)
        policy.transformer.to(device)
    else:
        policy = make_meta_policy(*SIZES[args.size].pipeline)
        randomize(policy, device, dtype)
    return Bench(
        policy,
        max_sequence_length=args.max_sequence_length,
        lora_r=args.lora_r,
        guidance_scale=args.guidance_scale,
        score_batch_size=args.score_batch_size,
        transition_batch_size=args.transition_batch_size,
        options=TAPOConfig(
            args.output_dir,
            use_cpu=device.type == "cpu",
            bf16=False,
            share_backbone=args.share_backbone,
            layerwise_casting=args.layerwise_casting,
            reward_layerwise_casting=args.reward_layerwise_casting,
            reward_group_offload=args.reward_group_offload,
            attention_backend=args.attention_backend,
            torch_compile=args.torch_compile,
        ),
    )


def settings(args) -> list["Setting"]:
    """The grid of n, P and prompts, then the sweeps of T and of the resolution from its first n and last P."""
    from dataclasses import replace
    from itertools import product

    from ..benchmark import Setting

    size = (args.height, args.width) if args.num_frames is None else (args.height, args.width, args.num_frames)
    steps = args.num_inference_steps
    grid = [
        Setting(steps, n, candidates, prompts, size)
        for prompts, candidates, n in product(args.prompts, args.num_candidates, args.num_sde_steps)
    ]
    base = Setting(steps, args.num_sde_steps[0], args.num_candidates[-1], args.prompts[0], size)
    sweeps = [replace(base, num_inference_steps=value) for value in args.sweep_steps]
    sweeps += [replace(base, size=(value, value, *size[2:])) for value in args.sweep_resolutions]
    return list(dict.fromkeys(grid + sweeps))


def summarize(measurements: list["Measurement"], peak_flops: float) -> dict[str, Any]:
    """
    What the measurements say together.

    Args:
        measurements (`list[Measurement]`): One per setting.
        peak_flops (`float`): Operations per second of the device's best matrix product.

    Returns:
        `dict[str, Any]`: `rows`, one per setting; `fits`, by prompts per batch, seconds of a rollout against its forwards at
            the first resolution, and of all rollouts against their operations; `n`, the cost of each n over the least.
    """
    from ..benchmark import linear_fit

    rows, first = [], measurements[0].setting
    for m in measurements:
        setting, update = m.setting, m.seconds["update"]
        rows.append(
            {
                "size": "x".join(map(str, setting.size)),
                "T": setting.num_inference_steps,
                "n": setting.num_sde_steps,
                "P": setting.num_candidates,
                "prompts": setting.prompts,
                "sampling s": m.seconds["sampling"],
                "scoring s": m.seconds["scoring"],
                "update s": update,
                "rollout / bare forwards": m.rollout_seconds / m.bare_seconds,
                "policy forwards": m.forwards["policy"],
                "reward forwards": m.forwards["reward"],
                "update forwards": m.forwards["training"] + m.forwards["reference"],
                "rollout TFLOP": m.flops["rollout"] / 1e12,
                "update TFLOP": m.flops["update"] / 1e12,
                "rollout of peak": m.flops["rollout"] / m.rollout_seconds / peak_flops,
                "update of peak": m.flops["update"] / update / peak_flops,
                "peak GiB": m.peak_bytes / 2**30,
            }
        )
    fits, ratios = {}, {}
    for prompts in sorted({m.setting.prompts for m in measurements}):
        same = [m for m in measurements if m.setting.size == first.size and m.setting.prompts == prompts]
        if len({m.rollout_forwards for m in same}) > 2:
            fits[f"seconds of a rollout against its forwards, {prompts} prompts"] = linear_fit(
                [m.rollout_forwards for m in same], [m.rollout_seconds for m in same]
            )
        for candidates in sorted({m.setting.num_candidates for m in same}):
            row = [
                m
                for m in same
                if m.setting.num_candidates == candidates
                and m.setting.num_inference_steps == first.num_inference_steps
            ]
            least = min(row, key=lambda m: m.setting.num_sde_steps)
            for m in row:
                if m is not least:
                    name = f"n = {m.setting.num_sde_steps} over {least.setting.num_sde_steps}, P = {candidates}, {prompts} prompts"
                    ratios[name] = {
                        "seconds": m.rollout_seconds / least.rollout_seconds,
                        "forwards": m.rollout_forwards / least.rollout_forwards,
                    }
    alone = [m for m in measurements if m.setting.prompts == first.prompts]
    if len({m.flops["rollout"] for m in alone}) > 2:
        fits[f"seconds of a rollout against its TFLOP, all sizes, {first.prompts} prompts"] = linear_fit(
            [m.flops["rollout"] / 1e12 for m in alone], [m.rollout_seconds for m in alone]
        )
    return {"rows": rows, "fits": fits, "n": ratios}


def format_report(report: dict[str, Any]) -> str:
    """The report in Markdown."""

    def cell(value) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    def table(rows: list[dict[str, Any]]) -> list[str]:
        names = list(rows[0])
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        return [*lines, *("| " + " | ".join(map(cell, row.values())) + " |" for row in rows), ""]

    machine = report["machine"]
    lines = [
        f"# {report['settings']['name']} on {machine['device']}",
        "",
        f"PyTorch {machine['torch']}, {machine['dtype']}, {machine['threads']} CPU threads. The best matrix product makes "
        f"{machine['peak_tflops']:.3g} TFLOP/s. Weights of policy and reward model: {machine['weights_gib']:.3g} GiB. "
        "Seconds, forwards and TFLOP are those of one prompt, that is of "
        "one pair of trajectories; guidance counts as two forwards, and what checkpointing computes again as none.",
        "",
        *table(report["rows"]),
    ]
    if report["fits"]:
        lines += table([{"least squares": name} | fit for name, fit in report["fits"].items()])
    if report["n"]:
        lines += table([{"rollout": name} | ratio for name, ratio in report["n"].items()])
    return "\n".join(lines)


def plot_report(report: dict[str, Any], path) -> None:
    """Draw the stages of every setting, and the seconds of rollouts against their forwards."""
    from ..metrics.plots import check_matplotlib

    check_matplotlib()
    from matplotlib.figure import Figure

    rows = report["rows"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = [f"{row['size']} T{row['T']} n{row['n']} P{row['P']} x{row['prompts']}" for row in rows]
    below = [0.0] * len(rows)
    for stage in ("sampling s", "scoring s", "update s"):
        values = [row[stage] for row in rows]
        left.bar(range(len(rows)), values, bottom=below, label=stage[:-2])
        below = [a + b for a, b in zip(below, values, strict=True)]
    left.set_xticks(range(len(rows)), labels, rotation=90, fontsize=5)
    left.set_ylabel("seconds per pair of trajectories")
    left.legend()
    for prompts in sorted({row["prompts"] for row in rows}):
        chosen = [row for row in rows if row["prompts"] == prompts and row["size"] == rows[0]["size"]]
        x = [row["policy forwards"] + row["reward forwards"] for row in chosen]
        (points,) = right.plot(
            x, [row["sampling s"] + row["scoring s"] for row in chosen], "o", label=f"{prompts} prompts"
        )
        fit = report["fits"].get(f"seconds of a rollout against its forwards, {prompts} prompts")
        if fit is not None:
            line = [fit["intercept"] + fit["slope"] * value for value in (min(x), max(x))]
            right.plot((min(x), max(x)), line, color=points.get_color(), label=f"R² = {fit['r2']:.3f}")
    right.set_xlabel("forwards of a rollout, per pair")
    right.set_ylabel("seconds of a rollout, per pair")
    right.legend()
    figure.savefig(path, dpi=150)


def main(args) -> None:
    """
    Writes `bench.json`, `bench.md` and `bench.png` and prints the table.

    Args:
        args ([`BenchArguments`]): What to measure.
    """
    import json
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from ..benchmark import matmul_peak
    from ..policies.loading import parse_dtype

    bench = make_bench(args)
    device, dtype = torch.device(args.device), parse_dtype(args.torch_dtype)
    peak = matmul_peak(device, dtype)
    measurements = []
    for setting in settings(args):
        measurements.append(bench.measure(setting, args.repeats, warm_up=args.warm_up))
        print(setting, {name: round(value, 4) for name, value in measurements[-1].seconds.items()}, flush=True)
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "dtype": args.torch_dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "peak_tflops": peak / 1e12,
        "weights_gib": bench.weight_bytes / 2**30,
    }
    options = asdict(args) | {"name": args.model_name_or_path or args.size}
    report = {"machine": machine, "settings": options, **summarize(measurements, peak)}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "bench.md").write_text(format_report(report), encoding="utf-8")
    if args.plot:
        plot_report(report, folder / "bench.png")
    print(format_report(report))
