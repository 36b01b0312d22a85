# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Tables 2 and 4, Figures 4, 12, 14 and 15, ablations: how well reward models read noisy latents."""

from functools import partial
from typing import TYPE_CHECKING

from tapo_trl.metrics.plots import draw_distributions

from .lab import CURVE_STEPS, REWARDS, Lab
from .measure import CURVE_SIGMAS, SIGMAS
from .report import Report, lines
from .statistics import Estimate, compare, difference, estimate


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SPLITS = ("validation", "test")
RANGES = {"501-1000": "t in [501, 1000]", "1-500": "t in [1, 500]", "clean": "t = 0"}
RULES = {
    "ground_truth": "ground-truth target, which sees the clean latent",
    "reference": "inference-time target: the base model's velocity",
    "none": "logit alone",
}
TRAINED_WITH = "trained with the inference-time target"
NO_ENHANCEMENT, INFERENCE = "SLRM without score enhancement", f"SLRM {TRAINED_WITH}"
NO_TOKENS, ADDITIVE, CLEAN = "SLRM without task tokens", "SLRM, additive enhancement", "SLRM trained at t = 0 only"
ABLATIONS = (NO_TOKENS, f"{NO_TOKENS}, {TRAINED_WITH}", ADDITIVE, f"{ADDITIVE}, {TRAINED_WITH}", CLEAN)
TABLE_4_REWARDS = ("SPM", "LRM", NO_ENHANCEMENT, "SLRM", INFERENCE)


def table2(lab: Lab) -> Report:
    """Reward models by range of timesteps."""
    cells = {
        (name, rule): {split_range: _by_range(lab, name, rule, split_range) for split_range in RANGES}
        for name in _trained(lab)
        for rule in _rules(lab, name)
    }
    rows = [
        [f"{name} ({RULES[rule]})", *values.values(), estimate(_means(values))]
        for (name, rule), values in cells.items()
    ]
    claims = [
        f"{slrm} reads noisy latents better than {other} ({RULES[rule].split(':')[0].split(',')[0]}, {RANGES[name]}): "
        + compare(cells[slrm, rule][name], cells[other, "none"][name])
        for other in available(lab)
        if other in ("LRM", "DiNa-LRM", "SPM", NO_ENHANCEMENT)
        for slrm, rule in (("SLRM", "ground_truth"), ("SLRM", "reference"), (INFERENCE, "reference"))
        for name in ("501-1000", "1-500")
    ]
    leak = difference(cells["SLRM", "ground_truth"]["501-1000"].values, cells["SLRM", "reference"]["501-1000"].values)
    claims.append(
        f"What the leak of the clean latent is worth, SLRM at t in [501, 1000]: the ground-truth target is {leak} above the "
        "inference-time one."
    )
    return Report(
        title="Table 2: reward models by timestep",
        method=_pairs_text(lab),
        header=["reward model", *RANGES.values(), "mean"],
        rows=rows,
        claims=claims,
    )


def table4(lab: Lab) -> Report:
    """Accuracy at ten timesteps."""
    curves = {}
    for name in _trained(lab, TABLE_4_REWARDS):
        for rule in _rules(lab, name):
            label = _label(lab, name, rule)
            curves[label] = {
                round(1000 * sigma): _accuracy(lab, name, rule, str(sigma)) for sigma in SIGMAS if sigma > 0
            }
    paper, without = curves[f"SLRM ({RULES['ground_truth']})"], curves[NO_ENHANCEMENT]
    claims = [
        f"Score enhancement helps at t = {t} (ground-truth target): {compare(paper[t], without[t])}"
        for t in (101, 501, 901)
    ]
    for name, what in (
        ("SLRM", "It still does with the inference-time target"),
        (INFERENCE, "And if it is trained with that target"),
    ):
        curve = curves[f"{name} ({RULES['reference']})"]
        claims += [f"{what} at t = {t}: {compare(curve[t], without[t])}" for t in (101, 501, 901)]
    peak = max(paper, key=lambda t: paper[t].mean)
    claims.append(f"SLRM peaks at t = 501 in the paper; here at t = {peak} ({paper[peak]}).")
    return Report(
        title="Table 4: accuracy at ten timesteps",
        method=_pairs_text(lab),
        header=["reward model", *(f"t = {t}" for t in paper)],
        rows=[[label, *curve.values()] for label, curve in curves.items()],
        claims=claims,
        panels=[lines("accuracy on held-out pairs", "t", curves, chance=0.5)],
    )


