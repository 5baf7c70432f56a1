# make help: what each target does. Everything runs in .venv, installed from constraints.txt; nothing else downloads.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PINS   ?= constraints.txt
PIP     = $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c $(PINS) -e
MODEL  ?= toys/wan
WORKERS ?= 2
TRITON ?= 3.9

help:               ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

install: $(VENV)/core               ## the library and its command in .venv
demo: $(VENV)/core                  ## generate with and without a recipe, side by side, in ./demo
	$(BIN)/dit-accel demo
test: $(VENV)/test                  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -q
lint: $(VENV)/dev                   ## format check, ruff, pyright
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright -p . --pythonpath $(BIN)/python
check: lint recipes test            ## what CI runs
fix: $(VENV)/dev                    ## format and repair what ruff can
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .
kernels-check: .pins-triton-$(TRITON).txt  ## without a GPU: kernels compiled for four, against budgets, and interpreted; TRITON=3.6 or 3.9
	$(MAKE) compiled-and-interpreted VENV=.venv-triton-$(TRITON) PINS=$<
compiled-and-interpreted: $(VENV)/kernels-test
	PYTHONPATH=kernels $(BIN)/python scripts/compile_cuda.py
	PYTHONPATH=kernels OMP_NUM_THREADS=1 $(BIN)/python scripts/compile_kernels.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -q tests/kernels/test_block_attention_triton.py tests/kernels/test_history_mix_triton.py tests/kernels/test_ahead.py
recipes: $(VENV)/core               ## validate every recipe file
	$(BIN)/dit-accel recipes check
bench: $(VENV)/test                 ## dense, fewer steps, every peer that is valid and our recipes on MODEL, in turn
	$(BIN)/dit-accel bench -m $(MODEL) --num-prompts 4 --json bench.json --plot bench.png
results: $(VENV)/test               ## the README's tables and the pictures, from the lines in docs/results
	$(BIN)/python scripts/results_table.py
wheel-test: $(VENV)/core            ## the wheel, alone in an empty environment and folder, runs the demo
	PYTHON="$(PYTHON)" bash scripts/wheel_test.sh
test-oldest: .pins-oldest.txt       ## all tests on the oldest supported diffusers, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest PINS=$<
clean:                              ## remove environments, caches and results of make
	rm -rf .venv .venv-* build dist demo bench.json bench.png .pins-* .pytest_cache .ruff_cache *.egg-info

.pins-%.txt: constraints-%.txt constraints.txt
	awk -F== '!seen[tolower($$1)]++' $^ > $@
$(VENV)/core: pyproject.toml $(PINS)
	$(PYTHON) -m venv $(VENV) && $(PIP) . && touch $@
$(VENV)/test: $(VENV)/core
	$(PIP) '.[test]' && touch $@
$(VENV)/kernels-test: $(VENV)/test
	$(PIP) '.[kernels-test]' && touch $@
$(VENV)/dev: $(VENV)/core
	$(PIP) '.[dev]' && touch $@

.PHONY: help install demo test lint check fix recipes bench results wheel-test test-oldest kernels-check compiled-and-interpreted clean
