# Every target sets up what it needs: a virtual environment with the tested versions of everything.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# the first of these that runs and is new enough makes the environment; PYTHON=... puts another one first
PYTHON ?=
CANDIDATES := $(PYTHON) python3.11 python3.12 python3.13 python3.14 python3 python

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint bench peers clean

help:  ## show these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: $(STAMP)  ## make $(VENV) and install yunmin with its development tools

quickstart: $(STAMP)  ## train, export, serve and measure a small Mamba on real text, in minutes
	@PATH="$(abspath $(BIN)):$$PATH" python -m benchmarks.quickstart

# a file's tests run in one process, in order; the longest file is not among the last
test: $(STAMP)  ## run all tests, the slow ones included, in two processes
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)  ## check format, style, types and the direction of imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# ARTIFACT=... measures that folder alone, or against AGAINST=...
bench: $(STAMP)  ## measure latency: the quickstart's models, or ARTIFACT=... [AGAINST=...]
ifdef ARTIFACT
	@$(BIN)/yunmin bench latency $(ARTIFACT) $(if $(AGAINST),--against $(AGAINST))
else
	@test -d quickstart_outputs/compact || $(MAKE) --no-print-directory quickstart
	@$(BIN)/yunmin bench latency quickstart_outputs/compact --against quickstart_outputs/dense
endif

# openvino's exporter wants an older transformers than ours; llama.cpp is compiled for this processor
peers: $(STAMP)  ## make .venv-peers/ with the engines and servers that benchmarks measure ours against
	@test -d .venv-peers/common || $(BIN)/python -m venv .venv-peers/common
	@echo "installing transformers, mambapy, onnxruntime and llama.cpp, which takes minutes to compile"
	@.venv-peers/common/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	@test -x .venv-peers/llama-server/bin/llama-server || { \
	  echo "building llama.cpp's own server from the same sources, which takes minutes, too" && \
	  .venv-peers/common/bin/python -m pip install --quiet --disable-pip-version-check 'cmake>=3.21' && \
	  .venv-peers/common/bin/python -m benchmarks.llama_server .venv-peers/llama-server/bin/llama-server; }
	@test -d .venv-peers/openvino || $(BIN)/python -m venv .venv-peers/openvino
	@echo "installing openvino"
	@.venv-peers/openvino/bin/python -m pip install --quiet --disable-pip-version-check \
	  'optimum-intel[openvino]>=2.2' 'transformers<=5.3.0'

clean:  ## remove what is built here (not training_outputs/)
	rm -rf .venv .venv-peers .ci-venv build dist *.egg-info quickstart_outputs benchmark_outputs
	rm -rf .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  found=; \
	  for python in $(CANDIDATES); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make: no Python >= 3.11 found; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
	  fi; \
	  echo "making $(VENV) with $$($$found --version)"; \
	  $$found -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "make: $$found cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 1; }; \
	fi
	@echo "installing yunmin and the tested versions of what it needs into $(VENV)"
	@# what is imported is compiled then; half of pip's time goes into the rest
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@
