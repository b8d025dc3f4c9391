# SPDX-License-Identifier: Apache-2.0
# Every target first sets up what it needs, once: an environment, its packages, the native library.
#
#   make test ARGS="-k merge"          arguments for pytest, the demo, the benchmarks or the report
#   make test VENV=/path/to/env        an environment that is already there, with its own torch
#   make test PYTHON=python3.12        the interpreter that a new environment is made from
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#   make matrix PYTHON312=/path/to/python3.12 MATRIX_TORCH="2.11.0 newest"
#   make test TOKENOPS_BUILD=none      see CONTRIBUTING.md

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# The budget of registers is that of this compiler.
TRITON ?= triton==3.7.1
PYTHON312 ?= python3.12
MATRIX_TORCH ?= 2.10.0 2.11.0
MATRIX_INDEX ?=
SANITIZE ?= address,undefined
SHARE ?= 1/8
# Processes that run the tests; 0 runs them in pytest's own.
JOBS ?= auto
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/.tokenops
CPP_FILES = $(shell find csrc benchmarks tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Every build, also one without a compiler, ends by writing this file.
NATIVE := tokenops/_build_info.json
SANITIZED := build/sanitize/tokenops/_C.abi3.so
EMULATED := build/emulate/tokenops/_C.abi3.so

.PHONY: help demo train test bench bench-compare docs lint format sanitize emulate cuda interpret headers matrix \
	gpu-check gpu-cache native clean FORCE
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make demo | train | test | bench | bench-compare | docs | lint | format | sanitize |"
	@echo "     emulate | cuda | interpret | headers | matrix | gpu-check | gpu-cache | native | clean"

demo: $(READY)/demo $(NATIVE)
	$(PY) examples/demo.py $(ARGS)

train: $(READY)/demo $(NATIVE)
	$(PY) examples/train_dynamicvit.py $(ARGS)

test: $(READY)/test $(NATIVE)
	$(PY) -m pytest --numprocesses $(JOBS) $(ARGS)

bench: $(READY)/bench $(NATIVE)
	$(PY) -m benchmarks.measure $(ARGS)

# This tree against a commit: BASE=main; fails where a case is slower by 5 % (ARGS="--threshold 3").
BASE ?= HEAD
bench-compare: $(READY)/bench $(NATIVE)
	$(PY) -m benchmarks.compare --base $(BASE) $(ARGS)

docs: $(READY)/bench
	$(PY) -m benchmarks.report $(ARGS)

lint: $(READY)/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)

format: $(READY)/lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

# The interpreter is not instrumented, so the sanitizers' runtime must be there before everything
# else, and the C++ library with it, whose throw it has to find. Coroutines have stacks of their own.
preload = export LD_PRELOAD="$$(ldd $(1) | awk '/libasan/ {a = $$3} /libstdc/ {s = $$3} \
		END {print a " " s}')" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0 \
		UBSAN_OPTIONS=print_stacktrace=1 \
		TOKENOPS_LIBRARY=$(1); \
	$(PY) -c "from tokenops import _native as n; exit(0 if n.loaded else n.reason)"

sanitize: $(READY)/test
	TOKENOPS_BUILD=cpu TOKENOPS_SANITIZE=$(SANITIZE) CXX=g++ $(PY) setup.py --quiet build_ext \
		--build-lib build/sanitize --build-temp build/sanitize/temp
	$(call preload,$(SANITIZED)) && $(PY) -m pytest --capture=sys tests/ops $(ARGS) && \
		ASAN_OPTIONS=$$ASAN_OPTIONS:detect_leaks=1:leak_check_at_exit=0 PYTHONMALLOC=malloc \
		LSAN_OPTIONS=suppressions=tests/python.supp $(PY) tests/leaks.py --calls 20

# CUDA kernels as C++ on the CPU, thread by thread, under the same sanitizers; SHARE as below.
emulate: $(READY)/test
	TOKENOPS_BUILD=emulate TOKENOPS_SANITIZE=$(SANITIZE) CXX=g++ $(PY) setup.py --quiet build_ext \
		--build-lib build/emulate --build-temp build/emulate/temp
	$(call preload,$(EMULATED)) && $(PY) -m pytest --capture=sys --backends native --partial \
		--share $(SHARE) --hypothesis-profile quick tests/ops tests/test_emulated.py \
		--ignore-glob='*attention*' --ignore-glob='*_triton.py' $(ARGS)