def figure12(lab: Lab) -> Report:
    """How often the ranking of a pair flips along the noise levels."""
    curves, rows, never = {}, [], {}
    for name in _trained(lab):
        for rule in _rules(lab, name)[:2]:
            label, of_seeds = _label(lab, name, rule), partial(_of_seeds, lab, name, rule, "consistency")
            sigmas = lab.rewards(name)[0]["pairs"]["test"][rule]["consistency"]["flips_from_cleanest"]
            curves[label] = {
                round(1000 * float(sigma)): of_seeds(lambda part, sigma=sigma: part["flips_from_cleanest"][sigma])
                for sigma in sigmas
            }
            never[label] = of_seeds(lambda part: part["never_flips"])
            rows.append([label, of_seeds(lambda part: part["flips_per_pair"]), never[label]])
    without, paper = never[NO_ENHANCEMENT], never[f"SLRM ({RULES['ground_truth']})"]
    inference, trained = (never[f"{name} ({RULES['reference']})"] for name in ("SLRM", INFERENCE))
    return Report(
        title="Figure 12: rankings that flip between timesteps",
        method=_pairs_text(lab)
        + " A pair keeps its noise at all levels. Flips are counted over the levels t = 0, 1, 101, ..., 901.",
        header=["reward model", "flips per pair", "pairs that never flip"],
        rows=rows,
        claims=[
            f"The ranking of a pair depends on the timestep: {1 - without.mean:.0%} of the pairs flip without enhancement.",
            f"Enhancement makes rankings consistent (ground-truth target, pairs that never flip): {compare(paper, without)}",
            f"It still does with the inference-time target: {compare(inference, without)}",
            f"And if it is trained with that target: {compare(trained, without)}",
        ],
        panels=[lines("rankings other than at the cleanest level", "t", curves, chance=0.5)],
    )


def figure4(lab: Lab) -> Report:
    """Accuracy by noise level along the training of an SLRM."""
    shown = [("SLRM", "ground_truth"), ("SLRM", "reference"), (INFERENCE, "reference"), (NO_ENHANCEMENT, "none")]
    results = {name: lab.queue.make([lab.reward_curve(name, seed) for seed in lab.seeds]) for name, _ in shown}
    curves: dict[str, dict[str, dict[int, Estimate]]] = {}
    for name, rule in shown:
        for step in results[name][0]["checkpoints"]:
            splits = [result["checkpoints"][step].values() for result in results[name]]
            for sigma in CURVE_SIGMAS:
                values = [sum(part[rule][str(sigma)] for part in parts) / len(parts) for parts in splits]
                of_sigma = curves.setdefault(f"{name} ({RULES[rule]})", {}).setdefault(f"t = {1000 * sigma:.0f}", {})
                of_sigma[int(step)] = estimate(values)
    claims = []
    for label, by_sigma in curves.items():
        for level, curve in by_sigma.items():
            best, last = max(curve, key=lambda step: curve[step].mean), max(curve)
            claims.append(f"{label}, {level}: best after {best} steps ({curve[best]}), {curve[last]} after {last}.")
    without = curves[f"{NO_ENHANCEMENT} ({RULES['none']})"]
    for level, curve in without.items():
        first, last = min(curve), max(curve)
        claims.append(
            f"Without enhancement, more training harms the reading at {level}: {compare(curve[first], curve[last])}"
        )
    steps = list(next(iter(without.values())))
    return Report(
        title="Figure 4: accuracy along the training",
        method=_pairs_text(lab)
        + f" Trainings of {CURVE_STEPS} steps, more than in the other experiments; the learning rate falls along them.",
        header=["reward model", "noise level", *(f"after {step} steps" for step in steps)],
        rows=[
            [label, level, *curve.values()] for label, by_sigma in curves.items() for level, curve in by_sigma.items()
        ],
        claims=claims,
        panels=[lines(label, "training step", by_sigma, chance=0.5) for label, by_sigma in curves.items()],
    )


def figure14(lab: Lab) -> Report:
    """Distributions of the scores of chosen and rejected samples, with and without enhancement."""
    shown = [("SLRM", "ground_truth"), ("SLRM", "reference"), (INFERENCE, "reference"), (NO_ENHANCEMENT, "none")]
    rows, panels, areas = _distributions(lab, shown)
    with_, without = areas["SLRM", "ground_truth"], areas[NO_ENHANCEMENT, "none"]
    inference, trained = areas["SLRM", "reference"], areas[INFERENCE, "reference"]
    high = _level(with_, 0.901)
    return Report(
        title="Figure 14: distributions of the scores",
        method=_pairs_text(lab) + DISTRIBUTIONS_TEXT,
        header=DISTRIBUTIONS_HEADER,
        rows=rows,
        claims=[
            f"Enhancement keeps the two apart under noise (ground-truth target, t = 901): {compare(with_[high], without[high])}",
            f"It still does with the inference-time target: {compare(inference[high], without[high])}",
            f"And if it is trained with that target: {compare(trained[high], without[high])}",
        ],
        panels=panels,
    )


def figure15(lab: Lab) -> Report:
    """Distributions of the scores after training without noise."""
    shown = [("SLRM", "ground_truth"), (CLEAN, "ground_truth"), (CLEAN, "reference"), (CLEAN, "none")]
    rows, panels, areas = _distributions(lab, shown)
    claims = []
    for sigma in (0.0, 0.501, 0.901):
        level = _level(areas["SLRM", "ground_truth"], sigma)
        for rule in ("ground_truth", "reference", "none"):
            with_noise, clean = areas_of(lab, "SLRM", rule)[level], areas[CLEAN, rule][level]
            claims.append(
                f"Training with noise keeps the two apart better than at t = 0 only (t = {1000 * sigma:.0f}, {RULES[rule]}): "
                + compare(with_noise, clean)
            )
    return Report(
        title="Figure 15: distributions of the scores after training at t = 0 only",
        method=_pairs_text(lab) + DISTRIBUTIONS_TEXT,
        header=DISTRIBUTIONS_HEADER,
        rows=rows,
        claims=claims,
        panels=panels,
    )


DISTRIBUTIONS_TEXT = (
    " AUC: probability that a chosen sample scores higher than a rejected one, of whatever prompt. The picture shows the first "
    "seed on the test split."
)
DISTRIBUTIONS_HEADER = ["reward model", "AUC at t = 0", "AUC at t = 501", "AUC at t = 901"]


def areas_of(lab: Lab, name: str, rule: str) -> dict[str, Estimate]:
    """AUC of a reward model by noise level."""
    return {
        sigma: _of_seeds(lab, name, rule, "distributions", lambda part, sigma=sigma: part[sigma]["auc"])
        for sigma in lab.rewards(name)[0]["pairs"]["test"][rule]["distributions"]
    }


def _distributions(lab: Lab, shown: "Sequence[tuple[str, str]]") -> tuple[list, list, dict]:
    """Rows, panels and AUC of reward models under rules."""
    rows, panels, areas = [], [], {}
    for name, rule in shown:
        area = areas[name, rule] = areas_of(lab, name, rule)
        middle, high = _level(area, 0.501), _level(area, 0.901)
        rows.append([f"{name} ({RULES[rule]})", area["0.0"], area[middle], area[high]])
        first = lab.rewards(name)[0]["pairs"]["test"][rule]["distributions"]
        of_seed = {float(sigma): _with_numbers(values) for sigma, values in first.items()}
        panels.append(partial(draw_distributions, f"{name}, {rule}", of_seed))
    return rows, panels, areas


def ablation(lab: Lab) -> Report:
    """The parts of SLRM, one change at a time."""
    names = _trained(lab, ("SLRM", INFERENCE, NO_ENHANCEMENT, "LRM", *ABLATIONS))
    cells = {
        (name, rule): {split_range: _by_range(lab, name, rule, split_range) for split_range in RANGES}
        for name in names
        for rule in _rules(lab, name)
    }
    claims = []
    for changed, whole, rule in (
        (NO_TOKENS, "SLRM", "ground_truth"),
        (f"{NO_TOKENS}, {TRAINED_WITH}", INFERENCE, "reference"),
        (ADDITIVE, "SLRM", "ground_truth"),
        (f"{ADDITIVE}, {TRAINED_WITH}", INFERENCE, "reference"),
        (CLEAN, "SLRM", "ground_truth"),
        (CLEAN, "SLRM", "none"),
    ):
        claims += [
            f"{whole} is better than {changed} ({RANGES[of_range]}, {RULES[rule]}): "
            + compare(cells[whole, rule][of_range], cells[changed, rule][of_range])
            for of_range in RANGES
        ]
    return Report(
        title="Ablation: the parts of SLRM, one change at a time",
        method=_pairs_text(lab)
        + " Without task tokens, the logit is the similarity of the mean image token after the last block to the pooled prompt "
        "embedding, and the enhancement stays. An additive enhancement is S + exp(-rho d) in place of S exp(-rho d).",
        header=["reward model", *RANGES.values(), "mean"],
        rows=[
            [f"{name} ({RULES[rule]})", *values.values(), estimate(_means(values))]
            for (name, rule), values in cells.items()
        ],
        claims=claims,
    )


