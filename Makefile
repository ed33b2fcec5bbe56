# `make demo` and `make test` set up everything they need in .venv; a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo ablation test test-lmms-eval release-check docs docs-serve lint format clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

# Some systems ship python3 without ensurepip; pip then installs into the environment from outside.
.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Cobra needs Python 3.10 or newer; say which with: make PYTHON=python3.12 demo"; exit 1; }
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv \
	  && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@touch $@

.venv/user: .venv/created pyproject.toml
	@echo "Installing Cobra into .venv (torch alone is a few GB: this takes some minutes once)"
	$(BIN)/python -m pip install --quiet --editable '.[easyvqa]'
	@touch $@

.venv/dev: .venv/user pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: .venv/user  ## train the tiny Cobra on easy-VQA, evaluate it, say where the pictures are
	$(BIN)/python scripts/pretrain.py +experiment=tiny
	$(BIN)/python scripts/evaluate.py benchmark=easyvqa model=runs/tiny

# Started again, it goes on where it stopped. The folders can be moved as everywhere, by COBRA_DATA and so on.
SEEDS ?= 0 1 2
ABLATION_ROWS := full siglip ldpv2 base one-epoch align aligned
TOY := $(or $(COBRA_DATA),data)/toy
ABLATION_RUNS := $(or $(COBRA_RUNS),runs)/ablation
ABLATION_RESULTS := $(or $(COBRA_RESULTS),results)/ablation

ablation: .venv/user  ## train and evaluate the paper's ablation at tiny size: about 80 minutes a seed; SEEDS="0 1" for two
	set -e; for seed in $(SEEDS); do for row in $(ABLATION_ROWS); do \
	  run="$(ABLATION_RUNS)/seed-$$seed"; \
	  $(BIN)/python scripts/pretrain.py +experiment=tiny-$$row run.seed=$$seed "paths.runs=$$run"; \
	  test $$row = align || $(BIN)/python scripts/evaluate.py benchmark=all "data_root=$(TOY)" \
	    "model=$$run/tiny-$$row" "paths.results=$(ABLATION_RESULTS)/seed-$$seed"; \
	done; done
	$(BIN)/python scripts/ablation.py

test: .venv/dev  ## run the tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

# lmms-eval pins versions that are not Cobra's, so it has an environment of its own.
.venv-lmms-eval/created: pyproject.toml
	$(PYTHON) -m venv .venv-lmms-eval
	.venv-lmms-eval/bin/python -m pip install --quiet lmms-eval==0.7.3 --editable '.[easyvqa]' pytest
	@touch $@

test-lmms-eval: .venv-lmms-eval/created  ## run the tests of the lmms-eval plug-in against lmms-eval itself
	.venv-lmms-eval/bin/python -m pytest tests/integrations/test_lmms_eval.py

# The tests of the release import everything but Cobra itself from .venv, so that torch is not installed again.
release-check: .venv/dev  ## build sdist and wheel from a clean tree, install the wheel by itself, train and evaluate with it
	@test -z "$$(git status --porcelain)" || { git status --short; echo "Commit or remove these first."; exit 1; }
	rm -rf dist
	$(BIN)/python -m build
	COBRA_DIST=$(CURDIR)/dist $(BIN)/python -m pytest tests/journeys/test_wheel.py

docs: .venv/dev  ## build the documentation in site/; warnings are errors
	$(BIN)/python scripts/make_settings.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: .venv/dev  ## show the documentation at http://127.0.0.1:8000 while you write
	$(BIN)/mkdocs serve

lint: .venv/dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/dev  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environments (runs/, results/ and data/ stay)
	rm -rf .venv .venv-lmms-eval
