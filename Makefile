# Each command does all of its set-up; the second time there is none left to do.
#
#   make demo       trains with BAGUA's algorithms on small data and compares them
#   make published  shows twelve published effects; stops where a claim does not hold
#   make notebooks  runs the studies in full: docs/studies.md and its figures
#   make test       lint, then every test and doctest
#   make check      lint, then a fast part of the tests
#   make lint       ruff and pyright only
#   make format     lets ruff rewrite what it can
#   make clean      removes the environment and everything built
#
# PYTHON=python3.12 chooses the interpreter of a new environment (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
EXPERIMENTS := .venv/.installed-experiments
DEV := .venv/.installed-dev

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo published notebooks test check lint format clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(EXPERIMENTS)
	$(BIN)/bagua-jax run demo

published: $(EXPERIMENTS)
	@set -e; for config in experiments/configs/published/*.yaml; do \
	    $(BIN)/bagua-jax run $$config; \
	done

# One run of pytest, so that its last line counts everything; two processes, because most
# of the time is compilation, which takes one core. --pyargs: doctests import the package
# by its name; as a path, algorithms/ would be imported a second time.
test: lint
	$(BIN)/pytest -n 2 --dist worksteal --doctest-modules --pyargs tests/ bagua_jax

# One look at everything: the shape of the package, every algorithm against the relations
# that it must obey, the wire, configs.
check: lint
	$(BIN)/pytest -n 2 -q tests/test_imports.py tests/test_oracles.py \
	    tests/algorithms/test_golden.py tests/algorithms/test_refusals.py \
	    tests/runtime/test_buckets.py tests/wire/test_count.py \
	    tests/experiments/test_config.py

notebooks: $(DEV)
	$(BIN)/python -m bagua_jax.experiments.studies

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(DEV)
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

define install
@echo 'Installing bagua_jax[$(1)] into .venv. The first time takes a few minutes.'
$(BIN)/python -m pip install --quiet --editable '.[$(1)]'
endef

$(EXPERIMENTS): pyproject.toml | $(BIN)/pip
	$(call install,experiments)
	touch $@

$(DEV): pyproject.toml | $(BIN)/pip
	$(call install,dev)
	touch $(EXPERIMENTS) $@
