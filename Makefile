# `make demo` and `make test` need python3 (3.10 or newer) with venv and pip, and make the rest themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo
# processes that share the test files, one thread each: two are enough to halve the time, and as many ranks may join each
WORKERS ?= 2

.PHONY: demo test check format clean

demo: $(INSTALLED)
	$(BIN)/accelerate launch --config_file configs/accelerate/single.yaml train_llama.py --overwrite_output_dir true
	$(BIN)/python eval_zero_shot.py $(DEMO)/export --suite embedded --output $(DEMO)/zero_shot.json
	@echo "checkpoint  $(DEMO)/export"
	@echo "results     $(DEMO)/zero_shot.json"
	@echo "report      $(DEMO)/report.html"

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
