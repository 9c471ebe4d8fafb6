# Two commands do all: `make quickstart` and `make test`. Everything is installed into .venv from requirements.txt.
PYTHON ?= python3
BIN := .venv/bin
SCENES := data/tetrominoes
.DEFAULT_GOAL := help
.PHONY: help install quickstart test check test-all test-gpu test-slurm test-slurm-short clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 18

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (torch is large: a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@touch $@

install: .venv/.installed  ## install into .venv

quickstart: install  ## shards, pretraining, export, object discovery, probe and report on generated scenes
	@$(BIN)/python pretrain/make_shards.py tetrominoes $(SCENES)/train --count 20000
	@$(BIN)/python pretrain/make_shards.py tetrominoes $(SCENES)/test --count 320 --seed 1
	@$(BIN)/python cluster/launch.py quickstart.yaml

test: install  ## the tests
	@$(BIN)/python -m pytest

check: install  ## style and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

test-all: install  ## the slow tests as well
	@$(BIN)/python -m pytest -m 'not slurm and not gpu'

test-gpu: install  ## the tests of what runs on a GPU; skipped with a reason where there is none
	@$(BIN)/python -m pytest -rs -m gpu tests/test_gpu.py

test-slurm: install  ## everything on a real SLURM of several nodes (Debian, root)
	@$(BIN)/python -m pytest -rs -m slurm tests/slurm

test-slurm-short: install  ## the short form of it; skipped with a reason where it cannot run
	@SLURM_TEST_DBD=0 SLURM_TEST_SLURMD_TIMEOUT=60 $(BIN)/python -m pytest -rs -m slurm -k short tests/slurm

clean:  ## remove the environment and caches; runs/ and data/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
