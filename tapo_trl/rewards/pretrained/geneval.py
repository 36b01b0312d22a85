# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0
"""GenEval's rules: whether the objects that a prompt asks for are in the picture, by a detector and a CLIP."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPModel

from ...files import cache_root
from .base import PretrainedReward
from .checkpoints import read_state_dict
from .clip import OPENAI_CLIP, cast_clip
from .mask2former import Detections, detect, detector_from_mmdet
from .preprocessing import CLIP_MEAN, CLIP_STD, center_crop, normalize, resize_shortest_edge


DETECTOR = "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco"
FILE = f"{DETECTOR}_20220504_001756-c9d0c4f2.pth"
URL = f"https://download.openmmlab.com/mmdetection/v3.0/mask2former/{DETECTOR}/{FILE}"
# COCO's, in the order of the detector, three of them as GenEval calls them
CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,"
    "cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,"
    "sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,"
    "toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,"
    "vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
POSITIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # confidence that an object must exceed
MAX_OBJECTS = 16  # of one class
DISTANCE = 0.1  # of two centres, in sums of the sizes, that does not count
BACKGROUND = 0x99 / 255  # around an object whose color is read


class Thing(NamedTuple):
    """A detected object: its box (left, top, right, bottom) in pixels, and its pixels."""

    box: tuple[int, int, int, int]
    mask: torch.Tensor


class GenEvalReward(PretrainedReward):
    """
    GenEval: 1 if all objects of the prompt are in the picture, in the number, colors and positions that it asks for, and else 0.
    The column `metadata` says what they are: a line of GenEval's prompt file, as text or as a dictionary.

    The detector computes in float32; `torch_dtype` is the precision of the CLIP, which tells colors.

    Args:
        detector (`Mask2FormerForUniversalSegmentation`): from [`~mask2former.detector_from_mmdet`].
        clip ([`~transformers.CLIPModel`]): OpenAI's ViT-L/14.
        tokenizer (`Callable`): its tokenizer.
        kwargs: arguments of [`PretrainedReward`].
    """

    name = "geneval"
    weights = FILE
    needs = (OPENAI_CLIP,)
    license = "Apache-2.0, MIT (CLIP)"
    score_range = (0.0, 1.0)
    columns = ("metadata",)
    differentiable = False
    num_parameters = 496_357_596
    default_batch_size = 4
    citation = "Ghosh et al., 2023, arXiv:2310.11513"

    def __init__(self, detector, clip: CLIPModel, tokenizer, **kwargs):
        super().__init__(**kwargs)
        self.detector, self.clip, self.tokenizer = detector, clip, tokenizer

    @classmethod
    def detector_path(cls) -> Path:
        """Where the detector's weights are looked for."""
        return cache_root(None) / "detectors" / FILE

    @classmethod
    def load(cls, weights, torch_dtype, revision, clip: str = OPENAI_CLIP, **kwargs):
        """`clip` is the Hub id or folder of the CLIP, see also [`PretrainedReward.load`]."""
        if revision is not None:
            raise ValueError("The reward `geneval` has no revisions: its detector is a file.")
        path = cls.detector_path() if weights == cls.weights else Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        state = read_state_dict(path)
        detector = detector_from_mmdet(state.get("state_dict", state), str(path))
        if detector.config.num_labels != len(CLASSES):
            raise ValueError(f"`{path}` detects {detector.config.num_labels} classes, but COCO has {len(CLASSES)}.")
        model = CLIPModel.from_pretrained(clip, dtype=torch.float32)
        cast_clip(model, torch_dtype)
        return cls(detector, model, AutoTokenizer.from_pretrained(clip), **kwargs)

    @classmethod
    def how_to_get(cls) -> str:
        """The command that fetches the detector."""
        return f"curl --location --create-dirs --output {cls.detector_path()} {URL}"

    @classmethod
    def _missing(cls, weights, revision, error):
        path = cls.detector_path() if weights == cls.weights else Path(weights)
        if not path.is_file():
            return (
                f"The reward `geneval` needs the weights of its detector, but there is no file {path}. Fetch them once with "
                f"`{cls.how_to_get()}`, or pass the file as `weights`."
            )
        return (
            f"The reward `geneval` needs a CLIP. Download it where there is a network, with `hf download {OPENAI_CLIP}`, or pass "
            f"its folder as `clip`. The error was: {error}"
        )

    @classmethod
    def check_prompts(cls, prompts, **columns):
        super().check_prompts(prompts, **columns)
        for metadata in columns["metadata"]:
            read_metadata(metadata)

    def raw_scores(self, images, prompts, metadata):
        found = detect(self.detector, images)
        return torch.tensor(
            [
                float(not self.mistakes(*parts))
                for parts in zip(images, found, map(read_metadata, metadata), strict=True)
            ],
            device=images.device,
        )

    def mistakes(self, image: torch.Tensor, found: Detections, wanted: dict[str, Any]) -> list[str]:
        """
        What is wrong with a picture.

        Args:
            image (`torch.Tensor` of shape `(3, H, W)`): float, in [0, 1].
            found ([`~mask2former.Detections`]): its objects.
            wanted (`dict[str, Any]`): from [`read_metadata`].
        """
        things = things_by_class(found, COUNTING_THRESHOLD if wanted["tag"] == "counting" else THRESHOLD)
        return find_mistakes(things, wanted, lambda members, name: self.colors(image, members, name))

    @torch.no_grad()
    def colors(self, image: torch.Tensor, things: list[Thing], name: str) -> list[str]:
        """The color of each of some things of one class, by CLIP, which sees each alone on grey."""
        size, crops = self.clip.config.vision_config.image_size, []
        for (left, top, right, bottom), mask in things:
            crop = image.where(mask, BACKGROUND)[None, :, top:bottom, left:right]
            crops.append(center_crop(resize_shortest_edge(crop, size), size, rounding="nearest"))
        pixel_values = normalize(torch.cat(crops), CLIP_MEAN, CLIP_STD).to(self.clip.visual_projection.weight.dtype)
        prompts = [prompt.format(color=color, name=name) for color in COLORS for prompt in COLOR_PROMPTS]
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        text = self.clip.get_text_features(**tokens.to(image.device), return_dict=True).pooler_output.float()
        text = F.normalize(text, dim=-1).unflatten(0, (len(COLORS), -1)).mean(1)
        seen = self.clip.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output.float()
        best = (F.normalize(seen, dim=-1) @ F.normalize(text, dim=-1).T).argmax(1)
        return [COLORS[index] for index in best.tolist()]


