# make demo   optimize an example model and show the result
# make test   all checks and all tests
# make docs   write docs/remarks from the table of remarks
# make zoo    every architecture in every form, as a table, with docs/zoo.md (MODELS="llama bert": some of them)
# make bench-gpu  kernels and whole models on a CUDA device, side by side with what else is installed (about 45 minutes)
# make property  two thousand random attention programs, each judged by an exhaustive evaluation (PROGRAMS=500: as many)
# make mutation  every guard of the analysis removed in turn, and the test that must notice
#
# All work on a fresh machine with Python 3.11 or newer, git and make: they build .venv with the pinned versions of
# constraints.txt, and build it again only when constraints.txt or pyproject.toml changes.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check lint types layers pytest zoo zoo-page property mutation bench bench-gpu docs clean

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/.stamp-demo
	$(BIN)/attnopt optimize examples/llama.py

# The tests come last, so that the output ends in pytest's own closing line.
test: check pytest

check: lint types layers

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check attnopt tests examples benchmarks tools

types: $(VENV)/.stamp-dev
	$(BIN)/mypy

layers: $(VENV)/.stamp-dev
	$(BIN)/lint-imports

pytest: $(VENV)/.stamp-dev $(VENV)/.stamp-triton-3.6
	$(BIN)/pytest -q -n $(JOBS)

# A run of all models writes benchmarks/results/zoo.json and docs/zoo.md.
zoo: $(VENV)/.stamp-dev
	cd tests && ../$(BIN)/python -m zoo --jobs $(JOBS) $(MODELS)

zoo-page: $(VENV)/.stamp-dev
	cd tests && ../$(BIN)/python -m zoo.page

property: $(VENV)/.stamp-dev
	ATTNOPT_PROGRAMS=$(or $(PROGRAMS),2000) $(BIN)/pytest -q -p no:xdist -m slow tests/property

mutation: $(VENV)/.stamp-dev
	$(BIN)/pytest -q -p no:xdist -m slow tests/mutation

bench: $(VENV)/.stamp-dev
	$(BIN)/python benchmarks/optimize_time.py
	$(BIN)/python benchmarks/cpu_speed.py

# Results and a picture go to benchmarks/results; tools/gpu_tables.py prints the README's tables from them.
bench-gpu: $(VENV)/.stamp-dev
	$(BIN)/python benchmarks/kernels.py --budget 100000
	$(BIN)/python benchmarks/models.py --budget 100000
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[report]'
	$(BIN)/python benchmarks/plot.py

docs: $(VENV)/.stamp-dev
	$(BIN)/python tools/remark_pages.py

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"attnopt needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]} (choose another with PYTHON=...)")'
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# The Hopper kernels are compiled for this version too.
$(VENV)/.stamp-triton-3.6: $(VENV)/.stamp-venv
	@echo "Installing Triton 3.6 beside the pinned one, into $(VENV)/triton-3.6"
	@$(BIN)/python -m pip install -qq --no-deps --target $(VENV)/triton-3.6 triton==3.6.0
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@echo "Installing attnopt and its dependencies into $(VENV) (the first time this takes a few minutes)"
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@echo "Installing attnopt with everything that its tests need into $(VENV) (the first time this takes a few minutes)"
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	@# It asks for torchvision, which its models do not need, and which breaks transformers where its build is not that of torch.
	@$(BIN)/python -m pip install -qq --no-deps --constraint constraints.txt vit-pytorch
	@touch $@ $(VENV)/.stamp-demo

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
