# Everything works on a fresh machine with Python >= 3.11: each target first makes the environment it needs.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test test-all lint format docs notebooks lock wheel clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(STAMP)  ## Install the package and all tools into .venv

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.x"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: install  ## Pretrain and fine-tune a small model on real speech; see runs/quickstart/report.html
	$(BIN)/speechllm quickstart --output runs/quickstart

test: install  ## Run the fast tests (under 10 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: install  ## Run all tests, also those on real weights and speech
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"
	$(BIN)/python -m pytest -m slow

lint: install  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## Build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: install  ## Run the notebooks on the real small models, and keep their outputs (minutes)
	$(BIN)/speechllm fetch
	$(BIN)/python notebooks/execute.py notebooks/*.ipynb
	$(BIN)/ruff format notebooks

lock: $(STAMP)  ## Pin the newest versions that fit into requirements.lock
	$(BIN)/uv pip compile -q --universal --no-emit-index-url --all-extras --upgrade --output-file requirements.lock pyproject.toml

wheel: install  ## Build the wheel and import it in an empty environment
	rm -rf dist build
	$(BIN)/python -m build -q --wheel --no-isolation
	tests/check_wheel.sh dist/*.whl

clean:  ## Remove the environment and what runs left behind
	rm -rf $(VENV) runs dist build *.egg-info
