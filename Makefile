# `make help` lists the targets. A target that needs the virtual environment .venv creates .venv.
PYTHON ?= python3
VENV ?= .venv
# The torch that a new environment gets. Any torch >= 2.10 works, with or without CUDA: make demo TORCH=torch
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin/python
# Python compiles a module when a program imports it, which is enough for the demo.
INSTALL := $(RUN) -m pip install --quiet --no-compile
SOURCES := $(wildcard csrc/*.h csrc/*/*) CMakeLists.txt pyproject.toml
CUDA_BUILD := build/cuda
CTEST := $(VENV)/bin/ctest --output-on-failure --parallel $(shell nproc)
CLANG ?= clang++
COMMA := ,

.PHONY: help install demo examples choosing test test-all coverage kernel-test kernel-test-arm sanitize valgrind sanitize-python fuzz fuzz-kernels libfuzzer fuzz-caches soak \
  versions package docs docs-links accuracy reliability bench kernel-bench lint fmt cuda-compile gpu-check clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) "$(TORCH)" numpy
	$(INSTALL) "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11"
	touch $@

$(VENV)/installed: $(VENV)/created $(SOURCES)
	$(INSTALL) --no-build-isolation -e ".[demo,bench]"
	touch $@

# Developers also need linters, and the libraries of tests and examples. The group `peers` is installed with --no-deps,
# because its dependencies take gigabytes, and the tests do not use them. All modules are compiled, because tests start
# many processes, and because tests make warnings errors, which compiling some modules gives. Errors are ignored: some
# files are for a later Python.
$(VENV)/complete: $(VENV)/installed
	$(INSTALL) --no-build-isolation -e ".[train,report,deploy,examples,test,dev]"
	$(INSTALL) --no-deps --group peers
	$(INSTALL) --group stacks
	@$(RUN) -W ignore -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

install: $(VENV)/installed  ## create .venv, build fastkd and install it there

demo: $(VENV)/installed  ## distill a small student on scikit-learn's digits, and print the gain in accuracy
	$(RUN) examples/digits.py

# pytest runs a process for each core, so a process has one OpenMP thread. Tests of threads set the number of threads.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist worksteal
test: $(VENV)/complete  ## run the quick tests, which takes a few minutes
	$(PYTEST) -m "not slow" --junitxml build/test.xml

test-all: kernel-test kernel-test-arm $(VENV)/complete  ## run every test, also the kernels' own tests
	$(PYTEST) --junitxml build/test-all.xml

coverage: $(VENV)/complete  ## run the quick tests, then the slow tests, and write their coverage to docs/tests.md
	$(PYTEST) -m "not slow" --junitxml build/test.xml --cov fastkd --cov-report json:build/test.json
	$(PYTEST) -m slow --junitxml build/slow.xml --cov fastkd --cov-append --cov-report json:build/test-all.json
	$(RUN) docs/tests.py

# $(call kernels,FOLDER,OPTIONS,TARGETS) builds the CPU kernels and the test programs in build/FOLDER, without torch or
# Python. If TARGETS names programs, only these programs are built.
define kernels
@mkdir -p build
@$(VENV)/bin/cmake -S . -B build/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
  -DFASTKD_TESTS=ON -DFASTKD_CUDA=OFF -DFASTKD_WERROR=ON $(2) > build/$(1).log || (cat build/$(1).log; false)
@$(VENV)/bin/cmake --build build/$(1) $(if $(3),--target $(3))
endef

kernel-test: $(VENV)/created  ## run the tests of the CPU kernels and of the emulated CUDA kernels, without torch or Python
	$(call kernels,kernels)
	$(CTEST) --test-dir build/kernels

# aarch64 has only baseline kernels. The tests compare with double, because aarch64 computes long double in software.
ARM := aarch64-linux-gnu
ARM_TOOLS := $(and $(shell command -v $(ARM)-g++),$(shell command -v qemu-aarch64))
# FULL=1 also runs cpu_kernels, which takes about ten minutes under qemu.
kernel-test-arm: $(VENV)/created  ## cross-compile the CPU kernels for aarch64, and fuzz them under qemu
ifdef ARM_TOOLS
	$(call kernels,kernels-arm,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(ARM)-g++ -DCMAKE_CXX_FLAGS=-DFASTKD_TRUTH=double,cpu_fuzz $(if $(FULL),cpu_kernels))
	qemu-aarch64 -L /usr/$(ARM) build/kernels-arm/cpu_fuzz 200
	$(if $(FULL),qemu-aarch64 -L /usr/$(ARM) build/kernels-arm/cpu_kernels)
else
	@echo "kernel-test-arm: nothing is tested, because $(ARM)-g++ or qemu-aarch64 (Debian: qemu-user) is not installed"
endif

sanitize: $(VENV)/created  ## run the kernel tests under the address, undefined-behavior and thread sanitizers
	$(call kernels,sanitize,-DFASTKD_SANITIZE=address$(COMMA)undefined)
	$(CTEST) --test-dir build/sanitize
	$(call kernels,sanitize-threads,-DFASTKD_SANITIZE=thread,cpu_threads)
	$(CTEST) --test-dir build/sanitize-threads -R cpu_threads

