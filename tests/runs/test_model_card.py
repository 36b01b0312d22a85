# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from tapo_trl import FlowGRPOTrainer, OnlineDiffusionDPOTrainer, SLRMModel
from tapo_trl.rewards import REWARD_MODELS
from tapo_trl.rollouts import PAIRINGS
from tapo_trl.runs.model_card import CardFacts, citation, current_command, is_hub_id, public_command, write_model_card
from tapo_trl.trainer.diffusion_dpo_trainer import VARIANT_CARDS


BASE = "stabilityai/stable-diffusion-3.5-medium"
WAN = {
    "base_model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "pipeline_class": "WanPipeline",
    "transformer_class": "WanTransformer3DModel",
    "modality": "video",
    "fps": 16,
}
PAPER = "@inproceedings{paper2026,\n  title = {{The paper}}\n}"
SLRM = {"method": SLRMModel.card, "template_file": "slrm_model_card.md", "reward_model": SLRMModel}
METHODS = {
    "TAPO": {"method": PAIRINGS["tapo"].card},
    "Online-Diffusion-DPO": {"method": OnlineDiffusionDPOTrainer.method_card},
    "Flow-GRPO": {"method": FlowGRPOTrainer.method_card},
    "SLRM": SLRM,
}


def write(folder, **kwargs):
    options = {
        **METHODS["TAPO"],
        "template_file": "tapo_model_card.md",
        "base_model": BASE,
        "model_name": "my-model",
        "dataset_name": "user/prompts",
        "pipeline_class": "StableDiffusion3Pipeline",
        "transformer_class": "SD3Transformer2DModel",
        "modality": "image",
        "fps": None,
        "is_lora": True,
        "tags": ["extra"],
        "license": None,
        "method_table": {"beta": 1000.0, "num_sde_steps": 8},
        "metrics": {"reward": 0.123456},
        "images": [],
        "hub_model_id": "user/my-model",
        "command": "python tapo_sd35.py --config recipe.yaml",
    }
    write_model_card(folder / "README.md", CardFacts(**{**options, **kwargs}))
    return ModelCard.load(folder / "README.md")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a card needs no network")

    monkeypatch.setattr("socket.socket.connect", refuse)


