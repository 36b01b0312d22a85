# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

from .parser import RecipeParser


COMFYUI_FILE = "comfyui_lora.safetensors"


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl merge`."""
    from ..trainer.model_config import PipelineConfig
    from .arguments import MergeArguments

    return RecipeParser((MergeArguments, PipelineConfig), prog="tapo-trl merge")


def main(args, model_args) -> None:
    """
    Writes a pipeline with the LoRA merged into its weights, or a file of LoRA weights for ComfyUI.

    Args:
        args ([`MergeArguments`]): The LoRA, and what to write.
        model_args ([`PipelineConfig`]): The pipeline that it was trained on.
    """
    folder = Path(args.output_dir)
    name = model_args.require_model()
    folder.mkdir(parents=True, exist_ok=True)
    if args.format == "comfyui":
        written = write_comfyui_lora(args.lora, name, model_args.model_revision, folder)
        print(f"Wrote {written}, to be put into the folder models/loras of ComfyUI.")
    else:
        merge_into_pipeline(args.lora, model_args, folder)
        print(f"Wrote the pipeline with the LoRA merged to {folder}.")


def merge_into_pipeline(lora: str, model_args, folder: Path) -> None:
    """
    Args:
        lora (`str`): Folder or Hub id of the LoRA weights.
        model_args ([`PipelineConfig`]): The pipeline. Its weights are merged, and written, in `torch_dtype`.
        folder (`Path`): Where to.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from ..policies import load_policy

    name = model_args.model_name_or_path
    policy = load_policy(name, torch_dtype=model_args.dtype, revision=model_args.model_revision)
    policy.load_lora_weights(lora)
    for component in policy.pipeline.components.values():
        if hasattr(component, "fuse_lora") and any(isinstance(m, BaseTunerLayer) for m in component.modules()):
            component.fuse_lora(safe_fusing=True)
            component.unload_lora()
    policy.pipeline.save_pretrained(folder)


def write_comfyui_lora(lora: str, name: str, revision: str | None, folder: Path) -> Path:
    """
    Args:
        lora (`str`): Folder or Hub id of the LoRA weights.
        name (`str`): Folder or Hub id of the pipeline. Only its configuration is read.
        revision (`str`, *optional*): Branch, tag or commit of its repository.
        folder (`Path`): Where to.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: if ComfyUI does not know the layers of the pipeline by their names in diffusers.
    """
    from diffusers import DiffusionPipeline
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ..files import local_file
    from ..policies.comfyui import comfyui_lora
    from ..policies.loading import family_of

    pipeline_class = str(DiffusionPipeline.load_config(name, revision=revision)["_class_name"])
    family = family_of(pipeline_class)
    if family is None or not family.policy_class.comfyui_knows_layers:
        raise ValueError(
            f"ComfyUI is not known to find the layers of a `{pipeline_class}` by their names in diffusers, and no conversion is "
            "written: use `--format diffusers`."
        )
    with safe_open(local_file(lora, "pytorch_lora_weights.safetensors"), framework="pt") as file:
        tensors = comfyui_lora({key: file.get_tensor(key) for key in file.keys()}, file.metadata())
    save_file(tensors, folder / COMFYUI_FILE, metadata={"format": "pt"})
    return folder / COMFYUI_FILE
