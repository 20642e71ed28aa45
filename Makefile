# Everything runs in .venv, made from $(PYTHON). pip reads its own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and
# the like), so an index of CPU-only torch builds is named there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt --editable
ARGS ?=
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.DELETE_ON_ERROR:
.PHONY: help demo mnist test test-all fuzz lint docs bench clean

help:
	@echo "make demo    train a small GPT dense and sparse for the same seconds, draw pictures (about 7 minutes)"
	@echo "make mnist   compare algorithms on MNIST at several sparsities (ARGS=--quick: about 2 minutes)"
	@echo "make test    run the test suite (up to 8 minutes on 2 cores)"
	@echo "make test-all  run the slow tests too, try more examples, and every vector width (up to 20 minutes)"
	@echo "make fuzz    look for faults with random calls (ARGS='--minutes 10 --triage')"
	@echo "make lint    run the linter, the formatter's check and the type checker"
	@echo "make docs    build the pages of docs/ as a site, in site/"
	@echo "make bench   time sparse layers on this machine"
	@echo "make clean   remove .venv, results and caches"
	@echo
	@echo "PYTHON=python3.12 chooses the Python, ARGS='--text my.txt' passes options on, WORKERS=0 runs the tests in"
	@echo "one process. PIP_EXTRA_INDEX_URL may name an index of CPU-only torch builds, which are a small part of the"
	@echo "default download on Linux."

# Changed metadata or pinned versions install again; otherwise these take no time. What tests and checks need comes
# on top of what the examples need.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "sparselab needs Python 3.10 or newer; '$(PYTHON)' answers:" >&2; $(PYTHON) --version >&2; \
	  echo "Name another one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing sparselab and the tested versions of what it needs (torch is large; this may take minutes)"
	@$(PIP) install 'pip>=21.3'
	@$(INSTALL) '.[examples]'
	@touch $@

$(VENV)/.installed-all: $(VENV)/.installed
	@echo "Installing what the tests and the checks need"
	@$(INSTALL) '.[test,lint,examples]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "Installing what the pages need"
	@$(INSTALL) '.[docs]'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/python examples/shakespeare.py $(ARGS)

mnist: $(VENV)/.installed
	@$(BIN)/python examples/mnist.py $(ARGS)

test: $(VENV)/.installed-all
	@$(PYTEST) -m 'not slow' $(ARGS)

# Vector widths first, so that the last line is that of the whole suite.
test-all: $(VENV)/.installed-all
	@for width in 16 32 64; do \
	  SPARSELAB_VECTOR_BYTES=$$width $(PYTEST) -q -m 'any_width and not slow' tests/kernels tests/nn/ops/test_programs.py || exit 1; \
	done
	@$(PYTEST) --hypothesis-profile thorough $(ARGS)

fuzz: $(VENV)/.installed-all
	@$(BIN)/python -m tests.fuzz $(ARGS)

lint: $(VENV)/.installed-all
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m mypy

docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "The site is in site/index.html"

bench: $(VENV)/.installed
	@$(BIN)/python -m sparselab bench $(ARGS)

clean:
	rm -rf $(VENV) results site build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
