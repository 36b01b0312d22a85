# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""What others made, a repository, a recipe or a data set, neither runs code nor writes where it should not."""

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig

from tapo_trl import SLRMModel, TAPOTrainer, load_policy
from tapo_trl.callbacks.samples import SampleGridCallback
from tapo_trl.policies import SD3Policy
from tapo_trl.runs.checkpoints import seal_checkpoint
from tapo_trl.scripts.tapo import make_parser
from tests.testing_utils import tiny_sd3_pipeline
from tests.trainer.test_tapo_trainer import make_args, make_lora, make_trainer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Whole folders of a pipeline, an SLRM and an SLRM with LoRA."""
    root = tmp_path_factory.mktemp("folders")
    pipeline = tiny_sd3_pipeline()
    pipeline.save_pretrained(root / "pipeline")
    slrm = SLRMModel.from_policy(SD3Policy(pipeline))
    slrm.save_pretrained(root / "slrm")
    slrm.add_lora(LoraConfig(r=2, target_modules=["to_q"]))
    slrm.save_pretrained(root / "lora slrm")
    return root


class Repository:
    """A copy of a folder to tamper with. `ran` tells whether its code was run."""

    def __init__(self, source, folder):
        self.folder = Path(shutil.copytree(source, folder))
        self.trace = folder.with_name("trace")
        self.code = (
            f"open({str(self.trace)!r}, 'w')\nfrom diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline\n"
            "class EvilPipeline(StableDiffusion3Pipeline): pass\nclass Evil(SD3Transformer2DModel): pass\n"
        )

    @property
    def ran(self):
        return self.trace.exists()

    def add_code(self, name):
        (self.folder / name).write_text(self.code)

    def edit(self, name, **entries):
        file = self.folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    def pickle_instead(self, pattern, *names):
        """Replace weights by a pickle that leaves a trace when it is loaded."""
        for file in list(self.folder.glob(pattern)):
            file.unlink()
        for name in names:
            torch.save({"weight": Trace(self.trace)}, self.folder / name)


class Trace:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def repository(folders, tmp_path):
    def make(kind):
        return Repository(folders / kind, tmp_path / "repository")

    return make


def test_the_trap_works(repository):
    """Else the tests below would show nothing."""
    evil = repository("pipeline")
    evil.pickle_instead("vae/*.safetensors", "vae/diffusion_pytorch_model.bin")
    torch.load(evil.folder / "vae" / "diffusion_pytorch_model.bin", weights_only=False)
    assert evil.ran


class TestCode:
    @pytest.mark.parametrize(
        ("files", "entries"),
        [
            (["pipeline.py"], {"_class_name": ["pipeline", "EvilPipeline"]}),
            (["transformer/evil.py"], {"transformer": ["evil", "Evil"]}),
            (["evil.py"], {"transformer": ["evil", "Evil"]}),
            ([], {"transformer": ["os", "system"]}),
            ([], {"scheduler": ["builtins", "exec"]}),
        ],
        ids=str,
    )
    def test_of_a_pipeline_is_refused(self, repository, files, entries):
        evil = repository("pipeline")
        for name in files:
            evil.add_code(name)
        evil.edit("model_index.json", **entries)
        with pytest.raises(ValueError):
            load_policy(str(evil.folder))
        assert not evil.ran

    def test_of_a_component_is_not_looked_at(self, repository):
        evil = repository("pipeline")
        for component in ("transformer", "text_encoder", "vae"):
            evil.add_code(f"{component}/modeling.py")
            evil.edit(f"{component}/config.json", auto_map={"AutoModel": "modeling.Evil"})
        assert isinstance(load_policy(str(evil.folder)), SD3Policy)
        assert not evil.ran

    @pytest.mark.parametrize(
        "kwargs", [{"trust_remote_code": True}, {"custom_pipeline": "someone/pipeline"}, {"use_safetensors": False}]
    )
    def test_cannot_be_asked_for(self, folders, kwargs):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            load_policy(str(folders / "pipeline"), **kwargs)

    @pytest.mark.parametrize("kind", ["slrm", "lora slrm"])
    def test_of_an_slrm_is_not_looked_at(self, repository, folders, kind):
        evil = repository(kind)
        evil.add_code("modeling.py")
        evil.edit("config.json", auto_map={"AutoModel": "modeling.Evil"}, custom_pipeline="modeling")
        SLRMModel.from_pretrained(str(evil.folder), base_model=str(folders / "pipeline"))
        assert not evil.ran

    def test_of_a_yaml_file_is_refused(self, tmp_path, capsys):
        trace, recipe = tmp_path / "trace", tmp_path / "recipe.yaml"
        recipe.write_text(f"output_dir: !!python/object/apply:builtins.open [{trace}, w]\n")
        with pytest.raises(SystemExit):
            make_parser().parse_args_and_config(["--config", str(recipe)])
        assert "is not valid YAML" in capsys.readouterr().err
        assert not trace.exists()


class TestPickles:
    @pytest.mark.parametrize(
        ("component", "name"),
        [
            ("transformer", "diffusion_pytorch_model.bin"),
            ("vae", "diffusion_pytorch_model.bin"),
            ("text_encoder", "pytorch_model.bin"),
        ],
    )
    def test_of_a_pipeline(self, repository, component, name):
        evil = repository("pipeline")
        evil.pickle_instead(f"{component}/*.safetensors", f"{component}/{name}")
        with pytest.raises(OSError, match="safetensors"):
            load_policy(str(evil.folder))
        assert not evil.ran

    def test_of_an_slrm(self, repository):
        evil = repository("slrm")
        evil.pickle_instead("*.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            SLRMModel.from_pretrained(str(evil.folder))
        assert not evil.ran

    def test_of_a_lora_of_an_slrm(self, repository, folders):
        evil = repository("lora slrm")
        evil.pickle_instead("*.safetensors", "slrm_lora.bin", "adapter_model.bin", "pytorch_lora_weights.bin")
        with pytest.raises(OSError, match="slrm_lora.safetensors"):
            SLRMModel.from_pretrained(str(evil.folder), base_model=str(folders / "pipeline"))
        assert not evil.ran

    def test_of_the_base_of_an_slrm(self, repository, folders):
        evil = repository("pipeline")
        evil.pickle_instead("transformer/*.safetensors", "transformer/diffusion_pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            SLRMModel.from_pretrained(str(folders / "lora slrm"), base_model=str(evil.folder))
        assert not evil.ran

    def test_of_lora_weights(self, repository, folders):
        from tapo_trl.cli.arguments import SampleArguments
        from tapo_trl.cli.sample import load_sampling_policy
        from tapo_trl.trainer.model_config import PipelineConfig

        evil = repository("slrm")
        evil.pickle_instead("*", "pytorch_lora_weights.bin", "adapter_model.bin")
        args = SampleArguments(prompts="prompts.txt", output_dir="out", lora=str(evil.folder))
        with pytest.raises(OSError, match="safetensors"):
            load_sampling_policy(PipelineConfig(model_name_or_path=str(folders / "pipeline")), args)
        assert not evil.ran

    @pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
    def test_of_a_checkpoint_run_nothing(self, tmp_path, name):
        saving = {"save_strategy": "steps", "save_steps": 1}
        make_trainer(tmp_path, **saving).train()
        checkpoint, trace = tmp_path / "out" / "checkpoint-1", tmp_path / "trace"
        torch.save({"state": Trace(trace)}, checkpoint / name)
        seal_checkpoint(checkpoint)
        with pytest.raises(pickle.UnpicklingError, match="[Ww]eights"):
            make_trainer(tmp_path, **saving).train(resume_from_checkpoint=str(checkpoint))
        assert not trace.exists()


# One of the names that nothing on the disk may have
HOSTILE = [
    "../../escaped",
    "/tmp/escaped/x",
    "~/escaped",
    "escaped\n---\nlicense: mit\nbase_model: someone/else\n---\n# escaped",
    "--- \nescaped: true",
    "- escaped: {[\"'`|%s{{ 7*7 }}",
    "escaped\r\n---\r\n",
    "C:\\escaped",
]


@pytest.fixture
def written(monkeypatch):
    """Paths that were opened for writing, made or renamed to, while the test runs."""
    paths, is_on = [], [True]

    def listen(event, args):
        if not is_on:
            return
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                paths.append(os.fsdecode(args[0]))
        elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "shutil.copyfile"):
            paths.extend(os.fsdecode(path) for path in args[:2] if isinstance(path, (str, bytes, os.PathLike)))

    sys.addaudithook(listen)
    yield paths
    is_on.clear()


class TestHostileStrings:
    def run(self, tmp_path):
        def reward(images, prompts, **columns):
            return images.mean((1, 2, 3))

        reward.__name__ = HOSTILE[0]
        rows = {"prompt": HOSTILE, **{name: list(range(len(HOSTILE))) for name in HOSTILE}}
        trainer = TAPOTrainer(
            tiny_sd3_pipeline(),
            reward,
            make_args(
                tmp_path,
                eval_strategy="steps",
                eval_steps=1,
                save_strategy="steps",
                save_steps=1,
                report_to="tensorboard",
                run_name=HOSTILE[0],
            ),
            train_dataset=Dataset.from_dict(rows),
            eval_dataset={name: Dataset.from_dict({"prompt": HOSTILE[:2]}) for name in HOSTILE[:4]},
            callbacks=[SampleGridCallback(HOSTILE, every_n_steps=1, num_inference_steps=2)],
            peft_config=make_lora(),
        )
        trainer.train()
        trainer.save_model()
        return trainer

    @pytest.mark.slow
    def test_nothing_is_written_elsewhere(self, tmp_path, written, monkeypatch):
        trainer = self.run(tmp_path)
        trainer.create_model_card(model_name="m", dataset_name=HOSTILE[0], tags=HOSTILE)
        assert {path.name for path in tmp_path.iterdir()} == {"cache", "out"}
        assert len(written) > 10
        assert [path for path in written if "escaped" in path] == []
        assert [path for path in tmp_path.rglob("*") if "escaped" in path.name] == []

    @pytest.mark.slow
    def test_the_header_of_the_card_stays_whole(self, tmp_path):
        self.run(tmp_path).create_model_card(tags=HOSTILE)
        text = (tmp_path / "out" / "README.md").read_text()
        header = yaml.safe_load(re.match("---\n(.*?)\n---\n", text, re.DOTALL)[1])
        assert header["library_name"] == "diffusers"
        assert "base_model" not in header and "license" not in header
        card = ModelCard(text)
        assert card.data.to_dict() == header
        assert card.text.lstrip().startswith("# out\n")
        assert "escaped" in header["widget"][0]["text"]
        for block in card.text.split("```python\n")[1:]:
            compile(block.split("```")[0], "card", "exec")
        rows = [line for line in card.text.splitlines() if line.startswith("| ")]
        assert all(line.replace("\\|", "").count("|") == 3 for line in rows)
        assert any("escaped" in line for line in rows)

    def test_a_folder_with_a_hostile_name(self, tmp_path):
        base = tmp_path / 'x"); print("escaped'
        tiny_sd3_pipeline().save_pretrained(base)
        trainer = TAPOTrainer(
            str(base),
            lambda images, prompts: images.mean((1, 2, 3)),
            make_args(tmp_path),
            train_dataset=Dataset.from_dict({"prompt": ["cat", "dog"]}),
            peft_config=make_lora(),
        )
        trainer.create_model_card()
        text = (tmp_path / "out" / "README.md").read_text()
        code = text.split("```python\n")[1].split("```")[0]
        assert 'from_pretrained("path/to/x\\"); print(\\"escaped"' in code
        compile(code, "card", "exec")
