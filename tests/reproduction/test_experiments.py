# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The experiments on made-up results: what they compare, and what they say of it."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from tapo_trl.metrics import diagnose_scores
from tapo_trl.metrics.pair_scores import PairScores
from tapo_trl.reproduction import EXPERIMENTS, Lab, Run, World
from tapo_trl.reproduction.lab import METHODS
from tapo_trl.reproduction.measure import CURVE_SIGMAS, SIGMAS
from tapo_trl.reproduction.report import write_index
from tapo_trl.reproduction.statistics import Estimate


RECIPES = {"slrm": "slrm", "slrm_lrm": "slrm", "tapo": "tapo", "dpo": "dpo"}
RATES = (1e-3, 2e-3)
PROBED = {"spo": 50, "lpo": 20}  # forwards of a step, by pairing; 100 of all others


class PretendQueue:
    """Says of every run what a formula says, and remembers it."""

    def __init__(self, world, gain=lambda options: 0.0, enhanced=1.0, best_rate=2e-3):
        self.world, self.gain, self.enhanced, self.best_rate = world, gain, enhanced, best_rate
        self.made: dict[str, Run] = {}

    def make(self, runs):
        runs = list(runs)
        self.made |= {run.folder: run for run in runs}
        return [self._result(run) for run in runs]

    def _result(self, run: Run) -> dict:
        if run.command == "slrm":
            if "save_steps" in run.options:
                return {"checkpoints": {str(step): pretended_curve(step, run.seed) for step in (60, 120, 180)}}
            return {"pairs": {split: self._pairs(run) for split in ("validation", "test")}}
        options = run.options
        if run.is_probe:
            return {"forwards": {"policy": PROBED.get(options.get("pairing"), 100), "reward": 10}}
        gain = 0.0 if run.command == "base" else self.gain(options)
        # The two splits prefer other learning rates, so that choosing on the wrong one shows
        rate = options.get("learning_rate", self.best_rate)
        liked = {"validation": -0.01 * abs(math.log2(rate / self.best_rate)), "test": -rate}
        judges = {split: {"good": 0.5 + gain + liked[split] + 0.001 * run.seed, "reward": 1 - gain} for split in liked}
        return {
            "forwards": {"policy": 100 * options.get("max_steps", 0), "reward": 7},
            "judges": judges,
            "train_seconds": 8.0,
        }

    def _pairs(self, run: Run) -> dict:
        rules = ["none"] if run.recipe.endswith("slrm_lrm.yaml") else ["ground_truth", "reference", "none"]
        is_plain = run.options.get("velocity_target") == "none" or len(rules) == 1
        return pretended_pairs(run.seed, tuple(rules), 0.0 if is_plain else self.enhanced)


@cache
def pretended_pairs(seed: int, rules: tuple[str, ...], enhanced: float) -> dict:
    """A diagnosis of margins that the rules with a velocity raise by `enhanced`."""
    margins = torch.randn(len(SIGMAS), 60, generator=torch.Generator().manual_seed(seed)) + 0.5
    chosen = {rule: margins if rule == "none" else margins + enhanced for rule in rules}
    rejected = {rule: torch.zeros_like(margins) for rule in rules}
    return json.loads(json.dumps(diagnose_scores(PairScores(SIGMAS, torch.ones(60), chosen, rejected))))


def pretended_curve(step: int, seed: int) -> dict:
    """Accuracies of a checkpoint: they fall along the training, the more the noisier, and differ by split."""
    by_split = {"validation": 0.02, "test": -0.02}
    return {
        split: {
            rule: {str(sigma): 0.9 - sigma * step / 600 + offset + 0.001 * seed for sigma in CURVE_SIGMAS}
            for rule in ("ground_truth", "reference", "none")
        }
        for split, offset in by_split.items()
    }


