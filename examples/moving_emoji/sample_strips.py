# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Draws the sample picture of the README with the base pipeline: two clips per row, their frames side by side.

python examples/moving_emoji/sample_strips.py --output examples/moving_emoji/assets/base_samples.png
"""

import argparse
from pathlib import Path

from clips import HERE, save_strips
from sampling import load_pipeline, sample


PROMPTS = [
    "panda face moving left",
    "red apple moving right",
    "frog face moving up",
    "soccer ball moving down",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline_dir", type=Path, default=HERE / "pipeline")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--per_prompt", type=int, default=6)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    prompts = [prompt for prompt in args.prompts for _ in range(args.per_prompt)]
    clips = sample(load_pipeline(args.pipeline_dir), prompts, args.seed, args.steps, args.guidance_scale)
    save_strips(clips, args.output, columns=2)


if __name__ == "__main__":
    main()
