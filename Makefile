# `make demo` and `make test` set up everything they need in .venv; a second call installs nothing.
# Needs Python 3.11 or newer and GNU make, 3.81 or newer (macOS's own).

# The PyTorch to install. On Linux without an NVIDIA GPU its CPU build is tried first, to save gigabytes of CUDA.
TORCH ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11 python3,$(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
# `make test-lowest` takes the oldest one, for which the oldest versions of the dependencies have wheels.
PYTHON_LOWEST ?= python3.11

VENV := .venv
VENV_LOWEST := .venv-lowest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
# Files for pip; `make test-lowest` names one.
CONSTRAINTS :=
CONSTRAIN = $(addprefix --constraint ,$(CONSTRAINTS))
OS := $(shell uname -s)
SHELL := /bin/bash

.PHONY: help demo test test-lowest lint format types bench clean

help:
	@echo "make demo    install the runtime, generate views of examples/portrait.png into out/demo"
	@echo "make test    install everything for development, run the linters and all tests"
	@echo "make test-lowest    run all tests with the oldest dependencies that pyproject.toml admits"
	@echo "make lint | format | types | bench | clean"

demo: $(VENV)/.runtime
	$(BIN)/mvmlx generate examples/portrait.png -o out/demo --force
	@echo "Look at out/demo/grid.png and out/demo/turntable.gif; the cameras are in out/demo/transforms.json"

test: $(VENV)/.dev lint types
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

test-lowest:
	@$(MAKE) VENV=$(VENV_LOWEST) PYTHON=$(PYTHON_LOWEST) CONSTRAINTS=$(VENV_LOWEST)/lowest.txt $(VENV_LOWEST)/.dev
	$(VENV_LOWEST)/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/pyright

bench: $(VENV)/.dev
	$(BIN)/mvmlx benchmark $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(VENV_LOWEST) out/demo dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "mvmlx needs Python 3.11 or newer, and found none as: $(or $(PYTHON),python3.13 python3.12 python3.11 python3)." \
		"Install one, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { echo "$(PYTHON) cannot make virtual environments (Debian: apt install python3-venv)" >&2; exit 1; }
	@touch $@

$(VENV)/lowest.txt: $(VENV)/.created pyproject.toml tests/lowest.py
	@$(PIP) packaging
	@$(BIN)/python tests/lowest.py >$@.tmp
	@mv $@.tmp $@

# Alone on macOS, MLX comes with the package. Without its dependencies, PyTorch needs nothing else from the CPU index; they
# come with the second call, which finds PyTorch already there.
$(VENV)/.runtime: $(VENV)/.created $(CONSTRAINTS) pyproject.toml
ifeq ($(OS),Darwin)
	@echo "Installing mvmlx and MLX into $(VENV)"
	@$(PIP) $(CONSTRAIN) --editable .
else
	@command -v nvidia-smi >/dev/null || { \
		echo "No nvidia-smi: trying the CPU build of PyTorch first"; \
		$(PIP) --no-deps --index-url $(TORCH_CPU_INDEX) --timeout 5 --retries 0 "$(TORCH)" 2>/dev/null \
		|| echo "$(TORCH_CPU_INDEX) does not answer: taking PyTorch from the default index"; }
	@echo "Installing mvmlx and PyTorch into $(VENV) (minutes, the first time)"
	@$(PIP) $(CONSTRAIN) "$(TORCH)" --editable .
endif
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing what development needs into $(VENV) (minutes, the first time)"
	@$(PIP) $(CONSTRAIN) "$(TORCH)" --editable ".[cpu,dev,torch]"
	@touch $@
