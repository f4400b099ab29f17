# Everything a fresh machine needs is made here: Python 3.11, pip, make and git are enough.
#
#   make demo       the whole pipeline on cartoons drawn on the spot, result shown
#   make test       everything that runs without a GPU
#   make help       all targets

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON ?= $(shell command -v python3.11 || command -v python3)
UV_VERSION := $(shell sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements.lock)
WORKSPACE ?= workspace

.DEFAULT_GOAL := help
# Benchmarks there are, in the order they run; each is benchmarks/NAME.py.
BENCHES := $(basename $(notdir $(wildcard $(addprefix benchmarks/,$(addsuffix .py, \
	shots toonworld_shots toonworld_similarity toonworld_stories curation manifests embedding \
	attention model train extension generate)))))

.PHONY: help setup demo reproduce test test-fast bench bench-gpu check format lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY) ## Create .venv with the exact versions of requirements.lock

# Bytecode is compiled here, once: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every
# process would compile what it imports anew (training: 33 s instead of 14).
# A virtual environment that failed half-way has no .ready file, so the next call goes on where it stopped.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Triptych needs Python 3.11 or 3.12, found {v[0]}.{v[1]} ($(PYTHON)). Install it, or say which: make PYTHON=/path/to/python3.11")'
	@echo "Set-up 1/3: virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "Set-up 2/3: packages from requirements.lock (7 GB, with CUDA builds of PyTorch; bytecode compiled)"
	@$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	@echo "Set-up 3/3: this project, editable"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY) ## Run the whole pipeline on cartoons drawn on the spot and show the result
	@$(BIN)/triptych demo --workspace $(WORKSPACE)

reproduce: $(READY) ## The paper's ablation tables with small models; goes on where it stopped (ARGS=--quick)
	@$(BIN)/triptych reproduce --workspace $(WORKSPACE) $(ARGS)

test: $(READY) ## Everything that runs without a GPU (real Ray, Prefect, DeepSpeed, browser)
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(READY) ## Tests that start no Ray, Prefect, DeepSpeed, browser or server (minutes)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

bench: $(addprefix bench-,$(BENCHES)) ## All benchmarks, then docs/benchmarks.md; bench-NAME: one (ARGS=...)

bench-shots: ARGS ?= $(MEDIA) assets/samples
bench-shots: ## Shot detectors beside PySceneDetect: the samples, and MEDIA=folder
bench-curation: ## One and two workers, memory of a long run, a killed run (under an hour)

bench-%: $(READY)
	@$(BIN)/python -m benchmarks.$* $(ARGS)
	@$(BIN)/python -m benchmarks.tables

bench-gpu: $(READY) ## The benchmarks that have a part for one GPU
	@$(BIN)/python -m benchmarks.attention --gpu
	@$(BIN)/python -m benchmarks.model --gpu
	@$(BIN)/python -m benchmarks.train --gpu
	@$(BIN)/python -m benchmarks.extension --gpu
	@$(BIN)/python -m benchmarks.generate --gpu
	@$(BIN)/python -m benchmarks.tables

check: $(READY) ## Format, lint, types, import rule
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright
	@$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(READY) ## Rewrite the code in the project's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: ## Compile requirements.lock anew from pyproject.toml
	@$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" --output-file requirements.lock

clean: ## Remove the virtual environment, build files and the demo's workspace
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis workspace
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