# CUDA kernels for GPUs, with any PyTorch: needs nvcc 12.8 or newer (the budget is of 13.0), no GPU.
cuda: $(READY)/test
	TOKENOPS_BUILD=cuda $(PY) setup.py --quiet build_ext \
		--build-lib build/cuda --build-temp build/cuda/temp
	$(PY) -m benchmarks.cuda_resources build/cuda/temp/cuda/ptxas.log \
		build/cuda/tokenops/_C.abi3.so $(ARGS)

# Triton's kernels as Python on the CPU: right or wrong does not need a GPU, but time. SHARE=1/1 runs
# all tests, SHARE=2/8 another eighth of them.
interpret: $(READY)/test $(NATIVE)
	TRITON_INTERPRET=1 $(PY) -m pytest --backends triton --share $(SHARE) \
		--hypothesis-profile quick tests/ops tests/test_triton.py $(ARGS)

# csrc/ against the headers of every PyTorch that it is for: ARGS="2.10.0 2.11.0" for some of them.
headers: $(READY)/tools
	$(PY) tests/headers.py $(ARGS)

# The headers, then the tests with another Python and each PyTorch that MATRIX_TORCH lists ("newest" is
# one, too), in a copy of these files with an environment for each. Where PyTorch brings no Triton, the
# one that it was made with comes along.
MATRIX := $(CURDIR)/build/matrix
matrix:
	$(MAKE) headers ARGS=
	rm -rf $(MATRIX)/tokenops && mkdir -p $(MATRIX)/tokenops
	git ls-files -z --cached --others --exclude-standard | \
		tar --create --null --files-from=- | tar --extract --directory=$(MATRIX)/tokenops
	for version in $(MATRIX_TORCH); do \
		torch=torch==$$version triton=$(TRITON); \
		case $$version in newest) torch=torch;; 2.10.* | 2.11.*) triton=triton==3.6.0;; esac; \
		$(MAKE) -C $(MATRIX)/tokenops test TOKENOPS_BUILD=cpu VENV=$(MATRIX)/$$version \
			PYTHON=$(PYTHON312) TORCH="$$torch $(MATRIX_INDEX)" TRITON=$$triton || exit 1; \
	done

# All that needs a GPU, in eight minutes; installs nothing, so that it runs where nothing can be
# fetched. ARGS="--resume" goes on, ARGS="--device cpu" rehearses it without a GPU.
gpu-check:
	$(or $(wildcard $(PY)),$(PYTHON)) -m benchmarks.gpu_check $(ARGS)

# Triton's kernels for that check, compiled without a GPU, to be carried there: docs/gpu.md.
gpu-cache:
	$(or $(wildcard $(PY)),$(PYTHON)) -m benchmarks.gpu_cache $(ARGS)

native: $(NATIVE)

$(NATIVE): setup.py $(shell find csrc) | $(READY)/tools
	$(PY) setup.py --quiet build_ext --inplace

# Without a library there may be a compiler by now; a build that was asked for is made.
ifeq ($(wildcard tokenops/_C.*),)
$(NATIVE): FORCE
endif
ifdef TOKENOPS_BUILD
export TOKENOPS_BUILD
$(NATIVE): FORCE
endif

$(READY)/tools:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	$(PIP) "setuptools>=77" wheel ninja pybind11
	mkdir -p $(READY)
	touch $@

$(READY)/triton: $(READY)/tools
	$(PY) -c "import triton" 2>/dev/null || $(PIP) $(TRITON)
	touch $@

# Test, lint, bench and demo are extras of the package. An environment keeps its torch and Triton.
# The mode of the editable install keeps it importable from the folder above a clone of this name.
$(READY)/test: $(READY)/triton
$(READY)/test $(READY)/lint $(READY)/bench $(READY)/demo: pyproject.toml $(READY)/tools
	$(PY) -c "from importlib.metadata import distributions as all; \
		print(*{f'{d.name}=={d.version}' for d in all() if d.name in ('torch', 'triton')}, \
		sep='\n')" >$(READY)/keep.txt
	PYTHONWARNINGS=ignore $(PIP) --constraint $(READY)/keep.txt --no-build-isolation \
		--config-settings editable_mode=compat --editable ".[$(@F)]"
	touch $@

clean:
	rm -rf build dist tokenops.egg-info $(NATIVE) tokenops/*.so
