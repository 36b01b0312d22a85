# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
import torch
from datasets import Dataset
from PIL import Image

from tapo_trl.evaluation import sample_benchmark
from tapo_trl.evaluation.sampling import list_items


def rows_of(name):
    return {
        "geneval": Dataset.from_list([{"prompt": p, "tag": "x", "metadata": json.dumps({"prompt": p})} for p in "ab"]),
        "compbench/color": Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]),
        "drawbench": Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]),
        "vbench": Dataset.from_list(
            [
                {"prompt": "a", "dimension": ["scene"]},
                {"prompt": "b", "dimension": ["temporal_flickering"]},
                {"prompt": "a", "dimension": ["color"]},
            ]
        ),
    }[name]


class Draw:
    """Pictures whose brightness is their seed, and a list of what was drawn. Stops after some batches."""

    def __init__(self, video=False, stop_after=None):
        self.drawn, self.video, self.stop_after = [], video, stop_after

    def __call__(self, prompts, seeds):
        if self.stop_after is not None and len(self.drawn) >= self.stop_after:
            raise KeyboardInterrupt
        self.drawn += zip(prompts, seeds, strict=True)
        shape = (3, 5, 16, 16) if self.video else (3, 8, 8)
        return torch.stack([torch.full(shape, seed / 255) for seed in seeds])


def sample(name, draw, folder, **options):
    settings = options.pop("settings", {"model": "tiny"})
    return sample_benchmark(name, rows_of(name), draw, folder, settings=settings, **options)


class TestLayouts:
    @pytest.mark.parametrize(
        ("name", "files"),
        [
            ("geneval", ["00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png"]),
            ("compbench/color", ["samples/a_000000.png", "samples/a_000001.png", "samples/b_000002.png"]),
            ("drawbench", ["00000_0.png", "00000_1.png", "00001_0.png"]),
            ("vbench", ["videos/a-0.mp4", "videos/a-1.mp4", "videos/b-0.mp4"]),
        ],
    )
    def test_files(self, name, files):
        assert [str(item.file) for item in list_items(name, rows_of(name), 2)][:3] == files

    def test_vbench_takes_25_videos_for_flickering_and_one_set_for_a_repeated_prompt(self):
        files = [item.file.name for item in list_items("vbench", rows_of("vbench"))]
        assert len(files) == len(set(files)) == 5 + 25

    @pytest.mark.parametrize("prompt", ["x" * 300, "a cup and/or a cat"])
    def test_a_prompt_that_is_no_file_name_is_an_error(self, prompt):
        with pytest.raises(ValueError, match="no file can be named"):
            list_items("compbench/color", Dataset.from_list([{"prompt": prompt}]))

    def test_a_long_prompt_is_a_file_name(self, tmp_path):
        rows = Dataset.from_list([{"prompt": "x" * 240}])
        (item,) = sample_benchmark("compbench/color", rows, Draw(), tmp_path, settings={}, samples_per_prompt=1)
        assert (tmp_path / item.file).exists()

    def test_geneval_has_the_row_beside_the_samples(self, tmp_path):
        sample("geneval", Draw(), tmp_path)
        assert json.loads((tmp_path / "00001" / "metadata.jsonl").read_text()) == {"prompt": "b"}

    def test_videos(self, tmp_path):
        pytest.importorskip("av")
        items = sample("vbench", Draw(video=True), tmp_path, samples_per_prompt=1)
        assert all((tmp_path / item.file).stat().st_size > 0 for item in items)


class TestResume:
    def test_a_stopped_run_goes_on_with_the_same_seeds(self, tmp_path):
        whole, first, second = Draw(), Draw(stop_after=3), Draw()
        sample("geneval", whole, tmp_path / "whole", batch_size=3)
        with pytest.raises(KeyboardInterrupt):
            sample("geneval", first, tmp_path / "stopped", batch_size=3)
        sample("geneval", second, tmp_path / "stopped", batch_size=3)
        assert first.drawn and second.drawn and first.drawn + second.drawn == whole.drawn
        for file in (tmp_path / "whole").rglob("*.png"):
            assert file.read_bytes() == (tmp_path / "stopped" / file.relative_to(tmp_path / "whole")).read_bytes()

    def test_a_file_that_was_cut_off_is_not_left_under_its_name(self, tmp_path, monkeypatch):
        def fail(self, file, **kwargs):
            file.write_bytes(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr(Image.Image, "save", fail)
        with pytest.raises(OSError, match="No space"):
            sample("drawbench", Draw(), tmp_path)
        assert not list(tmp_path.glob("*.png"))

    @pytest.mark.parametrize("change", [{"settings": {"model": "other"}}, {"seed": 7}, {"samples_per_prompt": 3}])
    def test_a_folder_of_other_settings_is_refused(self, tmp_path, change):
        sample("drawbench", Draw(), tmp_path)
        before = sorted(file.name for file in tmp_path.iterdir())
        with pytest.raises(ValueError, match="other settings"):
            sample("drawbench", Draw(), tmp_path, **change)
        assert sorted(file.name for file in tmp_path.iterdir()) == before

    def test_only_what_changed_is_named(self, tmp_path):
        sample("drawbench", Draw(), tmp_path, settings={"size": (8, 8, None), "model": "tiny"})
        sample("drawbench", Draw(), tmp_path, settings={"size": (8, 8, None), "model": "tiny"})
        with pytest.raises(ValueError, match=r"other settings \(model\): give another `samples_dir`"):
            sample("drawbench", Draw(), tmp_path, settings={"size": (8, 8, None), "model": "other"})

    def test_settings_that_cannot_be_read(self, tmp_path):
        (tmp_path / "sampling.json").write_text('{"model"')
        with pytest.raises(ValueError, match="sampling.json.* cannot be read"):
            sample("drawbench", Draw(), tmp_path)
