# Two commands: `make quickstart` trains the demonstration, `make test` proves the project.
# Both install what they need into .venv once; where pip looks is pip's own setting.

VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
EXTRAS := quickstart,eval,track,export,cuda13,dev
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$p" -c '$(NEW_ENOUGH)' 2>/dev/null && echo "$$p" && break; done)

# The launcher's ranks and DeepSpeed's compiler look for python and ninja on the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# On a machine without an NVIDIA device the launcher would look for the GPUs that this names.
ifeq ($(wildcard /dev/nvidia[0-9]* /dev/dxg),)
unexport CUDA_VISIBLE_DEVICES
endif

# Two files of tests at a time, each process on one core: threads that spin would starve the ranks.
# In the order of conftest.py: xdist's own begins with the files that have most tests.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-oldest sample-oldest test-long test-slow test-alone test-faults soak test-gpu test-all \
	first-hour bench-data bench-eval results docs lint types clean

help:
	@echo "make quickstart   install, fetch the demonstration, train it (minutes on two CPU cores)"
	@echo "make test         install and run the tests; test-long the long ones, test-all every one"
	@echo "make test-oldest  part of the tests on the oldest versions, in .venv-oldest"
	@echo "make test-faults  kill, stall and starve real runs; a table says what came of each"
	@echo "make soak         a run killed fifty times at random moments (20 minutes)"
	@echo "make first-hour   on a machine with a GPU: ten minutes, then a table of what works how fast"
	@echo "make bench-eval   times of kNN, probes and feature extraction beside targets"
	@echo "make bench-data   images per second of the data path beside torchvision's own loader"
	@echo "make results      the runs of docs/results.md again, in runs/results (hours)"
	@echo "make docs         the documentation as a site, in build/site"
	@echo "make lint types   ruff; mypy"
	@echo "make clean        remove .venv, .venv-oldest and caches; runs/ stays"

$(BIN)/python:
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	echo "unic_ds needs Python 3.11 or newer; found: $(or $(PYTHON),none). Install one, or name" \
	"it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed: setup.py pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) -e '.[quickstart,eval,cuda13]' -c $(CONSTRAINTS)
	@touch $@

$(VENV)/.demo: demo-packages.txt $(VENV)/.installed
	$(PIP) --no-deps -r demo-packages.txt
	@touch $@

$(VENV)/.dev: eval-packages.txt $(VENV)/.installed
	$(PIP) -e '.[$(EXTRAS)]' -c $(CONSTRAINTS)
	$(PIP) --no-deps -r eval-packages.txt
	@touch $@

quickstart: $(VENV)/.demo
	$(BIN)/unic-ds quickstart
	$(BIN)/deepspeed unic_ds/train.py --ds_config ds_configs/zero2.json

test: $(VENV)/.demo $(VENV)/.dev
	$(PYTEST) -m "not slow and not soak and not gpu"

test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=quickstart,eval,cuda13,dev \
	sample-oldest

# Kernels in the interpreter, initial weights, every ZeRO stage on two ranks, the main command,
# products by an op of torch that is not documented.
sample-oldest: $(VENV)/.demo $(VENV)/.dev
	$(PYTEST) -m "not slow and not soak and not gpu" tests/kernels/test_ladder_triton.py \
	tests/kernels/test_losses_triton.py tests/process/test_requirements.py \
	tests/training/test_train.py tests/models/test_student.py tests/evaluate/test_products.py \
	-k "triton or requirements or products or main_command or zero_stage or initial_weights"

# LEFT_OUT names a marker of tests that do not run, UNTIL a time (seconds since 1970) after which
# no test starts: `.ci/run` must end.
SLOW = slow and not soak and not gpu$(if $(LEFT_OUT), and not $(LEFT_OUT))
IN_TIME = $(if $(UNTIL),--start-until $(UNTIL))

test-long: test-slow test-alone

test-slow: $(VENV)/.demo $(VENV)/.dev
	$(PYTEST) $(IN_TIME) -m "$(SLOW) and not alone"

test-alone: $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python -m pytest $(IN_TIME) -m "$(SLOW) and alone"

test-faults: $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python -m pytest -m "fault and not soak"

soak: $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python -m pytest -s tests/training/test_soak.py

test-gpu: $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

test-all: $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python -m pytest

first-hour: $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python tests/first_hour/first_hour.py

bench-data: $(VENV)/.installed
	$(BIN)/python -m unic_ds.data.bench

bench-eval: $(VENV)/.dev
	$(BIN)/python -m unic_ds.evaluate.bench

results: $(VENV)/.demo $(VENV)/.dev
	tests/results/results.sh

docs: $(VENV)/.dev
	$(BIN)/python -m unic_ds.cli.reference_pages docs/reference
	$(BIN)/zensical build --strict --clean

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if command -v shellcheck; then shellcheck -x slurm/*.sh tests/slurm/*.sh .ci/run; fi

types: $(VENV)/.dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-oldest .cache build unic_ds.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
