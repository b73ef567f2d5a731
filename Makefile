# `make help` lists what there is. Everything happens in .venv, which the first target to need it creates.
PYTHON ?= python3
VENV ?= .venv
# The torch that a new environment gets. Any torch >= 2.10 works, also one with CUDA: make demo TORCH=torch
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin/python
SOURCES := $(wildcard csrc/*.h csrc/*/*) CMakeLists.txt pyproject.toml
KERNEL_BUILD := build/kernels
CUDA_BUILD := build/cuda

.PHONY: help install demo examples test kernel-test bench lint fmt cuda-compile gpu-check clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet "$(TORCH)" numpy
	$(RUN) -m pip install --quiet "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11"
	touch $@

$(VENV)/installed: $(VENV)/created $(SOURCES)
	$(RUN) -m pip install --quiet --no-build-isolation -e ".[demo,bench]"
	touch $@

# What developers need beside it: the tests' and examples' libraries, linters, and the libraries that fastkd.compat
# is tested against, whose own dependencies weigh gigabytes and are not needed.
$(VENV)/complete: $(VENV)/installed
	$(RUN) -m pip install --quiet --no-build-isolation -e ".[train,report,examples,test,dev]"
	$(RUN) -m pip install --quiet --no-deps --group peers
	touch $@

install: $(VENV)/installed  ## create .venv, build fastkd and install it there

demo: $(VENV)/installed  ## distil a small student on scikit-learn's digits, and show what it brought
	$(RUN) examples/digits.py

test: $(VENV)/complete kernel-test  ## run every test
	$(RUN) -m pytest

kernel-test: $(VENV)/created  ## run the CPU kernels' own tests, without torch or Python
	@mkdir -p build
	@$(VENV)/bin/cmake -S . -B $(KERNEL_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	  -DFASTKD_TESTS=ON -DFASTKD_CUDA=OFF -DFASTKD_WERROR=ON > $(KERNEL_BUILD).log || (cat $(KERNEL_BUILD).log; false)
	@$(VENV)/bin/cmake --build $(KERNEL_BUILD)
	$(VENV)/bin/ctest --test-dir $(KERNEL_BUILD) --output-on-failure

examples: $(VENV)/complete  ## run every script and notebook in examples/, in full
	for script in $$(grep -l "__main__" examples/*.py); do echo "== $$script"; $(RUN) $$script || exit 1; done
	$(RUN) -m pytest tests/test_examples.py -k notebook

bench: $(VENV)/installed  ## measure fastkd against what you would use instead
	$(RUN) -m benchmarks

lint: $(VENV)/complete  ## ruff, mypy and clang-format, changing nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

fmt: $(VENV)/complete  ## let ruff and clang-format rewrite the sources
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

cuda-compile: $(VENV)/created  ## compile the CUDA kernels for every architecture; fails on register spills
	@mkdir -p build
	@$(VENV)/bin/cmake -S . -B $(CUDA_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	  -DFASTKD_TESTS=ON -DFASTKD_CUDA=ON -DFASTKD_WERROR=ON > $(CUDA_BUILD).log || (cat $(CUDA_BUILD).log; false)
	@$(VENV)/bin/cmake --build $(CUDA_BUILD) --clean-first > $(CUDA_BUILD).log 2>&1 || (cat $(CUDA_BUILD).log; false)
	$(RUN) tests/kernels/ptxas_table.py $(CUDA_BUILD).log

gpu-check:  ## build, test, sanitize and measure the CUDA kernels on this machine's GPU, without network
	PYTHON=$(PYTHON) .ci/gpu-check

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist
