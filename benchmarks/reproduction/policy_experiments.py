# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Tables 1 and 3, Figures 10 and 11, and what the paper does not show: when two trajectories beat one."""

from dataclasses import replace
from typing import Any

from .lab import MAX_RATES, METHODS, TAPO, Lab, Method
from .report import Report, bars, grid, lines
from .reward_experiments import ADDITIVE, NO_TOKENS, accuracy_by_seed, available, inference_rule
from .runs import Run
from .statistics import Estimate, compare, difference, verdict


BETAS = (20.0, 100.0, 500.0, 1000.0, 2000.0, 5000.0)
SDE_STEPS = (2, 4, 8, 16)
GRID = ((2, 4, 8, 16), (2, 4, 8))  # of stochastic steps and candidates

EVEN_TAPO = replace(TAPO, options={**TAPO.options, "step_weighting": "velocity"})

PAIRINGS: dict[str, dict] = {
    "TAPO": {"pairing": "tapo"},
    "TAPO's branches, pairs within each": {"pairing": "tapo_within"},
    "SPO's pairs": {"pairing": "spo", "pair_threshold": [0.0]},
    "SPO's pairs, goes on with the best": {"pairing": "spo", "pair_threshold": [0.0], "continue_with": "best"},
}
HYBRIDS = ("TAPO's branches, pairs within each", "SPO's pairs, goes on with the best")  # without further changes alone
CONDITIONS: dict[str, dict] = {
    "n = 8, P = 4": {},
    "fewer stochastic steps, n = 2": {"options": {"num_sde_steps": 2}},
    "more candidates, P = 8": {"options": {"num_candidates": 8}},
    "a reward model of 20 training steps": {"reward": "SLRM, 20 steps"},
    "a DiNa-LRM as reward model": {"reward": "DiNa-LRM"},
    "the harder half of the prompts": {"hard_prompts": True},
}


def _even(reward: str = "SLRM", **options) -> Method:
    return replace(EVEN_TAPO, reward=reward, options={**EVEN_TAPO.options, **options})


VARIANTS: dict[str, Method] = {
    "TAPO as in the paper": TAPO,
    "with equal velocity gradients (step_weighting)": EVEN_TAPO,
    "with that and KL (kl_coef 20)": _even(kl_coef=20.0),
    "with that and pairs within branches": _even(pairing="tapo_within"),
    "with that and the reference's velocity as target": _even(velocity_target="reference"),
    "with that and beta 200": _even(beta=200.0),
    "with that and scores of one-step estimates": _even(score_estimates=True, velocity_target="none"),
    "with that and a margin (pair_threshold 0.5)": _even(pair_threshold=[0.5]),
    "with that and consistent pairs alone": _even(consistent_pairs=True),
    "with that and an SLRM trained with the inference-time target": _even(
        "SLRM trained with the inference-time target"
    ),
    "with that and an SLRM without score enhancement": _even("SLRM without score enhancement"),
    "with that and a DiNa-LRM": _even("DiNa-LRM"),
}

LONGER = 4
"""Budget of [`longer`], in budgets of Table 1."""
LONGER_SAMPLES = 4
"""Samples of each held-out prompt that [`longer`] judges at least."""
SEARCHED_BETAS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "TAPO": (EVEN_TAPO, (62.5, 250.0, 1000.0)),
    "SPO's pairs": (_even(**PAIRINGS["SPO's pairs"]), (62.5, 250.0, 1000.0)),
    "online DPO": (METHODS["Online Diffusion-DPO"], (25.0, 100.0, 400.0)),
    "Diffusion-DPO": (METHODS["Diffusion-DPO"], (62.5, 250.0, 1000.0)),
}


def table1(lab: Lab) -> Report:
    """Methods by judge, at the same number of policy forwards."""
    methods = {name: method for name, method in METHODS.items() if _is_available(lab, method)}
    finalists = lab.finalists(methods)
    rows, primary = [[*_base_row(lab), ""]], {}
    for name, pair in finalists.items():
        primary[name] = lab.judged(pair[0])
        rows.append([name, *_finalist_cells(lab, pair)])
    base = _base(lab)
    claims = [
        f"TAPO against {name}: {compare(primary['TAPO'], value)}"
        for name, value in {"the base model": base, **primary}.items()
        if name != "TAPO"
    ]
    return Report(
        title="Table 1: methods at the same cost",
        method=_method_text(lab),
        header=["method", *TRAINING_HEADER, *lab.world.describe, _second_header(lab)],
        rows=rows,
        claims=claims,
        panels=[bars(lab.world.describe[lab.world.primary], primary, start=base.mean)],
    )


OTHER_COMPONENTS = ("SLRM without score enhancement", NO_TOKENS, "LRM", ADDITIVE)
COMPONENTS = (*OTHER_COMPONENTS, "SLRM", "SLRM trained with the inference-time target")


def table3(lab: Lab) -> Report:
    """Components of the reward model, and the number of stochastic steps."""
    rows, claims, judged, accuracies = [], [], {}, {}
    components = available(lab, COMPONENTS)
    by_reward = _of_seeds(lab, {name: (_with_reward(name), {}) for name in components})
    by_steps = _of_seeds(lab, {steps: (TAPO, {"num_sde_steps": steps}) for steps in SDE_STEPS})
    for name, runs in by_reward.items():
        accuracies[name] = accuracy_by_seed(lab, name, inference_rule(lab, name))
        judged[name] = lab.judged(runs)
        cells = [accuracies[name], _seconds_per_pair(lab, runs)]
        rows.append([f"reward: {name}", *cells, *_training_cells(lab, runs), *_judge_cells(lab, runs)])
    for steps, runs in by_steps.items():
        judged[steps] = lab.judged(runs)
        cells = ["", _seconds_per_pair(lab, runs)]
        rows.append([f"TAPO, n = {steps}", *cells, *_training_cells(lab, runs), *_judge_cells(lab, runs)])
    for name in components:
        if name in OTHER_COMPONENTS:
            claims += [
                f"SLRM is the better reward model than {name} (accuracy, inference-time target): "
                + compare(accuracies["SLRM"], accuracies[name]),
                f"TAPO is better with SLRM than with {name}: " + compare(judged["SLRM"], judged[name]),
            ]
    claims += [f"n = 8 is better than n = {steps}: {compare(judged[8], judged[steps])}" for steps in (2, 4, 16)]
    return Report(
        title="Table 3: components of SLRM, and the number of stochastic steps n",
        method=_method_text(
            lab,
            f"{TAPOS_RATE} All runs have {lab.world.num_steps} steps, so that more stochastic steps cost more. Seconds per pair are those of the "
            "whole training, with its start, of the fastest seed, and depend on what else the machine did: compare with `tapo-trl bench`, "
            "which measures sampling, scoring and update in one run.",
        ),
        header=[
            "",
            "accuracy of the reward, inference-time target",
            "seconds per pair",
            *TRAINING_HEADER,
            *lab.world.describe,
        ],
        rows=rows,
        claims=claims,
        panels=[
            lines(
                lab.world.describe[lab.world.primary],
                "stochastic steps n",
                {"TAPO": {steps: judged[steps] for steps in SDE_STEPS}},
                log_x=True,
            )
        ],
    )


def figure10(lab: Lab) -> Report:
    """How much beta matters."""
    runs = _of_seeds(lab, {beta: (TAPO, {"beta": beta}) for beta in BETAS})
    judged = {beta: lab.judged(of_seeds) for beta, of_seeds in runs.items()}
    best = max(judged, key=lambda beta: judged[beta].mean)
    return Report(
        title="Figure 10: the strength of the regularisation, beta",
        method=_method_text(lab, TAPOS_RATE),
        header=["beta", *TRAINING_HEADER, *lab.world.describe],
        rows=[[f"{beta:g}", *_training_cells(lab, run), *_judge_cells(lab, run)] for beta, run in runs.items()],
        claims=[
            f"beta = 1000 is better than 20: {compare(judged[1000.0], judged[20.0])}",
            f"beta = 1000 is better than 5000: {compare(judged[1000.0], judged[5000.0])}",
            f"The best is 500 or 1000 in the paper; here it is {best:g} ({judged[best]}).",
        ],
        panels=[
            lines(
                "judges",
                "beta",
                {judge: {beta: lab.judged(run, judge) for beta, run in runs.items()} for judge in lab.world.describe},
                log_x=True,
            )
        ],
    )


def figure11(lab: Lab) -> Report:
    """Stochastic steps by candidates, and where the reward is hacked."""
    cells = {
        (steps, candidates): (TAPO, {"num_sde_steps": steps, "num_candidates": candidates})
        for steps in GRID[0]
        for candidates in GRID[1]
    }
    runs = _of_seeds(lab, cells)
    judged = {cell: lab.judged(of_seeds) for cell, of_seeds in runs.items()}
    reward = {cell: lab.judged(of_seeds, "reward") for cell, of_seeds in runs.items()}
    start = lab.judged([lab.base("SLRM", seed) for seed in lab.seeds], "reward")
    rows = [
        [steps, candidates, *_training_cells(lab, run), reward[steps, candidates], *_judge_cells(lab, run)]
        for (steps, candidates), run in runs.items()
    ]
    corner, paper = (GRID[0][-1], GRID[1][-1]), (8, 4)
    hacked = f"reward {reward[corner]} against {reward[paper]} at n = 8, P = 4, judge {judged[corner]} against {judged[paper]}"
    lower_judge = verdict(difference(judged[paper].values, judged[corner].values))
    return Report(
        title="Figure 11: stochastic steps n by candidates P",
        method=_method_text(lab, f"{TAPOS_RATE} The reward of the base model's samples is {start}."),
        header=["n", "P", *TRAINING_HEADER, "reward of the samples", *lab.world.describe],
        rows=rows,
        claims=[
            f"More stochastic steps are better at P = 4 (16 against 2): {compare(judged[16, 4], judged[2, 4])}",
            f"The corner of the largest n and P is hacked, its judges fall while its reward rises: **{lower_judge}** ({hacked}).",
        ],
        panels=[
            _grid(lab.world.describe[lab.world.primary], judged),
            _grid("reward of the samples", reward),
        ],
    )


def pairings(lab: Lab) -> Report:
    """One trajectory or two, at the same number of policy forwards."""
    rows, claims, of_all = [], [], {}
    conditions = {
        condition: {name: _pairing(name, changes) for name in PAIRINGS if not changes or name not in HYBRIDS}
        for condition, changes in CONDITIONS.items()
        if available(lab, [changes.get("reward", "SLRM")])
    }
    finalists = lab.finalists(
        {
            f"{name}; {condition}": method
            for condition, methods in conditions.items()
            for name, method in methods.items()
        }
    )
    for condition, methods in conditions.items():
        judged = {}
        for name in methods:
            pair = finalists[f"{name}; {condition}"]
            judged[name] = lab.judged(pair[0])
            rows.append([condition, name, *_finalist_cells(lab, pair)])
        claims += [
            f"{condition}: TAPO against {name}: {compare(judged['TAPO'], value)}"
            for name, value in judged.items()
            if name != "TAPO"
        ]
        of_all |= {f"{condition}: {name}": value for name, value in judged.items()}
    return Report(
        title="One trajectory or two: TAPO's pairs, SPO's, and hybrids",
        method=_method_text(
            lab,
            "All pairings have beta = 1000, no clipping, no threshold and `step_weighting: velocity`, so that they differ in "
            "their pairs alone. The harder half of the prompts is that whose samples by the base have the least reward.",
        ),
        header=["condition", "pairs", *TRAINING_HEADER, *lab.world.describe, _second_header(lab)],
        rows=rows,
        claims=claims,
        panels=[bars(lab.world.describe[lab.world.primary], of_all, start=_base(lab).mean)],
    )


