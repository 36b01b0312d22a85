#!/usr/bin/env bash
# Check and measure tapo_trl on one GPU, offline, in less than nine minutes. Rehearse it on a CPU with `--tiny`.
#   benchmarks/gpu/run.sh OUTPUT_DIR [--tiny] [--seconds 520] [--steps NAME ...]
# It uses .gpu/packages.tar.xz if pack.sh made that.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
if [ -f .gpu/packages.tar.xz ]; then
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  tar -C "$packages" -xf .gpu/packages.tar.xz
  export PYTHONPATH="$packages"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
"$python" benchmarks/gpu/measure.py --output_dir "$@"
