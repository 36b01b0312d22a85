#!/usr/bin/env bash
# Pack what a machine without network lacks into .gpu/packages.tar.xz: the versions of this environment, for Python 3.12 on Linux x86-64.
#   benchmarks/gpu/pack.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

names="transformers tokenizers huggingface_hub diffusers trl peft datasets evaluate dill multiprocess ftfy wcwidth"
pins=$("$python" -c 'import sys; from importlib.metadata import version; print(*(f"{n}=={version(n)}" for n in sys.argv[1:]))' $names)
"$python" -m pip install --quiet --no-deps --no-compile --target "$folder" --only-binary=:all: --python-version 3.12 \
  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 $pins
mkdir -p .gpu
tar -C "$folder" -cf - . | xz -3 > .gpu/packages.tar.xz
echo ".gpu/packages.tar.xz: $(du -h .gpu/packages.tar.xz | cut -f1). $pins"
