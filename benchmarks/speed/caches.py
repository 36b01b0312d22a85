# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Time, memory and disk of the caches of prompt embeddings and latents, by the number of rows. Rows are made up: no text encoder
runs, and each preference pair has a prompt of its own and two given latents.

    python -m benchmarks.speed.caches --rows 5000 20000 50000

The later start is what every training but the first costs: looking for each prompt on the disk, and opening the latents. Memory is that
start's, without mapped files.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from datasets import Array3D, Dataset, Features, Value

from tapo_trl import load_policy
from tapo_trl.data.preferences import prepare_preference_dataset
from tapo_trl.data.prompts import PromptCache
from tapo_trl.policies import PromptEmbeddings
from tapo_trl.policies.sd3 import SD3Policy


SHAPE, TOKENS, DIM = (4, 8, 8), 8, 32
LATENT = Array3D(SHAPE, "float32")
FEATURES = Features({"prompt": Value("string"), "chosen": LATENT, "rejected": LATENT})


def rows(number: int):
    rng = np.random.default_rng(0)
    for row in range(number):
        chosen, rejected = rng.normal(size=(2, *SHAPE)).astype(np.float32)
        yield {"prompt": f"made-up prompt {row}", "chosen": chosen, "rejected": rejected}


def made_up_embeddings(prompts: list[str], max_sequence_length: int) -> PromptEmbeddings:
    return PromptEmbeddings(torch.ones(len(prompts), TOKENS, DIM), torch.ones(len(prompts), DIM))


def disk(folder: Path) -> int:
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def own_memory() -> int:
    """Bytes, without the pages of files that are mapped."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def start(folder: Path) -> dict[str, float]:
    """What a training does with the caches before its first step."""
    policy = load_policy(SD3Policy.tiny())
    policy.encode_prompts = made_up_embeddings
    dataset = Dataset.from_parquet(str(folder / "pairs.parquet"), cache_dir=str(folder / "datasets"))
    before, times = own_memory(), {}
    clock = time.perf_counter()
    cache = PromptCache(policy, folder / "cache", max_sequence_length=TOKENS, dtype=torch.bfloat16)
    cache.encode(dataset["prompt"])
    times["prompts"] = time.perf_counter() - clock
    clock = time.perf_counter()
    prepared = prepare_preference_dataset(dataset, policy, 32, 32, cache_dir=folder / "cache")
    times["latents"] = time.perf_counter() - clock
    clock, number = time.perf_counter(), 512
    for row in np.random.default_rng(1).integers(0, len(prepared), number).tolist():
        cache.load([prepared[row]["prompt"]])
    times["row_ms"] = 1000 * (time.perf_counter() - clock) / number
    times["memory_mb"] = (own_memory() - before) / 1e6
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 20_000, 50_000])
    parser.add_argument("--start", type=Path, help="Used by the script itself: measure one start in a fresh process.")
    args = parser.parse_args()
    if args.start is not None:
        print(json.dumps(start(args.start)))
        return
    print(
        "| rows | first start: prompts, latents (s) | later start: prompts, latents (s) | memory (MB) | one row (ms) | disk (MB) |"
    )
    print("|---|---|---|---|---|---|")
    for number in args.rows:
        folder = Path(tempfile.mkdtemp())
        Dataset.from_generator(
            rows, gen_kwargs={"number": number}, features=FEATURES, cache_dir=str(folder / "made")
        ).to_parquet(folder / "pairs.parquet")
        command = [sys.executable, "-m", "benchmarks.speed.caches", "--start", str(folder)]
        first, later = (
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            for _ in range(2)
        )
        times = [f"{run['prompts']:.1f}, {run['latents']:.1f}" for run in (first, later)]
        size = disk(folder / "cache") / 1e6
        print(
            f"| {number:,} | {times[0]} | {times[1]} | {later['memory_mb']:.0f} | {later['row_ms']:.2f} | {size:.0f} |",
            flush=True,
        )
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
