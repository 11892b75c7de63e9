# `make demo` and `make test` need python3 (3.10 or newer) with venv and pip, and make the rest themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo

.PHONY: demo test check format clean

demo: $(INSTALLED)
	$(BIN)/accelerate launch train_llama.py
	$(BIN)/python eval_zero_shot.py $(DEMO)/export --suite embedded --output $(DEMO)/zero_shot.json
	@echo "checkpoint  $(DEMO)/export"
	@echo "results     $(DEMO)/zero_shot.json"
	@echo "figure      $(DEMO)/training.png"

test: check
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
