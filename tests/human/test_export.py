# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
from datasets import Image, Video, load_dataset

from tapo_trl.cli.human_arguments import StudyArguments, VotesArguments
from tapo_trl.data.images import ImageReader
from tapo_trl.data.preferences import PreferencePairs, check_preference_dataset
from tapo_trl.data.videos import VideoReader
from tapo_trl.human import export
from tapo_trl.human.export import VoteFilter, export_preferences, split_of, write_parquet

from .studies import make_study, vote


ONE_SPLIT = {"train": 1.0}


def rows_of(folder, split="train"):
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]


class TestRows:
    def test_labels_turn_with_the_chosen_medium(self, tmp_path):
        study = make_study(tmp_path / "study", 3)
        events = [
            vote("p01", "0000", {"visual_quality": 0.0, "text_alignment": 0.5}),
            vote("p02", "0000", {"visual_quality": 0.0, "text_alignment": 1.0}),
            vote("p01", "0001", {"visual_quality": 1.0, "text_alignment": 0.0}),
            vote("p01", "0002", {"visual_quality": 1.0, "text_alignment": 1.0}),
        ]
        export_preferences(study, tmp_path / "data", events, splits=ONE_SPLIT)
        first, tie, last = rows_of(tmp_path / "data")
        assert first["chosen_file_name"] == "media/b/0000.png"
        assert (first["source_chosen"], first["source_rejected"]) == ("b", "a")
        assert (first["label"], first["label_visual_quality"], first["label_text_alignment"]) == (1.0, 1.0, 0.25)
        assert (first["num_votes"], first["agreement_visual_quality"], first["agreement_text_alignment"]) == (
            2,
            1.0,
            0.0,
        )
        assert (tie["label"], tie["label_visual_quality"], tie["label_text_alignment"]) == (0.5, 1.0, 0.0)
        assert (last["chosen_file_name"], last["label"], last["agreement_visual_quality"]) == (
            "media/a/0002.png",
            1.0,
            None,
        )

    def test_dimension_weights_decide(self, tmp_path):
        study = make_study(tmp_path / "study", 1)
        events = [vote("p01", "0000", {"visual_quality": 1.0, "text_alignment": 0.0})]
        export_preferences(study, tmp_path / "data", events, None, {"text_alignment": 1.0}, ONE_SPLIT)
        assert rows_of(tmp_path / "data")[0]["source_chosen"] == "b"
        with pytest.raises(ValueError, match="motion"):
            export_preferences(study, tmp_path / "data", events, None, {"motion": 1.0})

    def test_all_pairs_of_a_prompt_are_in_one_split(self):
        names = [split_of(f"p{number}", 0) for number in range(2000)]
        assert {name: round(names.count(name) / 2000, 1) for name in set(names)} == {
            "train": 0.8,
            "validation": 0.1,
            "test": 0.1,
        }


