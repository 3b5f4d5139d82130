# Each command does all of its set-up; the second time there is none left to do.
#
#   make demo       trains with BAGUA's algorithms on small data and compares them
#   make published  shows twelve published effects; stops where a claim does not hold
#   make notebooks  runs the studies in full: docs/studies.md and its figures
#   make test       lint, then every test and doctest
#   make lint       ruff and pyright only
#   make format     lets ruff rewrite what it can
#   make clean      removes the environment and everything built
#
# PYTHON=python3.12 chooses the interpreter of a new environment (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo published notebooks test lint format clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(INSTALLED)
	$(BIN)/bagua-jax run demo

published: $(INSTALLED)
	@set -e; for config in experiments/configs/published/*.yaml; do \
	    $(BIN)/bagua-jax run $$config; \
	done

# One run of pytest, so that its last line counts everything; two processes, because most
# of the time is compilation, which takes one core. --pyargs: doctests import the package
# by its name; as a path, algorithms/ would be imported a second time.
test: lint
	$(BIN)/pytest -n 2 --dist worksteal --doctest-modules --pyargs tests/ bagua_jax

notebooks: $(INSTALLED)
	$(BIN)/python -m bagua_jax.experiments.studies

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info

# pip is the last thing that venv makes: with it, the environment is whole.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "bagua_jax needs Python 3.11 or newer; PYTHON=$(PYTHON) is" \
	        "$$($(PYTHON) --version 2>&1 | head -n 1). Name another:" \
	        "make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	    exit 1; }
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml | $(BIN)/pip
	@echo 'Installing bagua_jax into .venv. The first time takes a few minutes.'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
