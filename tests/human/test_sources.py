# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from tapo_trl.cli.main import main
from tapo_trl.evaluation.baselines import Baseline
from tapo_trl.human.pairing import make_pairs, matches_of, warn_of_different_shapes
from tapo_trl.human.prompts import import_prompts
from tapo_trl.human.sources import Source, find_medium, make_media
from tapo_trl.human.study import TEXT_ALIGNMENT, Study, View
from tapo_trl.human.votes import VoteStore
from tapo_trl.policies import load_policy
from tapo_trl.policies.wan_experts import WanExpertsPolicy
from tapo_trl.trainer.policy_setup import leave_out_experts

from .studies import vote


class StandIn:
    """A pipeline that paints its seed. It fails where the prompt says so."""

    def __init__(self, name, path, dtype, options=None):
        self.pipeline, self.calls = None, []

    def load(self, device):
        self.pipeline = self

    def draw(self, prompts, seeds, batch_size, device):
        if any("fail" in prompt for prompt in prompts):
            raise RuntimeError("no such luck")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return torch.stack([torch.rand(3, 8, 8, generator=generator) for generator in generators])


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr("tapo_trl.human.sources.Baseline", StandIn)
    study = Study(dimensions=[TEXT_ALIGNMENT])
    study.save(tmp_path / "study")
    import_prompts(study, [f"prompt {number}" for number in range(8)])
    return study


def sources(**changes):
    return [Source("a", "model", **changes), Source("b", "other", **changes)]


def make(study, names="ab", **options):
    prompts = study.read_prompts()
    return [
        failure for name in names for failure in make_media(study, Source(name, "model " + name), prompts, **options)
    ]


def bytes_of(study):
    return {file.name: file.read_bytes() for file in sorted((study.folder / "media").rglob("*.png"))}


