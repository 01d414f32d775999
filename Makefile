# make demo       prune the bundled digits network, from nothing to the encrypted file
# make test       lint, format, types, imports between rooms, tests with coverage
# make test-all   the same with all that is slow, or needs PostgreSQL, an S3 server or the data sets
# make bench      the benchmarks (benchmarks/README.md)
# Each of them calls `setup`, which makes .venv once and again only when pyproject.toml changes.

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup demo lint test test-all bench

PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed
KEY    := runs/demo-key.txt

help:
	@sed -n 's/^# make /  make /p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11" >&2; \
	    echo "hint: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || { echo "setup: making .venv"; $(PYTHON) -m venv .venv; }
	@echo "setup: installing autoprune and its tools into .venv (PyTorch is 5 GB: minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# A run is never overwritten, so an earlier demo is moved to runs/digits.previous (replacing the one before).
demo: $(STAMP) $(KEY)
	@if test -e runs/digits; then rm -rf runs/digits.previous; mv runs/digits runs/digits.previous; \
	  echo "demo: the earlier run is now runs/digits.previous"; fi
	$(BIN)/autoprune run digits --recipient "$$(sed -n 's/^# public key: //p' $(KEY))"
	$(BIN)/autoprune decrypt runs/digits/model.autoprune.age --identity $(KEY) --out runs/digits/model.autoprune
	@ls -d runs/digits/report.html runs/digits/plots runs/digits/model.autoprune runs/digits/model.autoprune.age

$(KEY): | $(STAMP)
	@mkdir -p runs
	$(BIN)/autoprune keygen $@

# Tests run on all cores, in a random order (`-p no:randomly` keeps the order of the files).
PYTEST := $(BIN)/pytest -n auto --dist worksteal --cov --cov-report=term:skip-covered

# Benchmarks and scripts are checked for names and arguments that do not exist, so that a rename reaches them;
# not strictly, because peers and model zoos have no types.
SCRIPT_TYPES := MYPYPATH=benchmarks:studies $(BIN)/mypy --explicit-package-bases --ignore-missing-imports \
  --no-warn-unused-ignores $(addprefix --disable-error-code=,arg-type assignment index list-item \
  no-any-return no-untyped-call operator return-value union-attr)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(SCRIPT_TYPES) benchmarks/*.py scripts/*.py
	$(BIN)/lint-imports

test: lint
	$(PYTEST)

# What this machine cannot run is skipped, and listed with its reason at the end. The data sets are those in
# AUTOPRUNE_DATA or, where that is not set, those that lie beside the checkout in ../shared/data.
test-all: lint
	AUTOPRUNE_DATA="$$(scripts/data_folder.sh)" $(PYTEST) -m "" -rs

# Hours; benchmarks/README.md says what each measures and how to run a part of it.
bench: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python benchmarks/bench_crypto.py
	$(BIN)/python benchmarks/bench_coverage.py torchvision
