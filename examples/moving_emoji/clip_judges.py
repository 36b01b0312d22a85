# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Two held-out judges of moving-emoji clips, and two measures of motion that need no learning.

The judges are small networks trained on real clips only (see `train_judges.py`); no generated clip was ever shown to
them, and no preference training uses them. Clips are `[B, 3, 9, 48, 48]` in [-1, 1] throughout.

    quality_judge, subject_judge = load_judges()
    quality_judge.probabilities(clips)               # [B, 3], columns clean, jerky, distorted
    subject_judge.ranks(clips, prompts)              # [B], 1 = the right subject scored best of all subjects
    subject_judge.probabilities(clips, prompts)      # [B], finer than the rank
    direction_hits(clips, prompts)                   # [B], does it move where the prompt says
    roughness(clips)                                 # [B], pixels per frame; about 0 for a smooth motion
"""

import sys
from pathlib import Path

import torch
from clips import DIRECTIONS, FRAMES, HERE, KINDS, parse_prompt


sys.path.append(str(HERE.parent / "emoji"))

from judges import ImageTower, Judge, SubjectJudge, recall_at  # noqa: E402, F401


class QualityJudge(Judge):
    """Says of which kind a clip is: clean, jerky or distorted. It sees the nine frames at once, as channels."""

    def __init__(self, labels: list[str] = KINDS, channels: tuple[int, ...] = (24, 32, 64), size: int = 32):
        super().__init__(labels, channels, size)
        self.tower.down[0] = ImageTower.layer(3 * FRAMES, channels[0], 5, stride=2)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """The score of every kind, `[B, 3]`."""
        return super().forward(clips.flatten(1, 2) / 2 + 0.5)

    @torch.no_grad()
    def probabilities(self, clips: torch.Tensor) -> torch.Tensor:
        """Probabilities `[B, 3]` of the kinds in `labels`."""
        return self(clips.to(self.scale)).softmax(dim=-1)


class ClipSubjectJudge(SubjectJudge):
    """Ranks all subjects for a clip, by the mean score of its frames."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """The score of every subject, `[B, subjects]`; any number of frames."""
        scores = super().forward(clips.transpose(1, 2).flatten(0, 1) / 2 + 0.5)
        return scores.unflatten(0, (len(clips), -1)).mean(dim=1)

    def own_columns(self, prompts: list[str]) -> torch.LongTensor:
        """The column of each prompt's subject among the labels, `[B, 1]`."""
        return super().own_columns([parse_prompt(prompt)[0] for prompt in prompts])


def load_judges(folder: Path | str = HERE / "judges") -> tuple[QualityJudge, ClipSubjectJudge]:
    """Loads the quality judge and the subject judge from a folder of `train_judges.py`."""
    return QualityJudge.load(Path(folder) / "quality"), ClipSubjectJudge.load(Path(folder) / "subject")


def centres(clips: torch.Tensor) -> torch.Tensor:
    """The centre of mass of what is not white, per frame: `[B, 9, 2]` rows and columns in pixels."""
    mass = (0.95 - (clips.amin(dim=1) / 2 + 0.5)).clamp(min=0) + 1e-6  # [B, 9, 48, 48]
    rows, columns = torch.arange(clips.shape[-2]), torch.arange(clips.shape[-1])
    places = torch.stack([(mass * rows[:, None]).sum(dim=(2, 3)), (mass * columns).sum(dim=(2, 3))], dim=-1)
    return places / mass.sum(dim=(2, 3))[..., None]


def direction_hits(clips: torch.Tensor, prompts: list[str]) -> torch.BoolTensor:
    """Whether the way from the first frame's centre to the last's is nearest to the prompt's direction, `[B]`."""
    way = centres(clips)[:, -1] - centres(clips)[:, 0]
    found = (way @ torch.tensor(list(DIRECTIONS.values()), dtype=way.dtype).T).argmax(dim=1)
    own = torch.tensor([list(DIRECTIONS).index(parse_prompt(prompt)[1]) for prompt in prompts])
    return found == own


def roughness(clips: torch.Tensor) -> torch.Tensor:
    """The mean change of the velocity of the centre from frame to frame, in pixels per frame, `[B]`."""
    return centres(clips).diff(n=2, dim=1).norm(dim=-1).mean(dim=1)