class TestFilters:
    def test_each_counts_what_it_leaves_out(self, tmp_path):
        study = make_study(tmp_path / "study", 16, gold=6)
        gold = [pair.pair_id for pair in study.read_pairs() if pair.gold]
        events = [vote(name, f"{row:04d}", 1.0, ms=5000) for row in range(10) for name in ("p01", "p02")]
        events += [vote("p01", pair_id, 1.0) for pair_id in gold] + [vote("bad", pair_id, 0.0) for pair_id in gold]
        events += [vote("bad", "0000", 0.0), vote("p03", "0001", 1.0, ms=100)]
        events += [vote("p03", "0002", kind="skip", reason="broken"), vote("p02", "0003", kind="undo")]
        events += [vote("p04", "0004", 0.0, ms=5000), vote("p01", "gone", 1.0)]
        (study.folder / "media/a/0005.png").write_bytes(b"no picture")
        rules = VoteFilter(min_votes=2, min_seconds=1.0, min_gold_accuracy=0.7, min_agreement=0.5)
        report = export_preferences(study, tmp_path / "data", events, rules, splits=ONE_SPLIT)
        assert report["dropped"] == {
            "votes on pairs that pairs.jsonl does not have": 1,
            "votes of people with less than 0.7 of the known answers right": 7,
            "votes that took less than 1 s": 1,
            "pairs that somebody skipped as broken or offensive": 1,
            "pairs with fewer than 2 votes": 1,
            "pairs whose people agree less than 0.5": 1,
            "pairs with a file that cannot be read": 1,
        }
        assert report["rows"] == {"train": 6}

    def test_ties_stay_unless_they_are_dropped(self, tmp_path):
        study = make_study(tmp_path / "study", 2)
        events = [vote("p01", "0000", 0.5), vote("p01", "0001", 1.0)]
        assert export_preferences(study, tmp_path / "data", events, splits=ONE_SPLIT)["rows"] == {"train": 2}
        dropped = export_preferences(study, tmp_path / "data", events, VoteFilter(drop_ties=True), splits=ONE_SPLIT)
        assert dropped["rows"] == {"train": 1}

    def test_a_pair_without_votes_has_no_label(self):
        with pytest.raises(ValueError, match="`min_votes` must be at least 1"):
            VoteFilter(min_votes=0)

    @pytest.mark.parametrize(
        "options", [{"min_votes": 2}, {"min_seconds": 1.0}, {"drop_ties": True}, {"license": "mit"}]
    )
    def test_without_an_export_they_are_refused(self, options):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` is of exports"):
            VotesArguments("study", **options)

    @pytest.mark.parametrize(
        "options", [{"gold": 20}, {"compare": "first"}, {"methods": "methods.yaml", "figure": "wins.png"}]
    )
    def test_options_of_the_other_half_of_study_are_refused(self, options):
        with pytest.raises(ValueError, match=f"`{list(options)[-1]}` .* without `methods`"):
            StudyArguments("study", **options)

    def test_nothing_left_is_an_error_with_the_reasons(self, tmp_path):
        study = make_study(tmp_path / "study", 2)
        with pytest.raises(ValueError, match="2 pairs with fewer than 1 votes"):
            export_preferences(study, tmp_path / "data", [])
        assert not (tmp_path / "data").exists()


class TestFolder:
    @pytest.mark.parametrize("videos", [False, True])
    def test_trainers_read_it(self, tmp_path, videos):
        study = make_study(tmp_path / "study", 3, videos)
        events = [vote("p01", f"{row:04d}", [1.0, 0.0, 0.5][row]) for row in range(3)]
        export_preferences(study, tmp_path / "data", events, splits=ONE_SPLIT)
        dataset = load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache"))
        assert isinstance(dataset.features["chosen"], Video if videos else Image)
        check_preference_dataset(dataset, "data", {"visual_quality": 1.0})
        reader = VideoReader(16, 16, 8, 8) if videos else ImageReader(16, 16)
        row = PreferencePairs(dataset, reader, "data").load(2)
        assert row["label"] == 0.5
        assert row["chosen"].shape == ((3, 8, 16, 16) if videos else (3, 16, 16))

    def test_an_earlier_export_is_replaced_and_other_files_are_not(self, tmp_path):
        study = make_study(tmp_path / "study", 2)
        export_preferences(study, tmp_path / "data", [vote("p01", "0000"), vote("p01", "0001")], splits=ONE_SPLIT)
        export_preferences(study, tmp_path / "data", [vote("p01", "0001")], splits={"test": 1.0})
        assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["README.md", "test"]
        assert [path.name for path in (tmp_path / "data").rglob("*.png")] == ["0001.png", "0001.png"]
        (tmp_path / "data" / "mine.txt").write_text("mine")
        with pytest.raises(ValueError, match="no earlier export"):
            export_preferences(study, tmp_path / "data", [vote("p01", "0001")])
        assert (tmp_path / "data" / "mine.txt").exists()

    def test_a_data_set_of_somebody_else_is_not_removed(self, tmp_path):
        study = make_study(tmp_path / "study", 1)
        (tmp_path / "data/train").mkdir(parents=True)
        (tmp_path / "data/train/metadata.jsonl").write_text("mine")
        with pytest.raises(ValueError, match="no earlier export"):
            export_preferences(study, tmp_path / "data", [vote("p01", "0000")], splits=ONE_SPLIT)
        assert (tmp_path / "data/train/metadata.jsonl").read_text() == "mine"

    def test_an_export_that_was_killed_is_replaced(self, tmp_path, monkeypatch):
        study, events = make_study(tmp_path / "study", 1), [vote("p01", "0000")]

        def kill(*files):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(export, "_place_file", kill)
            export_preferences(study, tmp_path / "data", events, splits=ONE_SPLIT)
        export_preferences(study, tmp_path / "data", events, splits=ONE_SPLIT)
        assert len(list((tmp_path / "data/train").rglob("*.png"))) == 2

    def test_card_says_what_was_asked_and_left_out(self, tmp_path):
        study = make_study(tmp_path / "study", 2)
        export_preferences(
            study,
            tmp_path / "data",
            [vote("p01", "0001", ms=5000), vote("fast", "0000", ms=1)],
            VoteFilter(min_seconds=1.0),
            splits=ONE_SPLIT,
            license="cc0-1.0",
            name="me/pairs",
        )
        card = (tmp_path / "data" / "README.md").read_text()
        for text in (
            "license: cc0-1.0",
            'load_dataset("me/pairs"',
            "Which looks better?",
            "1 pairs with fewer than 1 votes",
            "a: preferred in 1 of 1",
            "1 votes of 1 people",
        ):
            assert text in card

    def test_parquet_holds_the_images(self, tmp_path):
        study = make_study(tmp_path / "study", 2)
        export_preferences(study, tmp_path / "data", [vote("p01", "0001")], splits=ONE_SPLIT)
        write_parquet(tmp_path / "data", tmp_path / "parquet")
        stored = load_dataset(
            "parquet",
            data_files=str(tmp_path / "parquet/train.parquet"),
            split="train",
            cache_dir=str(tmp_path / "cache"),
        )
        assert stored[0]["chosen"].size == (32, 32)
