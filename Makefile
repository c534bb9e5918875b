# One environment, .venv, built once for every target.
#   PYTHON=  the interpreter to make it with        (default python3)
#   TORCH=   the torch requirement to install in it (default torch==2.13.0)
#   TRITON=  the triton requirement, which a CUDA build of torch pins by itself (default triton==3.9.0)
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# The kernel's own test is compiled by the test that runs it.
NATIVE := $(shell find csrc -path csrc/tests -prune -o \( -name '*.cpp' -o -name '*.h' \) -print)

.PHONY: help demo test test-native test-interpreter test-oldest-triton bench auc gpu-report gpu-check lint clean FORCE
.DEFAULT_GOAL := help

help:
	@echo "make demo    train DIN on real data with and without din_fast: table and figure in results/demo"
	@echo "make test    lint, types and all tests: test-native, then test-interpreter (the Triton kernels on the CPU)"
	@echo "make bench   speed and memory, 20 to 40 minutes; make bench BENCH=--quick a few minutes"
	@echo "make gpu-report   compile every Triton kernel for GPUs that are not here, and judge them: docs/gpu-report.md"
	@echo "make gpu-check    on a machine with a GPU: parity, memory, speed, into results/gpu"
	@echo "make auc     does attention help? DIN and two baselines on ml-100k: the README's table"
	@echo "make lint    ruff and mypy only"
	@echo "make clean   remove the environment and everything built"
	@echo "PYTHON=python3.12, TORCH='torch>=2.11' and TRITON='triton==3.8.0' choose another interpreter, torch or triton"

demo: .venv/ready
	$(BIN)/python -m examples.demo

test: lint test-native test-interpreter

test-native: .venv/ready
	$(BIN)/python -m pytest -q -n 2

# Triton's interpreter has to be asked for before triton is imported: a process of its own.
test-interpreter: .venv/ready
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/interpreter

# The same on the oldest Triton that the kernels are for, and compiling them with it.
test-oldest-triton: .venv/triton-3.7.1/ready
	PYTHONPATH=.venv/triton-3.7.1 $(BIN)/python -m pytest -q -n 2 tests/test_ahead_of_time.py
	PYTHONPATH=.venv/triton-3.7.1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/interpreter

# BENCH=--quick for a few minutes, BENCH=--sweep for how times and memory grow.
bench: .venv/ready
	$(BIN)/python -m bench $(BENCH)

# All sizes in use with the triton that is judged; the main ones with older versions, which are not.
gpu-report: .venv/ready
	$(BIN)/python -m bench.gpu_report
	$(MAKE) gpu-report-3.8.0 gpu-report-3.7.1

gpu-report-%: .venv/triton-%/ready
	PYTHONPATH=.venv/triton-$* $(BIN)/python -m bench.gpu_report --quick --out docs/gpu-report-triton-$*.md

gpu-check: .venv/ready
	$(BIN)/python -m bench.gpu_check

auc: .venv/ready
	$(BIN)/python -m examples.auc
	$(BIN)/python -m examples.auc --readme

lint: .venv/ready
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info din_fast/*.so din_fast/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Another PYTHON, TORCH or TRITON than last time starts a new environment.
.venv/choice: FORCE
	@if [ "$$(cat $@ 2>/dev/null)" != "$(PYTHON) $(TORCH) $(TRITON)" ]; then \
		echo "making .venv with $(PYTHON), $(TORCH) and $(TRITON)"; \
		if [ -e $@ ]; then rm -rf .venv; fi; \
		$(PYTHON) -m venv .venv && echo "$(PYTHON) $(TORCH) $(TRITON)" > $@; \
	fi

.venv/ready: .venv/choice pyproject.toml tests/frameworks.txt setup.py $(NATIVE)
	$(PIP) "$(TORCH)" "$(TRITON)" "setuptools>=77" "pybind11>=2.12"
	DIN_FAST_BUILD=cpu $(PIP) --no-build-isolation --editable ".[test,bench,demo]"
	$(PIP) --no-deps -r tests/frameworks.txt
	@touch $@

# Another triton beside the one of .venv, for PYTHONPATH.
.PRECIOUS: .venv/triton-%/ready
.venv/triton-%/ready: .venv/ready
	$(PIP) --no-deps --upgrade --target .venv/triton-$* triton==$*
	@touch $@
