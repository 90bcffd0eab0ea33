# Every target sets up what it needs: on a fresh machine `make test` alone is enough.
#
#   PYTHON=python3.12          the interpreter that .venv is made with (3.11 or newer)
#   TORCH=system               use the torch that PYTHON already has (a cluster's, a container's), not the locked one
#   MEGAGPT2_NO_EXT=1          leave the compiled operators out
#   ARGS="-k monitor -x"       further arguments for pytest; with bench, for the benchmarks: ARGS="--threads 1"

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-nvme quickstart test test-slow test-cuda test-reference bench lint
.DELETE_ON_ERROR:

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
MINIMUM_TORCH := 2.11

# An environment remembers which torch it was made with, so that later targets need not be told again.
made_with := $(shell [ -e $(VENV)/.packages ] && cat $(VENV)/.torch)
TORCH ?= $(or $(made_with),locked)
ifeq ($(filter locked system,$(TORCH)),)
$(error TORCH=$(TORCH) is not known: use TORCH=system, or leave it out for the version in requirements.lock)
endif
ifneq ($(filter-out $(TORCH),$(made_with)),)
$(error $(VENV) was made with TORCH=$(made_with), not TORCH=$(TORCH): remove it first (rm -rf $(VENV)))
endif

# The first candidate that is new enough; with TORCH=system it must have a torch too.
candidates := python3.11 python3.12 python3.13 python3
suitable := import sys; sys.exit(sys.version_info < (3, 11))
ifeq ($(TORCH),system)
candidates := python3 python python3.11 python3.12 python3.13
suitable := import sys, torch; sys.exit(sys.version_info < (3, 11))
endif
PYTHON ?= $(shell for p in $(candidates); do \
	"$$p" -c '$(suitable)' >/dev/null 2>&1 && echo "$$p" && exit; done; echo python3)

ifeq ($(TORCH),system)
venv_options := --system-site-packages
lock_filter := grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)=='
else
venv_options :=
lock_filter := cat
endif

operator_sources := $(wildcard csrc/bindings.cpp csrc/*/*)

define require_compiler
if [ -e csrc/bindings.cpp ] && [ "$$MEGAGPT2_NO_EXT" != 1 ] && ! command -v "$${CXX:-c++}" >/dev/null; then \
	echo "make setup: no C++ compiler ($${CXX:-c++}) was found. Install one (apt-get install g++," \
		"dnf install gcc-c++), name one with CXX=..., or go without the compiled operators:" \
		"MEGAGPT2_NO_EXT=1 make setup" >&2; exit 1; fi
endef

# An unfinished environment is made anew, one that isn't ours is left alone.
define make_environment
[ ! -e $(VENV) ] || [ -e $(VENV)/.torch ] || { \
	echo "make setup: $(VENV) is there but not from make setup: move or remove it first (rm -rf $(VENV))" >&2; exit 1; }; \
python="$(PYTHON)"; \
"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "make setup: megagpt2 needs Python 3.11 or newer, but $$python is: $$("$$python" --version 2>&1)." \
		"Name another with PYTHON=/path/to/python3.11" >&2; exit 1; }; \
"$$python" -m venv --clear $(venv_options) $(VENV); \
echo $(TORCH) > $(VENV)/.torch
endef

define require_system_torch
$(VENV_PYTHON) -c 'import torch; print(torch.__version__)' >/dev/null 2>&1 || { \
	echo "make setup TORCH=system: $$(readlink -f $(VENV_PYTHON)) can't import torch. Name the interpreter" \
		"that has it with PYTHON=..., or leave TORCH=system out to install the locked one" >&2; \
	exit 1; }; \
$(VENV_PYTHON) -c 'import sys, torch; \
have = [int(part) for part in torch.__version__.split(".")[:2]]; \
sys.exit(have < [int(part) for part in "$(MINIMUM_TORCH)".split(".")])' || { \
	echo "make setup TORCH=system: torch $$($(VENV_PYTHON) -c 'import torch; print(torch.__version__)') is too" \
		"old, megagpt2 needs $(MINIMUM_TORCH) or newer. Leave TORCH=system out to install the locked one" >&2; \
	exit 1; }
endef

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## create .venv with the pinned packages and megagpt2 itself (TORCH=system: keep your torch)

$(VENV)/.packages: requirements.lock
	@$(require_compiler)
	@[ -e $@ ] || { set -e; $(make_environment); }
ifeq ($(TORCH),system)
	@$(require_system_torch)
endif
	$(lock_filter) requirements.lock > $(VENV)/requirements.txt
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -r $(VENV)/requirements.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.packages setup.py pyproject.toml $(operator_sources)
	@$(require_compiler)
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -e . --no-deps --no-build-isolation
	@touch $@

setup-nvme: setup ## build the operators for offload to NVMe (needs libaio's headers: libaio-dev, libaio-devel)
	$(VENV_PYTHON) tools/setup_nvme.py

quickstart: setup ## train a small GPT-2 on this machine, with tensor and pipeline parallelism
	$(VENV_PYTHON) tools/quickstart.py

test: setup ## the fast tests
	$(VENV_PYTHON) -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: setup ## the slow tests, and where there is a CUDA device the GPU tests
	$(VENV_PYTHON) -m pytest $(ARGS) -m \
		"$$($(VENV_PYTHON) -c 'import torch; print("slow or gpu" if torch.cuda.is_available() else "slow and not gpu")')"

test-cuda: setup ## CUDA sources without a GPU: they compile, spill no registers, and are right run thread by thread
	$(VENV_PYTHON) -m pytest $(ARGS) -m slow tests/unit/test_cuda_sources.py tests/unit/test_cuda_on_cpu.py

test-reference: setup ## operators, model, layouts and whole runs in plain torch, as where there is no compiler
	MEGAGPT2_REFERENCE=1 $(VENV_PYTHON) -m pytest $(ARGS) -m "not slow and not gpu" \
		tests/numerics tests/unit/test_backends.py tests/distributed/test_layouts.py tests/distributed/test_replicas.py \
		tests/integration/test_pretrain.py tests/integration/test_generate.py tests/integration/test_resume.py

bench: setup ## every benchmark of tools/bench, with tables here and JSON in build/bench
	@set -e; for file in $(filter-out tools/bench/common.py,$(wildcard tools/bench/*.py)); do \
		echo "== $$file"; $(VENV_PYTHON) $$file --json build/bench/$$(basename $$file .py).json $(ARGS); echo; done

lint: setup ## ruff over the whole tree
	$(VENV_PYTHON) -m ruff check .
