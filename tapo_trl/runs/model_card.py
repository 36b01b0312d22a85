# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData

from ..method_card import MethodCard
from ..policies.loading import base_license
from ..version import __version__


if TYPE_CHECKING:
    from ..rewards import StepRewardModel
    from ..trainer.base import DiffusionTrainer


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


def citation(paper: str) -> str:
    """The BibTeX entry of a paper that is one, or the key of one in `references.bib`."""
    if paper.startswith("@"):
        return paper
    bibliography = resources.files("tapo_trl").joinpath("runs", "templates", "references.bib").read_text("utf-8")
    return re.search(rf"^@\w+{{{re.escape(paper)},.*?^}}", bibliography, re.DOTALL | re.MULTILINE)[0]


@dataclass(kw_only=True)
class CardFacts:
    """
    What a model card is made of.

    Args:
        method ([`MethodCard`]): What it says about the method.
        template_file (`str`): Template of the card, in `runs/templates`.
        reward_model (`type`, *optional*): Class of the reward model, if one was trained.
        base_model (`str`, *optional*): Hub id or folder of the pipeline that was trained.
        model_name (`str`): Title of the card.
        dataset_name (`str`, *optional*): Hub id or path of the training data.
        pipeline_class (`str`): Class of the pipeline in diffusers.
        transformer_class (`str`): Class of its transformer.
        transformers (`list[str]`): Components that are transformers.
        lora_calls (`list[str]`): How LoRA weights are loaded, see [`FlowPolicy`].
        modality (`"image"` or `"video"`): What the pipeline makes.
        fps (`int`, *optional*): Frames per second, for video.
        negative_prompt (`str`): Negative prompt without which the pipeline has no guidance, if there is one.
        is_multistep (`bool`): Whether the pipeline's own solver is a multistep method, on another grid than the training.
        is_lora (`bool`): Whether LoRA weights were trained, or the transformer itself.
        tags (`list[str]`): Tags beside those of the method and those that every such model has.
        license (`str`, *optional*): Licence; by default that of the base model, if it is known.
        method_table (`dict[str, Any]`): Options of the training, for a table.
        metrics (`dict[str, float]`): Last logged values, for a table.
        images (`list[Path]`): Images (strips of frames for video) in the folder of the card, for a gallery.
        hub_model_id (`str`, *optional*): Repository of the trained model, for the code example.
        command (`str`, *optional*): Command that started the training.
    """

    method: MethodCard
    template_file: str
    reward_model: "type[StepRewardModel] | None" = None
    base_model: str | None
    model_name: str
    dataset_name: str | None
    pipeline_class: str
    transformer_class: str
    transformers: list[str] = field(default_factory=lambda: ["transformer"])
    lora_calls: list[str] = field(default_factory=lambda: ['pipeline.load_lora_weights("{model}")'])
    modality: Literal["image", "video"]
    fps: int | None
    negative_prompt: str = ""
    is_multistep: bool = False
    is_lora: bool
    tags: list[str]
    license: str | None = None
    method_table: dict[str, Any]
    metrics: dict[str, float]
    images: list[Path]
    hub_model_id: str | None
    command: str | None

    def metadata(self, folder: Path) -> ModelCardData:
        """Header of a card in `folder`."""
        base_on_hub, is_policy, task = (
            is_hub_id(self.base_model),
            self.reward_model is None,
            f"text-to-{self.modality}",
        )
        license, license_name = self.license, None
        if license is None and base_on_hub:
            license, license_name = base_license(self.base_model) or (None, None)
        kinds = ["reward-model"] if not is_policy else ["lora", "template:sd-lora"] if self.is_lora else []
        tags = ["trl", *self.method.tags, *kinds, task, "diffusers", "diffusers-training", *map(_one_line, self.tags)]
        return ModelCardData(
            base_model=self.base_model if base_on_hub else None,
            datasets=[self.dataset_name] if is_hub_id(self.dataset_name) else None,
            library_name="diffusers",
            license=license,
            license_name=license_name,
            license_link=f"https://huggingface.co/{self.base_model}" if license_name else None,
            metrics=sorted(map(_one_line, self.metrics)) or None,
            model_name=_one_line(self.model_name),
            pipeline_tag=task if is_policy else None,
            tags=list(dict.fromkeys(tags)),
            widget=_gallery(self.images, folder) or None,
        )

    def variables(self) -> dict[str, Any]:
        """Variables of the template: these facts in words that can be published."""
        base_name = Path(self.base_model).name if self.base_model else "an unnamed pipeline"
        if is_hub_id(self.base_model):
            base_link, base_argument = (
                f"[{self.base_model}](https://huggingface.co/{self.base_model})",
                self.base_model,
            )
        else:
            base_link, base_argument = f"the pipeline `{base_name}`", f"path/to/{base_name}"
        data_link = f"`{Path(self.dataset_name).name}`" if self.dataset_name else None
        if is_hub_id(self.dataset_name):
            data_link = f"[{self.dataset_name}](https://huggingface.co/datasets/{self.dataset_name})"
        model_argument = _in_code(self.hub_model_id or f"path/to/{self.model_name}")
        packages = ("trl", "transformers", "diffusers", "peft", "torch", "datasets")
        return vars(self) | {
            "reads_pixels": self.reward_model is not None and self.reward_model.scores_x0_prediction,
            "model_name": _one_line(self.model_name),
            "base_model_link": base_link,
            "base_model_argument": _in_code(base_argument),
            "model_argument": model_argument,
            "lora_calls": [call.replace("{model}", model_argument) for call in self.lora_calls],
            "dataset_link": data_link,
            "is_video": self.modality == "video",
            "negative_prompt": _in_code(self.negative_prompt),
            "has_gallery": len(self.images) > 0,
            "method_table": {name: _in_table(str(value)) for name, value in self.method_table.items()},
            "metrics": {_in_table(name): _in_table(value) for name, value in self.metrics.items()},
            "command": public_command(self.command) if self.command else None,
            "versions": {"tapo_trl": __version__, **{package: version(package) for package in packages}},
            "paper_citation": citation(self.method.paper),
            "trl_citation": citation("vonwerra2020trl"),
        }


