# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json

import pytest

from tapo_trl.evaluation import read_compbench, read_geneval, read_vbench, vbench_total


DIMENSIONS = (
    *("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree"),
    *("aesthetic_quality", "imaging_quality", "object_class", "multiple_objects", "human_action", "color"),
    *("spatial_relationship", "scene", "appearance_style", "temporal_style", "overall_consistency"),
)
# Percentages from the public leaderboard of VBench: the dimensions, then quality, semantic and total
PUBLISHED = {
    "LaVie": (
        (
            91.41,
            97.47,
            98.30,
            96.38,
            49.72,
            54.94,
            61.90,
            91.82,
            33.32,
            96.80,
            86.39,
            34.09,
            52.69,
            23.56,
            25.93,
            26.41,
        ),
        (78.78, 70.31, 77.08),
    ),
    "ModelScope": (
        (
            89.87,
            95.29,
            98.28,
            95.79,
            66.39,
            52.06,
            58.57,
            82.25,
            38.98,
            92.40,
            81.72,
            33.68,
            39.26,
            23.39,
            25.37,
            25.67,
        ),
        (78.05, 66.54, 75.75),
    ),
    "VideoCrafter-0.9": (
        (
            86.24,
            92.88,
            97.60,
            91.79,
            89.72,
            44.41,
            57.22,
            87.34,
            25.93,
            93.00,
            78.84,
            36.74,
            43.36,
            21.57,
            25.42,
            25.21,
        ),
        (74.91, 65.46, 73.02),
    ),
}

# Prompts of GenEval by task, and the scores of its repository: overall, then the tasks in this order
GENEVAL_PROMPTS = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
GENEVAL = {
    "Stable Diffusion v1.5": (0.43, (0.97, 0.38, 0.35, 0.76, 0.04, 0.06)),
    "Stable Diffusion v2.1": (0.50, (0.98, 0.51, 0.44, 0.85, 0.07, 0.17)),
    "Stable Diffusion XL": (0.55, (0.98, 0.74, 0.39, 0.85, 0.15, 0.23)),
    "IF-XL": (0.61, (0.97, 0.74, 0.66, 0.81, 0.13, 0.35)),
}


def scores_of(model):
    return {name: value / 100 for name, value in zip(DIMENSIONS, PUBLISHED[model][0], strict=True)}


class TestVBench:
    @pytest.mark.parametrize("model", PUBLISHED)
    def test_published_totals_follow_from_published_dimensions(self, model):
        result = vbench_total(scores_of(model))
        assert [round(100 * result[name], 2) for name in ("quality", "semantic", "total")] == pytest.approx(
            PUBLISHED[model][1], abs=0.0101
        )

    def test_a_missing_dimension_is_an_error(self):
        scores = scores_of("LaVie")
        del scores["scene"]
        with pytest.raises(ValueError, match="scene"):
            vbench_total(scores)

    def test_reads_the_files_of_the_tool(self, tmp_path):
        for name, value in scores_of("LaVie").items():
            result = {name: [value, [{"video_path": "a.mp4", "video_results": value}]]}
            (tmp_path / f"{name}_eval_results.json").write_text(json.dumps(result))
        assert read_vbench(tmp_path)["total"] == vbench_total(scores_of("LaVie"))["total"]
        (tmp_path / "scene_eval_results.json").unlink()
        assert "total" not in read_vbench(tmp_path)

    def test_two_results_of_a_dimension_are_an_error(self, tmp_path):
        for file in ("a", "b"):
            (tmp_path / f"{file}_eval_results.json").write_text(json.dumps({"scene": [0.5, []]}))
        with pytest.raises(ValueError, match="scene"):
            read_vbench(tmp_path)

    @pytest.mark.parametrize("content", ["[1]", '{"scene": null}', '{"scene": []}', '{"scene": ["x"]}', '{"scene"'])
    def test_a_broken_file_is_named(self, tmp_path, content):
        (tmp_path / "a_eval_results.json").write_text(content)
        with pytest.raises(ValueError, match="a_eval_results.json"):
            read_vbench(tmp_path)

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "a_eval_results.json").write_text("{}")
        with pytest.raises(ValueError, match="is a file: name the folder"):
            read_vbench(tmp_path / "a_eval_results.json")

    def test_no_result_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="eval_results"):
            read_vbench(tmp_path)


class TestGenEval:
    def test_overall_is_the_mean_of_the_tasks_not_of_the_images(self, tmp_path):
        rows = [("counting", False)] * 3 + [("counting", True), ("colors", True)]
        text = "\n".join(json.dumps({"tag": tag, "correct": correct, "filename": "x"}) for tag, correct in rows)
        (tmp_path / "results.jsonl").write_text(text)
        assert read_geneval(tmp_path / "results.jsonl") == {"counting": 0.25, "colors": 1.0, "overall": 0.625}

    @pytest.mark.parametrize("model", GENEVAL)
    def test_published_overall_follows_from_the_counts_of_the_published_tasks(self, tmp_path, model):
        """Four images for each of the 553 prompts; the published shares are rounded, and so is their overall score."""
        overall, shares = GENEVAL[model]
        rows = []
        for (tag, num_prompts), share in zip(GENEVAL_PROMPTS.items(), shares, strict=True):
            correct = round(4 * num_prompts * share)
            rows += [{"tag": tag, "correct": index < correct} for index in range(4 * num_prompts)]
        (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found = read_geneval(tmp_path / "results.jsonl")
        assert found["overall"] == pytest.approx(overall, abs=0.0075)
        of_images = sum(row["correct"] for row in rows) / len(rows)
        assert found["overall"] > of_images + 0.01  # which weighs large tasks more

    def test_a_folder_or_binary_file_is_an_error(self, tmp_path):
        (tmp_path / "results.jsonl").write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match="it is no text"):
            read_geneval(tmp_path / "results.jsonl")
        with pytest.raises(ValueError, match="is a folder"):
            read_geneval(tmp_path)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            '{"tag": "counting"}',
            "5",
            '["tag", "correct"]',
            '{"tag": 1',
            "<html>",
            '{"tag": "a", "correct": "False"}',
        ],
    )
    def test_another_file_is_an_error(self, tmp_path, text):
        (tmp_path / "results.jsonl").write_text(text)
        with pytest.raises(ValueError, match="GenEval"):
            read_geneval(tmp_path / "results.jsonl")


class TestCompBench:
    def test_mean_of_the_answers(self, tmp_path):
        rows = [{"question_id": 0, "answer": "0.25"}, {"question_id": 1, "answer": "0.75"}]
        (tmp_path / "vqa_result.json").write_text(json.dumps(rows))
        assert read_compbench(tmp_path / "vqa_result.json") == 0.5

    @pytest.mark.parametrize("content", [[], {"answer": 1}, [{"question_id": 0}], [5]])
    def test_another_file_is_an_error(self, tmp_path, content):
        (tmp_path / "vqa_result.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="CompBench"):
            read_compbench(tmp_path / "vqa_result.json")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[{"answer":', "no JSON .* Did the tool stop"),
            ('[{"answer": "yes"}]', "entry 1, `answer`: 'yes' is no number"),
            ('[{"answer": NaN}]', "entry 1, `answer`: nan is not finite"),
        ],
    )
    def test_a_broken_file_is_named(self, tmp_path, text, message):
        (tmp_path / "vqa_result.json").write_text(text)
        with pytest.raises(ValueError, match=f"vqa_result.json.*{message}"):
            read_compbench(tmp_path / "vqa_result.json")
