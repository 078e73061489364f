# `make demo` and `make test` need Python 3.10 or newer, make, and a package index; they set up .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# How many processes run the tests; each has one thread.
WORKERS ?= 2

.PHONY: help setup demo test test-fast lint format wheel clean

help:
	@echo "make demo       edit facts in the bundled model, measure, report, take the edits back"
	@echo "make test       all tests;  make test-fast: without those that take minutes;  ARGS='-k name' is passed on"
	@echo "                WORKERS=4 for four processes instead of two"
	@echo "make lint       ruff and pyright;  make format: let ruff rewrite"
	@echo "make wheel      build dist/*.whl"
	@echo "make clean      remove what make made"

setup: $(READY)

# The stamp is written last, so an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "expected Python 3.10 or newer; got $$($(PYTHON) --version): run make PYTHON=python3.x"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/reknow demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-fast: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(READY)
	rm -rf dist build
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) dist build src/*.egg-info