def write_model_card(path: str | Path, facts: CardFacts) -> ModelCard:
    """
    Write the model card of a trained policy or reward model. Needs no network, and puts no path of this machine and no access
    token into the card: a base model or dataset in a local folder is called by the folder's name.

    Args:
        path (`str` or `Path`): Where the card goes, `<output folder>/README.md`.
        facts ([`CardFacts`]): What it is made of.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card, as written.
    """
    path = Path(path)
    template = str(resources.files("tapo_trl").joinpath("runs", "templates", facts.template_file))
    card = ModelCard.from_template(facts.metadata(path.parent), template_path=template, **facts.variables())
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path)
    return card


def write_card_of(
    trainer: "DiffusionTrainer", model_name: str | None, dataset_name: str | None, tags: str | list[str] | None
) -> None:
    """Write the card of a trainer into its output folder, see [`~trainer.base.DiffusionTrainer.create_model_card`]."""
    args, policy = trainer.args, trainer.policy
    folder, hub_model_id = Path(args.output_dir), trainer.hub_model_id or args.hub_model_id
    metrics = {}
    for logs in trainer.state.log_history:
        metrics |= {name: value for name, value in logs.items() if name.startswith(trainer._card_metrics)}
    facts = CardFacts(
        method=trainer.method_card,
        template_file=trainer._template_file,
        reward_model=trainer._reward_model_class,
        base_model=trainer._base_model_name,
        model_name=model_name or (hub_model_id or folder.resolve().name).split("/")[-1],
        dataset_name=dataset_name or trainer.dataset_name,
        pipeline_class=type(policy.pipeline).__name__,
        transformer_class=policy.pipeline.config["transformer"][1],  # FSDP changes that of the object
        transformers=list(policy.experts),
        lora_calls=policy.lora_calls,
        modality=policy.modality,
        fps=args.fps if policy.modality == "video" else None,
        negative_prompt=policy.defaults.negative_prompt,
        is_multistep="flow_shift" in policy.pipeline.scheduler.config,
        is_lora=is_peft_model(trainer.accelerator.unwrap_model(trainer.model)),
        tags=[tags] if isinstance(tags, str) else tags or [],
        method_table=trainer._method_table(),
        metrics=metrics,
        images=sorted(folder.glob("samples/*.png"))[-4:],
        hub_model_id=hub_model_id,
        command=current_command(),
    )
    write_model_card(folder / "README.md", facts)
