# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# More workers than cores: many tests wait for processes that start and end.
JOBS ?= 4

.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"lit-llm needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing lit-llm and what it needs into $(VENV) (some minutes the first time)"
	@# One resolution with the range of torch: pip takes the wheel that fits this machine.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -e '.[dev]'
	@touch $@

install: $(READY) ## create .venv and install

quickstart: $(READY) ## run the first study and compare its arms
	@$(BIN)/lit-llm plan ablations/quickstart.yaml
	@echo
	@$(BIN)/lit-llm run ablations/quickstart.yaml

test: $(READY) ## the tests, under 15 minutes on two cores
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow and not gpu"

test-slow: $(READY) ## the tests that take minutes each
	@$(BIN)/python -m pytest -n 3 --dist loadgroup -m slow

# In a folder of its own, since other packages behave differently where they find triton.
GPU_KERNELS = $(VENV)/gpu-kernels
$(GPU_KERNELS)/fla: | $(READY)
	@echo "installing triton, liger-kernel and fla-core, a gigabyte, into $(GPU_KERNELS)"
	@rm -rf $(GPU_KERNELS) $(GPU_KERNELS).part
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off --no-deps --target $(GPU_KERNELS).part triton 'liger-kernel>=0.8.5' 'fla-core>=0.6' einops
	@mv $(GPU_KERNELS).part $(GPU_KERNELS)

test-gpu-kernels: $(GPU_KERNELS)/fla ## kernels of Liger and flash-linear-attention beside ours, on a CPU by Triton's interpreter
	@PYTHONPATH=$(GPU_KERNELS) TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/gpu_kernels

test-gpu: $(READY) ## the tests that need a GPU, then speed beside peers at sizes 150m and 1b
	@PYTHONPATH=. $(BIN)/python tests/gpu/run.py

same-bits: $(READY) ## small runs of everything, equal to those of the commit BASE? (BASE=HEAD)
	@$(BIN)/python tests/same_bits/run.py --against $(or $(BASE),HEAD)

check: $(READY) ## ruff, codespell, mypy, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/codespell
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## ruff's fixes and layout
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

benchmarks: $(READY) ## the benchmarks, most beside a peer
	@$(BIN)/lit-llm bench
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

$(VENV)/.docs: $(READY)
	@echo "installing the extra docs into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs ## the site, into site/
	@$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs ## the site at http://127.0.0.1:8000, built again at each change
	@$(BIN)/mkdocs serve

screenshots: $(READY) ## pictures of the quickstart's report and of MLflow's UI for the README, in Chromium
	@$(BIN)/python docs/screenshots.py

notebook: $(READY) ## docs/notebook.ipynb, executed
	@$(BIN)/python docs/make_notebook.py

.PHONY: help install quickstart test test-slow test-gpu-kernels test-gpu same-bits check format benchmarks docs docs-serve screenshots notebook