def recipe(lab: Lab) -> Report:
    """Which changes make the paper's TAPO better."""
    methods = {name: method for name, method in VARIANTS.items() if _is_available(lab, method)}
    first, second, *others = methods
    finalists = lab.finalists(methods)
    judged = {name: lab.judged(pair[0]) for name, pair in finalists.items()}
    return Report(
        title="Changes of TAPO, at the same cost",
        method=_method_text(lab),
        header=["variant", *TRAINING_HEADER, *lab.world.describe, _second_header(lab)],
        rows=[[name, *_finalist_cells(lab, pair)] for name, pair in finalists.items()],
        claims=[
            *(f"{name}, against the paper's: {compare(judged[name], judged[first])}" for name in (second, *others)),
            *(f"{name}, against step_weighting alone: {compare(judged[name], judged[second])}" for name in others),
        ],
        panels=[bars(lab.world.describe[lab.world.primary], judged, start=_base(lab).mean)],
    )


def longer(lab: Lab) -> Report:
    """Methods at four times the cost, with a beta of their own."""
    final = replace(lab, samples_per_prompt=max(lab.samples_per_prompt, LONGER_SAMPLES))
    methods, rates, trials = {}, {}, {}
    for name, (method, betas) in SEARCHED_BETAS.items():
        if _is_available(lab, method):
            arms = {f"{name}, beta {beta:g}": _with_beta(method, beta) for beta in betas}
            of_arms = {run: arms[arm] for arm, runs in lab.search(arms).items() for run in runs}
            best = max(of_arms, key=lambda run: lab.on_validation([run]))
            methods[name], trials[name] = of_arms[best], list(of_arms)
            rates[name] = (best.options["learning_rate"] / 4, best.options["learning_rate"] / 2)
    rows, judged, found = [], {}, []
    for name, (runs, long) in _longer_runs(final, methods, rates).items():
        judged[name] = final.judged(runs)
        tried = f"{len(trials[name])} + {len(long)}"
        cells = [*_training_cells(final, runs), *_judge_cells(final, runs)]
        rows.append([name, f"{runs[0].options['beta']:g}", tried, *cells])
        texts = [
            f"beta {run.options['beta']:g} at {run.options['learning_rate']:g} gives {lab.on_validation([run]):.2f}"
            for run in trials[name]
        ]
        texts += [
            f"{LONGER} times as long at {run.options['learning_rate']:g} {final.on_validation([run]):.2f}"
            for run in long
        ]
        found.append(f"Trials of {name}, `validation`: {', '.join(texts)}")
    return Report(
        title=f"Methods at {LONGER} times the cost, with a beta of their own",
        method=_method_text(
            final,
            "Pairs of steps have `step_weighting: velocity` and no clipping.",
            finals=f"each beta has these trials, judged by {lab.samples_per_prompt} samples; the beta of the best trial is kept, and the learning "
            f"rate is searched again with {LONGER} times the steps, first with a quarter and half of its own; the best has all seeds",
        ),
        header=["method", "beta", "trials", *TRAINING_HEADER, *lab.world.describe],
        rows=rows,
        claims=[
            *(
                f"TAPO against {name}: {compare(judged['TAPO'], value)}"
                for name, value in judged.items()
                if name != "TAPO"
            ),
            *found,
        ],
        panels=[bars(lab.world.describe[lab.world.primary], judged, start=_base(final).mean)],
    )


def _longer_runs(
    lab: Lab, methods: dict[str, Method], rates: dict[str, tuple[float, ...]]
) -> dict[str, tuple[list[Run], list[Run]]]:
    """Of each method, the best training with all seeds, and those that its learning rate was searched with."""
    searched = lab.search(methods, LONGER, rates)
    made = {}
    for name, long in searched.items():
        best = max(long, key=lambda run: lab.on_validation([run]))
        made[name] = [lab.with_seed(name, methods[name], best, seed) for seed in lab.seeds], long
    lab.queue.make([run for runs, _ in made.values() for run in runs])
    return made


def _with_beta(method: Method, beta: float) -> Method:
    return replace(method, options={**method.options, "beta": beta})


def _pairing(name: str, changes: dict[str, Any]) -> Method:
    options = {**PAIRINGS[name], "step_weighting": "velocity", **changes.get("options", {})}
    return Method("tapo", options, changes.get("reward", "SLRM"), changes.get("hard_prompts", False))