class TestMedia:
    def test_a_file_per_prompt_and_model_that_start_from_the_same_noise(self, study):
        assert make(study) == []
        for row in study.read_prompts():
            first, second = (find_medium(study.folder / "media" / name, row["prompt_id"]) for name in "ab")
            assert first.read_bytes() == second.read_bytes()
            facts = json.loads(first.with_suffix(".json").read_text())
            assert facts["prompt"] == row["prompt"] and facts["model"] == "model a"

    def test_what_is_missing_is_made_again_to_the_same_bytes(self, study):
        make(study)
        before = bytes_of(study)
        for file in sorted((study.folder / "media").rglob("*.png"))[::3]:
            file.unlink()
        make(study)
        assert bytes_of(study) == before

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_a_prompt_that_fails_is_named_and_the_others_go_on(self, study, batch_size):
        import_prompts(study, ["this must fail"])
        failures = make(study, "a", batch_size=batch_size)
        assert len(failures) == 1
        assert "this must fail" in failures[0] and "no such luck" in failures[0]
        assert len(bytes_of(study)) == 8
        assert make(study, "a") == failures  # named again, not tried again
        assert len(make_pairs(study, study.read_prompts(), [("a", "a")])) == 8

    def test_retry_failed(self, study, monkeypatch):
        import_prompts(study, ["this must fail"])
        make(study, "a")
        monkeypatch.setattr(StandIn, "draw", lambda self, prompts, *rest: torch.zeros(len(prompts), 3, 8, 8))
        assert make(study, "a") != []
        assert make(study, "a", retry_failed=True) == []
        assert len(bytes_of(study)) == 9

    def test_other_settings_are_refused(self, study):
        make(study, "a")
        with pytest.raises(ValueError, match="other settings"):
            make_media(study, Source("a", "model a", lora="new"), study.read_prompts())

    def test_a_lora_is_put_on_the_expert_that_it_is_for(self, study, tmp_path, monkeypatch):
        policy = load_policy(WanExpertsPolicy.tiny())
        policy.configure_experts("low")
        peft_config = leave_out_experts(policy, LoraConfig(r=2, target_modules=policy.lora_target_modules))
        policy.save_lora_weights(tmp_path, get_peft_model(policy.transformer, peft_config))
        pipeline = WanExpertsPolicy.tiny()
        monkeypatch.setattr(StandIn, "load", lambda self, device: setattr(self, "pipeline", pipeline))
        make_media(study, Source("a", "model a", lora=str(tmp_path)), study.read_prompts())
        assert hasattr(pipeline.transformer_2, "peft_config") and not hasattr(pipeline.transformer, "peft_config")

    @pytest.mark.parametrize("suffix", [".mov", ".avi"])
    def test_a_folder_of_clips_in_other_containers(self, study, tmp_path, suffix):
        prompts = study.read_prompts()
        for row in prompts:
            (tmp_path / f"{row['prompt_id']}{suffix}").write_bytes(b"a clip")
        source = Source("other", folder=str(tmp_path))
        if suffix == ".avi":
            with pytest.raises(ValueError, match="cannot show .*avi"):
                make_media(study, source, prompts)
        else:
            make_media(study, source, prompts)
            assert find_medium(study.folder / "media/other", prompts[0]["prompt_id"]).suffix == suffix

    def test_a_folder_of_files(self, study, tmp_path):
        names = [row["prompt_id"] for row in study.read_prompts()]
        (tmp_path / "others").mkdir()
        for number in range(8):
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / "others" / f"{number:03d}.png")
        make_media(study, Source("other", folder=str(tmp_path / "others")), study.read_prompts())
        for number, name in enumerate(names):
            assert np.asarray(Image.open(study.folder / "media/other" / f"{name}.png"))[0, 0, 0] == number
        (tmp_path / "others" / "007.png").unlink()
        with pytest.raises(ValueError, match="7 files for 8 prompts"):
            make_media(study, Source("fewer", folder=str(tmp_path / "others")), study.read_prompts())

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"name": "a/b", "model": "m"}, "no name"),
            ({"name": "a"}, "either"),
            ({"name": "a", "model": "m", "folder": "f"}, "either"),
            ({"name": "a", "folder": "f", "lora": "l"}, "leave out"),
            ({"name": "a", "model": "m", "dtype": "int99"}, "precision"),
        ],
    )
    def test_bad_sources(self, fields, message):
        with pytest.raises(ValueError, match=message):
            Source(**fields)


class TestPairs:
    def test_each_prompt_is_a_pair_with_the_models_in_either_place(self, study):
        make(study)
        pairs = make_pairs(study, study.read_prompts(), [("a", "b")])
        assert len(pairs) == 8
        assert {pair.sources for pair in pairs} == {("a", "b"), ("b", "a")}
        assert study.read_pairs() == pairs

    def test_gold_and_repeats(self, study):
        make(study)
        pairs = make_pairs(study, study.read_prompts(), [("a", "b")], gold=4, repeats=3)
        gold = [pair for pair in pairs if pair.gold]
        assert len(gold) == 4 and len({pair.source_0 for pair in gold}) == 2
        for pair in gold:
            right = pair.media[0 if pair.gold["text_alignment"] == 1.0 else 1]
            assert pair.source_0 == pair.source_1 and pair.prompt_id in right
        assert sum(pair.repeat_of is not None for pair in pairs) == 3

    def test_votes_are_not_lost(self, study):
        make(study)
        pairs = make_pairs(study, study.read_prompts(), [("a", "b")])
        with VoteStore(study.folder / "votes.jsonl") as store:
            store.append(vote("p01", pairs[0].pair_id, {"text_alignment": 1.0}))
        import_prompts(study, ["another"])
        make(study)
        assert len(make_pairs(study, study.read_prompts(), [("a", "b")])) == 9
        find_medium(study.folder / "media/a", pairs[0].prompt_id).unlink()
        with pytest.raises(ValueError, match="1 pairs .* would go"):
            make_pairs(study, study.read_prompts(), [("a", "b")])
        assert len(study.read_pairs()) == 9

    def test_matches(self):
        assert matches_of(["a", "b", "c"], "all") == [("a", "b"), ("a", "c"), ("b", "c")]
        assert matches_of(["a", "b", "c"], "first") == [("a", "b"), ("a", "c")]
        with pytest.raises(ValueError, match="two"):
            matches_of(["a"], "all")

    def test_media_of_other_sizes_are_warned_of(self, study, caplog, monkeypatch):
        from transformers.utils import logging

        monkeypatch.setattr(logging.get_logger("tapo_trl.human.pairing"), "propagate", True)
        make(study, "a")
        monkeypatch.setattr(StandIn, "draw", lambda self, prompts, *rest: torch.zeros(len(prompts), 3, 8, 16))
        make(study, "b")
        pairs = make_pairs(study, study.read_prompts(), [("a", "b")])
        warn_of_different_shapes(study, pairs)
        assert "16 x 8" in caplog.text
        caplog.clear()
        study.view = View(8, 8)
        warn_of_different_shapes(study, pairs)
        assert caplog.text == ""


