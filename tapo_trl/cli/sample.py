# Copyright 2026 The tapo_trl authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from .parser import RecipeParser


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl sample`."""
    from .arguments import PipelineConfig, SampleArguments

    return RecipeParser((SampleArguments, PipelineConfig), prog="tapo-trl sample")


def load_pipeline(model_args, lora: str | None):
    """
    Loads a diffusers pipeline onto the accelerator, with LoRA weights if there are any.

    Args:
        model_args ([`PipelineConfig`]): The pipeline.
        lora (`str`, *optional*): Folder or Hub id with `pytorch_lora_weights.safetensors`.

    Returns:
        [`~diffusers.DiffusionPipeline`]: The pipeline.
    """
    from accelerate import PartialState

    from ..policies import load_policy

    pipeline = load_policy(
        model_args.require_model(), torch_dtype=model_args.dtype, revision=model_args.model_revision
    ).pipeline
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline.to(PartialState().device)


def draw(pipeline, prompts: list[str], args):
    """
    Draws one image per prompt; image `i` starts from the noise of `args.seed + i`.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): The pipeline.
        prompts (`list[str]`): The prompts.
        args ([`SampleArguments`] or [`EvaluateArguments`]): How to sample.

    Returns:
        `torch.Tensor`: Images of shape `[B, 3, H, W]`, float32 in [0, 1], on the CPU.
    """
    import torch

    images = []
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        output = pipeline(
            prompt=batch,
            negative_prompt=args.negative_prompt,
            height=args.resolution,
            width=args.resolution,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            max_sequence_length=args.max_sequence_length,
            generator=[torch.Generator().manual_seed(args.seed + start + i) for i in range(len(batch))],
            output_type="pt",
        )
        images.append(output.images.float().cpu())
    return torch.cat(images)


def main(args, model_args) -> None:
    """
    Draws images and writes them, and a grid of them, as PNG files.

    Args:
        args ([`SampleArguments`]): What to draw.
        model_args ([`PipelineConfig`]): The pipeline.
    """
    from pathlib import Path

    from ..trainer.image_grid import images_to_grid, images_to_pil
    from .builders import read_prompts

    prompts = read_prompts(args.prompts, "prompts")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    images = draw(load_pipeline(model_args, args.lora), prompts, args)
    for index, image in enumerate(images_to_pil(images)):
        image.save(folder / f"{index:03d}.png")
    images_to_grid(images, args.columns).save(folder / "grid.png")
    print(f"Wrote {len(prompts)} images and grid.png to {folder}.")