# valgrind emulates a processor without AVX-512, so the AVX-512 kernels are not tested.
valgrind: $(VENV)/created  ## run the kernel tests under valgrind: memory errors, uninitialized values, leaks
	$(call kernels,kernels,,cpu_kernels cpu_threads cpu_fuzz device_arithmetic)
	for test in "cpu_kernels memory" "cpu_threads" "cpu_fuzz 300" "device_arithmetic"; do \
	  valgrind --quiet --error-exitcode=1 --leak-check=full build/kernels/$$test || exit 1; done

sanitize-python: $(VENV)/complete  ## run core Python tests with an extension built with sanitizers
	$(RUN) -m reliability.sanitize

FUZZERS := tests/test_fuzz.py tests/test_fuzz_topk.py tests/test_fuzz_linear.py \
  tests/test_fuzz_ops.py
fuzz: $(VENV)/complete  ## compare random calls with float64, and make invalid calls of ops: make fuzz CASES=20000 SEED=7
	@failed=0; for fuzzer in $(FUZZERS); do echo "== $$fuzzer"; \
	  $(RUN) $$fuzzer $(CASES) $(SEED) || failed=1; done; exit $$failed

fuzz-kernels: $(VENV)/created  ## make hostile calls of the CPU kernels, with sanitizers
	$(call kernels,sanitize,-DFASTKD_SANITIZE=address$(COMMA)undefined,cpu_fuzz)
	build/sanitize/cpu_fuzz $(CASES) $(SEED)

libfuzzer: $(VENV)/created  ## make hostile calls of the CPU kernels by libFuzzer, which needs clang
	$(call kernels,libfuzzer,-DCMAKE_CXX_COMPILER=$(CLANG) -DFASTKD_SANITIZE=fuzzer-no-link$(COMMA)address -DFASTKD_LIBFUZZER=ON,cpu_fuzz)
	build/libfuzzer/cpu_fuzz -max_total_time=60 -max_len=600 -print_final_stats=1

fuzz-caches: $(VENV)/complete  ## fuzz the reader of teachers' caches by libFuzzer: make fuzz-caches SECONDS=600
	$(INSTALL) --group fuzz
	$(RUN) -m reliability.caches $(SECONDS)

soak: $(VENV)/complete  ## make 100,000 calls of each kind, and check that memory does not grow
	$(RUN) -m reliability.soak

versions: $(VENV)/complete  ## run core tests on several versions of Python and torch, which take gigabytes
	$(INSTALL) --group package
	$(RUN) -m reliability.versions $(PAIRS)

package: $(VENV)/complete  ## test sdist, auditwheel and cibuildwheel, as far as this machine allows
	$(INSTALL) --group package
	$(RUN) -m reliability.package

# -W and -n make a dead link, or a docstring's reference to an unknown name, an error. The doctest builder runs the
# examples in docstrings.
SPHINX := $(RUN) -m sphinx -W --keep-going -n -q -c docs -d build/doctrees
docs: $(VENV)/complete  ## build the documentation site in build/docs, and check its links and examples
	$(INSTALL) --group docs
	$(SPHINX) . build/docs
	$(SPHINX) -b doctest . build/docs-doctest
	@echo "the site is in build/docs/index.html"

docs-links: docs  ## also check links to other sites, over the network
	$(SPHINX) -b linkcheck . build/docs-links

accuracy: $(VENV)/installed  ## write docs/accuracy.md, the errors of fastkd and eager PyTorch against float64
	$(RUN) -m benchmarks.accuracy

reliability: $(VENV)/complete  ## run the programs that docs/reliability.md lists, and write that page
	$(RUN) -m reliability

examples: $(VENV)/complete  ## run every script and notebook in examples/, in full
	for script in $$(grep -l "__main__" examples/*.py); do echo "== $$script"; $(RUN) $$script || exit 1; done
	$(RUN) -m pytest tests/test_examples.py -k notebook

choosing: $(VENV)/complete  ## run or continue the sweep of docs/choosing.md, and write its tables and plots
	$(RUN) -m benchmarks.choosing

bench: $(VENV)/installed  ## time fastkd and other implementations of the loss
	$(RUN) -m benchmarks

kernel-bench: $(VENV)/created  ## time the CPU kernels alone, without torch or Python
	$(call kernels,kernels,,cpu_speed)
	build/kernels/cpu_speed

lint: $(VENV)/complete  ## check with ruff, mypy and clang-format, without changes
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

fmt: $(VENV)/complete  ## format the sources with ruff and clang-format
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

cuda-compile: $(VENV)/created  ## compile the CUDA kernels for every architecture, and fail if registers spill
	@mkdir -p build
	@$(VENV)/bin/cmake -S . -B $(CUDA_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	  -DFASTKD_TESTS=ON -DFASTKD_CUDA=ON -DFASTKD_WERROR=ON > $(CUDA_BUILD).log || (cat $(CUDA_BUILD).log; false)
	@$(VENV)/bin/cmake --build $(CUDA_BUILD) --clean-first --target fastkd_cuda cuda_kernels cuda_topk cuda_mixture > $(CUDA_BUILD).log 2>&1 || (cat $(CUDA_BUILD).log; false)
	$(RUN) tests/kernels/ptxas_table.py $(CUDA_BUILD).log

gpu-check:  ## build, test, sanitize and measure the CUDA kernels on this machine's GPU, without network
	PYTHON=$(PYTHON) .ci/gpu-check $(STEPS)

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist
