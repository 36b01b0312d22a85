# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The fixture was made with the original detector, see `fixtures/make_geneval.py`."""

import json

import pytest
import torch
from datasets import Dataset

from tapo_trl import get_reward
from tapo_trl.cli.main import main
from tapo_trl.evaluation import load_prompts
from tapo_trl.rewards.pretrained import reward_class
from tapo_trl.rewards.pretrained.geneval import (
    CLASSES,
    COLORS,
    GenEvalReward,
    Thing,
    find_mistakes,
    read_metadata,
    relations,
    things_by_class,
)
from tapo_trl.rewards.pretrained.mask2former import Detections, detect, detector_from_mmdet, read_pixels
from tapo_trl.trainer.reward_setup import check_reward_functions
from tests.testing_utils import save_tiny_clip, tiny_sd3_pipeline

from .fixtures import recipes


@pytest.fixture(scope="module")
def fixture():
    facts, state, found = recipes.read("geneval")
    logits = [state.pop(f"logits.{part}") for part in ("classes", "masks")]
    return facts, state, logits, found


@pytest.fixture(scope="module")
def detector(fixture):
    return detector_from_mmdet(fixture[1], "fixture")


@pytest.fixture(scope="module")
def files(fixture, tmp_path_factory):
    """The detector as mmdet publishes it, and a CLIP."""
    folder = tmp_path_factory.mktemp("geneval")
    torch.save({"meta": {"CLASSES": ("person",)}, "state_dict": fixture[1]}, folder / "detector.pth")
    save_tiny_clip(folder / "clip")
    return {"weights": folder / "detector.pth", "clip": folder / "clip"}


class TestDetector:
    def test_network_is_that_of_the_original(self, fixture, detector):
        pixels = torch.from_numpy(recipes.picture(160, 192, 9)).float().movedim(-1, 0)[None] / 64 - 2
        with torch.no_grad():
            output = detector(pixels)
        for found, expected in zip(
            (output.class_queries_logits[0], output.masks_queries_logits[0]), fixture[2], strict=True
        ):
            # A layer attends where the mask of the one before is positive, so that rounding decides about the pixels at its edge: on one
            # processor all are the original's and the logits agree to 1e-5, on another, and in float64, one differs and they agree to 7e-3
            torch.testing.assert_close(found, expected, atol=1e-2 * expected.std().item(), rtol=0)

    def found(self, fixture, detector, number):
        (found,) = detect(detector, recipes.as_pixels(recipes.picture(*fixture[0]["pictures"][number], number))[None])
        return found, fixture[3][fixture[3][:, 0] == number, 1:]

    def test_detections_are_those_of_the_original(self, fixture, detector):
        found, rows = self.found(fixture, detector, 0)
        areas = found.masks.sum((1, 2))
        rows = rows[rows[:, 5].argsort(descending=True)]
        order = found.scores.argsort(descending=True)
        torch.testing.assert_close(found.scores[order], rows[:, 5], atol=1e-4, rtol=0)
        distinct = rows[:-1, 5] - rows[1:, 5] > 1e-4  # neighbours may change places
        clear = torch.cat([distinct, torch.tensor([False])]) & torch.cat([torch.tensor([True]), distinct])
        assert clear.sum() > 20
        assert torch.equal(found.labels[order][clear].float(), rows[clear, 0])
        assert (found.boxes[order][clear] - rows[clear, 1:5]).abs().max() <= 1
        assert (areas[order][clear] - rows[clear, 6]).abs().max() < 1e-3 * found.masks[0].numel()

    @pytest.mark.parametrize("number", [1, 2])
    def test_other_sizes(self, fixture, detector, number):
        """OpenCV scales 8-bit pixels in whole numbers, so that they differ by one here and there."""
        found, rows = self.found(fixture, detector, number)
        assert found.masks.shape[1:] == tuple(fixture[0]["pictures"][number])
        best = found.scores.argsort(descending=True)[:5]
        expected = rows[rows[:, 5].argsort(descending=True)[:5]]
        torch.testing.assert_close(found.scores[best], expected[:, 5], atol=0.02, rtol=0)
        assert (found.boxes[best] - expected[:, 1:5]).abs().max() <= 1

    def test_pixels(self):
        pixels, size = read_pixels(torch.full((1, 3, 40, 100), 1.0))
        assert size == (533, 1333) and pixels.shape == (1, 3, 544, 1344)
        assert pixels[0, 0, 0, 0].item() == pytest.approx((255 - 123.675) / 58.395)
        assert pixels[0, 2, -1, -1].item() == pytest.approx((128 - 103.53) / 57.375)

    def test_another_checkpoint(self, fixture):
        state = dict(fixture[1])
        del state["panoptic_head.pixel_decoder.lateral_convs.0.gn.bias"]
        with pytest.raises(ValueError, match="no checkpoint of this scorer: .*adapter_1.1.bias is missing"):
            detector_from_mmdet(state, "x")
        with pytest.raises(ValueError, match="`x` is no Mask2Former on a Swin in mmdet's layout"):
            detector_from_mmdet({"weight": torch.ones(1)}, "x")


def box(left, top, right, bottom, side=100):
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return Thing((left, top, right, bottom), mask)


CAT, DOG = box(0, 40, 20, 60), box(60, 40, 90, 60)


class TestRules:
    def mistakes(self, things, include, exclude=(), colors=()):
        wanted = read_metadata({"tag": "x", "include": include, "exclude": exclude})
        return find_mistakes(things, wanted, lambda members, name: list(colors)[: len(members)])

    def test_counts(self):
        three = [{"class": "cat", "count": 3}], [{"class": "cat", "count": 4}]
        for number, expected in ((2, ["2 of 3 cat"]), (3, []), (4, ["4 cat, fewer than 4 asked for"])):
            assert self.mistakes({"cat": [CAT] * number, "dog": [DOG]}, *three) == expected
        assert self.mistakes({}, [{"class": "cat", "count": 1}]) == ["0 of 1 cat"]

    def test_only_the_most_confident_are_looked_at(self):
        red = [{"class": "cat", "count": 1, "color": "red"}]
        assert self.mistakes({"cat": [CAT, DOG]}, red, colors=["red", "blue"]) == []
        assert self.mistakes({"cat": [CAT, DOG]}, red, colors=["blue", "red"]) == ["0 of 1 cat red"]

    @pytest.mark.parametrize(
        ("dog", "expected"),
        [
            (DOG, {"right of"}),
            (box(0, 80, 20, 100), {"below"}),
            (box(0, 0, 20, 10), {"above"}),
            (box(45, 85, 65, 100), {"right of", "below"}),
            (box(2, 42, 22, 58), set()),
            (box(0, 43, 20, 63), set()),  # less than a tenth of both heights
            (box(0, 46, 20, 66), set()),  # 6 off, of which 4 do not count: a third of the distance
            (box(0, 49, 20, 69), {"below"}),
        ],
    )
    def test_positions(self, dog, expected):
        assert relations(dog.box, CAT.box) == expected
        opposite = {"right of": "left of", "below": "above", "above": "below"}
        assert relations(CAT.box, dog.box) == {opposite[name] for name in expected}
        for name in ("left of", "right of", "above", "below"):
            include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": [name, 0]}]
            assert (self.mistakes({"cat": [CAT], "dog": [dog]}, include) == []) is (name in expected)

    def test_a_position_to_something_that_is_not_there(self):
        include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]
        assert self.mistakes({"dog": [DOG]}, include) == ["0 of 1 cat", "dog not above cat"]

    def test_confident_things(self):
        scores = torch.linspace(0.2, 0.95, 40)
        boxes, masks = torch.arange(40)[:, None].expand(40, 4), torch.zeros(40, 8, 8, dtype=torch.bool)
        found = Detections(torch.tensor([1, 15] * 20), scores, boxes, masks)
        things = things_by_class(found, 0.3)
        assert {name: len(members) for name, members in things.items()} == {"bicycle": 16, "cat": 16}
        assert [thing.box[0] for thing in things["cat"]][:3] == [39, 37, 35]
        assert {name: len(members) for name, members in things_by_class(found, 0.9).items()}["cat"] == 2

    def test_facts(self):
        assert len(CLASSES) == 80 and len(set(CLASSES)) == 80 and CLASSES.index("computer keyboard") == 66


