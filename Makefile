# Every target does its own set-up: a virtual environment with the pinned packages of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow check examples clean

# The main job on the embedded data: AdamW against Muon on a small GPT. Run again, it shows the finished result.
demo: $(VENV)/lab.done
	$(BIN)/schatten compare --out runs/demo --resume

# The whole suite. One thread per worker: two workers with two threads each are slower on two cores. Tests that start ranks
# are one worker's, so that they start them once.
test: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# What is worth running but too long for every commit.
test-slow: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

# Lint, types and the direction of imports.
check: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# One script for each framework people train with; those whose text says torchrun on two processes.
examples: $(VENV)/dev.done
	set -e; for script in examples/*.py; do \
	  if grep -q 'torchrun --nproc' $$script; then run='torchrun --standalone --nproc-per-node 2'; else run=python; fi; \
	  echo "== $$run $$script"; OMP_NUM_THREADS=1 $(BIN)/$$run $$script; \
	done

$(VENV)/lab.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[lab]'
	touch $@

$(VENV)/dev.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache
