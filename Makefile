# SPDX-License-Identifier: Apache-2.0
# make test     everything that checks a change: ruff, mypy, pytest (ARGS="-k name")
# make check    the same
# make quick    the same without the engine and the server: about a minute
# make demo     a real server on this machine's CPU, splitting steps
# make test-vllm VLLM=0.33.0
#               what touches vLLM, on another release: its Python, over the CPU kernels of
#               the release that is tested otherwise
# make lint     ruff and mypy alone
# make format   let ruff rewrite what it can
# make clean    remove what these commands made
#
# Each builds .venv first, or reuses it. PYTHON names the Python to build it with.

PYTHON ?= python3
PORT   ?= 8765
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  := $(VENV)/share/smollm2-135m-instruct
PLAIN  := .venv-plain

VLLM   ?= 0.33.0
OTHER  := .venv-$(VLLM)

.PHONY: test check quick test-vllm demo lint format clean

test: lint $(MODEL) $(PLAIN)/.ready
	$(BIN)/pytest $(ARGS)

check: test

quick: lint
	$(BIN)/pytest --ignore=tests/engine --ignore=tests/http \
	  --ignore=tests/plain_cpu $(ARGS)

test-vllm: $(OTHER)/.swapped $(MODEL)
	$(OTHER)/bin/python -m pytest --ignore=tests/roofline --ignore=tests/calibration \
	  --ignore=tests/lanes --ignore=tests/plain_cpu $(ARGS)

demo: $(READY) $(MODEL)
	@$(BIN)/python examples/demo.py --port $(PORT)

lint: $(READY)
	$(BIN)/ruff format --check --diff
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info tests/triton_interpreter/build \
	  tests/triton_interpreter/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The three that are uninstalled come with vLLM, as CUDA builds that do not load
# beside torch's CPU build ("operator torchvision::nms does not exist"). vLLM
# runs without them.
$(READY): setup.py requirements.txt tests/triton_interpreter/setup.py
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else \
	  "vllm-duet needs Python 3.11, 3.12 or 3.13: try make PYTHON=python3.12")'
	@echo "Building $(VENV); the first time takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	@touch $@

# vLLM's CPU build as users have it, without the tests' Triton shim.
$(PLAIN)/.ready: $(READY)
	rm -rf $(PLAIN) && cp --archive --link $(VENV) $(PLAIN)
	$(PLAIN)/bin/python -m pip uninstall --yes --quiet vllm-duet-triton-interpreter
	@touch $@

$(OTHER)/.swapped: tests/other_vllm.py | $(READY)
	@echo "Building $(OTHER): a copy of $(VENV) with another vLLM."
	rm -rf $(OTHER) && cp --archive --link $(VENV) $(OTHER)
	$(BIN)/python tests/other_vllm.py $(VLLM) $(OTHER)
	@touch $@

$(MODEL): | $(READY)
	@$(BIN)/python examples/smollm2.py
