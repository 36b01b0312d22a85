# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Two held-out judges of emoji pictures: which artist's style, and does the picture show the prompt.

Both are small networks trained on real pictures only (see `train_judges.py`); no generated picture was ever shown to
them, and no preference training uses them.

    style_judge, subject_judge = load_judges("examples/emoji/judges")
    style_judge.style_probabilities(images)          # [B, 3], columns named by style_judge.styles
    ranks = subject_judge.ranks(images, prompts)     # [B], 1 = the right caption scored best of all captions
    recall_at(ranks, 10)
    subject_judge.probabilities(images, prompts)     # [B], finer than the rank
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class ImageTower(nn.Module):
    """A small residual convolutional network: images [B, 3, 64, 64] in [0, 1] to features [B, channels[-1]]."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.down, self.residual = nn.ModuleList(), nn.ModuleList()
        for i, (before, after) in enumerate(zip((3, *channels), channels, strict=False)):
            kernel = 5 if i == 0 else 3
            self.down.append(self.layer(before, after, kernel, stride=2))
            self.residual.append(self.layer(after, after, 3, stride=1))

    @staticmethod
    def layer(before: int, after: int, kernel: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.SiLU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = 2 * images - 1
        for i, (down, residual) in enumerate(zip(self.down, self.residual, strict=True)):
            hidden = down(hidden)
            if i > 0:
                hidden = hidden + residual(hidden)
        return hidden.mean(dim=(2, 3))


class Judge(nn.Module):
    """An image tower followed by one learnt vector per label, compared by cosine."""

    def __init__(self, labels: list[str], channels: tuple[int, ...], size: int):
        super().__init__()
        self.labels = list(labels)
        self.config = {"labels": self.labels, "channels": list(channels), "size": size}
        self.tower = ImageTower(tuple(channels))
        self.project = nn.Linear(channels[-1], size)
        self.label_vectors = nn.Parameter(torch.randn(len(labels), size))
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The score of every label, [B, labels]."""
        vectors = nn.functional.normalize(self.project(self.tower(images)), dim=-1)
        return self.scale * vectors @ nn.functional.normalize(self.label_vectors, dim=-1).T

    def save(self, path: Path) -> None:
        """Writes `PATH.safetensors` and `PATH.json`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, path.with_suffix(".safetensors"))
        path.with_suffix(".safetensors").chmod(0o644)
        path.with_suffix(".json").write_text(json.dumps(self.config, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Judge":
        """Reads what `save` wrote, ready for use."""
        judge = cls(**json.loads(path.with_suffix(".json").read_text()))
        judge.load_state_dict(load_file(path.with_suffix(".safetensors")))
        return judge.eval().requires_grad_(False)


class StyleJudge(Judge):
    """Says whose style a picture has."""

    @property
    def styles(self) -> list[str]:
        return self.labels

    @torch.no_grad()
    def style_probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities [B, 3] of `styles` for images [B, 3, 64, 64] in [0, 1]."""
        return self(images.to(self.scale)).softmax(dim=-1)


class SubjectJudge(Judge):
    """Ranks all known captions for a picture."""

    @property
    def prompts(self) -> list[str]:
        return self.labels

    def own_columns(self, prompts: list[str]) -> torch.LongTensor:
        """The column of each prompt among the labels, [B, 1]."""
        unknown = sorted(set(prompts) - set(self.labels))
        if unknown:
            raise ValueError(f"The subject judge does not know these prompts: {unknown}")
        return torch.tensor([[self.labels.index(p)] for p in prompts], device=self.scale.device)

    @torch.no_grad()
    def ranks(self, images: torch.Tensor, prompts: list[str]) -> torch.LongTensor:
        """The rank (1 = best) of each image's own prompt among all captions, by the score of the image."""
        columns = self.own_columns(prompts)
        scores = self(images.to(self.scale))
        return 1 + (scores > scores.gather(1, columns)).sum(dim=1)

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """The probability of each image's own prompt among all captions: a finer measure than the rank."""
        columns = self.own_columns(prompts)
        return self(images.to(self.scale)).softmax(dim=1).gather(1, columns)[:, 0]


def load_judges(folder: Path | str) -> tuple[StyleJudge, SubjectJudge]:
    """Loads the style judge and the subject judge from a folder of `train_judges.py`."""
    return StyleJudge.load(Path(folder) / "style"), SubjectJudge.load(Path(folder) / "subject")


def recall_at(ranks: torch.Tensor, k: int) -> float:
    """The share of images whose own prompt is among the `k` best."""
    return (ranks <= k).float().mean().item()
