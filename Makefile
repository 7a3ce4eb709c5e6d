# Works on a fresh machine with Python 3.11+ and make: the first target makes its own environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test lint types bench clean help

help:
	@echo "make demo    fit the built-in model to 8, 4 and 2 bits (no download)"
	@echo "make test    tests and doctests"
	@echo "make lint    ruff and mypy"
	@echo "make bench   the benchmark behind the README's table (needs the data in QUANTAILOR_DATA)"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/quantailor demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations 15

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python bench/fit_quality.py stories260k --steps 240 --out bench/results/fit_stories260k.json
	$(BIN)/python bench/fit_quality.py tinystories-llama-4m --steps 120 --out bench/results/fit_tinystories-llama-4m.json
	$(BIN)/python bench/sst2.py --out bench/results/sst2.json
	$(BIN)/quantailor demo --json --quiet > bench/results/demo.json
	$(BIN)/python scripts/render_tables.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
