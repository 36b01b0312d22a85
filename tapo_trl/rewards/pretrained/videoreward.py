# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""VideoReward of VideoAlign: a Qwen2-VL-2B that rates the visual quality, the motion and the text alignment of videos."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

from .checkpoints import load_converted, pretrained_from_state_dict, read_state_dict
from .instructions import read_instruction
from .qwen2_vl import Qwen2VLReward, language_names, read_frames, resized_config


BASE = "Qwen/Qwen2-VL-2B-Instruct"
FILES = ["model_config.json", "checkpoint-*/*.pth", "checkpoint-*/*.safetensors"]
DIMENSIONS = ("VQ", "MQ", "TA")
MIN_PIXELS = 128 * 28 * 28
MIN_FRAMES, MAX_FRAMES = 4, 768
PEFT_PREFIX = "base_model.model."


class VideoReward(Qwen2VLReward):
    """
    VideoReward: visual quality (VQ), motion quality (MQ) and text alignment (TA) of a video, each normalised to the mean 0 and
    the standard deviation 1 of its training data, or their sum.

    Args:
        model ([`~transformers.Qwen2VLModel`]): vision tower and language model.
        head (`nn.Module`): score of a hidden state, or one score for each dimension.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): tokenizer of the base model.
        instruction (`str`): text around `{text_prompt}`, with the reward tokens.
        settings (`dict`): the checkpoint's `model_config.json`.
        fps (`float`): frames per second of the videos that it gets. It reads `settings["data_config"]["fps"]` of them.
        dimension (`str`, *optional*, defaults to `"overall"`): `"overall"`, `"VQ"`, `"MQ"` or `"TA"`.
        kwargs: arguments of [`PretrainedReward`].
    """

    name = "videoreward"
    weights = "KlingTeam/VideoReward"
    needs = (BASE,)
    license = "Apache-2.0"
    score_range = (-6.0, 6.0)
    reads = "video"
    num_parameters = 2_208_563_200
    default_batch_size = 1
    citation = "Liu et al., 2025, arXiv:2501.13918"
    reward_tokens = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
    media_token = "<|video_pad|>"

    def __init__(
        self,
        model: Qwen2VLModel,
        head: nn.Linear,
        tokenizer,
        instruction: str,
        settings: dict[str, Any],
        fps: float | None = None,
        dimension: str = "overall",
        **kwargs,
    ):
        super().__init__(model, head, tokenizer, instruction, **kwargs)
        check_reading(fps, dimension)
        data = settings["data_config"]
        if data.get("sample_type", "uniform") != "uniform" or data.get("num_frames") is not None:
            raise ValueError(
                "VideoReward reads frames at a fixed rate (`sample_type: uniform`, no `num_frames`), and no others."
            )
        self.fps, self.read_fps, self.max_pixels = fps, data["fps"], data["max_frame_pixels"]
        self.dimension = dimension
        norms = settings.get("inference_config") or {}
        for kind, default in (("mean", 0.0), ("std", 1.0)):
            values = [norms.get(f"{name}_{kind}", default) for name in DIMENSIONS]
            self.register_buffer(f"dimension_{kind}", torch.tensor(values), persistent=False)

    @classmethod
    def load(cls, weights, torch_dtype, revision, base_model: str = BASE, instruction_file=None, **kwargs):
        check_reading(kwargs.get("fps"), kwargs.get("dimension", "overall"))
        instruction = read_instruction(cls.name, instruction_file)
        folder = Path(weights)
        if not folder.is_dir():
            folder = Path(snapshot_download(weights, revision=revision, allow_patterns=FILES))
        settings = json.loads((folder / "model_config.json").read_text())
        config, tokenizer = AutoConfig.from_pretrained(base_model), AutoTokenizer.from_pretrained(base_model)
        state = read_checkpoint(folder, settings["peft_lora_config"], base_model, torch_dtype)
        model, head = language_names(state), {"weight": state["rm_head.weight"]}
        vocabulary = len(tokenizer) + len(cls.reward_tokens)
        model["language_model.embed_tokens.weight"] = model["language_model.embed_tokens.weight"][:vocabulary]
        linear = nn.Linear(*reversed(head["weight"].shape), bias=False)
        source = str(folder)
        return cls(
            pretrained_from_state_dict(Qwen2VLModel, resized_config(config, model), model, source, torch_dtype),
            load_converted(linear, head, source, torch.float32),
            tokenizer,
            instruction,
            settings,
            **kwargs,
        )

    def read(self, images: torch.Tensor) -> torch.Tensor:
        index = frames_to_read(images.shape[2], self.fps, self.read_fps)
        frames = images[:, :, index].transpose(1, 2)
        read = read_frames(frames.flatten(0, 1), MIN_PIXELS, self.max_pixels)
        return read.unflatten(0, frames.shape[:2]).transpose(1, 2)

    def dimensions(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Normalised VQ, MQ and TA, float32, of shape `(N, 3)`."""
        scores = self.rewards(images, prompts)
        scores = scores.diagonal(dim1=1, dim2=2) if scores.shape[2] == len(DIMENSIONS) else scores.squeeze(2)
        return (scores - self.dimension_mean) / self.dimension_std

    def raw_scores(self, images, prompts):
        scores = self.dimensions(images, prompts)
        return scores.sum(1) if self.dimension == "overall" else scores[:, DIMENSIONS.index(self.dimension)]


def check_reading(fps: float | None, dimension: str) -> None:
    """
    Raises:
        ValueError: if the frame rate of the videos or the dimension is unusable.
    """
    if not isinstance(fps, (int, float)) or fps <= 0:
        raise ValueError(
            "The reward `videoreward` reads two frames per second, and must know how many the videos have: pass `fps=16`, on the "
            "command line `--reward_model_init_kwargs '{\"fps\": 16}'`."
        )
    if dimension not in ("overall", *DIMENSIONS):
        raise ValueError(f"`dimension` must be one of overall, {', '.join(DIMENSIONS)}, but it is `{dimension}`.")


def frames_to_read(total: int, fps: float, read_fps: float) -> list[int]:
    """
    Which frames of a video are read: `read_fps` per second, an even number, at least four, evenly spaced from the first to the
    last.

    Raises:
        ValueError: if the video has less than two frames.
    """
    if total < 2:
        raise ValueError(f"The reward `videoreward` reads videos of at least 2 frames, but got {total}.")
    number = min(max(total / fps * read_fps, MIN_FRAMES), min(MAX_FRAMES, total) // 2 * 2)
    return torch.linspace(0, total - 1, round(number / 2) * 2).round().long().tolist()


def read_checkpoint(folder: Path, lora: dict[str, Any], base: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """
    Tensors of the latest checkpoint in the original's names, with the LoRA merged. A checkpoint is the whole model (`model.pth`),
    or the LoRA and what else was trained; then the rest is the base model's.

    Args:
        folder (`Path`): folder with `checkpoint-*`.
        lora (`dict`): `peft_lora_config` of `model_config.json`.
        base (`str`): Hub id or folder of the base model.
        dtype (`torch.dtype`): precision.

    Raises:
        OSError: if there is no checkpoint.
    """
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    if not steps:
        raise OSError(f"The folder `{folder}` has no `checkpoint-*`.")
    checkpoint = steps[-1]
    if (checkpoint / "model.pth").is_file():
        return merge_lora(read_state_dict(checkpoint / "model.pth"), lora)
    model = Qwen2VLModel.from_pretrained(base, dtype=dtype).state_dict()
    names = {"language_model.": "model.", "visual.": "visual."}
    state = {
        new + name.removeprefix(old): tensor
        for name, tensor in model.items()
        for old, new in names.items()
        if name.startswith(old)
    }
    state |= _plain_names(read_state_dict(checkpoint / "non_lora_state_dict.pth"))
    state |= _plain_names(read_state_dict(checkpoint / "adapter_model.safetensors"))
    return merge_lora(state, lora)


def _plain_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PEFT's names without its prefix, its layers and its adapters."""
    return {
        name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(".default.", "."): tensor
        for name, tensor in state.items()
    }


def merge_lora(state: dict[str, torch.Tensor], lora: dict[str, Any]) -> dict[str, torch.Tensor]:
    """
    Add the products of LoRA matrices to the weights that they change.

    Args:
        state (`dict[str, torch.Tensor]`): tensors, also in the names of PEFT.
        lora (`dict`): with `lora_r`, `lora_alpha` and `use_rslora`.
    """
    state = _plain_names(state)
    merged = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    rank = lora["lora_r"]
    scaling = lora["lora_alpha"] / (math.sqrt(rank) if lora.get("use_rslora") else rank)
    for name in state.keys() - merged.keys():
        layer, matrix = name.split(".lora_")
        if matrix not in ("A.weight", "B.weight"):
            raise ValueError(f"VideoReward's LoRA changes linear layers, but the checkpoint has `{name}`.")
        if matrix == "A.weight":
            weight = merged[f"{layer}.weight"]
            change = state[f"{layer}.lora_B.weight"].float() @ state[name].float()
            merged[f"{layer}.weight"] = (weight.float() + scaling * change).to(weight.dtype)
    return merged