class TestMetadata:
    def test_tapo(self, tmp_path):
        data = write(tmp_path).data
        assert data.library_name == "diffusers"
        assert data.base_model == BASE
        assert data.datasets == ["user/prompts"]
        assert data.pipeline_tag == "text-to-image"
        assert (data.license, data.license_name) == ("other", "stabilityai-ai-community")
        assert data.metrics == ["reward"]
        assert {"trl", "tapo", "lora", "diffusers", "text-to-image", "extra"} <= set(data.tags)
        assert len(data.tags) == len(set(data.tags))

    @pytest.mark.parametrize(
        ("pairing", "name", "tag", "key"),
        [
            ("tapo", "**TAPO** (", "tapo", "xian2026consistent"),
            ("tapo_within", "**TAPO** (", "tapo-within", "xian2026consistent"),
            ("spo", "**SPO** (Step-by-step", "spo", "liang2024step"),
            ("lpo", "**LPO** (Latent", "lpo", "zhang2025diffusion"),
        ],
    )
    def test_pairings(self, tmp_path, pairing, name, tag, key):
        card = write(tmp_path, method=PAIRINGS[pairing].card)
        assert tag in card.data.tags and name in " ".join(card.text.split())
        assert ("TAPO" in card.text.replace("TAPO-", "")) == pairing.startswith("tapo")
        assert f"{{{key}," in card.text
        assert "trajector" in card.text and "Both sides of a preference pair" not in card.text

    @pytest.mark.parametrize(
        ("variant", "name"), [("inversion_dpo", "Inversion-DPO"), ("dense_reward", "DenseReward")]
    )
    def test_variants_of_diffusion_dpo(self, tmp_path, variant, name):
        card = write(tmp_path, method=VARIANT_CARDS[variant])
        assert f"**{name}** on the preference pairs of" in " ".join(card.text.split())
        assert {"diffusion-dpo", name.lower().replace("reward", "-reward")} <= set(card.data.tags)
        assert "A policy that is trained on a learned reward" not in card.text

    def test_slrm(self, tmp_path):
        data = write(tmp_path, **SLRM).data
        assert {"trl", "slrm", "reward-model"} <= set(data.tags)
        assert not {"tapo", "lora"} & set(data.tags)
        assert data.pipeline_tag is None

    @pytest.mark.parametrize(
        ("base_model", "license", "expected"),
        [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", None, "apache-2.0"), ("user/model", None, None), (BASE, "mit", "mit")],
    )
    def test_license(self, tmp_path, base_model, license, expected):
        assert write(tmp_path, base_model=base_model, license=license).data.license == expected

    def test_is_yaml(self, tmp_path):
        write(tmp_path)
        header = (tmp_path / "README.md").read_text().split("---")[1]
        assert yaml.safe_load(header)["base_model"] == BASE

    def test_what_is_not_on_the_hub_is_not_metadata(self, tmp_path):
        data = write(tmp_path, base_model=str(tmp_path), dataset_name="data/prompts/train.parquet").data
        assert data.base_model is None
        assert data.datasets is None


class TestText:
    @pytest.mark.parametrize("name", ["TAPO", "Online-Diffusion-DPO", "Flow-GRPO", "SLRM"])
    def test_no_local_path_and_no_token(self, tmp_path, name):
        (tmp_path / "base").mkdir()
        card = write(
            tmp_path,
            **METHODS[name],
            base_model=str(tmp_path / "base"),
            dataset_name=str(tmp_path / "prompts.txt"),
            hub_model_id=None,
            command=f"python x.py --config {tmp_path}/a.yaml --output_dir={tmp_path}/out --hub_token hf_secret",
        )
        assert str(tmp_path) not in card.content
        assert "hf_secret" not in card.content
        assert "`base`" in card.text
        assert "path/to/base" in card.text
        assert "`prompts.txt`" in card.text
        assert "python x.py --config a.yaml --output_dir=out\n" in card.text

    def test_usage_of_lora_weights(self, tmp_path):
        text = write(tmp_path).text
        assert f'StableDiffusion3Pipeline.from_pretrained("{BASE}"' in text
        assert 'load_lora_weights("user/my-model")' in text
        assert "Transformer2DModel" not in text

    def test_usage_of_a_transformer(self, tmp_path):
        card = write(tmp_path, is_lora=False)
        assert 'SD3Transformer2DModel.from_pretrained("user/my-model", subfolder="transformer"' in card.text
        assert "load_lora_weights" not in card.text
        assert "lora" not in card.data.tags

    def test_what_was_trained_is_not_guessed_from_the_folder(self, tmp_path):
        """A card is written before the first whole save, and into folders that held something else."""
        (tmp_path / "transformer").mkdir()
        assert "load_lora_weights" in write(tmp_path, is_lora=True).text
        assert "load_lora_weights" not in write(tmp_path / "empty", is_lora=False).text

    @pytest.mark.parametrize("base_model", [WAN["base_model"], "path/to/my-pipeline"])
    def test_usage_of_a_video_model(self, tmp_path, base_model):
        card = write(tmp_path, **WAN | {"base_model": base_model, "is_multistep": True})
        assert "WanPipeline.from_pretrained" in card.text
        assert 'export_to_video(video, "lighthouse.mp4", fps=16)' in card.text
        assert "FlowMatchEulerDiscreteScheduler(shift=" in card.text
        assert card.data.pipeline_tag == "text-to-video"
        assert "FlowMatchEulerDiscreteScheduler" not in write(tmp_path, **WAN).text

    def test_usage_of_a_reward_model(self, tmp_path):
        text = write(tmp_path, **SLRM).text
        assert 'SLRMModel.from_pretrained("user/my-model")' in text
        assert "policy.encode(images)  # images: [1, 3, H, W]" in text
        assert "slrm.score(" in text
        assert "policy.encode(videos)  # videos: [1, 3, F, H, W]" in write(tmp_path, **SLRM, **WAN).text

    @pytest.mark.parametrize("name", ["TAPO", "Online-Diffusion-DPO", "Flow-GRPO", "SLRM"])
    @pytest.mark.parametrize("is_lora", [False, True])
    @pytest.mark.parametrize("family", [{}, WAN], ids=["image", "video"])
    def test_code_compiles(self, tmp_path, name, is_lora, family):
        text = write(tmp_path, **METHODS[name], is_lora=is_lora, **family).text
        blocks = text.split("```python\n")[1:]
        assert blocks
        for block in blocks:
            compile(block.split("```")[0], "card", "exec")

    def test_gallery(self, tmp_path):
        image = tmp_path / "samples" / "step_000100.png"
        card = write(tmp_path, images=[image])
        assert card.data.widget == [{"text": "step 000100", "output": {"url": "samples/step_000100.png"}}]
        assert "<Gallery />" in card.text
        assert "Gallery" not in write(tmp_path).content

    def test_tables_and_citations(self, tmp_path):
        text = write(tmp_path).text
        assert "| `num_sde_steps` | 8 |" in text
        assert "| `reward` | 0.1235 |" in text
        assert citation("xian2026consistent") in text
        assert "vonwerra2020trl" in text
        assert "- diffusers: " in text

    @pytest.mark.parametrize("name", ["TAPO", "Online-Diffusion-DPO", "Flow-GRPO", "SLRM"])
    def test_without_anything_optional(self, tmp_path, name):
        text = write(
            tmp_path,
            **METHODS[name],
            base_model=None,
            dataset_name=None,
            method_table={},
            metrics={},
            hub_model_id=None,
            command=None,
        ).text
        assert "None" not in text
        assert "```bash" not in text
        assert "| option" not in text
        assert "{{" not in text.replace("title     = {{", "").replace("title   = {{", "")


class TestHelpers:
    def test_citations(self):
        methods = [pairing.card for pairing in PAIRINGS.values()] + list(VARIANT_CARDS.values())
        methods += [model.card for model in REWARD_MODELS.values()]
        for method in methods:
            assert citation(method.paper).startswith("@") and method.paper in citation(method.paper)
        assert citation(PAPER) == PAPER

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            (BASE, True),
            ("user/model_v1.5", True),
            ("model", False),
            ("/data/model", False),
            ("./data", False),
            ("a/b/c", False),
            (None, False),
        ],
    )
    def test_is_hub_id(self, name, expected):
        assert is_hub_id(name) is expected

    def test_an_existing_folder_is_not_a_hub_id(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("outputs/model").mkdir(parents=True)
        assert not is_hub_id("outputs/model")

    @pytest.mark.parametrize(
        ("command", "expected"),
        [
            ("python a.py --beta 3", "python a.py --beta 3"),
            ("python /x/y/a.py --prompts 'a cat' --dir=/x/y", "python a.py --prompts 'a cat' --dir=y"),
            ("a --hub_token hf_1 --beta 3", "a --beta 3"),
            ("a --hub-token=hf_1 --num_task_tokens 4", "a --num_task_tokens 4"),
            (
                """a --kwargs '{"token": "hf_0123456789", "dir": "/x/y/z"}'""",
                """a --kwargs '{"token": "hf_***", "dir": "z"}'""",
            ),
            ("a --config ~/recipes/b.yaml --pairs x=~/y/z", "a --config b.yaml --pairs x=z"),
            ("a --url https://example.com/x/y --ratio 1/2 --model user/name", None),
        ],
    )
    def test_public_command(self, command, expected):
        assert public_command(command) == (expected or command)

    @pytest.mark.parametrize(
        ("argv", "module", "expected"),
        [
            (["/x/run.py", "--prompt", "it's a cat"], None, """python run.py --prompt 'it'"'"'s a cat'"""),
            (["/x/bin/tapo-trl", "tapo", "--beta", "3"], None, "tapo-trl tapo --beta 3"),
            (["/x/cli/__main__.py", "tapo"], "tapo_trl.cli.__main__", "python -m tapo_trl.cli tapo"),
        ],
    )
    def test_current_command(self, monkeypatch, argv, module, expected):
        spec = None if module is None else SimpleNamespace(name=module)
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
        assert current_command() == expected
        assert public_command(current_command()) == expected
