# make quickstart   virtual environment, installation, and the whole pipeline on a tiny Phi-4
# make test         what the tests need, lint, types, the default test suite (WORKERS=1: one process)
# make install      .venv with phi4r, editable, at the versions of constraints-*.txt; EXTRAS=te,flash-attn adds to it
# make test-slow    the tests marked slow: the whole quick start at a small size
# make test-fresh   some of the default tests, every process started from nothing and none forked (tests/preloaded.py)
# make test-slurm   the tests on a private SLURM (needs slurm-wlm and munge; skipped without, but not with CI=true)
# make test-dali    the tests of the DALI loader, with DALI (0.8 GB), which the default suite skips
# make test-install phi4r in empty folders, with uv and the CUDA build and with pip and a CPU build; the suite in both
# make vllm-deps    .venv-vllm with vLLM for CPUs (3.5 GB; needs a CPU build of torch); CUDA=1 makes it for GPUs
# make test-vllm    the tests on real vLLM servers (in .venv-vllm, or where PHI4R_VLLM_PYTHON says); one of them on a SLURM
# make test-deps    the same plus what tests and lint need
# make lint         ruff and mypy
# make format       ruff, rewriting files
#
# CUDA=1 or CPU=1 chooses the build of torch, which is found out otherwise (docs/install.md). PYTHON=python3.12 chooses the
# interpreter (3.11 or 3.12). PIP_FLAGS passes options to pip, such as an index with CPU builds of torch, which are much
# smaller. ARGS goes to `phi4r quickstart`, TESTS to pytest.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
ARGS ?=
TESTS ?=
EXTRAS ?=
VLLM_VENV ?= .venv-vllm
NATIVE := CMakeLists.txt $(wildcard kernels/csrc/*)
BUILD := $(if $(filter 1,$(CUDA)),cuda)$(if $(filter 1,$(CPU)),cpu)
$(if $(filter cudacpu,$(BUILD)),$(error CUDA=1 and CPU=1: one of them))
STAMP := $(VENV)/.installed$(addprefix -,$(BUILD))
VLLM ?= vllm$(if $(filter cuda,$(BUILD)),,-cpu)==0.32.0
INSTALL = $(BIN)/python install.py $(if $(BUILD),--build $(BUILD)) $(PIP_FLAGS)

# The layout tests start several ranks; one thread each keeps them from spinning on each other's cores.
export OMP_NUM_THREADS ?= 1

# Processes that share out the files of the tests. More than four wait for the longest file.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
PYTEST = $(BIN)/python -m pytest -q
SHARED = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: install extras test-deps quickstart test test-slow test-fresh test-slurm test-dali test-install vllm-deps vllm-name test-vllm \
	lint format clean

install: $(STAMP) $(if $(EXTRAS),extras)

extras: $(STAMP)
	$(INSTALL) --extras "$(EXTRAS)"

test-deps: $(STAMP)-test

quickstart: install
	$(BIN)/phi4r quickstart $(ARGS)

test: test-deps lint
	@echo "== tests"
	$(PYTEST) $(SHARED) -m "not slow and not gpu and not vllm and not slurm" $(TESTS)

test-slow: test-deps
	@echo "== slow tests"
	$(PYTEST) $(SHARED) -m "slow and not gpu and not vllm and not slurm" $(TESTS)

# The launcher, the command line, and SFT and GRPO on one rank and on two.
test-fresh: test-deps
	@echo "== tests with processes started from nothing"
	PHI4R_TESTS_FRESH=1 $(PYTEST) $(SHARED) -m "not slow and not gpu and not vllm and not slurm" \
		$(or $(TESTS),tests/launch tests/cli tests/multiprocess/test_recipe_layouts.py)

test-slurm: test-deps
	@echo "== tests on a real SLURM"
	$(PYTEST) -m "slurm and not vllm" $(TESTS)

test-dali: test-deps
	@echo "== tests with NVIDIA DALI, which it installs (0.8 GB)"
	$(INSTALL) --extras dali
	$(PYTEST) tests/data/test_dali.py

test-install: test-deps
	@echo "== installations in empty folders"
	$(BIN)/python -m benchmarks.install $(ARGS)

vllm-deps: $(VLLM_VENV)/.installed

vllm-name:
	@echo $(VLLM)

test-vllm: test-deps $(if $(PHI4R_VLLM_PYTHON),,vllm-deps)
	@echo "== tests on real vLLM servers"
	$(PYTEST) -m "vllm and not slow" $(TESTS)

lint: test-deps
	@echo "== lint and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: test-deps
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@echo "== making $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"phi4r needs Python 3.11 or 3.12, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	"$(PYTHON)" -m venv $(VENV)

# A stamp is newer than what it was made from, so a second `make install` does nothing. One per build of torch: those of
# the other are removed. With what tests need in one go, since each time builds the C++ module.
COMPILER := command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	echo "   no C++ compiler found: slower Python code takes the place of the C++ module; phi4r doctor says so"
# An editable installation knows the packages that were there when it was made, so a new one installs again.
PACKAGES := $(wildcard phi4r/*/__init__.py phi4r/*/*/__init__.py kernels/phi4r_kernels/__init__.py kernels/phi4r_kernels/*/__init__.py)
SOURCES := pyproject.toml install.py $(wildcard constraints-*.txt) $(NATIVE) $(PACKAGES)

$(STAMP): $(SOURCES) | $(VENV)/bin/python
	@echo "== installing phi4r into $(VENV)"
	@$(COMPILER)
	$(INSTALL)
	@rm -f $(VENV)/.installed*
	@touch $@

$(STAMP)-test: $(SOURCES) | $(VENV)/bin/python
	@echo "== installing phi4r and what tests and lint need into $(VENV)"
	@$(COMPILER)
	$(INSTALL) --extras test
	@rm -f $(VENV)/.installed*
	@touch $(STAMP) $@

# torchvision, torchaudio and torchcodec come along for other models and may not match this torch.
$(VLLM_VENV)/.installed:
	@echo "== installing $(VLLM) into $(VLLM_VENV)"
	"$(PYTHON)" -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python install.py --only $(VLLM) $(PIP_FLAGS)
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@
