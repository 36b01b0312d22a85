# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Pushing to the Hub, over HTTP to a double of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard, close_session
from huggingface_hub.utils import _http
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from tapo_trl import SLRMConfig, SLRMTrainer, TAPOTrainer, load_policy
from tapo_trl.callbacks.ema import EMACallback
from tapo_trl.callbacks.samples import SampleGridCallback
from tapo_trl.runs import hub as hub_module
from tests.data.preference_pairs import latent_pairs
from tests.testing_utils import tiny_sd3_pipeline
from tests.trainer.hub_double import TOKEN, USER, HubDouble
from tests.trainer.test_tapo_trainer import make_trainer, trainable


LORA_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
SLRM_FILES = {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
SLRM_LORA_FILES = {"README.md", "config.json", "adapter_config.json", "slrm_lora.safetensors"}
SAVING = {"save_strategy": "steps", "save_steps": 1}
PUSHING = {**SAVING, "push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True}


@pytest.fixture(params=[True])
def hub(request, monkeypatch):
    monkeypatch.setattr(
        _http, "time", SimpleNamespace(sleep=lambda seconds: None)
    )  # between requests that are repeated
    with HubDouble(lfs=request.param) as double:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", double.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", request.param)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield double
    close_session()


def tapo_trainer(tmp_path, name="tapo", **kwargs):
    callbacks = [SampleGridCallback(["cat", "dog"], every_n_steps=1, num_inference_steps=2)]
    return make_trainer(tmp_path, callbacks=callbacks, hub_model_id=f"{USER}/{name}", **{**PUSHING, **kwargs})


def slrm_trainer(tmp_path, peft_config=None, model=None, **kwargs):
    args = {
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "resolution": 32,
        "max_sequence_length": 16,
        "num_task_tokens": 2,
        "cache_dir": str(tmp_path / "cache"),
        "learning_rate": 1e-3,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "eval_sigmas": [0.5],
        **PUSHING,
    }
    return SLRMTrainer(
        tiny_sd3_pipeline() if model is None else model,
        SLRMConfig(str(tmp_path / "slrm"), **{**args, **kwargs}),
        train_dataset=latent_pairs(8),
        peft_config=peft_config,
    )


def local_files(folder, names):
    return {name: (Path(folder) / name).read_bytes() for name in names}


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == hub_module.__name__]