class TestReward:
    IMAGES = torch.stack([recipes.as_pixels(recipes.picture(64, 64, seed)) for seed in range(3)])
    PROMPTS = ["a", "b", "c"]

    def metadata(self, reward, exact):
        """One thing more than the detector sees, or as many."""
        rows = []
        for found in detect(reward.detector, self.IMAGES):
            things = things_by_class(found, 0.3)
            name, members = max(things.items(), key=lambda item: len(item[1]))
            row = {"tag": "x", "include": [{"class": name, "count": len(members) + (not exact)}], "prompt": "x"}
            rows.append(json.dumps(row))
        return rows

    def test_scores(self, files):
        reward = get_reward("geneval", **files)
        right, wrong = self.metadata(reward, True), self.metadata(reward, False)
        assert reward(self.IMAGES, self.PROMPTS, metadata=right, style=["x"] * 3).tolist() == [1, 1, 1]
        reward.batch_size = 2
        assert reward(self.IMAGES, self.PROMPTS, metadata=[right[0], wrong[1], right[2]]).tolist() == [1, 0, 1]
        video = self.IMAGES[[0, 0, 1]].transpose(0, 1)[None]
        scores = reward(video, ["a"], metadata=[json.loads(right[0])])
        assert scores.item() in (pytest.approx(2 / 3), 1)

    def test_colors(self, files):
        """What the CLIP says of the thing alone on grey, and of the prompts of its class."""
        reward = get_reward("geneval", **files)
        image = self.IMAGES[0]
        found = reward.colors(image, [box(10, 20, 50, 61, 64), box(0, 0, 30, 64, 64)], "cat")
        assert len(found) == 2 and set(found) <= set(COLORS)
        other = image.clone()
        other[:, :20] = 0  # outside of the first thing
        assert reward.colors(other, [box(10, 20, 50, 61, 64)], "cat") == found[:1]

    def test_the_detector_stays_in_full_precision(self, files):
        reward = get_reward("geneval", torch_dtype="bfloat16", **files)
        assert reward.detector.dtype is torch.float32
        assert reward.clip.visual_projection.weight.dtype is torch.bfloat16
        assert reward.colors(self.IMAGES[0], [box(0, 0, 9, 9, 64)], "cat")[0] in COLORS

    def test_missing_files(self, files, tmp_path):
        for weights in ({}, {"weights": tmp_path / "none.pth"}):
            with pytest.raises(
                OSError, match=r"no file .*pth\. Fetch them once with `curl .*--output .* https://.*\.pth`"
            ):
                get_reward("geneval", **weights)
        with pytest.raises(OSError, match="needs a CLIP. .*`hf download openai/clip-vit-large-patch14`"):
            get_reward("geneval", weights=files["weights"], clip="nobody/clip")

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ("{", "JSONDecodeError"),
            ({"tag": "x", "include": [{"class": "dragon", "count": 1}]}, "does not know the entry .*dragon"),
            ({"tag": "x", "include": [{"class": "cat", "count": 1, "color": "pale"}]}, "does not know"),
            ({"tag": "x", "include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}, "does not know"),
            ({"include": []}, "KeyError.*tag"),
            ({"tag": "x", "include": [{"class": "cat"}]}, "KeyError.*count"),
            (3, "TypeError"),
        ],
    )
    def test_bad_metadata_is_refused_before_anything_is_drawn(self, metadata, message):
        with pytest.raises(ValueError, match=f"reads the column `metadata`, a line of .*{message}"):
            reward_class("geneval").check_prompts(["a"], metadata=[metadata])

    def test_the_column_is_checked_before_anything_is_loaded(self):
        rows = {"prompt": ["a"], "metadata": [json.dumps({"tag": "x", "include": [{"class": "cat", "count": 1}]})]}
        check_reward_functions(["geneval"], [Dataset.from_dict(rows)])
        with pytest.raises(ValueError, match="reads the column `metadata` of the dataset beside the prompt"):
            check_reward_functions(["geneval"], [Dataset.from_dict({"prompt": ["a"]})])