@pytest.mark.slow
class TestCommand:
    """With a real pipeline, the tiny SD3 of the emoji world."""

    KWARGS = '{"num_inference_steps": 2, "height": 64, "width": 64, "max_sequence_length": 1}'

    def flags(self, folder):
        return ["pairs", str(folder), "--model_a", "examples/emoji/pipeline", "--kwargs_a", self.KWARGS, "--dtype", "float32",
                "--kwargs_b", self.KWARGS.replace("2,", "3,")]  # fmt: skip

    def test_pairs_of_two_settings(self, tmp_path, capsys):
        main(["prompts", str(tmp_path), "--prompts", "panda face", "red apple", "--media", "images"])
        main([*self.flags(tmp_path), "--same_source", "1", "--repeats", "1"])
        assert "5 pairs" in capsys.readouterr().out
        pictures = sorted((tmp_path / "media").rglob("*.png"))
        assert len(pictures) == 6
        assert all(Image.open(picture).size == (64, 64) for picture in pictures)

    def test_killed_and_continued_with_another_number_of_processes(self, tmp_path):
        for name in ("whole", "killed"):
            main(["prompts", str(tmp_path / name), "--prompts", "panda face", "red apple", "--media", "images"])
        main(self.flags(tmp_path / "whole"))
        script = (
            "import os, signal, sys\n"
            "from tapo_trl.human import sources\n"
            "write = sources._write\n"
            "def killed(stem, sample, fps):\n"
            "    if list(stem.parent.glob('*.png')): os.kill(os.getpid(), signal.SIGKILL)\n"
            "    write(stem, sample, fps)\n"
            "sources._write = killed\n"
            "from tapo_trl.cli.main import main\n"
            "main(sys.argv[1:])\n"
        )
        command = [sys.executable, "-c", script, *self.flags(tmp_path / "killed")]
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
        assert len(list((tmp_path / "killed").rglob("*.png"))) == 1
        launch = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            "2",
            "-m",
            "tapo_trl.cli",
        ]
        result = subprocess.run(
            [*launch, *self.flags(tmp_path / "killed")], capture_output=True, text=True, env={**os.environ}
        )
        assert result.returncode == 0, result.stderr
        main(self.flags(tmp_path / "killed"))
        digests = [
            {
                str(file.relative_to(tmp_path / name)): hashlib.sha256(file.read_bytes()).hexdigest()
                for file in (tmp_path / name).rglob("*.png")
            }
            for name in ("whole", "killed")
        ]
        assert digests[0] == digests[1] and len(digests[0]) == 4
        assert (tmp_path / "whole/pairs.jsonl").read_text() == (tmp_path / "killed/pairs.jsonl").read_text()


def test_the_real_class_is_used():
    from tapo_trl.human import sources as module

    assert module.Baseline is Baseline
