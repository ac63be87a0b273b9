# make demo   compare with torch.nn: results, speed and training
# make test   run the tests           make lint   run ruff and mypy
# make help   list every command

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
READY := $(VENV)/.installed
ECOSYSTEM := $(VENV)/.ecosystem

# `make test-all` also compiles the kernels with the oldest supported Triton and the newest.
TRITONS := 3.6 3.9
TRITONS_READY := $(TRITONS:%=.triton-%/.installed)
TRITON_PATHS := FUSEDRNN_TRITON_36=$(CURDIR)/.triton-3.6 FUSEDRNN_TRITON_39=$(CURDIR)/.triton-3.9

# Dependencies of fastai and speechbrain that the tests need. The others are torchvision and
# torchaudio, whose wheels do not load beside every build of torch, and models of spaCy.
NEEDED := fastdownload fastprogress fasttransform hyperpyyaml sentencepiece

# One thread for each of the two processes, so that they do not compete for the cores.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint format lesson study predict gpu clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(READY)  ## compare with torch.nn: results, speed and training (ARGS="sine --quick")
	$(PY) -m bench $(ARGS)

test: $(READY)  ## run the tests (ARGS="-k lstm")
	$(PYTEST) -m "not slow and not ecosystem" $(ARGS)

test-all: $(READY) $(ECOSYSTEM) $(TRITONS_READY)  ## run every test: long ones, other libraries, other Tritons
	$(TRITON_PATHS) $(PYTEST) -m "not ecosystem" $(ARGS)
	$(PYTEST) -m ecosystem $(ARGS)  # apart: what these libraries leave in a process disturbs others

lint: $(READY)  ## check with ruff and mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: $(READY)  ## repair what ruff can repair
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

lesson: $(READY)  ## run an experiment of a course (NAME=sine; without NAME: list them)
	$(PY) -m bench lesson $(NAME) $(ARGS)

predict: $(READY)  ## compile the kernels for absent GPUs and predict their steps (ARGS="--again cooperative")
	$(PY) -m fusedrnn.kernels.predict $(ARGS)

study: $(READY)  ## show which kernels a layer becomes; needs no GPU (ARGS="--hidden 512 --cell gru")
	$(PY) -m fusedrnn study $(or $(ARGS),--hidden 128)

gpu:  ## test and time everything on a CUDA device; installs nothing (ARGS="--minutes 9")
	PYTHONPATH=. $(PYTHON) -m bench gpu $(ARGS)

clean:  ## remove everything that make has made
	rm -rf $(VENV) .triton-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("The pinned \
	environment needs Python 3.11 or newer; choose one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[bench,dev,test]'
	@touch $@

$(ECOSYSTEM): $(READY)
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[ecosystem]'
	$(PIP) install --constraint constraints.txt $(NEEDED)
	$(PIP) install --constraint constraints.txt --no-deps fastai speechbrain
	@touch $@

.triton-%/.installed: | $(READY)
	rm -rf $(@D)
	$(PIP) install --no-deps --target $(@D) triton==$*.0
	@touch $@