class TestCommands:
    @pytest.fixture
    def folder(self, tmp_path, files):
        """A pipeline, prompts in the official layout, and the same as a dataset."""
        tiny_sd3_pipeline().save_pretrained(tmp_path / "base")
        rows = [
            {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"},
            {"tag": "position", "include": [{"class": "dog", "count": 1, "position": None}], "prompt": "a dog"},
        ]
        (tmp_path / "geneval.jsonl").write_text("\n".join(map(json.dumps, rows)))
        load_prompts("geneval", tmp_path / "geneval.jsonl").to_parquet(tmp_path / "prompts.parquet")
        return tmp_path

    def kwargs(self, files):
        return [
            "--reward_model_init_kwargs",
            json.dumps({"geneval": {name: str(path) for name, path in files.items()}}),
        ]

    def test_benchmark_and_score(self, folder, files, capsys):
        flags = ["--num_inference_steps", "2", "--resolution", "32", "--max_sequence_length", "8"]
        flags += ["--model_name_or_path", str(folder / "base"), "--benchmark", "geneval", "--samples_per_prompt", "2"]
        flags += ["--benchmark_prompts", str(folder / "geneval.jsonl"), "--samples_dir", str(folder / "samples")]
        main(["evaluate", *flags, *self.kwargs(files)])
        output = capsys.readouterr()
        found = json.loads(output.out)["benchmark"]
        assert (
            found.keys() == {"name", "samples", "scores"}
            and found["samples"] == 4
            and "evaluate_images" not in output.err
        )
        scores = found["scores"]
        assert scores["overall"] == (scores["single_object"] + scores["position"]) / 2

        # The same reward of the same pictures, as of a folder
        for row in range(2):
            (folder / "samples" / f"{row:05d}" / "samples" / "0000.png").rename(folder / f"{row}.png")
        pictures = folder / "pictures"
        pictures.mkdir()
        for row in range(2):
            (folder / f"{row}.png").rename(pictures / f"{row}.png")
        flags = ["--prompts", str(folder / "prompts.parquet"), "--reward_model", "geneval", *self.kwargs(files)]
        main(["score", str(pictures), *flags, "--output_file", str(folder / "scores.json")])
        of_files = json.loads((folder / "scores.json").read_text())["files"]
        assert [row["prompt"] for row in of_files] == ["a cat", "a dog"]
        assert {row["geneval"] for row in of_files} <= {0.0, 1.0}

    def test_without_the_detector(self, folder, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(GenEvalReward, "detector_path", lambda: tmp_path / "none.pth")
        flags = ["--num_inference_steps", "2", "--resolution", "32", "--max_sequence_length", "8"]
        flags += ["--model_name_or_path", str(folder / "base"), "--benchmark", "geneval", "--samples_per_prompt", "1"]
        flags += ["--benchmark_prompts", str(folder / "geneval.jsonl"), "--samples_dir", str(folder / "samples")]
        with pytest.raises(OSError, match="Fetch them once with `curl"):
            main(["evaluate", *flags, "--reward_model", "geneval"])
        assert not (folder / "samples").exists()
        main(["evaluate", *flags])
        assert "evaluate_images.py" in (message := capsys.readouterr().err) and "curl --location" in message

    @pytest.mark.slow
    @pytest.mark.parametrize("command", ["tapo", "grpo", "online_dpo"])
    def test_training(self, folder, files, command):
        flags = {"model_name_or_path": folder / "base", "dataset_name": folder / "prompts.parquet"}
        flags |= {"output_dir": folder / "out", "cache_dir": folder / "cache", "resolution": 32, "max_steps": 1}
        flags |= {"num_inference_steps": 3, "per_device_train_batch_size": 2, "max_sequence_length": 8}
        flags |= {"logging_steps": 1, "use_cpu": True, "bf16": False, "use_peft": True, "lora_r": 2}
        flags |= {"report_to": "none", "disable_tqdm": True}
        flags |= {"num_sde_steps": 1} if command != "online_dpo" else {"num_noise_levels": 1}
        flags |= {"num_candidates": 2} if command == "tapo" else {"num_generations": 2}
        argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        main([command, *argv, "--reward_model", "geneval", *self.kwargs(files)])
        history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
        assert all(0 <= entry["reward"] <= 1 for entry in history if "reward" in entry)
        assert any("reward" in entry for entry in history)
