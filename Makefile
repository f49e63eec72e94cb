# Every target first makes its environment, .venv or .venv-aot, and remakes it when what it depends on has changed.

PYTHON ?= python$(shell cat .python-version)
BIN := .venv/bin
AOT := .venv-aot/bin
MODEL ?= kvjax-4m

.PHONY: run test test-slow test-kernels lint bench soak study train aot environment

COMPARED := --compare=full,vllm,h2o,infinigen

run: environment  ## compare four strategies on a real model: speed, bytes, what they lose of prose, and of a fact asked for early or late
	@if $(BIN)/kvjax fetch smollm2-135m; then \
	  $(BIN)/python -m kvjax.run --model=smollm2-135m $(COMPARED) --task=prose,niah_single --query=both \
	    --input_len=1024 --output_len=32 --num_prompts=12 --batch_size=4; \
	else \
	  echo "without smollm2-135m the comparison runs on kvjax-4m, a byte-level model that ships with kvjax and knows nothing but its task"; \
	  $(BIN)/python -m kvjax.run --model=kvjax-4m $(COMPARED); \
	fi

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal

test: environment  ## every kind of test; further cells of the matrices and the kernels have targets of their own
	$(PYTEST) -m "not slow" --ignore=tests/kernels

test-slow: environment  ## the further cells
	$(PYTEST) -m slow --ignore=tests/kernels

test-kernels: environment  ## the Pallas kernels in their interpreters
	$(PYTEST) tests/kernels

lint: environment  ## style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: environment  ## speed beside transformers and llama.cpp
	$(BIN)/python -m experiments.bench.speed

soak: environment  ## thousands of requests at twice the sustainable rate, with cancellations and preemptions
	$(BIN)/python -m experiments.load.soak

study: environment  ## the study at its quick sizes: records, figures, STUDY.md and one page, in runs/study
	$(BIN)/python -m experiments.study --quick --output_dir=runs/study
	$(BIN)/python -m experiments.paper --results=runs/study
	$(BIN)/python -m kvjax.report runs/study

train: environment  ## train a bundled model: make train MODEL=kvjax-1m
	$(BIN)/python -m kvjax.train --model=$(MODEL) --output_dir=runs/$(MODEL)

aot: .venv-aot/installed  ## compile every kernel for an H200 and for TPUs, none of them here; CI: make aot AOT_FLAGS=--quick
	$(AOT)/python -m experiments.aot $(AOT_FLAGS)

environment: .venv/installed

.venv/installed: pyproject.toml setup.py constraints.txt .python-version
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv-aot/installed: pyproject.toml setup.py constraints.txt .python-version
	test -x $(AOT)/python || $(PYTHON) -m venv .venv-aot
	$(AOT)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[aot]'
	touch $@