TAPOS_RATE = "All rows have the learning rate of TAPO in Table 1, which may not be the best for each."
TRAINING_HEADER = ["learning rate", "steps", "policy forwards", "reward forwards"]


def _training_cells(lab: Lab, runs: list[Run]) -> list:
    forwards = lab.queue.make(runs[:1])[0]["forwards"]
    options = runs[0].options
    return [f"{options['learning_rate']:g}", options["max_steps"], forwards["policy"], forwards["reward"]]


def _finalist_cells(lab: Lab, pair: list[list[Run]]) -> list:
    """Cells of the best learning rate, and what the second would have given: where they differ much, the choice matters."""
    best, *others = pair
    second = [f"{runs[0].options['learning_rate']:g}: {lab.judged(runs)}" for runs in others]
    return [*_training_cells(lab, best), *_judge_cells(lab, best), "".join(second)]


def _second_header(lab: Lab) -> str:
    return f"{lab.world.primary} with the second learning rate"


def _seconds_per_pair(lab: Lab, runs: list[Run]) -> float:
    """Of the fastest training: other work makes any of them slower, and none faster."""
    pairs = lab.world.num_steps * lab.world.prompts_per_step
    return min(result["train_seconds"] for result in lab.queue.make(runs)) / pairs


def _judge_cells(lab: Lab, runs: list[Run]) -> list[Estimate]:
    return [lab.judged(runs, judge) for judge in lab.world.describe]


def _base(lab: Lab) -> Estimate:
    """The base, which is the same for every seed, as often as there are seeds."""
    return lab.judged([lab.base(None, lab.seeds[0])] * len(lab.seeds))


def _base_row(lab: Lab) -> list:
    runs = [lab.base(None, seed) for seed in lab.seeds[:1]]
    return ["base model", "", 0, 0, 0, *_judge_cells(lab, runs)]


def _is_available(lab: Lab, method: Method) -> bool:
    needs = [method.reward] if method.reward is not None else []
    return method.command in lab.world.recipes and len(available(lab, needs)) == len(needs)


def _with_reward(name: str) -> Method:
    return replace(
        TAPO, reward=name, options={**TAPO.options, **({} if name == "SLRM" else {"velocity_target": None})}
    )


def _of_seeds(lab: Lab, cells: dict[Any, tuple[Method, dict[str, Any]]]) -> dict[Any, list[Run]]:
    """Runs of every cell, one per seed, with the learning rate that Table 1 found for TAPO."""
    rate = lab.at_budget({"TAPO": TAPO})["TAPO"][0].options["learning_rate"]
    runs = {
        cell: [lab.policy("TAPO", method, seed, learning_rate=rate, **options) for seed in lab.seeds]
        for cell, (method, options) in cells.items()
    }
    lab.queue.make([run for of_seeds in runs.values() for run in of_seeds])
    return runs


def _grid(title: str, values: dict[tuple[int, int], Estimate]):
    rows, columns = GRID
    table = [[values[steps, candidates].mean for candidates in columns] for steps in rows]
    return grid(title, list(rows), list(columns), table, "candidates P", "stochastic steps n")


def _method_text(lab: Lab, more: str = "", finals: str = "of the best two, the mean over all seeds decides") -> str:
    world = lab.world
    judges = "; ".join(f"`{name}`: {text}" for name, text in world.describe.items())
    return (
        f"World `{world.name}`. Policy forwards count every row through the policy's network, a backward as two of them; "
        f"a method gets as many steps as {lab.budget()} of them pay for (up to some smaller batches at the end of an epoch), unless "
        f"the table shows other steps. Each method has its best learning rate by `{world.primary}` on the prompts of `validation`: "
        f"with the first seed, {' and '.join(f'{rate:g}' for rate in world.learning_rates['tapo'])} are tried, and further ones until "
        f"the best lies between two others or {MAX_RATES} were tried; {finals}. The table shows the prompts of `test`, "
        f"{lab.samples_per_prompt} samples each, the mean over {len(lab.seeds)} training seeds (of reward model and policy) "
        f"and the 95 % interval. Judges: {judges}. {more}"
    ).strip()