def read_metadata(metadata: str | Mapping[str, Any]) -> dict[str, Any]:
    """
    What a prompt asks for: `tag`, the task; `include` and `exclude`, lists of `class` and `count` with, where they are asked for,
    `color` and `position`, a relation and the index of the entry it is to.

    Args:
        metadata (`str` or `Mapping`): a line of GenEval's prompt file.

    Raises:
        ValueError: if it is none.
    """
    try:
        row = json.loads(metadata) if isinstance(metadata, str) else dict(metadata)
        # A table fills up what an entry does not have
        parts = {part: [_known(entry) for entry in row.get(part) or []] for part in ("include", "exclude")}
        for index, entry in enumerate(parts["include"]):
            names = [entry["class"] in CLASSES, entry.get("color", "red") in COLORS]
            if "position" in entry:
                relation, target = entry["position"]
                names += [relation in POSITIONS, target in range(index)]
            if not all(names):
                raise ValueError(f"GenEval does not know the entry {entry}")
        return {"tag": row["tag"], **parts}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"The reward `geneval` reads the column `metadata`, a line of GenEval's prompt file, but it is {metadata!r}: {error!r}."
        ) from error


def _known(entry: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in entry.items() if value is not None}
    return {**known, "class": known["class"], "count": int(known["count"])}


def things_by_class(found: Detections, threshold: float) -> dict[str, list[Thing]]:
    """The confident objects of each class, at most 16, the most confident first."""
    things: dict[str, list[Thing]] = {}
    for index in found.scores.argsort(descending=True).tolist():
        members = things.setdefault(CLASSES[found.labels[index]], [])
        if found.scores[index] > threshold and len(members) < MAX_OBJECTS:
            members.append(Thing(tuple(found.boxes[index].tolist()), found.masks[index]))
    return things


def find_mistakes(things: dict[str, list[Thing]], wanted: dict[str, Any], read_colors) -> list[str]:
    """
    GenEval's rules: all that `include` asks for, with the most confident objects of a class, and nothing that `exclude` does.

    Args:
        things (`dict[str, list[Thing]]`): from [`things_by_class`].
        wanted (`dict[str, Any]`): from [`read_metadata`].
        read_colors (`Callable`): things and their class to the color of each.

    Returns:
        `list[str]`: what is wrong, nothing if the picture is right.
    """
    mistakes: list[str] = []
    groups: list[list[Thing] | None] = []
    for entry in wanted["include"]:
        name, count, before = entry["class"], entry["count"], len(mistakes)
        members = things.get(name, [])[:count]
        if len(members) < count:
            mistakes.append(f"{len(members)} of {count} {name}")
        elif "color" in entry and (right := read_colors(members, name).count(entry["color"])) < count:
            mistakes.append(f"{right} of {count} {name} {entry['color']}")
        elif "position" in entry:
            relation, target = entry["position"]
            others = groups[target]
            if others is None or any(
                relation not in relations(thing.box, other.box) for thing in members for other in others
            ):
                mistakes.append(f"{name} not {relation} {wanted['include'][target]['class']}")
        groups.append(members if len(mistakes) == before else None)
    for entry in wanted["exclude"]:
        number = len(things.get(entry["class"], []))
        if number >= entry["count"]:
            mistakes.append(f"{number} {entry['class']}, fewer than {entry['count']} asked for")
    return mistakes


def relations(box: tuple[int, ...], other: tuple[int, ...]) -> set[str]:
    """Where one box is, seen from the other: one or two of `POSITIONS`, or nowhere if they overlap too much."""
    first, second = (torch.tensor(corners, dtype=torch.float64).view(2, 2) for corners in (box, other))
    offset = first.mean(0) - second.mean(0)
    sizes = (first[1] - first[0]) + (second[1] - second[0])
    rest = (offset.abs() - DISTANCE * sizes).clamp(min=0) * offset.sign()
    if (rest.abs() < 1e-3).all():
        return set()
    right, down = (rest / offset.norm()).tolist()
    limits = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {relation for relation, share in limits.items() if share > 0.5}
