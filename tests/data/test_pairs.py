# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import io
import math
import pickle

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_from_disk
from PIL import Image as PILImage

import tapo_trl
from tapo_trl import DiffusionDPOConfig
from tapo_trl.data import PAIR_PRESETS, to_preference_pairs
from tapo_trl.trainer.diffusion_dpo_trainer import weights_of_pairs


VOTES = {"leftvote": 1, "rightvote": 0, "tievote": 0.5}


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (4, 4), (shade,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def pickapic() -> Dataset:
    """Rows in the columns of Pick-a-Pic v1 and v2: a first that wins, a second that wins, a tie, and one without a label."""
    number = 4
    return Dataset.from_dict(
        {
            "are_different": [True] * number,
            "best_image_uid": ["u"] * number,
            "caption": [f"thing {row}" for row in range(number)],
            "created_at": ["2023-01-01"] * number,
            "has_label": [True, True, True, False],
            "image_0_uid": ["u"] * number,
            "image_1_uid": ["v"] * number,
            "jpg_0": [png(10 * row) for row in range(number)],
            "jpg_1": [png(10 * row + 1) for row in range(number)],
            "label_0": [1.0, 0.0, 0.5, -1.0],
            "label_1": [0.0, 1.0, 0.5, -1.0],
            "model_0": ["a"] * number,
            "num_example_per_prompt": [1] * number,
            "ranking_id": list(range(number)),
            "user_id": list(range(number)),
        }
    )


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr("tapo_trl.data.pair_tables.logger.warning", messages.append)
    return messages


class TestPresets:
    def test_pickapic(self, warnings):
        pairs = to_preference_pairs(pickapic(), preset="pickapic")
        assert pairs.column_names == ["prompt", "chosen", "rejected", "label"]
        assert pairs["prompt"][:] == ["thing 0", "thing 1", "thing 2"] and pairs["label"][:] == [1.0, 1.0, 0.5]
        assert pairs["chosen"][:] == [png(0), png(11), png(20)] and pairs["rejected"][:] == [png(1), png(10), png(21)]
        assert warnings == ["Left out 1 of 4 rows, whose `has_label` is false."]

    def test_hpdv2(self):
        columns = {"prompt": ["a", "b"], "user_hash": ["x", "y"], "human_preference": [[1, 0], [0, 1]]}
        dataset = Dataset.from_dict({**columns, "image_path": [["0.jpg", "1.jpg"], ["2.jpg", "3.jpg"]]})
        pairs = to_preference_pairs(dataset, preset="hpdv2", media_root="train")
        assert pairs.to_dict() == {
            "prompt": ["a", "b"],
            "chosen": ["train/0.jpg", "train/3.jpg"],
            "rejected": ["train/1.jpg", "train/2.jpg"],
            "label": [1.0, 1.0],
            "chosen_score": [1.0, 1.0],
            "rejected_score": [0.0, 0.0],
        }

    def test_hpdv2_test(self):
        dataset = Dataset.from_dict(
            {
                "prompt": ["a"],
                "image_path": [["0.jpg", "1.jpg", "2.jpg"]],
                "rank": [[2, 1, 2]],
                "raw_annotations": [[{"rank": [2, 1, 2], "user_hash": "x"}]],
            }
        )
        pairs = to_preference_pairs(dataset, preset="hpdv2_test").to_dict()
        assert pairs["chosen"] == ["1.jpg", "0.jpg", "1.jpg"] and pairs["rejected"] == ["0.jpg", "2.jpg", "2.jpg"]
        assert pairs["label"] == [1.0, 0.5, 1.0]

    def test_hpdv3(self):
        columns = {"prompt": ["a"], "path1": ["good.jpg"], "path2": ["/bad.jpg"], "confidence": [0.9]}
        dataset = Dataset.from_dict({**columns, "choice_dist": [[7, 2]], "model1": ["m"], "model2": ["n"]})
        pairs = to_preference_pairs(dataset, preset="hpdv3", media_root="hpd")
        root = "https://huggingface.co/datasets/OWNER/NAME/resolve/main"
        on_the_hub = to_preference_pairs(dataset, preset="hpdv3", media_root=root)
        assert on_the_hub["chosen"][:] == [f"{root}/good.jpg"]
        assert pairs["chosen"][:] == ["hpd/good.jpg"] and pairs["rejected"][:] == ["/bad.jpg"]

    def test_genai_bench_image(self):
        votes = ["leftvote", "rightvote", "tievote", "bothbad_vote"]
        images = {
            side: [{"bytes": png(shade + row), "path": None} for row in range(4)]
            for side, shade in (("left_image", 0), ("right_image", 10))
        }
        features = Features(
            {column: Value("string") for column in ("prompt", "left_model", "right_model", "vote_type")}
        )
        features |= {"left_image": Image(), "right_image": Image()}
        strings = {"prompt": list("abcd"), "left_model": ["m"] * 4, "right_model": ["n"] * 4, "vote_type": votes}
        dataset = Dataset.from_dict({**strings, **images}, features=features)
        pairs = to_preference_pairs(dataset, preset="genai_bench_image")
        assert isinstance(pairs.features["chosen"], Image) and pairs["label"][:] == [1.0, 1.0, 0.5, 0.5]
        assert [image.getpixel((0, 0))[0] for image in pairs["chosen"]] == [0, 11, 2, 3]

    def test_genai_bench_video(self):
        address = "https://huggingface.co/datasets/tianleliphoebe/genai-arena-video-mp4/blob/main/{}.mp4"
        dataset = Dataset.from_dict(
            {
                "prompt": ["a"],
                "left_model": ["m"],
                "left_video": [address.format("l")],
                "right_model": ["n"],
                "right_video": [address.format("r")],
                "vote_type": ["rightvote"],
            }
        )
        pairs = to_preference_pairs(dataset, preset="genai_bench_video", media_root="elsewhere")
        assert pairs["chosen"][:] == [address.format("r")] and pairs["rejected"][:] == [address.format("l")]

    def test_videogen_rewardbench(self, warnings):
        columns = {"path_A": ["a0", "a1", "a2", "a3"], "path_B": ["b0", "b1", "b2", "b3"], "prompt": list("wxyz")}
        columns |= {"Overall": ["A", "B", "same", "invalid"], "fps_A": [24.0] * 4, "num_frames_A": [48] * 4}
        columns |= {"VQ": ["A", "A", "same", "A"], "MQ": ["B", "B", "B", "B"], "TA": ["A", "invalid", "A", "A"]}
        pairs = to_preference_pairs(Dataset.from_dict(columns), preset="videogen_rewardbench").to_dict()
        assert pairs["chosen"] == ["a0", "b1", "a2"] and pairs["label"] == [1.0, 1.0, 0.5]
        assert pairs["label_visual_quality"] == [1.0, 0.0, 0.5] and pairs["label_motion_quality"] == [0.0, 1.0, 0.0]
        assert pairs["label_text_alignment"] == [1.0, None, 1.0]
        assert warnings == ["Left out 1 of 4 rows, whose `Overall` is missing."]

    def test_videofeedback(self):
        scores = {"visual quality": [1, 3, 2], "temporal consistency": [2, 2, 4], "dynamic degree": [1, 1, 1]}
        scores |= {"text-to-video alignment": [4, 4, 1], "factual consistency": [1, 1, 1]}
        columns = {"id": ["0", "1", "2"], "images": [["f.jpg"]] * 3, "text prompt": ["a", "a", "b"]}
        columns |= {
            "video link": ["0.mp4", "1.mp4", "2.mp4"],
            "conversations": [[{"from": "human", "value": "x"}]] * 3,
        }
        pairs = to_preference_pairs(Dataset.from_dict(columns | scores), preset="videofeedback").to_dict()
        assert (pairs["prompt"], pairs["chosen"], pairs["rejected"]) == (["a"], ["1.mp4"], ["0.mp4"])
        assert pairs["label"] == [1.0] and pairs["label_visual_quality"] == [1.0]
        assert pairs["label_temporal_consistency"] == [0.5]

    def test_a_preset_is_plain_arguments_that_others_override(self):
        dataset = pickapic().rename_column("caption", "text")
        by_name = to_preference_pairs(dataset, preset="pickapic", prompt="text")
        assert by_name["prompt"][:] == ["thing 0", "thing 1", "thing 2"]
        arguments = {**PAIR_PRESETS["pickapic"], "prompt": "text"}
        assert to_preference_pairs(dataset, **arguments).to_dict() == by_name.to_dict()

    def test_is_public(self):
        assert tapo_trl.to_preference_pairs is to_preference_pairs


class TestByPosition:
    def test_columns_of_any_kind_stand_beside(self):
        nested = {"boxes": [[1, 2], []], "who": [{"id": 1}, {"id": 2}], "stamp": [None, None]}
        columns = {"prompt": ["a", "b"], "left": ["l0", "l1"], "right": ["r0", "r1"], "winner": [0, 1], **nested}
        pairs = to_preference_pairs(Dataset.from_dict(columns), first="left", second="right", label="winner")
        assert pairs["chosen"][:] == ["r0", "l1"] and pairs.column_names == ["prompt", "chosen", "rejected", "label"]

    @pytest.mark.parametrize(
        ("first", "second", "own", "other"),
        [
            ("jpg_0", "jpg_1", "label_0", "label_1"),
            ("left", "right", "label_left", "label_right"),
            ("path_A", "path_B", "label_A", "label_B"),
            ("one_image", "two_image", "label_one", "label_two"),
            ("good", "bad", "label_1", "label_2"),
        ],
    )
    def test_the_label_of_the_other_side_is_no_dimension(self, first, second, own, other):
        columns = {"prompt": ["a"], first: ["x"], second: ["y"], own: [0.0], other: [1.0], "label_motion": [0.25]}
        pairs = to_preference_pairs(Dataset.from_dict(columns), first=first, second=second, label=own)
        assert pairs.column_names == ["prompt", "chosen", "rejected", "label", "label_motion"]
        assert pairs["label_motion"][:] == [0.75]

    @pytest.mark.parametrize("selection", [[3, 1, 1, 2], [1, 2], [2, 3, 0]])
    def test_rows_that_were_selected_before(self, selection):
        columns = {"prompt": list("abcd"), "x": ["x0", "x1", "x2", "x3"], "y": ["y0", "y1", "y2", "y3"]}
        dataset = Dataset.from_dict({**columns, "who": ["rightvote", "leftvote", "tievote", "rightvote"]}).select(
            selection
        )
        arguments = {"first": "x", "second": "y", "label": "who", "label_values": VOTES, "media_root": "/f"}
        winners = {0: "y", 1: "x", 2: "x", 3: "y"}
        pairs = to_preference_pairs(dataset, **arguments)
        assert pairs["chosen"][:] == [f"/f/{winners[row]}{row}" for row in selection]
        assert pairs["prompt"][:] == ["abcd"[row] for row in selection]
        assert pairs["label"][:] == [0.5 if row == 2 else 1.0 for row in selection]

    def test_nothing_is_copied_or_written(self, tmp_path, monkeypatch):
        rng = np.random.default_rng(0)
        files = {side: [rng.bytes(100_000) for _ in range(20)] for side in ("x", "y")}
        dataset = Dataset.from_dict({"prompt": ["a"] * 20, **files, "label": [0.0, 1.0] * 10})
        dataset.save_to_disk(tmp_path / "pairs")
        dataset = load_from_disk(tmp_path / "pairs").shuffle(seed=1)
        before = sorted(path.name for path in tmp_path.rglob("*"))
        allocated = pa.total_allocated_bytes()
        pairs = to_preference_pairs(dataset, first="x", second="y", label="label")
        assert pa.total_allocated_bytes() - allocated < 100_000 and len(pickle.dumps(pairs)) < 100_000
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
        for row in range(20):
            winner = "x" if dataset[row]["label"] else "y"
            assert pairs[row]["chosen"] == dataset[row][winner]

    def test_fingerprints_are_the_same_in_every_process_and_tell_the_arguments_apart(self):
        columns = {"prompt": ["a", "b"], "x": ["0", "1"], "y": ["2", "3"], "who": ["l", "r"]}
        arguments = {"first": "x", "second": "y", "label": "who", "label_values": {"l": 1, "r": 0}}
        dataset = Dataset.from_dict(columns)
        first, second = (to_preference_pairs(dataset, **arguments)._fingerprint for _ in range(2))
        assert first == second
        arguments["label_values"] = {"l": 0, "r": 1}
        assert to_preference_pairs(dataset, **arguments)._fingerprint != first

    def test_class_labels_and_numbers_have_values_too(self):
        columns = {"prompt": ["a", "b"], "x": ["x0", "x1"], "y": ["y0", "y1"]}
        features = Features(
            {**{name: Value("string") for name in columns}, "who": ClassLabel(names=["left", "right"])}
        )
        dataset = Dataset.from_dict({**columns, "who": [1, 0]}, features=features)
        pairs = to_preference_pairs(dataset, first="x", second="y", label="who", label_values={"left": 1, "right": 0})
        assert pairs["chosen"][:] == ["y0", "x1"]
        dataset = Dataset.from_dict({**columns, "who": [2, 1]})
        pairs = to_preference_pairs(dataset, first="x", second="y", label="who", label_values={1: 1, 2: 0})
        assert pairs["chosen"][:] == ["y0", "x1"]

    @pytest.mark.parametrize(
        ("values", "meanings"),
        [
            ([1.0, 2.0, None], {1: 1, 2: 0}),  # integers with a null, as pandas writes them
            ([1.0, 2.0, None], {"1": 1, "2": 0}),
            ([1, 2, None], {1.0: 1, 2.0: 0}),
            ([True, False, None], {"true": 1, "false": 0}),
            ([True, False, None], {True: 1, False: 0}),
            (["True", "False", None], {"True": 1, "False": 0}),
        ],
    )
    def test_keys_as_they_are_written(self, values, meanings):
        columns = {"prompt": list("abc"), "x": list("123"), "y": list("456"), "vote": values}
        pairs = to_preference_pairs(
            Dataset.from_dict(columns), first="x", second="y", label="vote", label_values=meanings
        )
        assert (pairs["chosen"][:], pairs["rejected"][:]) == (["1", "5"], ["4", "2"])

    @pytest.mark.parametrize("format", ["torch", "numpy", "pandas"])
    def test_the_format_does_not_matter(self, format):
        plain = to_preference_pairs(pickapic(), preset="pickapic")
        assert to_preference_pairs(pickapic().with_format(format), preset="pickapic").to_dict() == plain.to_dict()


class TestScoresOfBothSides:
    """What VideoDPO weights pairs by."""

    ROWS = {"prompt": list("aaab"), "m": list("0123"), "q": [1.0, 3.0, 2.0, 5.0], "t": [0.0, 1.0, 4.0, 5.0]}

    def test_means_of_several_scores(self):
        pairs = to_preference_pairs(Dataset.from_dict(self.ROWS), media="m", scores=["q", "t"])
        assert pairs["chosen"][:] == ["1", "2", "2"] and pairs["rejected"][:] == ["0", "0", "1"]
        assert pairs["chosen_score"][:] == [2.0, 3.0, 3.0] and pairs["rejected_score"][:] == [0.5, 0.5, 2.0]

    def test_the_chosen_one_has_the_higher_score_though_a_lower_rank_wins(self):
        pairs = to_preference_pairs(Dataset.from_dict(self.ROWS), media="m", scores="q", lower_is_better=True)
        assert pairs["chosen"][:] == ["0", "0", "2"]
        assert pairs["chosen_score"][:] == [-1.0, -1.0, -2.0] and pairs["rejected_score"][:] == [-3.0, -2.0, -3.0]

    def test_weights(self):
        """Five of six scores share a bin; the pair with the rare one counts more."""
        rows = {"prompt": list("aabbcc"), "m": list("012345"), "s": [0.1, 0.1, 0.1, 0.1, 0.9, 0.1]}
        pairs = to_preference_pairs(Dataset.from_dict(rows), media="m", scores="s")
        weights = weights_of_pairs(pairs, DiffusionDPOConfig("out", variant="video_dpo", bf16=False, use_cpu=True))
        assert weights.tolist() == pytest.approx([1.0, 1.0, (5 / 6) / (5 / 6 * 1 / 6) ** 0.5])


class TestByPreference:
    def test_other_columns_stay(self):
        columns = {"text": ["a", "b"], "good": ["g0", "g1"], "bad": ["b0", "b1"], "margin": [1.0, 2.0], "ok": [1, 0]}
        dataset = Dataset.from_dict(columns).select([1, 0])
        pairs = to_preference_pairs(
            dataset, first="good", second="bad", prompt="text", valid_column="ok", media_root="/r"
        )
        assert pairs[:] == {
            "prompt": ["a"],
            "chosen": ["/r/g0"],
            "rejected": ["/r/b0"],
            "margin": [1.0],
            "ok": [1],
        }


class TestErrors:
    DATASET = {"prompt": ["a", "b"], "x": ["x0", "x1"], "y": ["y0", "y1"], "who": ["l", "r"], "n": [1.0, 3.0]}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "`first`, `second` is missing"),
            ({"first": "x"}, "`second` is missing"),
            ({"preset": "pickapick"}, "`preset` must be one of .*pickapic"),
            ({"first": "x", "second": "z"}, r"no column `z` \(`second`\)"),
            ({"first": "x", "second": "y", "prompt": "promt"}, "Did you mean `prompt`"),
            ({"first": "x", "second": "y", "label_values": {"l": 1}}, "`label_values` needs `label`"),
            ({"first": "x", "second": "y", "label": "who"}, r"holds \['l', 'r'\], which are no numbers: say by `label_values`"),
            ({"first": "x", "second": "y", "label": "who", "label_values": {"l": 1}}, r"holds \['r'\], and `label_values` only"),
            ({"first": "x", "second": "y", "label": "who", "label_values": {"l": 2}}, "numbers from 0 to 1"),
            ({"first": "x", "second": "y", "label": "n"}, r"values in \[0, 1\].* reach from 1.0 to 3.0"),
            ({"first": "x", "second": "n", "label": "who", "label_values": {"l": 1, "r": 0}}, "different types"),
            ({"first": "x", "second": "y", "valid_column": "who"}, "must hold booleans, got 'l'"),
            ({"first": "x", "second": "n", "media_root": "/"}, "`media_root` needs paths, but the column `n`"),
            ({"first": "x", "second": "y", "media": "x"}, "exclude each other"),
            ({"media": "x"}, "`scores` is missing"),
            ({"media": "n", "scores": "n"}, "must hold paths or addresses"),
            ({"media": "x", "scores": "who", "prompt": "y"}, "Row 0: a score must be a finite number, got 'l'"),
            ({"media": "x", "scores": "n"}, "No pair is left"),
        ],
    )  # fmt: skip
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            to_preference_pairs(Dataset.from_dict(self.DATASET), **arguments)

    def test_lists_of_other_lengths(self):
        dataset = Dataset.from_dict({"prompt": ["a"], "files": [["0", "1"]], "rank": [[1]]})
        with pytest.raises(ValueError, match="Row 0: `files` and `rank` must be lists of the same length"):
            to_preference_pairs(dataset, media="files", scores="rank")

    def test_rows_without_a_score_are_counted(self, warnings):
        columns = {"prompt": ["a"] * 3, "x": ["0", "1", "2"], "s": [1.0, None, 2.0]}
        assert to_preference_pairs(Dataset.from_dict(columns), media="x", scores="s")["chosen"][:] == ["2"]
        assert warnings == ["Left out 1 of 3 rows, whose prompt, `x` or scores are missing."]

    @pytest.mark.parametrize(
        "columns",
        [
            {"prompt": list("aaaa"), "m": ["1", "2", "3", None], "s": [1.0, float("nan"), 2.0, 3.0]},
            {"prompt": ["a", None, "a", None], "m": list("1234"), "s": [1, 2, 2, 3]},
            {
                "prompt": ["a", "b"],
                "m": [["1", "2", "3", None], ["4", "5"]],
                "s": [[1.0, None, 2.0, 3.0], [None, 1.0]],
            },
        ],
    )
    def test_prompts_media_and_scores_that_are_missing(self, columns, warnings):
        pairs = to_preference_pairs(Dataset.from_dict(columns), media="m", scores="s")
        assert pairs[:] == {"prompt": ["a"], "chosen": ["3"], "rejected": ["1"], "label": [1.0]} | {
            "chosen_score": [2.0],
            "rejected_score": [1.0],
        }
        assert "2 of " in warnings[0]

    def test_one_column_for_both_sides(self):
        with pytest.raises(ValueError, match="`first` and `second` are the same column, `caption`"):
            to_preference_pairs(pickapic(), first="caption", second="caption", label="label_0")

    def test_labels_that_are_missing(self, warnings):
        columns = {**self.DATASET, "n": [math.nan, 1.0]}
        pairs = to_preference_pairs(Dataset.from_dict(columns), first="x", second="y", label="n")
        assert pairs["chosen"][:] == ["x1"] and warnings == ["Left out 1 of 2 rows, whose `n` is missing."]

    def test_a_transform_is_refused(self):
        dataset = Dataset.from_dict(self.DATASET).with_transform(lambda rows: rows)
        with pytest.raises(ValueError, match="`dataset` has a transform"):
            to_preference_pairs(dataset, first="x", second="y")

    def test_a_dict_of_splits_is_refused(self):
        with pytest.raises(TypeError, match="give one split"):
            to_preference_pairs({"train": Dataset.from_dict(self.DATASET)}, first="x", second="y")

    def test_list_of_frames_keeps_its_type(self):
        columns = {"prompt": ["a"], "x": [["0.jpg", "1.jpg"]], "y": [["2.jpg", "3.jpg"]], "w": [0.0]}
        pairs = to_preference_pairs(Dataset.from_dict(columns), first="x", second="y", label="w", media_root="f")
        assert pairs["chosen"][:] == [["f/2.jpg", "f/3.jpg"]] and isinstance(pairs.features["chosen"], List)
