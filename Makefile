## bnext: batch normalization for PyTorch on hand-written CUDA and CPU kernels.
##
##   make demo     trains LeNet without batch normalization, with torch.nn's and with bnext's: a table, a picture;
##                 about 3 minutes
##   make test     everything: style, types, and the whole test suite; 18 to 40 minutes on 2 cores with nvcc
##   make lint     style and types alone; a minute the first time, then seconds
##   make bench    times bnext and torch.nn on ResNet-50's layers: build/bench.json, build/bench.png; about 3 minutes
##   make clean    removes .venv and all that was built
##
## The first of these also sets up .venv. It downloads TORCH (default: torch; 3 GB where it comes with CUDA, 0.5 GB
## where not): 1 to 10 minutes. All but lint then compile, once: on 2 cores 3 minutes for the CPU, and 5 to 9 more for
## CUDA, where there is a compiler for it. Another torch:   make TORCH="torch==2.13.0" test
##
##   make gpu      on a machine with a GPU, in steps of less than nine minutes that are targets of their
##                 own: gpu-build, gpu-smoke, gpu-table, gpu-probe, gpu-tables, gpu-test, gpu-sanitize.
##                 Uses PYTHON and the torch that it has, without .venv or network, and writes to RESULTS:
##                 make gpu PYTHON=python3 RESULTS=out   With DRY=1 it only shows what it would do.

PYTHON ?= python3
TORCH  ?= torch
JOBS   ?= $(shell nproc)
RESULTS ?= bench/results

# A failing compiler has to fail the rule, although its output goes through a filter.
SHELL       := bash
.SHELLFLAGS := -o pipefail -c

# Without torch.compile, whose compilations alone would take longer.
BENCH := --suite resnet50 --providers bnext,eager

VENV := .venv
export PYTHONPATH := $(CURDIR)

# One stamp for each torch that was asked for: asking for another one installs it.
INSTALLED := $(VENV)/.installed-$(shell printf %s '$(TORCH)' | tr -c '[:alnum:].' '_')
BUILT     := $(VENV)/.built
SOURCES   := setup.py pyproject.toml bnext/_toolchain.py $(shell find csrc -type f)
CPP        = $(shell find . -name '.?*' -prune -o -path ./build -prune -o -type f -regex '.*\.\(h\|cuh\|cpp\|cu\)' -print)

# torch has ninja print each command line, of a kilobyte: this leaves "[3/18] csrc/cpu/batch_norm_forward.cpp".
BUILD := setup.py -q build_ext --inplace 2>&1 | sed -u -E 's,^(\[[0-9]+/[0-9]+\]) .* -c [^ ]*/(csrc/[^ ]+) -o .*,\1 \2,'

SAY := @printf '==> %s\n'

.PHONY: help demo test bench lint clean

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

demo: $(BUILT)
	$(SAY) "Training LeNet in many ways on scikit-learn's digits: nothing to download, about three minutes."
	$(VENV)/bin/python -m examples.compare

test: lint $(BUILT)
	$(SAY) "Running the whole suite with $(JOBS) processes: 18 to 40 minutes on 2 cores with nvcc."
	$(VENV)/bin/python -m pytest -q -m "" -n $(JOBS) --dist worksteal

bench: $(BUILT)
	$(SAY) "Timing, with no other program running: about 3 minutes."
	$(VENV)/bin/python bench/run.py $(BENCH) --phase forward,eval,backward,host --json build/bench.json --plot build/bench.png

lint: $(INSTALLED)
	$(SAY) "Checking style and types: a minute the first time, then seconds."
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@echo $(VENV)/bin/clang-format --dry-run -Werror "(all C++ and CUDA files)"
	@$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info bnext/_C.*.so .mypy_cache .ruff_cache .pytest_cache

$(INSTALLED): requirements-dev.txt
	$(SAY) "Installing $(TORCH) and requirements-dev.txt into $(VENV)." \
	  "Downloads 3 GB if this torch comes with CUDA, 0.5 GB if not: 1 to 10 minutes."
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	$(VENV)/bin/python -m pip install --disable-pip-version-check --upgrade '$(TORCH)' 'setuptools>=77' wheel 'ninja>=1.11' -r requirements-dev.txt
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	$(SAY) "Compiling for the torch in $(VENV): the CPU kernels take 3 minutes on 2 cores," \
	  "those for all CUDA architectures 5 to 9 more."
	@$(VENV)/bin/python $(BUILD)
	touch $@

# Steps of less than nine minutes, each by itself or all in order: build smoke table probe tables test sanitize.
GPU_STEPS := $(addprefix gpu-,build smoke table probe tables test sanitize)
.PHONY: gpu $(GPU_STEPS)

gpu:
	$(PYTHON) bench/gpu.py all --results '$(RESULTS)' $(if $(DRY),--dry)

$(GPU_STEPS): gpu-%:
	$(PYTHON) bench/gpu.py $* --results '$(RESULTS)' $(if $(DRY),--dry)