@pytest.fixture
def world(tmp_path):
    for name in RECIPES:
        (tmp_path / f"{name}.yaml").write_text(f"output_dir: {name}\n")
    return World(
        name="pretended",
        recipes={name: str(tmp_path / f"{name}.yaml") for name in RECIPES},
        pairs={},
        prompts={},
        judge=None,
        primary="good",
        describe={"good": "how good"},
        learning_rates={"tapo": RATES, "dpo": RATES},
        prompts_per_step=2,
        num_steps=8,
        num_inference_steps=20,
        guidance_scale=1.5,
    )


def _tried(lab: Lab, seed: int) -> set[float]:
    """Learning rates of all judged trainings."""
    judged = [run for run in lab.queue.made.values() if run.command == "tapo" and not run.is_probe]
    return {run.options["learning_rate"] for run in judged if run.seed == seed}


def lab_of(world, seeds=3, **kwargs) -> Lab:
    return Lab(PretendQueue(world, **kwargs), range(seeds))


@pytest.mark.parametrize("name", list(EXPERIMENTS))
@pytest.mark.parametrize("seeds", [1, 3])
def test_every_experiment_writes_its_report(world, tmp_path, name, seeds):
    pytest.importorskip("matplotlib")
    report = EXPERIMENTS[name](lab_of(world, seeds))
    report.write(tmp_path / "out", name, "the command")
    assert report.rows and report.claims
    assert all(len(row) == len(report.header) for row in report.rows)
    # Splits and samples of a seed are no further seeds
    estimates = [cell for row in report.rows for cell in row if isinstance(cell, Estimate)]
    assert estimates and all(len(value.values) <= seeds for value in estimates)
    text = (tmp_path / "out" / f"{name}.md").read_text()
    assert "the command" in text and all(claim in text for claim in report.claims)
    content = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert len(content["rows"]) == len(report.rows)
    assert (tmp_path / "out" / f"{name}.png").is_file() == bool(report.panels)


def test_curves_are_means_over_the_splits_and_say_where_they_turn(world):
    report = EXPERIMENTS["fig4"](lab_of(world))
    assert report.header[2:] == ["after 60 steps", "after 120 steps", "after 180 steps"]
    noisiest = report.rows[3]
    assert noisiest[:2] == ["SLRM (ground-truth target, which sees the clean latent)", "t = 901"]
    for value, step in zip(noisiest[2:], (60, 120, 180), strict=True):
        assert value.mean == pytest.approx(0.9 - 0.901 * step / 600 + 0.001)
    falls = [claim for claim in report.claims if "more training harms" in claim]
    assert ["**holds**" in claim for claim in falls] == [False, True, True, True]


def test_the_best_beta_is_trained_for_longer_and_its_rate_is_searched_again(world):
    gain = {62.5: 0.1, 250.0: 0.2, 1000.0: 0.0}
    lab = lab_of(world, gain=lambda options: gain[options["beta"]])
    report = EXPERIMENTS["longer"](lab)
    rows = {row[0]: dict(zip(report.header, row, strict=True)) for row in report.rows}
    assert rows.keys() == {"TAPO", "SPO's pairs", "Diffusion-DPO"}  # this world has no recipe of the fourth
    for name, row in rows.items():
        # 1e-3, 2e-3 and 4e-3; then 5e-4, 1e-3, 2e-3 and, since that is the best again, 4e-3
        assert row["beta"] == "250" and row["trials"] == "9 + 4"
        assert row["steps"] == 4 * (16 if name == "SPO's pairs" else 8)
        assert row["learning rate"] == "0.002" and len(row["good"].values) == 3
    long = [run for run in lab.queue.made.values() if run.options.get("max_steps", 0) > 16]
    assert {(run.seed, run.options["beta"]) for run in long} == {(seed, 250.0) for seed in range(3)}
    assert len(long) == 3 * (4 + 2)
    judged = [run for run in lab.queue.made.values() if run.options.get("max_steps", 1) > 1]
    assert all(run.samples_per_prompt == (4 if run in long else 2) for run in judged)
    trials = next(claim for claim in report.claims if claim.startswith("Trials of TAPO"))
    assert trials.count("beta 250 at ") == 3 and "beta 62.5 at 0.002 gives 0.60" in trials
    assert "4 times as long at 0.0005 0.68" in trials