class TestPush:
    @pytest.mark.parametrize("hub", [True, False], indirect=True, ids=["lfs", "regular files, with hf_xet"])
    def test_tapo(self, hub, tmp_path, caplog):
        trainer = tapo_trainer(tmp_path)
        trainer.dataset_name = "someone/prompts"
        trainer.train()
        assert trainer.push_to_hub() is not None

        commits = hub.repos[f"{USER}/tapo"]
        messages = ["initial commit", "Training in progress, step 1", "Training in progress, step 2"]
        assert [commit.message for commit in commits[:3]] == messages
        output_dir = Path(trainer.args.output_dir)
        for step in (1, 2):
            files = commits[step].files
            samples = {f"samples/step_{done:06d}.png" for done in range(step + 1)} | {"samples/prompts.txt"}
            assert files.keys() - {".gitattributes"} == LORA_FILES | samples
            weights = LORA_FILES - {"README.md", "adapter_config.json"}
            assert local_files(output_dir / f"checkpoint-{step}", weights).items() <= files.items()
            assert b"someone/prompts" in files["README.md"]
        names = {"README.md", "adapter_model.safetensors"}
        assert local_files(output_dir, names).items() <= hub.files(f"{USER}/tapo").items()
        assert not (output_dir / "hub_upload").exists()
        assert warnings_of(caplog) == []

    def test_lora_weights_have_metadata(self, hub, tmp_path):
        trainer = tapo_trainer(tmp_path)
        trainer.train()
        file = tmp_path / "lora.safetensors"
        file.write_bytes(hub.files(f"{USER}/tapo")["pytorch_lora_weights.safetensors"])
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
        assert metadata["transformer.lora_alpha"] == 4

    def test_tapo_in_full(self, hub, tmp_path):
        trainer = tapo_trainer(tmp_path, peft=False)
        trainer.train()
        files = hub.files(f"{USER}/tapo")
        names = {"README.md", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}
        assert {name for name in files if not name.startswith("samples/")} - {".gitattributes"} == names
        pushed = tmp_path / "pushed.safetensors"
        pushed.write_bytes(files["transformer/diffusion_pytorch_model.safetensors"])
        weights = load_file(pushed)
        assert weights.keys() >= trainable(trainer).keys()
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, weights[name]), name

    @pytest.mark.parametrize("peft", [True, False])
    def test_averaged_weights_at_the_end(self, hub, tmp_path, peft):
        trainer = make_trainer(tmp_path, callbacks=[EMACallback()], hub_model_id="average", peft=peft, **PUSHING)
        trainer.train()
        trainer.push_to_hub()
        *during, final = hub.repos[f"{USER}/average"]
        name = "pytorch_lora_weights" if peft else "transformer/diffusion_pytorch_model"
        assert f"ema/{name}.safetensors" in final.files
        for commit in during:
            assert not [path for path in commit.files if "ema" in path]

    @pytest.mark.parametrize(("lora", "names"), [(False, SLRM_FILES), (True, SLRM_LORA_FILES)])
    def test_slrm(self, hub, tmp_path, lora, names):
        trainer = slrm_trainer(tmp_path, peft_config=LoraConfig(r=2) if lora else None, hub_model_id="slrm")
        trainer.train()
        trainer.push_to_hub(dataset_name="someone/pairs")
        commits = hub.repos[f"{USER}/slrm"]
        for step, commit in enumerate(commits[1:3], start=1):
            assert commit.files.keys() - {".gitattributes"} == names
            weights = next(name for name in names if name.endswith(".safetensors"))
            folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
            assert commit.files[weights] == (folder / weights).read_bytes()
        assert b"someone/pairs" in hub.files(f"{USER}/slrm")["README.md"]
        assert f'SLRMModel.from_pretrained("{USER}/slrm")'.encode() in commits[1].files["README.md"]

    def test_only_at_the_end(self, hub, tmp_path):
        trainer = tapo_trainer(tmp_path, hub_strategy="end")
        trainer.train()
        assert len(hub.repos[f"{USER}/tapo"]) == 1
        trainer.save_model()
        assert [commit.message for commit in hub.repos[f"{USER}/tapo"][1:]] == ["Model save"]

    def test_not_blocking(self, hub, tmp_path):
        trainer = tapo_trainer(tmp_path, hub_strategy="end")
        trainer.train()
        jobs = [trainer.push_to_hub(message, blocking=False) for message in ("first", "second")]
        assert all(job.result() is not None for job in jobs)
        assert hub.repos[f"{USER}/tapo"][1].message == "first"

    def test_weights_are_those_of_a_run_that_pushes_nothing(self, hub, tmp_path, unpushed):
        trainer = tapo_trainer(tmp_path)
        trainer.train()
        assert_same(trainer, unpushed)

    def test_a_slow_upload_has_the_files_of_its_step(self, hub, tmp_path):
        """While it waits, the training has long overwritten what lies in the output folder."""
        hub.fail("POST .*/preupload", 503, times=3)
        trainer = tapo_trainer(tmp_path)
        trainer.train()
        for step in (1, 2):
            pushed = hub.repos[f"{USER}/tapo"][step].files
            folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
            assert pushed["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unpushed(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("unpushed"), **SAVING)
    trainer.train()
    return trainable(trainer)


def assert_same(trainer, unpushed):
    for name, value in trainable(trainer).items():
        assert torch.equal(value, unpushed[name]), name


LOAD_BACK = """
import json, sys, torch
from huggingface_hub import ModelCard, snapshot_download
from tapo_trl import SLRMModel
from tests.testing_utils import tiny_sd3_pipeline

tapo, slrm, lora_slrm = sys.argv[1:]

def lora_weights(source):
    pipeline = tiny_sd3_pipeline()
    pipeline.load_lora_weights(source)
    assert pipeline.transformer.peft_config["default_0"].lora_alpha == 4
    return pipeline.transformer.state_dict()

def difference(left, right):
    assert left.keys() == right.keys() and len(left) > 0
    return max((left[name] - right[name]).abs().max().item() for name in left)

base = tiny_sd3_pipeline()
print(json.dumps({
    "tapo": difference(lora_weights("someone/tapo"), lora_weights(tapo)),
    "adapted": difference(lora_weights("someone/tapo"), {**lora_weights(tapo), **{
        name: torch.zeros_like(value) for name, value in lora_weights(tapo).items() if "lora_B" in name}}),
    "slrm": difference(SLRMModel.from_pretrained("someone/slrm").state_dict(),
                       SLRMModel.from_pretrained(slrm).state_dict()),
    "lora_slrm": difference(SLRMModel.from_pretrained("someone/lora-slrm", base_model=base).state_dict(),
                            SLRMModel.from_pretrained(lora_slrm, base_model=base).state_dict()),
}))
for name in ("tapo", "slrm", "lora-slrm"):
    ModelCard.load(f"someone/{name}").validate()
    snapshot_download(f"someone/{name}")
"""


@pytest.mark.slow
def test_load_back(hub, tmp_path):
    """In a process of its own, which knows the double as the Hub from its start."""
    tapo = tapo_trainer(tmp_path)
    slrm = slrm_trainer(tmp_path / "full", hub_model_id=f"{USER}/slrm")
    lora_slrm = slrm_trainer(tmp_path / "lora", LoraConfig(r=2), hub_model_id=f"{USER}/lora-slrm")
    for trainer in (tapo, slrm, lora_slrm):
        trainer.train()
        trainer.push_to_hub()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    folders = [trainer.args.output_dir for trainer in (tapo, slrm, lora_slrm)]
    result = subprocess.run(
        [sys.executable, "-c", LOAD_BACK, *folders],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    differences = json.loads(result.stdout)
    assert differences.pop("adapted") > 0
    assert differences == {"tapo": 0, "slrm": 0, "lora_slrm": 0}
    assert any("HEAD /someone/tapo/resolve/main/pytorch_lora_weights.safetensors" in line for line in hub.requests)


class TestCard:
    @pytest.fixture
    def pushed(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", [f"{tmp_path}/tapo_sd35.py", "--config", "recipe.yaml"])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
        monkeypatch.setattr(TAPOTrainer, "_base_model_name", "stabilityai/stable-diffusion-3.5-medium")
        trainer = tapo_trainer(tmp_path)
        trainer.dataset_name = "someone/prompts"
        trainer.train()
        return hub.files(f"{USER}/tapo")

    def test_metadata(self, pushed):
        card = ModelCard(pushed["README.md"].decode())
        card.validate()
        data = card.data.to_dict()
        assert data["library_name"] == "diffusers"
        assert data["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
        assert (data["license"], data["license_name"]) == ("other", "stabilityai-ai-community")
        assert data["datasets"] == ["someone/prompts"]
        assert "reward" in data["metrics"]
        assert {"lora", "trl", "tapo", "template:sd-lora"} <= set(data["tags"])

    def test_gallery(self, pushed):
        widget = ModelCard(pushed["README.md"].decode()).data.to_dict()["widget"]
        assert [entry["text"] for entry in widget] == [f"step {step:06d}: cat; dog" for step in range(3)]
        for entry in widget:
            assert pushed[entry["output"]["url"]].startswith(b"\x89PNG")
        assert b"<Gallery />" in pushed["README.md"]

    def test_text(self, pushed):
        text = pushed["README.md"].decode()
        for part in ("python tapo_sd35.py --config recipe.yaml", "| `reward` |", "- diffusers: ", "@inproceedings"):
            assert part in text, part
        blocks = text.split("```python\n")[1:]
        assert blocks and f'load_lora_weights("{USER}/tapo")' in blocks[0]
        for block in blocks:
            compile(block.split("```")[0], "card", "exec")

    def test_the_double_is_strict(self, hub):
        card = ModelCard("---\nbase_model: /data/model\nlicense: other\n---\n")
        with pytest.raises(ValueError, match="base_model"):
            card.validate()


class TestFaults:
    """Whatever the Hub does, the training ends, with the weights of a run that pushes nothing."""

    @pytest.mark.parametrize(
        ("pattern", "fault"),
        [("PUT /lfs", {"status": 503, "times": 3}), ("/preupload/", {"kind": "hang", "times": 1})],
        ids=str,
    )
    def test_it_passes(self, hub, tmp_path, unpushed, monkeypatch, caplog, pattern, fault):
        """`huggingface_hub` repeats the request."""
        monkeypatch.setattr(hub_module, "REQUEST_TIMEOUT", 2)
        hub.fail(pattern, **fault)
        trainer = tapo_trainer(tmp_path)
        trainer.train()
        assert_same(trainer, unpushed)
        assert len(hub.repos[f"{USER}/tapo"]) == 3
        assert warnings_of(caplog) == []

    @pytest.mark.parametrize(
        ("pattern", "fault"),
        [
            ("repos/create", {"status": 503, "times": 2}),  # before the training, and in the first save
            ("validate-yaml", {"status": 500, "times": 1}),
            ("/commit/", {"status": 500, "times": 1}),
            ("/commit/", {"kind": "reset", "times": 1}),
            ("/commit/", {"kind": "hang", "times": 1}),
        ],
        ids=str,
    )
    def test_the_next_save_tries_again(self, hub, tmp_path, unpushed, monkeypatch, caplog, pattern, fault):
        if fault.get("kind") == "hang":
            monkeypatch.setattr(hub_module, "REQUEST_TIMEOUT", 2)
        hub.fail(pattern, **fault)
        trainer = tapo_trainer(tmp_path)
        trainer.train()
        assert_same(trainer, unpushed)
        assert [commit.message for commit in hub.repos[f"{USER}/tapo"]] == [
            "initial commit",
            "Training in progress, step 2",
        ]
        assert len(warnings_of(caplog)) == fault["times"]
        assert not (Path(trainer.args.output_dir) / "hub_upload").exists()

    @pytest.mark.parametrize(
        ("pattern", "fault", "words"),
        [
            ("repos/create", {"status": 401}, "hf auth login"),
            ("repos/create", {"kind": "hang"}, "ReadTimeout"),
            ("repos/create", {"status": 200}, "KeyError"),
            ("/commit/", {"status": 403}, "write permission"),
            ("/commit/", {"status": 429}, "too many requests"),
            ("/commit/", {"status": 500}, "HTTP 500"),
            ("/commit/", {"kind": "reset"}, "ReadError"),
            (".", {"status": 503}, "HTTP 503"),
        ],
        ids=str,
    )
    def test_it_stays(self, hub, tmp_path, unpushed, monkeypatch, caplog, pattern, fault, words):
        if fault.get("kind") == "hang":
            monkeypatch.setattr(hub_module, "REQUEST_TIMEOUT", 0.1)
        hub.fail(pattern, **fault)
        trainer = tapo_trainer(tmp_path)
        trainer.train()
        assert trainer.push_to_hub() is None
        assert_same(trainer, unpushed)
        assert all(len(commits) == 1 for commits in hub.repos.values())

        messages = warnings_of(caplog)
        at_start = [message for message in messages if "The training starts" in message]
        assert len(at_start) == (pattern != "/commit/")
        failed = [message for message in messages if message not in at_start]
        assert len(failed) == 2  # the first save and the end; not every save
        assert all(words in message for message in messages)

        # The command of the message uploads what the run has made
        folder = Path(trainer.args.output_dir) / "hub_upload" / "latest"
        assert f"`hf upload {USER}/tapo {folder} .`" in failed[-1]
        weights = LORA_FILES - {"README.md", "adapter_config.json"}
        assert local_files(folder, weights) == local_files(trainer.args.output_dir, weights)
        hub.faults.clear()
        close_session()
        monkeypatch.setattr(hub_module, "REQUEST_TIMEOUT", 60)
        assert trainer.push_to_hub() is not None
        assert not folder.parent.exists()

    @pytest.mark.parametrize("token", [None, "hf_anotherToken"])
    def test_without_a_token(self, hub, tmp_path, unpushed, monkeypatch, caplog, token):
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.delenv("HF_TOKEN")
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        trainer = tapo_trainer(tmp_path)
        assert len(warnings_of(caplog)) == 1  # before the training, not after
        assert "hf auth login" in warnings_of(caplog)[0]
        trainer.train()
        assert_same(trainer, unpushed)

        monkeypatch.setenv("HF_TOKEN", TOKEN)  # logged in meanwhile
        assert trainer.push_to_hub() is not None
        assert LORA_FILES <= hub.files(f"{USER}/tapo").keys()

    def test_a_token_in_the_configuration(self, hub, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        trainer = tapo_trainer(tmp_path, hub_token=TOKEN)
        trainer.train()
        assert len(hub.repos[f"{USER}/tapo"]) == 3

    def test_a_card_that_is_refused_is_not_sent_again(self, hub, tmp_path, caplog):
        hub.fail("validate-yaml", 400)
        assert tapo_trainer(tmp_path, hub_strategy="end").push_to_hub() is None
        assert sum("validate-yaml" in line for line in hub.requests) == 1
        assert "Invalid metadata" in warnings_of(caplog)[0]

    def test_offline(self, hub, tmp_path, caplog, monkeypatch, unpushed):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        trainer = tapo_trainer(tmp_path)
        trainer.train()
        assert_same(trainer, unpushed)
        assert hub.requests == []
        assert "HF_HUB_OFFLINE" in warnings_of(caplog)[0] or "offline" in warnings_of(caplog)[0]

    def test_slrm(self, hub, tmp_path):
        hub.fail(".", 503)
        trainer = slrm_trainer(tmp_path, hub_model_id="slrm")
        trainer.train()
        assert trainer.push_to_hub() is None
        quiet = slrm_trainer(tmp_path / "quiet", push_to_hub=False)
        quiet.train()
        for name, value in quiet.model.state_dict().items():
            assert torch.equal(value, trainer.model.state_dict()[name]), name

    def test_no_room_for_the_copy(self, hub, tmp_path, unpushed, caplog, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(hub_module.shutil, "copy", full)
        trainer = tapo_trainer(tmp_path)
        trainer.train()
        assert_same(trainer, unpushed)
        assert "No space left" in warnings_of(caplog)[0]
        assert (Path(trainer.args.output_dir) / "checkpoint-2" / "checkpoint_seal.json").exists()

    def test_a_name_that_cannot_be(self, hub, tmp_path):
        with pytest.raises(ValueError, match="a/b/c"):
            make_trainer(tmp_path, hub_model_id="a/b/c", **PUSHING)


class TestPrivacy:
    @pytest.mark.parametrize("strategy", ["end", "every_save"])
    @pytest.mark.parametrize("kind", ["lora", "full", "slrm", "lora slrm"])
    def test_nothing_of_this_machine_and_no_pickles(self, hub, tmp_path, monkeypatch, kind, strategy):
        base = tmp_path / "base-model"
        tiny_sd3_pipeline().save_pretrained(base)
        command = ["run.py", "--hub_token", TOKEN, "--cache", f'{{"dir": "{tmp_path}/cache"}}', f"--x={TOKEN}"]
        monkeypatch.setattr(sys, "argv", [f"{tmp_path}/{command[0]}", *command[1:]])
        monkeypatch.setattr(socket, "gethostname", lambda: "name-of-this-machine")
        kwargs = {"hub_token": TOKEN, "hub_strategy": strategy, "report_to": "tensorboard", "hub_model_id": "private"}
        if "slrm" in kind:
            peft_config = LoraConfig(r=2) if kind.startswith("lora") else None
            trainer = slrm_trainer(tmp_path, peft_config, str(base), **kwargs)
        else:
            monkeypatch.setattr("tests.trainer.test_tapo_trainer.make_pipeline", lambda: load_policy(str(base)))
            trainer = make_trainer(tmp_path, peft=kind == "lora", **{**PUSHING, **kwargs})
        trainer.train()
        trainer.push_to_hub(dataset_name=str(tmp_path / "prompts.txt"))

        received = hub.everything()
        assert len(hub.repos[f"{USER}/private"]) >= (2 if strategy == "end" else 3)
        assert list(Path(trainer.args.output_dir).rglob("*name-of-this-machine*"))  # TensorBoard's files
        secrets = [TOKEN, "name-of-this-machine", str(tmp_path), str(Path.home()), os.getcwd()]
        for name, content in received.items():
            assert not name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")), name
            assert not content.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")), name
            for secret in secrets:
                assert secret not in name and secret.encode() not in content, (name, secret)
        assert any(b"base-model" in content for content in received.values())  # by its name alone

    @pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
    def test_checkpoints_are_not_pushed(self, hub, tmp_path, strategy):
        with pytest.raises(ValueError, match="every_save"):
            tapo_trainer(tmp_path, hub_strategy=strategy)
        with pytest.raises(ValueError, match="pickles"):
            slrm_trainer(tmp_path, hub_strategy=strategy)
        assert hub.requests == []

    def test_no_pickled_arguments(self, tmp_path):
        for peft in (True, False):
            trainer = make_trainer(tmp_path / str(peft), peft=peft, **SAVING)
            trainer.train()
            trainer.save_model()
            assert not list(tmp_path.rglob("training_args*"))
