# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""Legibility of the text that a prompt asks for, by optical character recognition."""

from collections.abc import Sequence

import torch

from .base import PretrainedReward


class OCRReward(PretrainedReward):
    r"""
    How much of the quoted text of the prompt is in the picture, as in Flow-GRPO (Liu et al., 2025): \( 1 - d / n \), with the
    \( n \) characters between the first pair of straight quotes and the edit distance \( d \) to what is read, at most
    \( n \). It is 0 if the text is anywhere in what is read. Case and spaces do not count.

    The text is read by RapidOCR on the CPU, whose models come with its package.

    Args:
        detect (`bool`, *optional*, defaults to `True`):
            whether to look for text in the picture. Without it the whole picture is taken for one line, which is much faster.
        detector_side (`int`, *optional*, defaults to 736):
            pixels to which the detector enlarges the shorter side of a smaller picture.
        kwargs: arguments of [`PretrainedReward`].
    """

    name = "ocr"
    license = "Apache-2.0"
    score_range = (0.0, 1.0)
    differentiable = False
    num_parameters = 7_790_000
    citation = "Liu et al., 2025, arXiv:2505.05470"

    def __init__(self, detect: bool = True, detector_side: int = 736, **kwargs):
        super().__init__(**kwargs)
        self.detect = detect
        self.engine = _engine(detector_side, pad_lines=detect)

    @classmethod
    def memory(cls, torch_dtype=None):
        """None on the accelerator: its models run on the CPU."""
        return 0

    @classmethod
    def check_prompts(cls, prompts, **columns):
        for prompt in prompts:
            quoted_text(prompt)

    def raw_scores(self, images, prompts):
        targets = [quoted_text(prompt) for prompt in prompts]
        pixels = (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        scores = [text_score(self.read(array), target) for array, target in zip(pixels, targets, strict=True)]
        return torch.tensor(scores, device=images.device)

    def read(self, picture) -> str:
        """
        What is written in a picture.

        Args:
            picture (`np.ndarray` of shape `(H, W, 3)`): uint8, RGB.
        """
        lines = self.engine(picture[:, :, ::-1], use_det=self.detect, use_cls=False, use_rec=True).txts
        return "".join(lines or ())


def _engine(detector_side: int, pad_lines: bool):
    """RapidOCR. With `pad_lines`, a line is padded to at least 320 / 48 times its height, as RapidOCR does to read several at once."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError(
            f"The reward `ocr` needs RapidOCR and onnxruntime: `pip install rapidocr onnxruntime`. {error}"
        ) from error
    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Det.limit_side_len": detector_side,
            **({} if pad_lines else {"Rec.rec_img_shape": [3, 48, 48]}),
            "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def quoted_text(prompt: str) -> str:
    """
    The text between the first pair of straight quotes.

    Raises:
        ValueError: if there is none.
    """
    parts = prompt.split('"')
    if len(parts) < 3 or not _plain(parts[1]):
        raise ValueError(
            f"The reward `ocr` compares the picture with the text between straight quotes, but the prompt {prompt!r} has none: "
            'write it as in: a sign that says "open".'
        )
    return parts[1]


def text_score(read: str, target: str) -> float:
    """`1 - d / n`, see [`OCRReward`]."""
    read, target = _plain(read), _plain(target)
    distance = 0 if target in read else min(edit_distance(read, target), len(target))
    return 1 - distance / len(target)


def edit_distance(first: Sequence, second: Sequence) -> int:
    """Least number of insertions, deletions and substitutions that turn one into the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for index, left in enumerate(first, 1):
        diagonal, row[0] = row[0], index
        for column, right in enumerate(second, 1):
            diagonal, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, diagonal + (left != right)),
            )
    return row[-1]


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()
