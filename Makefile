# Two commands do everything on a fresh machine: `make demo` and `make test`.
# PYTHON names the interpreter that the virtual environment is made with (3.11 or later).

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test check format clean

help:
	@echo "make demo    set up, search a plan for Llama-2-7B on 2x8 GPUs, train a tiny Llama by a found plan"
	@echo "make test    set up, run all tests"
	@echo "make check   set up, run formatter, linter, type checker, import contracts, spelling"
	@echo "make format  set up, format and fix what can be fixed"
	@echo "make clean   remove what the above made"

setup: $(READY)

# The stamp is written last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed; name one: make setup PYTHON=python3.11" >&2; exit 4; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
	  || { echo "cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 4; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(READY)

demo: setup
	$(BIN)/python -m galvatron_jax.search --mesh 2x8 --model llama2-7b --gpu h100
	$(BIN)/python -m galvatron_jax.search --mesh 1x8 --gpu cpu --model llama-tiny --seq 128 --global-batch 32 \
	  --out configs/llama_tiny.json
	$(BIN)/python examples/llama/train.py --model llama-tiny --devices 8 --seq 128 --global-batch 32 \
	  --plan configs/llama_tiny.json

# Plain pytest leaves the slow tests out; the last -m puts them back.
test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) -m "slow or not slow"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