def test_the_index_has_the_claims_of_what_was_written(world, tmp_path):
    reports = {name: EXPERIMENTS[name](lab_of(world)) for name in ("fig10", "table1")}
    for name, report in reports.items():
        report.panels = []
        report.write(tmp_path, name, "the command")
    write_index(tmp_path, EXPERIMENTS)
    text = (tmp_path / "README.md").read_text()
    assert all(claim in text for report in reports.values() for claim in report.claims)
    assert text.index("(table1.md)") < text.index("(fig10.md)") and "table2" not in text


class TestFairness:
    def test_methods_get_the_same_forwards(self, world):
        lab = lab_of(world)
        runs = lab.at_budget({name: METHODS[name] for name in ("TAPO", "SPO", "LPO", "Diffusion-DPO")})
        assert {name: {run.options["max_steps"] for run in of_seeds} for name, of_seeds in runs.items()} == {
            "TAPO": {8},
            "SPO": {16},
            "LPO": {40},
            "Diffusion-DPO": {8},
        }

    @pytest.mark.parametrize(
        ("best", "tried"),
        [
            (2e-3, {1e-3, 2e-3, 4e-3}),
            (1e-3, {5e-4, 1e-3, 2e-3}),
            (8e-3, {1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2}),
            (2.5e-4, {1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3}),
        ],
    )
    def test_the_search_encloses_the_best_learning_rate(self, world, best, tried):
        lab = lab_of(world, best_rate=best)
        runs = lab.at_budget({"TAPO": METHODS["TAPO"]})["TAPO"]
        assert {run.options["learning_rate"] for run in runs} == {best}
        assert _tried(lab, seed=0) == tried
        assert [run.seed for run in runs] == [0, 1, 2]

    def test_the_search_ends(self, world):
        lab = lab_of(world, best_rate=1e9)
        lab.at_budget({"TAPO": METHODS["TAPO"]})
        assert _tried(lab, seed=0) == {1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2}

    def test_a_single_learning_rate_is_not_searched(self, world):
        lab = lab_of(replace(world, learning_rates={"tapo": (1e-3,)}))
        lab.at_budget({"TAPO": METHODS["TAPO"]})
        assert _tried(lab, seed=0) == {1e-3}

    def test_between_the_best_two_learning_rates_all_seeds_decide(self, world):
        def gain(options):  # what is best with the first seed is bad with the others
            reward = options.get("reward_model")
            return -0.1 if reward is not None and reward.seed > 0 and options["learning_rate"] == 2e-3 else 0.0

        lab = lab_of(world, gain=gain)
        runs = lab.at_budget({"TAPO": METHODS["TAPO"]})["TAPO"]
        assert {run.options["learning_rate"] for run in runs} == {1e-3}
        assert _tried(lab, seed=0) == {1e-3, 2e-3, 4e-3} and _tried(lab, seed=1) == {1e-3, 2e-3}

    def test_tables_show_what_the_second_learning_rate_gives(self, world):
        report = EXPERIMENTS["table1"](lab_of(world, seeds=1))
        (row,) = [row for row in report.rows if row[0] == "TAPO"]
        assert row[1] == "0.002" and report.header[-1] == "good with the second learning rate"
        assert row[-1] == "0.001: 0.499"

    def test_reported_numbers_are_of_the_test_split(self, world):
        lab = lab_of(world)
        runs = lab.at_budget({"TAPO": METHODS["TAPO"]})["TAPO"]
        assert lab.judged(runs).values == pytest.approx([0.498, 0.499, 0.5])

    def test_a_policy_has_the_reward_model_of_its_seed(self, world):
        lab = lab_of(world)
        for seed in range(3):
            run = lab.policy("TAPO", METHODS["TAPO"], seed)
            assert run.seed == seed and run.options["reward_model"].seed == seed

    def test_hard_prompts_are_those_of_the_reward_model_of_the_seed(self, world):
        runs = [lab_of(world).policy("TAPO", replace(METHODS["TAPO"], hard_prompts=True), seed) for seed in (0, 1)]
        for seed, run in enumerate(runs):
            (prompts, reward) = run.options["dataset_name"], run.options["reward_model"]
            assert prompts.command == "hard_prompts" and prompts.needs[0].folder == reward.folder
            assert reward.seed == seed
        assert "dataset_name" not in lab_of(world).policy("TAPO", METHODS["TAPO"], 0).options

    def test_methods_without_recipe_are_left_out(self, world):
        report = EXPERIMENTS["table1"](lab_of(world))
        names = [row[0] for row in report.rows]
        assert "LPO with its own reward, LRM" in names and "TAPO" in names
        assert not any("GRPO" in name for name in names) and "SPO with its own reward, SPM" not in names


