# Every target first makes the environment in .venv, and remakes it when what it depends on has changed.

PYTHON ?= python$(shell cat .python-version)
BIN := .venv/bin
MODEL ?= kvjax-4m

.PHONY: run test lint bench soak train environment

run: environment  ## compare four strategies on the bundled model
	$(BIN)/python -m kvjax.run --compare=full,streaming,h2o,oracle_topk

test: environment  ## every test
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal

lint: environment  ## style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: environment  ## speed beside transformers and llama.cpp
	$(BIN)/python -m experiments.bench.speed

soak: environment  ## thousands of requests at twice the sustainable rate, with cancellations and preemptions
	$(BIN)/python -m experiments.load.soak

train: environment  ## train a bundled model: make train MODEL=kvjax-1m
	$(BIN)/python -m kvjax.train --model=$(MODEL) --output_dir=runs/$(MODEL)

environment: .venv/installed

.venv/installed: pyproject.toml setup.py constraints.txt .python-version
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