COMPARED_REWARDS = tuple(name for name in REWARDS if name not in ("SLRM, 20 steps", *ABLATIONS))


def available(lab: Lab, names: "Sequence[str]" = COMPARED_REWARDS) -> list[str]:
    """The reward models for which the world has a recipe."""
    return [name for name in names if REWARDS[name][0] in lab.world.recipes]


def _trained(lab: Lab, names: "Sequence[str]" = COMPARED_REWARDS) -> list[str]:
    """The same, once they are trained, all in one go."""
    names = available(lab, names)
    lab.queue.make([lab.reward(name, seed) for name in names for seed in lab.seeds])
    return names


def accuracy_by_seed(lab: Lab, name: str, rule: str) -> Estimate:
    """Mean accuracy over all noise levels and both splits, by seed."""
    return _accuracies(lab, name, rule, lambda accuracy: accuracy["accuracy"])


def _label(lab: Lab, name: str, rule: str) -> str:
    """A reward model by its name, and by the rule where there is a choice."""
    return name if len(_rules(lab, name)) == 1 else f"{name} ({RULES[rule]})"


def inference_rule(lab: Lab, name: str) -> str:
    """How rollouts can score: with the base's velocity, or by the logit where there is no enhancement."""
    return "reference" if "reference" in _rules(lab, name) else "none"


def _rules(lab: Lab, name: str) -> list[str]:
    """The rules that say something of a reward model; without enhancement in training only the logit does."""
    rules = list(lab.rewards(name)[0]["pairs"]["test"])
    options = REWARDS[name][1]
    return ["none"] if options.get("velocity_target") == "none" else rules


def _of_seeds(lab: Lab, name: str, rule: str, part: str, read: "Callable[[dict], float]") -> Estimate:
    """What `read` finds in a part of the results of each seed, the mean of both splits."""
    results = [result["pairs"] for result in lab.rewards(name)]
    return estimate([sum(read(pairs[split][rule][part]) for split in SPLITS) / len(SPLITS) for pairs in results])


def _accuracies(lab: Lab, name: str, rule: str, read: "Callable[[dict], float]") -> Estimate:
    return _of_seeds(lab, name, rule, "accuracy", read)


def _by_range(lab: Lab, name: str, rule: str, split_range: str) -> Estimate:
    return _accuracies(lab, name, rule, lambda accuracy: accuracy["by_range"][split_range]["accuracy"])


def _accuracy(lab: Lab, name: str, rule: str, sigma: str) -> Estimate:
    return _accuracies(lab, name, rule, lambda accuracy: accuracy["by_sigma"][sigma])


def _means(values: dict[str, Estimate]) -> list[float]:
    seeds = zip(*(value.values for value in values.values()), strict=True)
    return [sum(seed) / len(seed) for seed in seeds]


def _level(curve: dict[str, Estimate], sigma: float) -> str:
    return min(curve, key=lambda level: abs(float(level) - sigma))


def _with_numbers(values: dict) -> dict:
    """Quantiles by number, which JSON keeps by text."""
    for side in ("chosen", "rejected"):
        values[side]["quantiles"] = {float(level): value for level, value in values[side]["quantiles"].items()}
    return values


def _pairs_text(lab: Lab) -> str:
    return (
        f"World `{lab.world.name}`: pairs of the splits `validation` and `test`, whose captions no reward model was trained "
        f"on. Mean over {len(lab.seeds)} training seeds with the 95 % interval. Chance is 0.5. The learning rates are those "
        "of the recipes."
    )
