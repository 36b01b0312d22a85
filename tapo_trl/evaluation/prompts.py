# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Prompt sets of public benchmarks. They are read from the official files: none is part of this package."""

import csv
import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.utils import logging


logger = logging.get_logger(__name__)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [{"prompt": line.strip()} for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    # The rest of a row differs from one task to another, which a table cannot hold
    return [{"prompt": row["prompt"], "tag": row["tag"], "metadata": json.dumps(row)} for row in rows]


def _read_vbench(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [{"prompt": row["prompt_en"], "dimension": row["dimension"]} for row in rows]


def _read_captions(path: Path) -> list[dict[str, Any]]:
    return [{"prompt": row["caption"]} for row in json.loads(path.read_text(encoding="utf-8"))]


def _read_table(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
        rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    bad = [number for number, row in enumerate(rows, 1) if None in row or None in row.values()]
    if bad:
        raise ValueError(f"{path}, row {bad[0]}: there are not as many values as columns.")
    names = {name.lower(): name for name in rows[0]}
    prompt = names.get("prompt") or names.get("prompts")
    if prompt is None or "category" not in names:
        raise ValueError(
            f"{path} has the columns {list(rows[0])}, but `Prompt` (or `Prompts`) and `Category` are needed."
        )
    return [{"prompt": row[prompt], "category": row[names["category"]]} for row in rows]


@dataclass(frozen=True)
class Benchmark:
    """
    A public benchmark.

    Args:
        source (`str`): Repository or page with the official prompt file.
        file (`str`): Path of the prompt file in a clone of `source`.
        num_prompts (`int`): Number of prompts of the official file.
        sha256 (`str`, *optional*): Checksum of the official file, where it has one canonical copy.
        read (`Callable`): Reads a file into rows with the column `prompt`.
        samples_per_prompt (`int`): Samples that the benchmark asks for.
        modality (`str`): `"image"` or `"video"`.
        licence (`str`): Licence of the prompts.
        next_step (`str`, *optional*): Command of the official tool, in the environment of that tool. `None` where the package
            scores the samples itself.
    """

    source: str
    file: str
    num_prompts: int
    sha256: str | None
    read: Callable[[Path], list[dict[str, Any]]]
    samples_per_prompt: int
    modality: str
    licence: str
    next_step: str | None = None

    @property
    def how_to_get(self) -> str:
        """One sentence on where the prompts are found."""
        if self.source.startswith("https://github.com/"):
            folder = self.source.rsplit("/", 1)[-1]
            return f"Run `git clone --depth 1 {self.source}` and give the folder `{folder}`, or the file `{self.file}` in it."
        return f"Download them from {self.source} as a .csv or .tsv file, and give its path."


_COMPBENCH = {
    "color": "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d",
    "shape": "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae",
    "texture": "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f",
    "spatial": "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988",
    "3d_spatial": "c9953597315f36a5fcb41291bb19bdc6ab5f64a0fa760d691b4854a73f5d1fe9",
    "numeracy": "dad8df141604b70ba7554bec724e3db0a80023680769b5c514854ea2d2527bbe",
    "non_spatial": "04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d",
    "complex": "1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4",
}
_COMPBENCH_TOOLS = {
    **dict.fromkeys(("color", "shape", "texture"), "cd BLIPvqa_eval && python BLIP_vqa.py --out_dir={folder}"),
    "spatial": "cd UniDet_eval && python 2D_spatial_eval.py --outpath={folder}",
    "3d_spatial": "cd UniDet_eval && python 3D_spatial_eval.py --outpath={folder}",
    "numeracy": "cd UniDet_eval && python numeracy_eval.py --outpath={folder}",
    "non_spatial": "python CLIPScore_eval/CLIP_similarity.py --outpath={folder}",
    # Combines the results of the three before it
    "complex": (
        "(cd BLIPvqa_eval && python BLIP_vqa.py --out_dir={folder}) && "
        "(cd UniDet_eval && python 2D_spatial_eval.py --outpath={folder} --complex=True) && "
        "python CLIPScore_eval/CLIP_similarity.py --outpath={folder} --complex=True && "
        "cd 3_in_1_eval && python 3_in_1.py --outpath={folder}"
    ),
}

BENCHMARKS = {
    "geneval": Benchmark(
        source="https://github.com/djghosh13/geneval",
        file="prompts/evaluation_metadata.jsonl",
        num_prompts=553,
        sha256="5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
        read=_read_json_lines,
        samples_per_prompt=4,
        modality="image",
        licence="MIT",
        next_step="python evaluation/evaluate_images.py {folder} --outfile {folder}/results.jsonl --model-path DETECTOR_FOLDER",
    ),
    **{
        f"compbench/{category}": Benchmark(
            source="https://github.com/Karine-Huang/T2I-CompBench",
            file=f"examples/dataset/{category}_val.txt",
            num_prompts=300,
            sha256=sha256,
            read=_read_lines,
            samples_per_prompt=10,
            modality="image",
            licence="MIT",
            next_step=_COMPBENCH_TOOLS[category],
        )
        for category, sha256 in _COMPBENCH.items()
    },
    "drawbench": Benchmark(
        source="https://huggingface.co/datasets/shunk031/DrawBench",
        file="drawbench.csv",
        num_prompts=200,
        sha256=None,
        read=_read_table,
        samples_per_prompt=1,
        modality="image",
        licence="not stated",
    ),
    "partiprompts": Benchmark(
        source="https://github.com/google-research/parti",
        file="PartiPrompts.tsv",
        num_prompts=1632,
        sha256="fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
        read=_read_table,
        samples_per_prompt=1,
        modality="image",
        licence="Apache-2.0",
    ),
    "ocr": Benchmark(
        source="https://github.com/yifan123/flow_grpo",
        file="dataset/ocr/test.txt",
        num_prompts=1018,
        sha256="4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc",
        read=_read_lines,
        samples_per_prompt=1,
        modality="image",
        licence="MIT",
    ),
    "spo": Benchmark(  # training prompts, of SPO and of the paper
        source="https://github.com/RockeyCoss/SPO",
        file="spo_training_and_inference/assets/prompts/4k_training_prompts.json",
        num_prompts=4000,
        sha256="804018fcb30bc9bed28a2a0518855bffd386675a3c5138f96b925071cbae6fc4",
        read=_read_captions,
        samples_per_prompt=1,
        modality="image",
        licence="MIT",
    ),
    "vbench": Benchmark(
        source="https://github.com/Vchitect/VBench",
        file="vbench/VBench_full_info.json",
        num_prompts=946,
        sha256="5dd2de80ee43cda750b2b72ea7023657c0b90d3702041c7e4608c65dbe50dccd",
        read=_read_vbench,
        samples_per_prompt=5,
        modality="video",
        licence="Apache-2.0",
        next_step="vbench evaluate --videos_path {folder}/videos --dimension DIMENSION --output_path {folder}/evaluation_results",
    ),
}


def find_benchmark(name: str) -> Benchmark:
    """
    The benchmark of a name.

    Raises:
        ValueError: if there is none, with the nearest names.
    """
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=3, cutoff=0.4)
        near = near or [known for known in BENCHMARKS if known.startswith(f"{name}/")] or list(BENCHMARKS)
        raise ValueError(f"There is no benchmark `{name}`. Did you mean one of {near}?")
    return BENCHMARKS[name]


def load_prompts(name: str, path: str | Path) -> Dataset:
    """
    Read the prompts of a public benchmark from its official file.

    Args:
        name (`str`): `"geneval"`, `"compbench/color"` (or another category), `"drawbench"`, `"partiprompts"`, `"ocr"`, `"vbench"`,
            or `"spo"`, the 4,000 prompts that SPO trains with.
        path (`str` or `Path`): The official file, or a clone of its repository.

    Returns:
        `Dataset`: The column `prompt` and, by benchmark, `tag` and `metadata` (GenEval), `category` or `dimension`. A warning
            says if it is not the official file.

    Raises:
        ValueError: if the benchmark is unknown or the file cannot be read as one of its files.
        FileNotFoundError: if the file is missing; the message says where it is found.
    """
    benchmark, path = find_benchmark(name), Path(path)
    file = path / benchmark.file if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There are no prompts of `{name}` at {file}. {benchmark.how_to_get}")
    try:
        rows = benchmark.read(file)
    except (KeyError, TypeError, json.JSONDecodeError, csv.Error, UnicodeDecodeError, IndexError) as error:
        raise ValueError(
            f"{file} is not laid out as `{benchmark.file}` of {benchmark.source} ({error!r}). {benchmark.how_to_get}"
        ) from error
    if not rows:
        raise ValueError(f"{file} has no prompts.")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if len(rows) != benchmark.num_prompts or benchmark.sha256 not in (None, digest):
        logger.warning(
            f"{file} is not the official file of `{name}`: {len(rows)} prompts of {benchmark.num_prompts}, SHA-256 {digest[:12]}. "
            "Its scores cannot be compared to published ones."
        )
    return Dataset.from_list(rows)