class TestClaims:
    def test_table1_tells_better_from_worse(self, world):
        def gain(options):
            return {"spo": -0.2, "tapo": 0.1}.get(options.get("pairing"), 0.1)

        claims = "\n".join(EXPERIMENTS["table1"](lab_of(world, gain=gain)).claims)
        assert "TAPO against the base model: **holds**" in claims
        assert "TAPO against SPO: **holds** (0.599 ± 0.002 against 0.299 ± 0.002)." in claims
        assert "TAPO against Diffusion-DPO: **not decided**" in claims

        worse = "\n".join(EXPERIMENTS["table1"](lab_of(world, gain=lambda options: -gain(options))).claims)
        assert "TAPO against SPO: **does not hold: the opposite does**" in worse

    def test_fig11_sees_the_hacked_corner(self, world):
        def gain(options):
            return -0.1 if (options["num_sde_steps"], options["num_candidates"]) == (16, 8) else 0.0

        (claim,) = [line for line in EXPERIMENTS["fig11"](lab_of(world, gain=gain)).claims if "corner" in line]
        assert "**holds**" in claim and "reward 1.100" in claim

    @pytest.mark.parametrize(("enhanced", "expected"), [(3.0, "holds"), (-0.5, "the opposite does")])
    def test_fig12_and_table4_read_the_enhancement(self, world, enhanced, expected):
        for name in ("fig12", "table4"):
            claims = EXPERIMENTS[name](lab_of(world, enhanced=enhanced)).claims
            assert any(expected in claim for claim in claims if "nhancement" in claim)

    def test_the_inference_rule_is_named_beside_the_leaking_one(self, world):
        report = EXPERIMENTS["table2"](lab_of(world))
        assert any("leak of the clean latent" in claim for claim in report.claims)
        labels = [row[0] for row in report.rows]
        assert any("sees the clean latent" in label for label in labels)
        assert any("inference-time target" in label for label in labels)


def test_pairings_differ_in_their_pairs_alone(world):
    lab = lab_of(world, seeds=1)
    report = EXPERIMENTS["pairings"](lab)
    judged = [run for run in lab.queue.made.values() if run.command == "tapo" and not run.is_probe]
    paired = [run for run in judged if run.options.get("step_weighting") == "velocity"]
    allowed = {"pairing", "pair_threshold", "continue_with", "max_steps", "num_sde_steps", "num_candidates"}
    allowed |= {"transition_batch_size", "reward_model", "learning_rate", "dataset_name"}
    assert not any(row[0] == "a DiNa-LRM as reward model" for row in report.rows)  # the world has no recipe for it
    common = [{name: value for name, value in run.options.items() if name not in allowed} for run in paired]
    assert len(paired) > 12 and all(options == common[0] for options in common)
    assert replace(paired[0], label="x").folder == paired[0].folder
