# Two commands on a fresh machine: `make demo` (a video from a prompt) and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PROMPT ?= A large red star floats upwards on a beige background.

.PHONY: help setup demo test test-long check format docs clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The stamp makes set-up run again exactly when what it installs has changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ospnext needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@echo 'installing into $(VENV): a few minutes, most of them for torch'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.installed ## create .venv and install ospnext into it

demo: setup ## make a video from a prompt with the embedded model
	$(BIN)/ospnext generate --prompt "$(PROMPT)"

test: setup ## the test suite (a few minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-long: setup ## what takes longer; writes docs/test-long.txt
	bash -o pipefail -c '$(BIN)/python -m pytest -n 2 -m long -o console_output_style=classic | tee docs/test-long.txt'

check: setup ## lint, format, floors and types in one go
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: setup ## apply the formatter and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## write docs/configuration.md from the configuration classes
	$(BIN)/python docs/make_configuration.py

clean: ## remove what the commands above have made
	rm -rf $(VENV) outputs dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
