# One environment, .venv, built once for every target.
#   PYTHON=  the interpreter to make it with        (default python3)
#   TORCH=   the torch requirement to install in it (default torch==2.13.0)
PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# The kernel's own test is compiled by the test that runs it.
NATIVE := $(shell find csrc -path csrc/tests -prune -o \( -name '*.cpp' -o -name '*.h' \) -print)

.PHONY: help demo test bench lint clean FORCE
.DEFAULT_GOAL := help

help:
	@echo "make demo    train DIN on real data with and without din_fast: table and figure in results/demo"
	@echo "make test    lint, types and all tests"
	@echo "make bench   a short benchmark"
	@echo "make lint    ruff and mypy only"
	@echo "make clean   remove the environment and everything built"
	@echo "PYTHON=python3.12 and TORCH='torch>=2.11' choose another interpreter or torch"

demo: .venv/ready
	$(BIN)/python -m examples.demo

test: lint
	$(BIN)/python -m pytest -q -n 2

bench: .venv/ready
	$(BIN)/python -m bench --quick

lint: .venv/ready
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info din_fast/*.so din_fast/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Another PYTHON or TORCH than last time starts a new environment.
.venv/choice: FORCE
	@if [ "$$(cat $@ 2>/dev/null)" != "$(PYTHON) $(TORCH)" ]; then \
		echo "making .venv with $(PYTHON) and $(TORCH)"; \
		if [ -e $@ ]; then rm -rf .venv; fi; \
		$(PYTHON) -m venv .venv && echo "$(PYTHON) $(TORCH)" > $@; \
	fi

.venv/ready: .venv/choice pyproject.toml tests/frameworks.txt setup.py $(NATIVE)
	$(PIP) "$(TORCH)" "setuptools>=77" "pybind11>=2.12"
	DIN_FAST_BUILD=cpu $(PIP) --no-build-isolation --editable ".[test,bench,demo]"
	$(PIP) --no-deps -r tests/frameworks.txt
	@touch $@
