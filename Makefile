# What people do with this project. Every target can be interrupted and run again.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(shell cat requirements/cpu.lock pyproject.toml 2>/dev/null | sha256sum | cut -c1-16)
DEMO_OUTPUT ?= runs/demo
TEST_ARGS ?=
GPU_PLATFORM := --python-platform x86_64-manylinux_2_28

.PHONY: help install demo test test-slow test-gpu lint format lock-gpu clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## Make .venv with exactly the versions of requirements/cpu.lock

$(STAMP):
	@echo "== making $(VENV) (about 4 GB; 2 to 5 minutes) =="
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	rm -f $(VENV)/installed-*
	touch $@

demo: install  ## Corpus to checkpoint to scores to tokens per second, in about ten minutes
	$(BIN)/tinyllama demo --output $(DEMO_OUTPUT)

test: install  ## The whole test suite, as CI runs it; TEST_ARGS="tests/data -x" for a part of it
ifeq ($(TEST_ARGS),)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not alone"
	$(BIN)/python -m pytest -m "alone and not slow"
else
	$(BIN)/python -m pytest $(TEST_ARGS)
endif

test-slow: install  ## What takes minutes and most of the memory: one step of the whole 1.1B recipe on a CPU
	$(BIN)/python -m pytest -m slow --timeout=1800

test-gpu:  ## What needs one GPU, in the environment of $(PYTHON): PYTHON=.venv-gpu/bin/python make test-gpu
	$(PYTHON) -m pytest tests/gpu -m gpu

lint: install  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# setuptools: vLLM wants it below 81 on Python 3.12 alone; held there, one file does for 3.11 and 3.12, as the second line proves.
lock-gpu: install  ## Resolve '.[gpu]' anew into requirements/gpu.lock (reads metadata; installs nothing but uv, for the moment)
	work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && \
	$(BIN)/python -m pip install --quiet --target "$$work" uv && echo 'setuptools<81' > "$$work/constraints" && \
	resolve="$$work/bin/uv pip compile --no-config --quiet --no-header --no-annotate --extra gpu $(GPU_PLATFORM) pyproject.toml" && \
	$$resolve --python-version 3.11 --constraints "$$work/constraints" --output-file "$$work/lock" && \
	$$resolve --python-version 3.12 --constraints "$$work/lock" --output-file "$$work/3.12" && cmp "$$work/lock" "$$work/3.12" && \
	{ grep '^#' requirements/gpu.lock; cat "$$work/lock"; } > "$$work/whole" && cp "$$work/whole" requirements/gpu.lock

clean:  ## Remove the environment and what the demo made
	rm -rf $(VENV) $(DEMO_OUTPUT)
