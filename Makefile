# Everything a developer types. `make` alone lists the targets.
#
#   PYTHON  interpreter that makes the virtual environment (3.10 or newer)
#   VENV    where it lives
#   TORCH   what pip installs for the tests against transformers; on a machine whose index serves CUDA builds by
#           default, name a CPU build: make test TORCH='torch==2.13.0+cpu'
#   JOBS    pytest processes

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
RECIPE := qwen2.5-coder-0.5b-instruct

BIN := $(VENV)/bin
CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev
OPTIMUM_VENV := .venv-optimum
OPTIMUM := $(OPTIMUM_VENV)/.installed
KERNELS_VENV := .venv-kernels
KERNELS := $(KERNELS_VENV)/.installed
# triton-ascend 3.2.0 has builds for 3.10 and 3.11, on Linux, x86-64 and arm64
KERNELS_PYTHON ?= $(shell for p in python3.11 python3.10; do \
	$$p -c 'import venv' 2>/dev/null && { echo $$p; break; }; done)
PIP := -m pip install --quiet --disable-pip-version-check
CODE := qcompile tests examples benchmarks models kernels
export PIP_NO_INPUT := 1

.PHONY: help venv kernels-env mlir-tools kernels-prepared check test test-real test-ascend demo bench fmt clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or newer found; install one or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Without torch: this is all that a user of the compiler needs.
$(CORE): pyproject.toml | $(BIN)/python
	$(BIN)/python $(PIP) -e .
	@touch $@

# torch first and by exact version, so that no later requirement can pull a build with gigabytes of CUDA.
$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP) $(TORCH)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev,torch,eval,train,serve]'
	@touch $(CORE) $@

# Optimum pins an older transformers than the tests use, so its exporter has an environment of its own.
$(OPTIMUM):
	@test -x $(OPTIMUM_VENV)/bin/python || $(PYTHON) -m venv $(OPTIMUM_VENV)
	$(OPTIMUM_VENV)/bin/python $(PIP) $(TORCH)
	$(OPTIMUM_VENV)/bin/python $(PIP) 'optimum-onnx[onnxruntime]'
	@touch $@

# An environment of other packages is made anew: pip leaves triton-ascend broken when it replaces a triton.
$(KERNELS): kernels/environment.txt
	@test -n "$(KERNELS_PYTHON)" || { echo "no Python 3.10 or 3.11 found, which triton-ascend needs; run make $@ KERNELS_PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(KERNELS_PYTHON) -m venv --clear $(KERNELS_VENV)
	$(KERNELS_VENV)/bin/python $(PIP) -r kernels/environment.txt
	@touch $@

kernels-env: $(KERNELS)  ## make .venv-kernels with the compiler for Ascend kernels (no CANN, no NPU)

mlir-tools:  ## install Debian's mlir-19-tools and llvm-19, which run lowered kernels on this CPU (as root)
	@if command -v mlir-opt-19 >/dev/null && command -v llc-19 >/dev/null; then exit 0; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mlir-19-tools llvm-19 >/dev/null; \
	else echo "mlir-opt-19 and llc-19 are missing; as root: apt-get install mlir-19-tools llvm-19" >&2; exit 1; fi

# What cannot be had is said here, and again by pytest as the reason of each skipped test.
kernels-prepared:
	@$(MAKE) --no-print-directory kernels-env || echo "WARNING: no kernels environment: tests that compile kernels are skipped" >&2
	@$(MAKE) --no-print-directory mlir-tools || echo "WARNING: no MLIR tools: tests that run lowered kernels are skipped" >&2

venv: $(DEV)  ## make .venv with everything the tests need

demo: $(CORE)  ## export, optimize, verify and generate on a small model (no torch)
	$(BIN)/python -m examples.demo

check: $(DEV)  ## ruff, ruff format --check, mypy
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

test: check kernels-prepared  ## all checks, then every test that needs no device and no downloaded model
	$(BIN)/python -m pytest -n $(JOBS) -rs -m "not real and not ascend"

test-real: $(DEV) $(OPTIMUM)  ## fetch the real 0.5B model and run the whole path on it
	$(BIN)/qcompile fetch $(RECIPE)
	QCOMPILE_OPTIMUM_PYTHON=$(CURDIR)/$(OPTIMUM_VENV)/bin/python $(BIN)/python -m pytest -m real -rA --durations=0 tests/real

test-ascend: $(DEV)  ## tests that need an Ascend NPU with CANN
	$(BIN)/python -m pytest -m ascend

bench: $(DEV)  ## the measurements of benchmarks/ that need no second engine: tables and JSON in out/bench (an hour)
	@mkdir -p out/bench
	$(BIN)/qcompile fetch $(RECIPE) > out/bench/source
	$(BIN)/qcompile export "$$(tail -n 1 out/bench/source)" -o out/bench/fp32
	$(BIN)/qcompile optimize out/bench/fp32 --passes fuse -o out/bench/fused
	$(BIN)/qcompile optimize out/bench/fp32 --passes fuse,int8 -o out/bench/int8
	$(BIN)/qcompile export models/reasoner/weights -o out/bench/reasoner-fp32
	$(BIN)/qcompile optimize out/bench/reasoner-fp32 --passes fuse -o out/bench/reasoner
	$(BIN)/python benchmarks/time_and_memory.py real "$$(tail -n 1 out/bench/source)" --passes fuse fuse,int8 | tee out/bench/time_and_memory.txt
	$(BIN)/python benchmarks/decode_vs_transformers.py out/bench/fused "$$(tail -n 1 out/bench/source)" | tee out/bench/decode_vs_transformers.txt
	$(BIN)/qcompile bench out/bench/int8 --html out/bench/bench-int8.html | tee out/bench/bench-int8.txt
	$(BIN)/python benchmarks/reference_text.py out/bench/reference.jsonl
	$(BIN)/qcompile quality out/bench/fp32 out/bench/int8 --data out/bench/reference.jsonl --tokens 20000 | tee out/bench/quality-int8.txt
	$(BIN)/python benchmarks/ort_quantized_kernels.py | tee out/bench/ort_quantized_kernels.txt
	$(BIN)/python benchmarks/eval_batched.py out/bench/reasoner models/reasoner/test.jsonl --checkpoint models/reasoner/weights | tee out/bench/eval_batched.txt
	$(BIN)/python benchmarks/serve_load.py out/bench/reasoner | tee out/bench/serve_load.txt
	$(BIN)/python benchmarks/fuzz_om.py | tee out/bench/fuzz_om.txt

fmt: $(DEV)  ## format and repair what ruff can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:  ## remove environments and generated files
	rm -rf $(VENV) $(OPTIMUM_VENV) $(KERNELS_VENV) out build qcompile.egg-info .mypy_cache .ruff_cache .pytest_cache
