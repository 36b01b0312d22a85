# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Draws the sample picture of the README with the base pipeline.

    python examples/emoji/sample_grid.py --output examples/emoji/assets/base_samples.png

It shows two prompts per row, several seeds of each.
"""

import argparse
from pathlib import Path

from common import HERE, save_grid
from pretrain_transformer import load_pipeline, sample


PROMPTS = ["panda face", "cupcake", "butterfly", "bus", "racing car", "hamburger", "robot face", "snowman"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline_dir", type=Path, default=HERE / "pipeline")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--per_prompt", type=int, default=6)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    prompts = [prompt for prompt in args.prompts for _ in range(args.per_prompt)]
    images = sample(load_pipeline(args.pipeline_dir), prompts, seed=args.seed, guidance=args.guidance_scale)
    save_grid(images, args.output, columns=2 * args.per_prompt)


if __name__ == "__main__":
    main()
