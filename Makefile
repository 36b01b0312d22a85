# make demo      install into .venv, then train the reward model and align the policy on the emoji world
# make demo-video  the same for video: a tiny Wan2.1 on the moving-emoji world, into report/moving_emoji
# make test      install into .venv, then run the test suite
# make test-distributed  install DeepSpeed, then train on two processes under every engine
# make lint      check style and formatting;  make format  repairs them
# make install   create .venv (only when it is missing or pyproject.toml changed)
#
# Variables: PYTHON (the interpreter that creates .venv), VENV, TORCH (any requirement pip understands: a version, a wheel
# file or an address; "torch" lets pip choose), PIP_FLAGS (for example an index of CPU-only wheels), PYTEST_FLAGS, JOBS (tests
# at once: a number, by default one per core and 8 at most), THREADS, SLRM_CONFIG and TAPO_CONFIG (the recipes of the demo).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
THREADS ?= 1
JOBS ?= logical
LAUNCH := $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml --num_cpu_threads_per_process $(THREADS)
SLRM_CONFIG ?= recipes/emoji/slrm.yaml
TAPO_CONFIG ?= recipes/emoji/tapo.yaml

.PHONY: install demo demo-video test test-distributed lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("tapo_trl needs Python 3.10 or newer; set PYTHON=...") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[demo,dev]"
	touch $(STAMP)

demo: install
	$(BIN)/python examples/emoji/make_pairs.py
	$(LAUNCH) examples/slrm_sd35.py --config $(SLRM_CONFIG)
	$(LAUNCH) examples/tapo_sd35.py --config $(TAPO_CONFIG)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/emoji/report.py

demo-video: install
	$(BIN)/python examples/moving_emoji/make_pairs.py
	$(LAUNCH) examples/slrm_wan21.py --config recipes/moving_emoji/slrm.yaml
	$(LAUNCH) examples/tapo_wan21.py --config recipes/moving_emoji/tapo.yaml
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/moving_emoji/report.py

test: install
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 $(PYTEST_FLAGS)

test-distributed: install
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[deepspeed]"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m distributed tests/distributed $(PYTEST_FLAGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) report outputs .pytest_cache .ruff_cache
