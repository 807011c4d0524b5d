# make demo    trains LeNet without batch normalization, with torch.nn's, and with bnext's
# make test    the whole test suite
# make bench   three minutes of bench/run.py: figures, build/bench.json and build/bench.png
# make lint    formatting and static checks
# make clean   removes .venv and all that was built
#
# These set up .venv themselves, with TORCH in it: make TORCH="torch==2.13.0" test
#
# make gpu     on a machine with a GPU, in steps of less than nine minutes that are targets of their own:
#              gpu-build, gpu-smoke, gpu-table, gpu-probe, gpu-tables, gpu-test, gpu-sanitize. Uses PYTHON and the
#              torch that it has, without .venv or network, and writes to RESULTS: make gpu PYTHON=python3
#              RESULTS=out. With DRY=1 it only shows what it would do.

PYTHON ?= python3
TORCH  ?= torch
JOBS   ?= $(shell nproc)
RESULTS ?= bench/results

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

.PHONY: demo test bench lint clean

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

# Steps of less than nine minutes, each by itself or all in order: build smoke table probe tables test sanitize.
GPU_STEPS := $(addprefix gpu-,build smoke table probe tables test sanitize)
.PHONY: gpu $(GPU_STEPS)

gpu:
	$(PYTHON) bench/gpu.py all --results '$(RESULTS)' $(if $(DRY),--dry)

$(GPU_STEPS): gpu-%:
	$(PYTHON) bench/gpu.py $* --results '$(RESULTS)' $(if $(DRY),--dry)
