# Every target builds what it needs in .venv. Torch is installed first and pinned, so that no other package chooses a build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CHECKED := src tests examples benchmarks recipes
BENCHMARKS := import_time first_picture pictures parts optimisations loras overhead growth memory

.PHONY: demo test check bench docs

demo: $(VENV)/.run  ## paint "a red fox" with and without the LCM-LoRA; the last line is the picture's path
	@$(BIN)/python examples/demo.py

# A part of the suite, chosen by ARGS, need not cover the whole package.
test: $(VENV)/.test  ## the whole test suite; fails when less than 90 % of the lines run
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term $(or $(ARGS),--cov-fail-under=90)

docs: $(VENV)/.test  ## only the tests that hold the documentation to the truth
	$(BIN)/python -m pytest tests/docs $(ARGS)

check: $(VENV)/.dev  ## style, types and the direction of imports
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(VENV)/.bench  ## all benchmarks against the peers, hours; tables in benchmarks/results/. ARGS=--tiny is a trial
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py $(ARGS) || exit 1; done

# Stamp files, one for each set of packages.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable .
	touch $@

# Dependency groups (PEP 735) need pip 25.1.
$(VENV)/.test: $(VENV)/.run
	$(PIP) "pip>=25.1"
	$(PIP) --group test
	touch $@

# StreamDiffusion pins an old diffusers, and runs with the present one. stable-diffusion.cpp needs a compiler; without it
# the tables say that it is not there.
$(VENV)/.bench: $(VENV)/.test
	$(PIP) --group bench
	$(PIP) --no-deps streamdiffusion
	-$(PIP) --group bench-cpp
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --group dev
	touch $@
