# De-focus MLLM. `make help` lists the commands; each one makes or reuses .venv.

PYTHON ?= python3
TORCH := 2.13.0
OUTPUT ?= outputs/quickstart
RECIPE ?= training/recipes/easy_vqa.yaml
# Passed on as they are: make quickstart QUICKSTART_ARGS="--seed 1", make test PYTEST_ARGS="-k causal".
QUICKSTART_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Nothing is downloaded once .venv exists (a change of pyproject.toml or constraints.txt installs again).
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test upstream-tests harness-tests lint clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(INSTALLED)  ## train on easy-VQA from nothing, score the official test split, write outputs/quickstart/
	$(BIN)/python -m training.pipeline --config $(RECIPE) --output_dir $(OUTPUT) $(QUICKSTART_ARGS)

test: $(INSTALLED)  ## run the whole test suite (CPU, offline)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

upstream-tests: $(INSTALLED)  ## run the common tests of Transformers on our classes (downloads its source once, 11 MB)
	$(BIN)/python tests/upstream/run.py

harness-tests: $(INSTALLED)  ## run lmms-eval on a tiny model, against eval.run (installs it once, 120 MB in a cache)
	$(BIN)/python tests/eval/harnesses/run.py

lint: $(INSTALLED)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove .venv and caches; data/ and outputs/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './outputs/*' -prune -exec rm -rf {} +

# torch goes in first: with it in place no dependency can pull in the CUDA build. A machine that is set up for CPU builds
# offers $(TORCH)+cpu itself; elsewhere it comes from PyTorch's CPU index (on a Mac that is the ordinary build).
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is missing or older than 3.11; name another one: make PYTHON=python3.11" >&2; exit 1; }
	@echo "Making $(VENV): torch $(TORCH) for CPU, then this project and its dependencies (about 2 minutes)"
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq 'torch==$(TORCH)+cpu' 2>/dev/null || \
		$(BIN)/python -m pip install -qq --index-url https://download.pytorch.org/whl/cpu 'torch==$(TORCH)'
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[quickstart,dev]'
	@$(BIN)/python -c 'import importlib.util, sys, torch; \
		torch.version.cuda and sys.exit("error: a CUDA build of torch was installed; run make clean and try again"); \
		importlib.util.find_spec("torchvision") and sys.exit("error: torchvision was installed, which breaks Transformers beside a CPU torch; run make clean and try again")'
	@touch $@
	@echo "Ready: $$($(BIN)/python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)')"
