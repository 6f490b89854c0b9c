# Every target sets up what it needs, so `make demo` and `make test` work in a bare checkout.
# Paths are relative on purpose: the checkout may lie under a folder with spaces in its name.

PYTHON ?= python3
PYTEST_ARGS ?= -n 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0

.PHONY: demo test bench lint docs clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/fxquant demo

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

clean:
	rm -rf $(VENV) docs/_build build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache

# The stamp is written last: an install that broke off half-way is done again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fxquant needs Python 3.11 or newer, and '$(PYTHON)' is not one:" \
			"pass another, as in 'make test PYTHON=python3.12'." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install "$(TORCH)" -e ".[bench,cli,demo,dev,docs]"
	touch $(STAMP)
