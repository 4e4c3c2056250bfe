# SPDX-License-Identifier: Apache-2.0
# make test     everything that checks a change: ruff, mypy, pytest (ARGS="-k name")
# make check    the same
# make quick    the same without the engine and the server: about a minute
# make demo     real servers on this machine's CPU: tokens of split steps, and what a bound does
# make test-vllm VLLM=0.33.0
#               what touches vLLM, on another release: its Python, over the CPU kernels of
#               the release that is tested otherwise
# make test-gpu vLLM's CUDA build on a GPU that is not there (tests/fake_gpu); VLLM=0.33.0 for
#               another release
# make bench-cadence
#               what the host costs between decode steps, on that GPU
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

# VLLM names the release for test-vllm and test-gpu; each has its own without it.
OTHER_VLLM := $(or $(VLLM),0.33.0)
OTHER      := .venv-$(OTHER_VLLM)
CUDA_VLLM  := $(or $(VLLM),0.32.0)
CUDA       := .venv-cuda$(patsubst %,-%,$(filter-out 0.32.0,$(CUDA_VLLM)))
FAKE_GPU   := $(CUDA)/fake_gpu
ON_FAKE_GPU := $(CUDA)/bin/python tests/fake_gpu $(FAKE_GPU)

# By two processes, whatever the machine has: engines and servers need some GB each. Files run in
# their order, since the long ones are first.
IN_PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: test check quick test-vllm test-gpu bench-cadence demo lint format clean

test: lint $(MODEL) $(PLAIN)/.ready
	$(BIN)/pytest $(IN_PARALLEL) $(ARGS)

check: test

quick: lint
	$(BIN)/pytest $(IN_PARALLEL) --ignore=tests/engine --ignore=tests/http \
	  --ignore=tests/plain_cpu $(ARGS)

test-vllm: $(OTHER)/.swapped $(MODEL)
	$(OTHER)/bin/python -m pytest $(IN_PARALLEL) --ignore=tests/roofline \
	  --ignore=tests/lanes --ignore=tests/plain_cpu $(ARGS)

# Without tests/conftest.py, which is for the CPU. The tests start processes on the fake GPU;
# those of real tokens run on it themselves, since what is imported first makes kernels compute.
test-gpu: $(FAKE_GPU)/libcuda.so.1
	FAKE_GPU=$(abspath $(FAKE_GPU)) $(CUDA)/bin/python -m pytest $(IN_PARALLEL) --confcutdir=tests/gpu \
	  --ignore=tests/gpu/real_tokens tests/gpu $(ARGS)
	$(ON_FAKE_GPU) python -m pytest $(IN_PARALLEL) --confcutdir=tests/gpu/real_tokens \
	  tests/gpu/real_tokens $(ARGS)

bench-cadence: $(FAKE_GPU)/libcuda.so.1
	$(ON_FAKE_GPU) python eval/bench_cadence.py --kernel-us "0 8 15" \
	  --out eval/results/cadence.json

demo: $(MODEL) $(PLAIN)/.ready
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
	$(BIN)/python tests/other_vllm.py $(OTHER_VLLM) $(OTHER)
	@touch $@

# As users install it. `===`: where pip knows a CPU build of the torch that vLLM asks for, it
# would rather have that.
$(CUDA)/.ready: setup.py requirements.txt
	@echo "Building $(CUDA): vLLM $(CUDA_VLLM)'s CUDA build, some 5 minutes and 9 GB."
	$(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/python -m pip install --quiet --no-deps vllm==$(CUDA_VLLM)
	$(CUDA)/bin/python -m pip install --quiet --editable .[cuda] vllm==$(CUDA_VLLM) \
	  torch===$$(sed -n 's/^Requires-Dist: torch==//p' $(CUDA)/lib/*/site-packages/vllm-*/METADATA) \
	  $$(grep -E '^(httpx|hypothesis|pytest.*)==' requirements.txt)
	@touch $@

$(FAKE_GPU)/libcuda.so.1: $(CUDA)/.ready tests/fake_gpu/build.py $(wildcard tests/fake_gpu/src/*)
	$(CUDA)/bin/python tests/fake_gpu/build.py $(CUDA) $(FAKE_GPU)

$(MODEL): | $(READY)
	@$(BIN)/python examples/smollm2.py
