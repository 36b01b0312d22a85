# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""`tapo-trl evaluate --benchmark`, and rewards of pixels on noisy pairs."""

import json

import pytest
from accelerate import PartialState

from tapo_trl.cli.arguments import EvaluateArguments
from tapo_trl.cli.main import main
from tapo_trl.evaluation.scores import SampleFiles, find_samples
from tests.data.preference_pairs import color_pairs
from tests.testing_utils import tiny_sd3_pipeline, tiny_wan_pipeline


def brightness(images, prompts):
    return images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, and made-up prompt files in the official layouts."""
    folder = tmp_path_factory.mktemp("benchmarks")
    tiny_sd3_pipeline().save_pretrained(folder / "base")
    rows = [{"tag": tag, "include": [], "prompt": tag} for tag in ("counting", "colors")]
    (folder / "geneval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "parti.tsv").write_text("Prompt\tCategory\na cat\tAnimals\na cup\tThings\na dog\tAnimals\n")
    (folder / "vbench.json").write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["scene"]}]))
    return folder


def run(folder, *flags):
    sampling = ["--num_inference_steps", "2", "--resolution", "32", "--max_sequence_length", "8", "--batch_size", "2"]
    main(["evaluate", "--model_name_or_path", str(folder / "base"), *sampling, *map(str, flags)])


class TestSampling:
    def test_geneval_is_drawn_into_the_layout_of_its_tool(self, folder, tmp_path, capsys):
        flags = ["--benchmark", "geneval", "--benchmark_prompts", folder / "geneval.jsonl", "--samples_dir", tmp_path]
        flags += ["--batch_size", 1]  # kernels may round differently by batch size
        run(folder, *flags, "--samples_per_prompt", 3)
        output = capsys.readouterr()
        assert json.loads(output.out) == {"benchmark": {"name": "geneval", "samples": 6}}
        assert f"evaluate_images.py {tmp_path}" in output.err and "--results" in output.err
        files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.png"))
        assert files == [f"{row:05d}/samples/{index:04d}.png" for row in range(2) for index in range(3)]
        pictures = [file.read_bytes() for file in sorted(tmp_path.rglob("*.png"))]
        assert len(set(pictures)) == 6

        # What is missing is drawn again, and is the same
        sorted(tmp_path.rglob("*.png"))[4].unlink()
        run(folder, *flags, "--samples_per_prompt", 3)
        assert [file.read_bytes() for file in sorted(tmp_path.rglob("*.png"))] == pictures

    def test_rewards_by_category(self, folder, tmp_path, capsys):
        flags = ["--benchmark", "partiprompts", "--benchmark_prompts", folder / "parti.tsv", "--samples_dir", tmp_path]
        run(folder, *flags, "--reward_model", f"{__name__}:brightness", "--samples_per_prompt", 2)
        output = capsys.readouterr()
        (found,) = json.loads(output.out)["benchmark"]["rewards"].values()
        pictures = SampleFiles(find_samples(tmp_path))
        scores = [picture.mean().item() for picture in pictures]
        assert [found[name]["n"] for name in ("all", "Animals", "Things")] == [6, 4, 2]
        assert found["all"]["mean"] == pytest.approx(sum(scores) / 6, abs=1e-5)
        assert found["Things"]["mean"] == pytest.approx(sum(scores[2:4]) / 2, abs=1e-5)
        assert "In a clone of" not in output.err

    def test_a_prompt_in_two_categories_counts_in_both(self, folder, tmp_path, capsys):
        (tmp_path / "parti.tsv").write_text("Prompt\tCategory\na cat\tAnimals\na cat\tThings\n")
        flags = ["--benchmark", "partiprompts", "--benchmark_prompts", tmp_path / "parti.tsv"]
        run(folder, *flags, "--samples_dir", tmp_path / "out", "--reward_model", f"{__name__}:brightness")
        (found,) = json.loads(capsys.readouterr().out)["benchmark"]["rewards"].values()
        assert [found[name]["n"] for name in ("all", "Animals", "Things")] == [2, 1, 1]

    def test_rewards_are_checked_before_anything_is_drawn(self, folder, tmp_path):
        pytest.importorskip("rapidocr")
        flags = ["--benchmark", "partiprompts", "--benchmark_prompts", folder / "parti.tsv", "--samples_dir", tmp_path]
        with pytest.raises(ValueError, match="prompt 'a cat' has none"):
            run(folder, *flags, "--reward_model", "ocr")
        assert not list(tmp_path.iterdir())

    def test_videos_come_from_a_model_of_videos(self, folder, tmp_path):
        flags = ["--benchmark", "vbench", "--benchmark_prompts", folder / "vbench.json", "--samples_dir", tmp_path]
        with pytest.raises(ValueError, match="benchmark of videos"):
            run(folder, *flags)

    def test_vbench(self, folder, tmp_path):
        tiny_wan_pipeline().save_pretrained(tmp_path / "wan")
        flags = ["--benchmark", "vbench", "--benchmark_prompts", folder / "vbench.json", "--num_frames", 5]
        run(folder, *flags, "--samples_dir", tmp_path / "vbench", "--model_name_or_path", tmp_path / "wan")
        # And nothing else beside them, whose suffix the tool could take for theirs
        files = sorted(file.name for file in (tmp_path / "vbench" / "videos").iterdir())
        assert files == [f"a cat-{index}.mp4" for index in range(5)]


@pytest.mark.parametrize("mode", ["benchmark", "prompts"])
def test_only_the_first_process_prints_and_writes(folder, tmp_path, capsys, monkeypatch, mode):
    monkeypatch.setattr(PartialState, "is_main_process", False)
    flags = ["--reward_model", f"{__name__}:brightness", "--output_file", tmp_path / "result.json"]
    if mode == "benchmark":
        flags += [
            "--benchmark",
            "partiprompts",
            "--benchmark_prompts",
            folder / "parti.tsv",
            "--samples_dir",
            tmp_path,
        ]
    else:
        flags += ["--prompts", "a cat"]
    run(folder, *flags)
    assert capsys.readouterr().out == "" and not (tmp_path / "result.json").exists()
    assert len(list(tmp_path.glob("*.png"))) == (3 if mode == "benchmark" else 0)


def test_results_of_a_tool(folder, tmp_path, capsys):
    rows = [
        {"tag": "counting", "correct": True},
        {"tag": "counting", "correct": False},
        {"tag": "colors", "correct": True},
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(folder, "--benchmark", "geneval", "--results", tmp_path / "results.jsonl")
    found = json.loads(capsys.readouterr().out)["benchmark"]
    assert found["scores"] == {"counting": 0.5, "colors": 1.0, "overall": 0.75}
    (tmp_path / "vqa_result.json").write_text(json.dumps([{"question_id": 0, "answer": "0.25"}]))
    run(folder, "--benchmark", "compbench/color", "--results", tmp_path / "vqa_result.json")
    assert json.loads(capsys.readouterr().out)["benchmark"]["scores"] == {"compbench/color": 0.25}


def test_accuracy_of_pixel_rewards_on_noisy_pairs(folder, tmp_path, capsys):
    color_pairs(6).to_parquet(tmp_path / "pairs.parquet")
    pairs = [
        "--dataset_name",
        tmp_path / "pairs.parquet",
        "--dataset_test_split",
        "train",
        "--cache_dir",
        tmp_path / "cache",
    ]
    run(folder, *pairs, "--reward_model", f"{__name__}:brightness", "--sigmas", 0.0, 0.5, "--max_pairs", 4)
    (accuracy,) = json.loads(capsys.readouterr().out)["reward_accuracy"].values()
    assert set(accuracy) == {"estimate", "noisy"}
    run(folder, *pairs, "--reward_model", f"{__name__}:brightness", "--sigmas", 0.0, 0.5, "--tie_threshold", "best")
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"reward_accuracy", "reward_accuracy_with_ties"}
    (with_ties,) = found["reward_accuracy_with_ties"].values()
    assert all(0 <= with_ties[reading][level] <= 1 for reading in accuracy for level in ("0.0", "0.5"))
    assert accuracy["estimate"]["0.0"] == accuracy["noisy"]["0.0"]
    assert all(4 * value == round(4 * value) for levels in accuracy.values() for value in levels.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark": "gen-eval"}, "geneval"),
        ({"benchmark": "geneval"}, "samples_dir"),
        ({"benchmark": "geneval", "samples_dir": "x"}, "git clone .*geneval"),
        ({"benchmark": "partiprompts", "samples_dir": "x", "benchmark_prompts": "y"}, "reward_model"),
        ({"benchmark": "geneval", "prompts": ["a"]}, "`prompts` and `benchmark`"),
        ({"benchmark": "geneval", "slrm": "x", "dataset_name": "y"}, "`slrm` and `benchmark`"),
        ({"benchmark": "geneval", "samples_per_prompt": 0}, "samples_per_prompt"),
        ({"benchmark": "drawbench", "results": "x"}, "drawbench"),
        ({"results": "x", "reward_model": ["a:b"], "prompts": ["a"]}, "`results` is set but `benchmark` is not"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluateArguments(**options)
