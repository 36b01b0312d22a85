# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""`tapo-trl bench`: what a pair of trajectories costs on this machine, with random weights."""

from typing import TYPE_CHECKING, Any

from .parser import RecipeParser


if TYPE_CHECKING:
    from ..benchmark import Bench, Measurement, Setting

STAGES = ("sampling", "scoring", "update")
ONE_EXPERT = (
    " Only the expert `transformer` was measured, at all noise levels: seconds hold for both, since a sample goes through one of the "
    "two, but the weights of `transformer_2` are not in the memory."
)
TRAINER_OPTIONS = (  # of `TAPOConfig`
    *("max_sequence_length", "guidance_scale", "score_batch_size", "transition_batch_size", "share_backbone"),
    *("layerwise_casting", "reward_layerwise_casting", "reward_group_offload", "attention_backend", "torch_compile"),
    "activation_checkpointing",
)


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl bench`."""
    from .arguments import BenchArguments

    return RecipeParser((BenchArguments,), prog="tapo-trl bench")


def make_bench(args) -> "Bench":
    """
    The trainer to measure.

    Args:
        args ([`BenchArguments`]): The size of its networks, and its options.
    """
    import torch

    from ..benchmark import Bench, randomize
    from ..estimate.meta_models import make_meta_policy
    from ..policies import load_policy
    from ..policies.loading import family_of, known_pipelines, parse_dtype
    from ..trainer.tapo_config import TAPOConfig
    from .arguments import SIZES

    device, dtype, size = torch.device(args.device), parse_dtype(args.torch_dtype), SIZES[args.size]
    pipeline, components = known_pipelines()[size.repository]
    if args.model_name_or_path is not None:
        policy = load_policy(args.model_name_or_path, torch_dtype=dtype)
    elif size.tiny is not None:
        policy = load_policy(family_of(pipeline).policy_class.tiny(**size.tiny))
        policy.transformer.to(dtype)
    else:
        policy = make_meta_policy(pipeline, components)
        randomize(policy, device, dtype)
    num_experts = len(policy.experts)
    if num_experts > 1:
        policy = policy.only("high")  # as large as the other one
    policy.transformer.to(device)
    options = {name: getattr(args, name) for name in TRAINER_OPTIONS}
    config = TAPOConfig(
        args.output_dir,
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        velocity_target="parent",
        report_to="none",
        disable_tqdm=True,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        **options,
    )
    return Bench(policy, config, args.lora_r, num_experts)


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
    Put measurements together.

    Args:
        measurements (`list[Measurement]`): One per setting.
        peak_flops (`float`): Operations per second of the device's best matrix product.

    Returns:
        `dict[str, Any]`: `rows`, one per setting; `fits`, seconds of a rollout against its forwards at the first resolution, by
            prompts per batch, and against its operations at all resolutions; `n`, the cost of each n over the least.
    """
    from ..benchmark import linear_fit

    first = measurements[0].setting
    fits, ratios = {}, {}
    for prompts in sorted({m.setting.prompts for m in measurements}):
        same = [m for m in measurements if m.setting.size == first.size and m.setting.prompts == prompts]
        if len({m.rollout_forwards for m in same}) > 2:
            points = [m.rollout_forwards for m in same], [m.rollout_seconds for m in same]
            fits[f"seconds of a rollout against its forwards, {prompts} prompts"] = linear_fit(*points)
        for candidates in sorted({m.setting.num_candidates for m in same}):
            row = [m for m in same if m.setting.num_candidates == candidates]
            row = [m for m in row if m.setting.num_inference_steps == first.num_inference_steps]
            least = min(row, key=lambda m: m.setting.num_sde_steps)
            for m in [m for m in row if m is not least]:
                n = f"n = {m.setting.num_sde_steps} over {least.setting.num_sde_steps}"
                ratios[f"{n}, P = {candidates}, {prompts} prompts"] = {
                    "seconds": m.rollout_seconds / least.rollout_seconds,
                    "forwards": m.rollout_forwards / least.rollout_forwards,
                }
    alone = [m for m in measurements if m.setting.prompts == first.prompts]
    if len({m.flops["rollout"] for m in alone}) > 2:
        points = [m.flops["rollout"] / 1e12 for m in alone], [m.rollout_seconds for m in alone]
        fits[f"seconds of a rollout against its TFLOP, all sizes, {first.prompts} prompts"] = linear_fit(*points)
    return {"rows": [_row(m, peak_flops) for m in measurements], "fits": fits, "n": ratios}


def _row(m: "Measurement", peak_flops: float) -> dict[str, Any]:
    """What the table says of a setting."""
    return {
        "size": "x".join(map(str, m.setting.size)),
        "T": m.setting.num_inference_steps,
        "n": m.setting.num_sde_steps,
        "P": m.setting.num_candidates,
        "prompts": m.setting.prompts,
        **{f"{stage} s": m.seconds[stage] for stage in STAGES},
        "rollout / bare forwards": m.rollout_seconds / m.bare_seconds,
        "policy forwards": m.forwards["policy"],
        "reward forwards": m.forwards["reward"],
        "update forwards": m.forwards["training"] + m.forwards["reference"],
        "rollout TFLOP": m.flops["rollout"] / 1e12,
        "update TFLOP": m.flops["update"] / 1e12,
        "rollout of peak": m.flops["rollout"] / m.rollout_seconds / peak_flops,
        "update of peak": m.flops["update"] / m.seconds["update"] / peak_flops,
        "peak GiB": m.peak_bytes / 2**30,
    }


def format_report(report: dict[str, Any]) -> str:
    """The report in Markdown."""

    def table(rows: list[dict[str, Any]]) -> list[str]:
        def cell(value: Any) -> str:
            return f"{value:.3g}" if isinstance(value, float) else str(value)

        cells = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
        return [*(f"| {' | '.join(line)} |" for line in cells), ""]

    machine = report["machine"]
    lines = [
        f"# {report['settings']['name']} on {machine['device']}",
        "",
        f"PyTorch {machine['torch']}, {machine['dtype']}, {machine['threads']} CPU threads. The best matrix product makes "
        f"{machine['peak_tflops']:.3g} TFLOP/s. Weights of policy and reward model: {machine['weights_gib']:.3g} GiB. "
        "Seconds, forwards and TFLOP are those of one prompt, that is of "
        "one pair of trajectories; guidance counts as two forwards, and what checkpointing computes again as none."
        + ONE_EXPERT
        * (machine.get("experts", 1) > 1),
        "",
        *table(report["rows"]),
    ]
    if report.get("chunks"):
        lines += [
            "The update by the size of its chunks, beside one that is nothing but its forwards and backwards:",
            "",
        ]
        lines += table(report["chunks"])
    for name, parts in (("least squares", report["fits"]), ("rollout", report["n"])):
        if parts:
            lines += table([{name: key} | values for key, values in parts.items()])
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
    for stage in STAGES:
        values = [row[f"{stage} s"] for row in rows]
        left.bar(range(len(rows)), values, bottom=below, label=stage)
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
    chunks = bench.update_by_chunk(settings(args)[0], args.chunk_sizes, args.repeats) if args.chunk_sizes else []
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "dtype": args.torch_dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "peak_tflops": peak / 1e12,
        "weights_gib": bench.weight_bytes / 2**30,
        "experts": bench.num_experts,
    }
    options = asdict(args) | {"name": args.model_name_or_path or args.size}
    report = {"machine": machine, "settings": options, **summarize(measurements, peak), "chunks": chunks}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "bench.md").write_text(format_report(report), encoding="utf-8")
    if args.plot:
        plot_report(report, folder / "bench.png")
    print(format_report(report))
