# make run and make test are the commands to know; make help lists the others.
# Each makes what it needs: a virtual environment, with taskrun installed into it as a user
# would have it.  Another Python: make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Most tests wait for something most of the time.
AT_ONCE ?= 3

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test test-all lint types bench soak clean

bin := $(VENV)/bin
# A build/ folder left behind would bring deleted modules back.
install := rm -rf build && $(bin)/python -m pip install --quiet --disable-pip-version-check

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 16

run: $(VENV)/.installed ## a census of Python's standard library, on all cores
	$(bin)/taskrun exec examples/census/tasks.py $(ARGS)

test: $(VENV)/.installed $(VENV)/.test ## all the tests; ARGS="-k census" for some
	$(bin)/pytest --numprocesses $(AT_ONCE) --dist worksteal $(ARGS)

test-all: ## the tests on every Python 3.11, 3.12 and 3.13 of this machine
	@failed=; for version in 3.11 3.12 3.13; do \
	  python=$$($(find-python)) || { echo "no Python $$version here"; continue; }; \
	  echo "Python $$version: $$python"; \
	  $(MAKE) --no-print-directory test PYTHON=$$python VENV=.venv-$$version \
	    || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "failed on Python$$failed"; exit 1; }

lint: $(VENV)/.dev ## ruff: style and format
	$(bin)/ruff check
	$(bin)/ruff format --check

# From another folder: here the folder taskrun/ would be taken for the installed package,
# and taskrun.workers would not be found.
types: $(VENV)/.installed $(VENV)/.dev ## mypy --strict on taskrun and taskrun.workers
	@mkdir -p $(VENV)/types
	cd $(VENV)/types && $(abspath $(bin))/mypy --strict --package taskrun \
	  --config-file $(CURDIR)/pyproject.toml

bench: $(VENV)/.installed $(VENV)/.bench ## the benchmarks, minutes long
	$(bin)/python benchmarks/run.py $(ARGS)

soak: $(VENV)/.installed $(VENV)/.test ## a million simulated calls; all crashes, start methods, Pythons
	$(bin)/python benchmarks/core_scale.py $(ARGS)
	TASKRUN_SOAK=1 $(bin)/pytest tests/test_pool_crashes.py tests/test_known_bugs_pool.py \
	  tests/test_state_faults.py tests/conformance

clean: ## remove what the other commands made
	rm -rf .venv .venv-3.* build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# -- what they need -------------------------------------------------------------------

$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "taskrun needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# The folders too: they change when a module is removed.
sources := setup.cfg pyproject.toml \
  $(shell find taskrun workers -name '*.py' -o -type d ! -name __pycache__)

$(VENV)/.installed: $(sources) | $(bin)/python
	$(install) .
	@touch $@

$(VENV)/.test $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: setup.cfg | $(VENV)/.installed
	$(install) '.[$*]'
	@touch $@

# The first that starts, of PATH (a pyenv shim may be there and not start) and of pyenv's.
find-python = for python in python$$version \
  $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python; do \
  $$python -c '' 2>/dev/null && echo $$python && exit; done; exit 1
