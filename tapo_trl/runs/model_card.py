# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
import os
import re
import shlex
import sys
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from ..policies.families import base_license
from ..version import __version__


TRL_CITATION = """@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""

# Options of the training that the card of a policy shows.
TAPO_OPTIONS = (
    "pairing",
    "continue_with",
    "pair_threshold",
    "beta",
    "loss_type",
    "num_inference_steps",
    "num_sde_steps",
    "num_candidates",
    "noise_level",
    "sde_type",
    "guidance_scale",
    "velocity_target",
    "height",
    "width",
    "num_frames",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
)

DIFFUSION_DPO_OPTIONS = (
    "variant",
    "beta",
    "label_smoothing",
    "timestep_sampling",
    "gamma",
    "num_inference_steps",
    "dimension_weights",
    "height",
    "width",
    "num_frames",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
)

ONLINE_DPO_OPTIONS = (
    "beta",
    "label_smoothing",
    "num_generations",
    "num_noise_levels",
    "timestep_sampling",
    "num_inference_steps",
    "guidance_scale",
    "height",
    "width",
    "num_frames",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
)

FLOW_GRPO_OPTIONS = (
    "beta",
    "epsilon",
    "scale_rewards",
    "num_generations",
    "num_iterations",
    "num_inference_steps",
    "num_sde_steps",
    "noise_level",
    "sde_type",
    "guidance_scale",
    "height",
    "width",
    "num_frames",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
)

FLOW_GRPO_PAPER = {
    "title": "Flow-GRPO: Training Flow Matching Models via Online RL",
    "citation": """@article{liu2025flow,
    title   = {{Flow-GRPO: Training Flow Matching Models via Online RL}},
    author  = {Liu, Jie and Liu, Gongye and Liang, Jiajun and Li, Yangguang and Liu, Jiaheng and Wang, Xintao and Wan, Pengfei and Zhang, Di and Ouyang, Wanli},
    journal = {arXiv preprint arXiv:2505.05470},
    year    = {2025},
}""",
}

# By `DiffusionDPOConfig.variant`
DIFFUSION_DPO_PAPERS = {
    "diffusion_dpo": {
        "title": "Diffusion Model Alignment Using Direct Preference Optimization",
        "citation": """@inproceedings{wallace2024diffusion,
    title     = {{Diffusion Model Alignment Using Direct Preference Optimization}},
    author    = {Wallace, Bram and Dang, Meihua and Rafailov, Rafael and Zhou, Linqi and Lou, Aaron and Purushwalkam, Senthil and Ermon, Stefano and Xiong, Caiming and Joty, Shafiq and Naik, Nikhil},
    booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
    year      = {2024},
}""",
    },
    "inversion_dpo": {
        "title": "Inversion-DPO: Precise and Efficient Post-Training for Diffusion Models",
        "citation": """@article{li2025inversion,
    title   = {{Inversion-DPO: Precise and Efficient Post-Training for Diffusion Models}},
    author  = {Li, Zejian and Li, Yize and Meng, Chenye and Liu, Zhongni and Yang, Ling and Zhang, Shengyuan and Yang, Guang and Yang, Changyuan and Yang, Zhiyuan and Sun, Lingyun},
    journal = {arXiv preprint arXiv:2507.11554},
    year    = {2025},
}""",
    },
    "dense_reward": {
        "title": "A Dense Reward View on Aligning Text-to-Image Diffusion with Preference",
        "citation": """@article{yang2024dense,
    title   = {{A Dense Reward View on Aligning Text-to-Image Diffusion with Preference}},
    author  = {Yang, Shentao and Chen, Tianqi and Zhou, Mingyuan},
    journal = {arXiv preprint arXiv:2402.08265},
    year    = {2024},
}""",
    },
}

# By the kind of a reward model; that of SLRM is the trainer's own.
REWARD_MODEL_PAPERS = {
    "lrm": {
        "title": "Diffusion Model as a Noise-Aware Latent Reward Model for Step-Level Preference Optimization",
        "citation": """@article{zhang2025diffusion,
    title   = {{Diffusion Model as a Noise-Aware Latent Reward Model for Step-Level Preference Optimization}},
    author  = {Zhang, Tao and Da, Cheng and Ding, Kun and Yang, Huan and Jin, Kun and Li, Yan and Gao, Tingting and Zhang, Di and Xiang, Shiming and Pan, Chunhong},
    journal = {arXiv preprint arXiv:2502.01051},
    year    = {2025},
}""",
    },
    "spm": {
        "title": "Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference Optimization",
        "citation": """@article{liang2024step,
    title   = {{Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference Optimization}},
    author  = {Liang, Zhanhao and Yuan, Yuhui and Gu, Shuyang and Chen, Bohan and Hang, Tiankai and Cheng, Mingxi and Li, Ji and Zheng, Liang},
    journal = {arXiv preprint arXiv:2406.04314},
    year    = {2024},
}""",
    },
    "dina": {
        "title": "Beyond VLM-Based Rewards: Diffusion-Native Latent Reward Modeling",
        "citation": """@misc{liu2026beyond,
    title  = {{Beyond VLM-Based Rewards: Diffusion-Native Latent Reward Modeling}},
    author = {Liu, Gongye and Yang, Bo and Zhi, Yida and Zhong, Zhizhou and Ke, Lei and Deng, Didan and Gao, Han and Huang, Yongxiang and Zhang, Kaihao and Fu, Hongbo and Luo, Wenhan},
    url    = {https://github.com/HKUST-C4G/diffusion-rm},
    year   = {2026},
}""",
    },
}

# By `TAPOConfig.pairing`: name, tag and paper, `None` for TAPO's own
PAIRING_METHODS = {
    "tapo": ("TAPO", "tapo", None),
    "tapo_within": ("TAPO-within", "tapo-within", None),
    "spo": ("SPO", "spo", REWARD_MODEL_PAPERS["spm"]),
    "lpo": ("LPO", "lpo", REWARD_MODEL_PAPERS["lrm"]),
}

# By `DiffusionDPOConfig.variant`
DIFFUSION_DPO_NAMES = {
    "diffusion_dpo": "Diffusion-DPO",
    "inversion_dpo": "Inversion-DPO",
    "dense_reward": "DenseReward",
}

# Tags and template of each trainer's card
_KINDS = {
    "TAPO": (["tapo"], "tapo_model_card.md"),
    "TAPO-within": (["tapo-within"], "tapo_model_card.md"),
    "SPO": (["spo"], "tapo_model_card.md"),
    "LPO": (["lpo"], "tapo_model_card.md"),
    "Diffusion-DPO": (["diffusion-dpo"], "tapo_model_card.md"),
    "Inversion-DPO": (["diffusion-dpo", "inversion-dpo"], "tapo_model_card.md"),
    "DenseReward": (["diffusion-dpo", "dense-reward"], "tapo_model_card.md"),
    "Online-Diffusion-DPO": (["online-diffusion-dpo"], "tapo_model_card.md"),
    "Flow-GRPO": (["flow-grpo"], "tapo_model_card.md"),
    "SLRM": (["slrm", "reward-model"], "slrm_model_card.md"),
    "LRM": (["lrm", "reward-model"], "slrm_model_card.md"),
    "DiNa-LRM": (["dina", "reward-model"], "slrm_model_card.md"),
    "SPM": (["spm", "reward-model"], "slrm_model_card.md"),
}

# Class of a reward model, for the code example
_REWARD_CLASSES = {"SLRM": "SLRMModel", "LRM": "LRMModel", "DiNa-LRM": "DiNaModel", "SPM": "SPMModel"}

# Access tokens, and absolute paths inside of a longer argument, of which the name of the file is kept.
TOKEN = re.compile(r"\bhf_\w{8,}")
LOCAL_PATH = re.compile(r"(?<![\w.:/~])~?/(?:[^\s/'\"]+/)*([^\s/'\"]*)")

SECRET_FLAGS = ("--hub_token", "--hub-token", "--push_to_hub_token", "--push-to-hub-token")


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be a repository on the Hub (`user/name`), and is not a folder or file on this machine."""
    return name is not None and re.fullmatch(r"[\w-]+/[\w.-]+", name) is not None and not os.path.exists(name)


def current_command() -> str:
    """What was typed to start this process, after any launcher."""
    spec, script = sys.modules["__main__"].__spec__, Path(sys.argv[0])
    if spec is not None:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        program = ["python", script.name] if script.suffix == ".py" else [script.name]
    return shlex.join([*program, *sys.argv[1:]])


def public_command(command: str) -> str:
    """`command` without access tokens, and with the names of files instead of absolute paths."""
    words, skip = [], False
    for word in shlex.split(command):
        if skip:
            skip = False
        elif word in SECRET_FLAGS:
            skip = True
        elif not word.startswith(tuple(f"{flag}=" for flag in SECRET_FLAGS)):
            flag, separator, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
            words.append(flag + separator + (Path(value).name if os.path.isabs(value) else value))
    return shlex.join(LOCAL_PATH.sub(r"\1", TOKEN.sub("hf_***", word)) for word in words)


def _gallery(images: list[Path], folder: Path) -> list[dict[str, Any]]:
    """What the Hub shows of the images: each with its step and the prompts that are listed beside it."""
    gallery = []
    for image in images:
        prompts, text = image.with_name("prompts.txt"), image.stem.replace("_", " ")
        if prompts.is_file():
            text += ": " + "; ".join(prompts.read_text(encoding="utf-8").splitlines())
        gallery.append({"text": _one_line(text), "output": {"url": image.relative_to(folder).as_posix()}})
    return gallery


def _in_code(text: str) -> str:
    """`text` between the quotes of a Python string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _in_table(value: Any) -> str:
    """`value` in a cell of a table."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def write_model_card(
    path: str | Path,
    *,
    trainer_name: str,
    base_model: str | None,
    model_name: str,
    dataset_name: str | None,
    pipeline_class: str,
    transformer_class: str,
    modality: Literal["image", "video"],
    fps: int | None,
    is_lora: bool,
    tags: list[str],
    license: str | None,
    method_table: dict[str, Any],
    metrics: dict[str, float],
    images: list[Path],
    hub_model_id: str | None,
    paper: dict[str, str],
    command: str | None,
) -> ModelCard:
    """
    Writes the model card of a trained policy or reward model. Needs no network, and puts no path of this machine and no
    access token into the card: a base model or data set in a local folder is called by the folder's name.

    Args:
        path (`str` or `Path`): Where the card goes, `<output folder>/README.md`.
        trainer_name (`str`): Which card: that of a method that trains a policy, such as `"TAPO"`, or that of a reward model.
        base_model (`str`, *optional*): Hub id or folder of the pipeline that was trained.
        model_name (`str`): Title of the card.
        dataset_name (`str`, *optional*): Hub id or path of the training data.
        pipeline_class (`str`): Class of the pipeline in diffusers.
        transformer_class (`str`): Class of its transformer.
        modality (`"image"` or `"video"`): What the pipeline makes.
        fps (`int`, *optional*): Frames per second, for video.
        is_lora (`bool`): Whether LoRA weights were trained, or the transformer itself.
        tags (`list[str]`): Tags beside those that every such model has.
        license (`str`, *optional*): Licence; by default that of the base model, if it is known.
        method_table (`dict[str, Any]`): Options of the training, for a table.
        metrics (`dict[str, float]`): Last logged values, for a table.
        images (`list[Path]`): Images (strips of frames for video) in the folder of the card, for a gallery.
        hub_model_id (`str`, *optional*): Repository of the trained model, for the code example.
        paper (`dict[str, str]`): `title` and `citation` (BibTeX) of the paper.
        command (`str`, *optional*): Command that started the training.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card, as written.
    """
    path = Path(path)
    base_name = Path(base_model).name if base_model else "an unnamed pipeline"
    base_on_hub, data_on_hub = is_hub_id(base_model), is_hub_id(dataset_name)
    license_name = None
    if license is None and base_on_hub:
        license, license_name = base_license(base_model) or (license, license_name)

    kind, template = _KINDS[trainer_name]
    is_policy = "reward-model" not in kind
    if is_policy and is_lora:
        kind = [*kind, "lora", "template:sd-lora"]
    task = f"text-to-{modality}"
    card_data = ModelCardData(
        base_model=base_model if base_on_hub else None,
        datasets=[dataset_name] if data_on_hub else None,
        library_name="diffusers",
        license=license,
        license_name=license_name,
        license_link=f"https://huggingface.co/{base_model}/blob/main/LICENSE.md" if license_name else None,
        metrics=sorted(map(_one_line, metrics)) or None,
        model_name=_one_line(model_name),
        pipeline_tag=task if is_policy else None,
        tags=list(dict.fromkeys(["trl", *kind, task, "diffusers", "diffusers-training", *map(_one_line, tags)])),
        widget=_gallery(images, path.parent) or None,
    )
    if base_on_hub:
        base_link = f"[{base_model}](https://huggingface.co/{base_model})"
    else:
        base_link = f"the pipeline `{base_name}`"
    data_name = Path(dataset_name).name if dataset_name else None
    data_link = (
        f"[{dataset_name}](https://huggingface.co/datasets/{dataset_name})" if data_on_hub else f"`{data_name}`"
    )
    packages = ("trl", "transformers", "diffusers", "peft", "torch", "datasets")

    card = ModelCard.from_template(
        card_data,
        template_path=str(resources.files("tapo_trl").joinpath("runs", "templates", template)),
        trainer_name=trainer_name,
        reward_class=_REWARD_CLASSES.get(trainer_name),
        reward_kind=kind[0],
        model_name=_one_line(model_name),
        base_model_link=base_link,
        base_model_argument=_in_code(base_model if base_on_hub else f"path/to/{base_name}"),
        model_argument=_in_code(hub_model_id or f"path/to/{model_name}"),
        dataset_name=dataset_name,
        dataset_link=data_link,
        learns_from_pairs=trainer_name in DIFFUSION_DPO_NAMES.values(),
        is_lora=is_lora,
        is_video=modality == "video",
        fps=fps,
        pipeline_class=pipeline_class,
        transformer_class=transformer_class,
        has_gallery=len(images) > 0,
        method_table={name: _in_table(str(value)) for name, value in method_table.items()},
        metrics={_in_table(name): _in_table(value) for name, value in metrics.items()},
        command=public_command(command) if command else None,
        versions={"tapo_trl": __version__, **{package: version(package) for package in packages}},
        paper_citation=paper["citation"],
        trl_citation=TRL_CITATION,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path)
    return card
