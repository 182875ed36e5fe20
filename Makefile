# make demo      compress a trained network on real data and print the evidence
# make test      lint, types, import directions, and every test but the slow ones
# Each sets up .venv first; that is done once, and again when pyproject.toml changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH  := 2.13.0
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check

PARTS  := runtimes quantize pipeline networks whole rest pruning training

.PHONY: demo test $(addprefix tests-,$(PARTS)) test-all bench lint format setup clean
.DEFAULT_GOAL := test

demo: setup
	$(PY) examples/fashion_mnist/demo.py

# Several processes, three at a time, for each waits for others: what a runtime's native code does to one ends with it.
# The longest come first and the short ones last, so that all end together.
IN_whole    := tests/test_*.py
IN_pipeline := tests/pipeline tests/cli tests/goals tests/report
IN_quantize := tests/quantize tests/surgery
IN_runtimes := tests/runtimes tests/onnx_files tests/kernels
IN_networks := tests/network tests/sources tests/tasks tests/measure tests/conformance
IN_pruning  := tests/prune tests/analyze tests/architectures
IN_training := tests/train tests/distill tests/recipes tests/search
IN_rest     := src $(filter-out $(foreach part,$(filter-out rest,$(PARTS)),$(IN_$(part))) tests/__pycache__, \
	$(patsubst %/,%,$(wildcard tests/*/)))

test: setup
	$(MAKE) --keep-going --jobs 3 $(addprefix tests-,$(PARTS)) lint

$(addprefix tests-,$(PARTS)): setup
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(PY) -m pytest -m "not slow" -p no:cacheprovider $(IN_$(@:tests-%=%))

test-all: lint
	$(PY) -m pytest

bench: $(VENV)/.bench
	set -e; for file in benchmarks/*.py; do echo "== $$file"; $(PY) "$$file"; done

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

setup: $(VENV)/.package

$(VENV)/.created:
	"$(PYTHON)" -m venv $(VENV)
	touch $@

# Torch comes first and pinned: a plain range draws several GB of CUDA packages on a machine without a GPU.
$(VENV)/.torch-$(TORCH): $(VENV)/.created
	$(PIP) install torch==$(TORCH)
	touch $@

$(VENV)/.package: $(VENV)/.torch-$(TORCH) pyproject.toml
	$(PIP) install -e ".[all,edge,log,dev,examples,cluster]"
	touch $@

$(VENV)/.bench: $(VENV)/.package
	$(PIP) install -e ".[all,dev,examples,bench]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
