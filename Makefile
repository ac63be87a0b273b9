# make demo   the main job: fusedrnn beside torch.nn on IMDB and sine
# make test   every test            make lint   ruff and mypy
# make help   the rest

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
READY := $(VENV)/.installed

# Beside torch's own Triton the kernels are compiled by the oldest supported one and the newest.
TRITONS := 3.6 3.9
TRITONS_READY := $(TRITONS:%=.triton-%/.installed)
TRITON_PATHS := FUSEDRNN_TRITON_36=$(CURDIR)/.triton-3.6 FUSEDRNN_TRITON_39=$(CURDIR)/.triton-3.9

# Triton's interpreter multiplies by numpy's OpenBLAS, which sums in another order on each CPU: one
# order everywhere, so that a verdict here is a verdict there. With the one for AVX-512 an LSTM's
# dgates erred 6.8e-7 of 6.4e-7 in one case of 74, by tanh's 1.2e-7 (kernels/common.py).
ONE_ORDER := $(if $(filter x86_64,$(shell uname -m)),OPENBLAS_CORETYPE=Haswell)

# Two processes on two cores: more threads in each only take turns.
PYTEST := OMP_NUM_THREADS=1 $(ONE_ORDER) $(TRITON_PATHS) $(PY) -m pytest -n 2 --dist loadgroup \
	--benchmark-disable
COMPILE_ALL := $(PY) tests/compile_all.py --table docs/compiled.csv

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench compile-all precision beside gpu tables gpu-plan clean \
	lesson lessons-page study peers compare

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(READY)  ## environment, install, python -m bench (ARGS="sine --quick" is handed on)
	$(PY) -m bench $(ARGS)

test: $(READY) $(TRITONS_READY)  ## environment, install, every test (ARGS="-k lstm" is handed on)
	$(PYTEST) $(ARGS)

lint: $(READY)  ## ruff and mypy, changing nothing
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: $(READY)  ## what lint would complain about, repaired where a tool can
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

bench: $(READY)  ## the cases of the main job, timed by pytest-benchmark
	$(PY) -m pytest bench $(ARGS)

compile-all: $(READY) $(TRITONS_READY)  ## every kernel and tile size, for every chip, by every Triton
	mkdir -p docs
	$(TRITON_PATHS) $(COMPILE_ALL) $(ARGS)

lesson: $(READY)  ## an experiment of a course (NAME=gates; without one they are listed)
	$(PY) -m bench lesson $(NAME) $(ARGS)

lessons-page: $(READY)  ## the tables and pictures of docs/lessons.md, measured anew (or of NAME alone)
	$(PY) -m bench.lessons.page $(NAME)

study: $(READY)  ## what kernels a layer becomes, without a GPU (ARGS="--hidden 512 --cell gru")
	$(PY) -m fusedrnn study $(or $(ARGS),--hidden 128)

peers: $(READY)  ## every implementation that is installed, side by side (CASES=sine-10,character)
	$(PY) -m bench --cases $(or $(CASES),lessons) $(ARGS)

compare: $(READY)  ## what became slower or larger (FILES="OLD.csv OLD-2.csv NEW.csv")
	$(PY) -m bench compare $(FILES)

precision: $(READY)  ## README's table of precision, under the interpreter
	PYTHONPATH=. $(PY) tests/precision.py

beside: $(READY)  ## README's table of what torch.nn refuses
	PYTHONPATH=. $(PY) tests/beside_torch.py

gpu:  ## on a CUDA device: tests, sanitizer, lessons, sweep, autotuning; no network, no install
	PYTHONPATH=. $(PYTHON) -m bench gpu $(ARGS)

tables:  ## README's tables of GPU and CPU, from the newest results folders
	PYTHONPATH=. $(PYTHON) -m bench.readme

gpu-plan:  ## the fastest plans of FOLDER=bench/results/... into kernels/measured.csv
	PYTHONPATH=. $(PYTHON) -m bench.autotable $(FOLDER)

clean:  ## everything that make made
	rm -rf $(VENV) .triton-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("The pinned \
	environment needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[bench,dev,test]'
	@touch $@

.triton-%/.installed: | $(READY)
	rm -rf $(@D)
	$(PIP) install --no-deps --target $(@D) triton==$*.0
	@touch $@
