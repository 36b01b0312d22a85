# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from tapo_trl.reproduction import Run, RunQueue, load_world
from tapo_trl.reproduction.measure import CURVE_SIGMAS, Samples, measure_reward_model
from tapo_trl.reproduction.runs import RECIPE, RESULT, _printing_to, read_results, write_results
from tests.testing_utils import tiny_sd3_pipeline


WORLD_FILE = """
from tapo_trl.reproduction import World

WORLD = World(
    name="tiny",
    recipes={{name: f"{folder}/{{name}}.yaml" for name in ("slrm", "tapo")}},
    pairs={{split: "{folder}/pairs.parquet" for split in ("validation", "test")}},
    prompts={{split: f"{folder}/{{split}}.txt" for split in ("validation", "test")}},
    judge=lambda images, prompts: {{"bright": images.mean(dim=(1, 2, 3))}},
    primary="bright",
    describe={{"bright": "mean of the pixels"}},
    learning_rates={{"tapo": (1e-3,)}},
    prompts_per_step=2,
    num_steps=1,
    num_inference_steps=4,
    guidance_scale=2.0,
)
"""

COMMON = {
    "resolution": 32,
    "max_sequence_length": 8,
    "use_cpu": True,
    "bf16": False,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A world of a pipeline with random weights."""
    folder = tmp_path_factory.mktemp("world")
    tiny_sd3_pipeline().save_pretrained(folder / "base")
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)) for i in range(8)
    ]
    features = Features({"prompt": Value("string"), "chosen": ImageFeature(), "rejected": ImageFeature()})
    pairs = {"prompt": list("abcd"), "chosen": images[:4], "rejected": images[4:]}
    Dataset.from_dict(pairs, features=features).to_parquet(folder / "pairs.parquet")
    for split in ("train", "validation", "test"):
        (folder / f"{split}.txt").write_text("\n".join("abcd"))
    common = COMMON | {"model_name_or_path": str(folder / "base"), "cache_dir": str(folder / "cache")}
    slrm = common | {"dataset_name": str(folder / "pairs.parquet"), "num_task_tokens": 2}
    tapo = common | {"dataset_name": str(folder / "train.txt"), "use_peft": True, "lora_r": 2}
    (folder / "slrm.yaml").write_text("# a comment\n" + yaml.safe_dump(slrm))
    (folder / "tapo.yaml").write_text(yaml.safe_dump(tapo | {"num_inference_steps": 4, "guidance_scale": 2.0}))
    (folder / "world.py").write_text(WORLD_FILE.format(folder=folder))
    return folder


@pytest.fixture
def reward(folder):
    return Run("slrm", "slrm", str(folder / "slrm.yaml"))


@pytest.fixture
def tapo(folder, reward):
    options = {"reward_model": reward, "velocity_target": "parent", "num_sde_steps": 2, "num_candidates": 3}
    return Run("tapo", "tapo", str(folder / "tapo.yaml"), options)


class TestRun:
    def test_the_folder_depends_on_what_is_trained_alone(self, tapo):
        assert replace(tapo, label="another").folder == tapo.folder
        assert tapo.with_options(guidance_scale=2.0, adam_beta1=None).folder == tapo.folder  # as in the recipe
        others = [
            tapo.with_options(num_sde_steps=1),
            tapo.with_options(guidance_scale=None),
            tapo.with_seed(1),
            replace(tapo, samples_per_prompt=4),
            tapo.probe,
            tapo.with_options(reward_model=tapo.options["reward_model"].with_seed(1)),
        ]
        assert len({run.folder for run in [tapo, *others]}) == len(others) + 1
        assert replace(tapo, samples_per_prompt=4).probe.folder == tapo.probe.folder  # which is not judged

    def test_comments_of_a_recipe_change_nothing(self, folder, reward):
        before = reward.folder
        (folder / "slrm.yaml").write_text((folder / "slrm.yaml").read_text().replace("a comment", "another comment"))
        assert reward.folder == before

    def test_a_run_becomes_its_folder_in_the_recipe(self, tapo, tmp_path):
        recipe = yaml.safe_load(tapo.with_options(disable_tqdm=None).write_recipe(tmp_path).read_text())
        assert recipe["reward_model"] == [str(tmp_path / tapo.options["reward_model"].folder)]
        assert recipe["num_candidates"] == 3 and recipe["seed"] == 0
        assert "disable_tqdm" not in recipe

    def test_the_probe_has_one_step_and_seed_0(self, tapo):
        assert tapo.with_seed(3).with_options(max_steps=9).probe.options["max_steps"] == 1
        assert tapo.with_seed(3).probe.folder == tapo.probe.folder


@pytest.mark.slow
class TestRunQueue:
    @pytest.mark.slow
    def test_makes_what_is_missing_and_counts_forwards(self, folder, tapo, reward, tmp_path):
        queue = RunQueue(load_world(str(folder)), str(folder), tmp_path, jobs=2)
        (result,) = queue.make([tapo])

        # 2 prompts, T = 4, stochastic steps 1 and 3 of two branches, which are one until step 1; guidance doubles
        rollout, transitions = 2 * (2 + 2 * 2), 2 * 2 * 2
        assert result["forwards"] == {"policy": 2 * (rollout + transitions * (3 + 1)), "reward": 2 * 2 * 2 * 3}
        assert result["judges"].keys() == {"validation", "test"}
        assert result["judges"]["test"].keys() == {"bright", "reward"}
        pairs = queue.result(reward)["pairs"]["test"]
        assert set(pairs) == {"ground_truth", "reference", "none"}
        assert set(pairs["none"]) == {"accuracy", "consistency", "distributions"}

        # The command that a result names is the run: it starts from this recipe
        recipe = tmp_path / tapo.folder / RECIPE
        assert result["command"] == f"tapo-trl tapo --config {recipe}" and recipe.is_file()

        # Nothing is made twice; what has no result is made again, to the digit
        times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob(RESULT)}
        assert len(times) == 2
        queue.make([tapo, reward])
        assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob(RESULT)} == times
        (tmp_path / tapo.folder / RESULT).unlink()
        (again,) = queue.make([tapo])
        assert again["judges"] == result["judges"]
        assert (tmp_path / reward.folder / RESULT).stat().st_mtime_ns == times[tmp_path / reward.folder / RESULT]

    def test_checkpoints_are_measured_along_a_training(self, folder, reward, tmp_path):
        queue = RunQueue(load_world(str(folder)), str(folder), tmp_path)
        saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
        run = reward.with_options(**saving)
        (result,) = queue.make([run])
        assert list(result["checkpoints"]) == ["1", "2"]
        last = result["checkpoints"]["2"]
        assert {len(curve) for rules in last.values() for curve in rules.values()} == {len(CURVE_SIGMAS)}
        trained = tmp_path / run.folder
        for split, rules in last.items():  # the last checkpoint is what was trained
            measured = measure_reward_model(trained, str(folder / "pairs.parquet"), CURVE_SIGMAS)
            curves = {rule: parts["accuracy"]["by_sigma"] for rule, parts in measured.items()}
            assert rules == {
                rule: {str(sigma): value for sigma, value in curve.items()} for rule, curve in curves.items()
            }, split

    @pytest.mark.slow
    def test_hard_prompts_are_the_half_with_the_least_reward(self, folder, tapo, reward, tmp_path):
        queue = RunQueue(load_world(str(folder)), str(folder), tmp_path)
        hard = Run("hard_prompts", "hard", str(folder / "tapo.yaml"), {"reward_model": reward}, samples_per_prompt=1)
        (result,) = queue.make([replace(tapo, samples_per_prompt=1).with_options(dataset_name=hard)])
        recipe = yaml.safe_load((tmp_path / hard.folder / RECIPE).read_text())
        samples = Samples(queue.world, recipe)
        rewards = samples.score(list("abcd"), 1, judge=None)
        assert rewards.keys() == {"reward"} and rewards["reward"].unique().numel() == 4
        order = rewards["reward"][0].argsort().tolist()
        file = tmp_path / hard.folder / "prompts.txt"
        assert file.read_text().split() == sorted("abcd"[row] for row in order[:2])
        trained = yaml.safe_load(Path(result["command"].split()[-1]).read_text())
        assert trained["dataset_name"] == str(file)

    @pytest.mark.slow
    def test_known_results_are_not_made_again_but_what_others_need_is(self, folder, tapo, reward, tmp_path):
        record = tmp_path / "out" / "runs.jsonl"
        known = {tapo.folder: {"judges": {"test": {"bright": 0.25}}}, reward.folder: {"pairs": {}}}
        queue = RunQueue(load_world(str(folder)), str(folder), tmp_path / "runs", known=known, record=record)
        assert queue.make([tapo]) == [known[tapo.folder]]
        assert not (tmp_path / "runs").exists()
        other = tapo.with_options(label="other", beta=7.0)
        (result,) = queue.make([other])
        assert (tmp_path / "runs" / reward.folder / RESULT).is_file(), "its reward model is read from here"
        assert not (tmp_path / "runs" / tapo.folder).exists()
        recorded = read_results(record)
        assert recorded.keys() == {tapo.folder, other.folder}
        assert recorded[tapo.folder] == known[tapo.folder]
        assert recorded[other.folder]["judges"]["test"] == pytest.approx(result["judges"]["test"], rel=1e-4)

    @pytest.mark.slow
    def test_a_failure_names_the_log_and_keeps_the_rest(self, folder, tapo, tmp_path):
        queue = RunQueue(load_world(str(folder)), str(folder), tmp_path)
        broken = tapo.with_options(label="broken", beta=-1.0)
        with pytest.raises(RuntimeError, match=r"The run `broken` failed: .* See .*log.txt; the same command goes on"):
            queue.make([broken])
        log = (tmp_path / broken.folder / "log.txt").read_text()
        assert "`beta` must be positive, got -1.0." in log and "Traceback" in log
        assert queue.result(broken.options["reward_model"]) is not None

    @pytest.mark.slow
    def test_the_base_is_judged_untrained(self, folder, tapo, tmp_path):
        queue = RunQueue(load_world(str(folder)), str(folder), tmp_path)
        (result,) = queue.make(
            [Run("base", "base", str(folder / "tapo.yaml"), {"reward_model": None}, samples_per_prompt=1)]
        )
        policy_forwards = result["forwards"]["policy"]
        assert policy_forwards == 0
        from tapo_trl import load_policy
        from tapo_trl.policies.sampling import generate_samples

        policy = load_policy(str(folder / "base"))
        images = generate_samples(
            policy,
            policy.transformer,
            list("abcd"),
            lambda prompts: policy.encode_prompts(prompts, 8),
            "",
            latent_shape=policy.latent_shape(32, 32),
            num_inference_steps=4,
            guidance_scale=2.0,
            seed=0,
            batch_size=4,
        )
        assert result["judges"]["test"]["bright"] == pytest.approx(images.mean().item(), abs=1e-6)


def test_every_run_prints_to_its_own_log(tmp_path, monkeypatch):
    """A handler of logging keeps the stream that was there when it was made: transformers' is made once per process."""
    monkeypatch.setattr(sys, "stderr", open(2, "w", closefd=False))
    first, second, third = (tmp_path / name for name in ("first.txt", "second.txt", "third.txt"))
    with _printing_to(first):
        handler = logging.StreamHandler()
        handler.emit(logging.makeLogRecord({"msg": "of the first"}))
    with _printing_to(second):
        handler.emit(logging.makeLogRecord({"msg": "of the second"}))
    with pytest.raises(ValueError), _printing_to(third):
        raise ValueError("of the third")
    assert first.read_text() == "of the first\n"
    assert second.read_text() == "of the second\n"
    assert third.read_text().startswith("Traceback") and third.read_text().endswith("ValueError: of the third\n")


class TestLoadWorld:
    def test_says_where_it_looked(self):
        with pytest.raises(ValueError, match=r"neither nowhere/world.py nor examples/nowhere/world.py"):
            load_world("nowhere")

    def test_missing_files(self, folder, tmp_path):
        text = WORLD_FILE.format(folder=folder).replace("pairs.parquet", "no.parquet")
        (tmp_path / "world.py").write_text(text)
        with pytest.raises(ValueError, match=r"names files that do not exist: .*no.parquet"):
            load_world(str(tmp_path))

    def test_no_world_in_the_file(self, tmp_path):
        (tmp_path / "world.py").write_text("WORLD = 3\n")
        with pytest.raises(ValueError, match="must define `WORLD`"):
            load_world(str(tmp_path))


def test_recorded_results_are_replaced(tapo, reward, tmp_path):
    file = tmp_path / "runs.jsonl"
    write_results(file, {tapo: {"a": [1, 0.123456789]}, reward: {"b": {"c": True}}})
    write_results(file, {tapo: {"a": [2, "text"]}})
    assert read_results(file) == {tapo.folder: {"a": [2, "text"]}, reward.folder: {"b": {"c": True}}}
    write_results(file, {tapo: {"a": 0.123456789}})
    assert read_results(file)[tapo.folder] == {"a": 0.12346}
    assert [json.loads(line)["label"] for line in file.read_text().splitlines()] == ["tapo", "slrm"]


def test_results_are_json(tmp_path, tapo):
    """A result is read back as it is, and a folder without one counts as missing."""
    queue = RunQueue(None, "", tmp_path)
    assert queue.result(tapo) is None
    (tmp_path / tapo.folder).mkdir(parents=True)
    assert queue.result(tapo) is None
    (tmp_path / tapo.folder / RESULT).write_text(json.dumps({"judges": {}}))
    assert queue.result(tapo) == {"judges": {}}
