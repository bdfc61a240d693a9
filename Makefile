# make demo          fine-tune a real 135M-parameter Llama on this machine (no GPU needed)
# make test          lint, types and all tests
# Both first make .venv and install everything into it, with the versions of constraints.txt.
# make test-oldest   all tests on the oldest versions that pyproject.toml promises (constraints-oldest.txt), in .venv-oldest
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-oldest lint format clean

demo: .venv/.installed
	$(BIN)/python tools/demo.py

test: .venv/.installed lint
	$(BIN)/python -m pytest

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check -c constraints-oldest.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-oldest .mypy_cache .pytest_cache .ruff_cache build *.egg-info
