# make demo    trains LeNet without batch normalization, with torch.nn's, and with bnext's
# make test    the whole test suite
# make bench   three minutes of bench/run.py: figures, build/bench.json and build/bench.png
# make lint    formatting and static checks
# make clean   removes .venv and all that was built
#
# These set up .venv themselves, with TORCH in it: make TORCH="torch==2.13.0" test
#
# make gpu     on a machine with a GPU: builds for it, tests, sanitizes, times. Uses PYTHON and the
#              torch that it has, without .venv or network: make gpu PYTHON=python3

PYTHON ?= python3
TORCH  ?= torch
JOBS   ?= $(shell nproc)

# Without torch.compile, whose compilations alone would take longer.
BENCH := --suite resnet50 --providers bnext,eager

VENV := .venv
export PYTHONPATH := $(CURDIR)

# One stamp for each torch that was asked for: asking for another one installs it.
INSTALLED := $(VENV)/.installed-$(shell printf %s '$(TORCH)' | tr -c '[:alnum:].' '_')
BUILT     := $(VENV)/.built
KERNELS   := $(shell find csrc -type f)
SOURCES   := setup.py pyproject.toml bnext/_toolchain.py $(KERNELS)
BUILD     := setup.py -q build_ext --inplace

.PHONY: demo test bench lint clean gpu gpu-build gpu-test gpu-sanitize gpu-table

demo: $(BUILT)
	$(VENV)/bin/python -m examples.lenet

test: $(BUILT)
	$(VENV)/bin/python -m pytest -q -m "" -n $(JOBS) --dist worksteal

bench: $(BUILT)
	$(VENV)/bin/python bench/run.py $(BENCH) --phase forward,eval,backward,host --json build/bench.json --plot build/bench.png

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(KERNELS)

clean:
	rm -rf $(VENV) build dist *.egg-info bnext/_C.*.so

$(INSTALLED): requirements-dev.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	$(VENV)/bin/python -m pip install -q --upgrade '$(TORCH)' 'setuptools>=77' wheel 'ninja>=1.11' -r requirements-dev.txt
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	$(VENV)/bin/python $(BUILD)
	touch $@

# Each step runs even if one before it failed: time on such a machine is dear.
gpu: gpu-build
	$(MAKE) --keep-going gpu-test gpu-sanitize gpu-table

gpu-build:
	$(PYTHON) $(BUILD)

gpu-test:
	$(PYTHON) -m pytest -q -m "" -k cuda

gpu-sanitize:
	PYTHON=$(PYTHON) bench/sanitize.sh

gpu-table:
	$(PYTHON) bench/run.py $(BENCH) --phase forward,backward --dtype bfloat16,float32 --json --plot
