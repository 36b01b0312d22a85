# make demo      install into .venv, then train the reward model and align the policy on the emoji world
# make demo-video  the same for video: a tiny Wan2.1 on the moving-emoji world, into report/moving_emoji
# make test      install into .venv, then run the tests that take seconds
# make test-all  all tests: those, the slow ones (among them every command of the documentation), and make test-distributed
# make test-distributed  install DeepSpeed, then train on two processes under every engine
# make test-browser  install Playwright, then try the annotation page in Debian's Chromium (package chromium)
# make test-wheel  install the built wheel into a new environment, and train with it
# make docs      the documentation as a site, into site/; warnings are errors
# make lint      check style and formatting;  make format  repairs them
# make install   create .venv (only when it is missing or pyproject.toml changed)
#
# Variables: PYTHON (the interpreter that creates .venv), VENV, TORCH (any requirement pip understands: a version, a wheel
# file or an address; "torch" lets pip choose), PIP_FLAGS (for example an index of CPU-only wheels), PYTEST_FLAGS, JOBS (tests
# at once: a number, by default one per core and 8 at most), SLOW and DISTRIBUTED (which of these tests: `slow and not exhaustive`,
# `distributed and not exhaustive` leave out the same check of every further family and engine), THREADS (of each of the demo's
# processes), SLRM_CONFIG and TAPO_CONFIG (the recipes of the demo).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
PYTEST_FLAGS ?=
SLOW ?= slow
DISTRIBUTED ?= distributed

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
THREADS ?= 1
JOBS ?= logical
LAUNCH := $(BIN)/accelerate launch --config_file recipes/accelerate/multi_cpu.yaml --num_cpu_threads_per_process $(THREADS)
SLRM_CONFIG ?= recipes/emoji/slrm.yaml
TAPO_CONFIG ?= recipes/emoji/tapo_demo.yaml

# Progress of this package, and none of what the libraries below it say
demo demo-video: export HF_DATASETS_DISABLE_PROGRESS_BARS = 1
demo demo-video: export HF_HUB_DISABLE_PROGRESS_BARS = 1
demo demo-video: export TRANSFORMERS_VERBOSITY = error
demo demo-video: export DIFFUSERS_VERBOSITY = error
demo demo-video: export PYTHONWARNINGS = ignore

.PHONY: install demo demo-video test test-all test-distributed test-browser test-wheel docs lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("tapo_trl needs Python 3.10 or newer; set PYTHON=...") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[demo,dev]"
	touch $(STAMP)

# The recipes' batches are shared out among the two processes
demo: install
	@echo "1 of 4: preference pairs from pictures of emoji (seconds)"
	@$(BIN)/python examples/emoji/make_pairs.py
	@echo "2 of 4: a reward model learns the preferences (about a minute; metrics in runs/emoji/slrm.log)"
	@mkdir -p runs/emoji
	@$(LAUNCH) examples/slrm_sd35.py --config $(SLRM_CONFIG) --per_device_train_batch_size 16 > runs/emoji/slrm.log
	@echo "3 of 4: TAPO aligns the model with the reward model (about two minutes; metrics in runs/emoji/tapo.log)"
	@$(LAUNCH) examples/tapo_sd35.py --config $(TAPO_CONFIG) --per_device_train_batch_size 6 > runs/emoji/tapo.log
	@echo "4 of 4: pictures before and after, and what the judges say (about a minute)"
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/emoji/report.py

demo-video: install
	@echo "1 of 4: preference pairs of moving emoji (seconds)"
	@$(BIN)/python examples/moving_emoji/make_pairs.py
	@echo "2 of 4: a reward model learns the preferences (about two minutes; metrics in runs/moving_emoji/slrm.log)"
	@mkdir -p runs/moving_emoji
	@$(LAUNCH) examples/slrm_wan21.py --config recipes/moving_emoji/slrm.yaml --per_device_train_batch_size 16 > runs/moving_emoji/slrm.log
	@echo "3 of 4: TAPO aligns the model with the reward model (about two minutes; metrics in runs/moving_emoji/tapo.log)"
	@$(LAUNCH) examples/tapo_wan21.py --config recipes/moving_emoji/tapo.yaml --per_device_train_batch_size 6 > runs/moving_emoji/tapo.log
	@echo "4 of 4: clips before and after, and what the judges say (about two minutes)"
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/moving_emoji/report.py

test: install
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 $(PYTEST_FLAGS)

test-all: test
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -m "$(SLOW)" -n $(JOBS) --maxprocesses 8 $(PYTEST_FLAGS)
	$(MAKE) test-distributed

test-distributed: install
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[deepspeed]"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m "$(DISTRIBUTED)" tests/distributed $(PYTEST_FLAGS)

# Without `playwright install`, whose Chromium plays no H.264
test-browser: install
	@command -v chromium > /dev/null || { echo "make test-browser needs Chromium: apt-get install chromium" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[demo,dev,annotate,browser]"
	$(BIN)/python -m pytest -m browser tests/human $(PYTEST_FLAGS)

# The wheel alone: no extras, not beside the checkout
test-wheel: install
	rm -rf $(VENV)-wheel && $(BIN)/python -m venv $(VENV)-wheel
	$(BIN)/python -m pip wheel --quiet $(PIP_FLAGS) --no-deps --wheel-dir $(VENV)-wheel/dist .
	$(VENV)-wheel/bin/python -m pip install --quiet $(PIP_FLAGS) "$(TORCH)" $(VENV)-wheel/dist/*.whl
	cd $(VENV)-wheel && bin/python -I $(abspath tests/check_wheel.py)

docs: install
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[docs]"
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs . site

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) report site outputs .pytest_cache .ruff_cache
