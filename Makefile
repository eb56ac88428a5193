# The two commands of the README are `make demo` and `make test`. They need git, GNU make and Python 3.11 or newer, no root.
#
#   make VENV=/tmp/venv test        another place for the virtual environment
#   make PYTHON=python3.12 test     another Python to make it with
#   make TEST_ARGS='-k rules' test-unit

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
FLOORS ?= $(VENV)-floors
BIN := $(VENV)/bin
TEST_ARGS ?=
# As many test workers as cores, up to 4, each with one thread: torch's threads would compete for the cores.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))')
RECIPE := recipes/resnet_fmnist.yaml
RUN := runs/resnet_fmnist

.DEFAULT_GOAL := help
.PHONY: help demo check test test-all test-fast test-unit test-dist test-long test-gpu test-floors test-slurm test-chaos test-hosts test-xla lint format \
  wheel constraints clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

# --- The environment: made when missing, updated when pyproject.toml or constraints.txt changed -----------------------

$(VENV)/.tlscale: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tlscale needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; say which: make PYTHON=python3.12 ...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing tlscale and its dependencies; the first time that is several GB on Linux, torch's CUDA libraries included."
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.tlscale-dev: $(VENV)/.tlscale
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# --- The README's first command ---------------------------------------------------------------------------------------

demo: $(VENV)/.tlscale ## fine-tune the ResNet that ships with tlscale on Fashion-MNIST, from nothing to a model in runs/
	bash scripts/get_fashion_mnist.sh
	$(BIN)/tlscale run $(RECIPE) --resume
	@echo
	@echo "Figures:  $(RUN)/result.json"
	@echo "Model:    $(RUN)/model/  (tlscale.load('$(RUN)') loads it)"
	@echo "Log:      $(RUN)/metrics.jsonl"
	@echo "A second 'make demo' resumes from the last checkpoint; to start again, remove $(RUN)/."

# --- The README's second command, and its parts -----------------------------------------------------------------------

test: lint test-all ## everything that needs no special machine: lint, types, layers, tests

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=10
# A file to a worker, in the order of their names: tests/dist and tests/jobs have the longest, and nobody waits for a long
# one in the end (xdist's own order puts files of few tests last, which are these).
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: lint test-fast ## before each commit: lint, types, import contract and the fast tests, in under 90 s on 2 cores

test-fast: $(VENV)/.tlscale-dev
	$(PYTEST) $(PARALLEL) -m 'not slow and not dist and not long' tests/unit $(TEST_ARGS)

test-all: $(VENV)/.tlscale-dev
	bash scripts/get_fashion_mnist.sh
	$(PYTEST) $(PARALLEL) -m 'not long' $(TEST_ARGS)

test-unit: $(VENV)/.tlscale-dev ## only the tests in one process
	$(PYTEST) $(PARALLEL) -m 'not dist and not long' tests $(TEST_ARGS)

test-dist: $(VENV)/.tlscale-dev ## all tests with several processes, those that are too long for `make test` as well
	$(PYTEST) -m dist tests $(TEST_ARGS)

test-long: $(VENV)/.tlscale-dev ## exhaustive tests in one process, of which `make test` runs a sample
	$(PYTEST) $(PARALLEL) -m 'long and not dist' tests/unit tests/jobs $(TEST_ARGS)

test-slurm: $(VENV)/.tlscale-dev ## launch/slurm.sbatch under a real Slurm on this machine (Debian, root)
	bash scripts/get_slurm.sh
	$(PYTEST) -m long tests/slurm $(TEST_ARGS)

# Where there is a GPU; elsewhere they are skipped.
test-gpu: $(VENV)/.tlscale-dev ## the tests of a GPU, on a machine that has one (scripts/gpu_kit.sh: where there is no network)
	$(PYTEST) -m gpu tests/gpu $(TEST_ARGS)

# In an environment of its own. What only checks the code (linters) is left out: it asks for newer versions of the same.
test-floors: ## the fast tests on the lowest versions that pyproject.toml allows; the first time that is several GB
	test -x $(FLOORS)/bin/pip || $(PYTHON) -m venv $(FLOORS)
	$(PYTHON) scripts/floors.py > $(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pip install --quiet -c $(FLOORS)/floors.txt -e '.[tensorboard,heif,export]' pytest pytest-timeout pytest-xdist hypothesis jsonschema
	$(MAKE) --no-print-directory BIN=$(FLOORS)/bin -o $(VENV)/.tlscale-dev test-fast

# Those that take minutes, and are not in `make test`.

test-chaos: $(VENV)/.tlscale-dev ## kill runs at every fault point and check that nothing is lost (TLSCALE_CHAOS_SEED=... repeats one)
	$(PYTEST) tests/chaos $(TEST_ARGS)

test-hosts: $(VENV)/.tlscale-dev ## two hosts as network namespaces (root and iproute2)
	command -v ip >/dev/null || apt-get install -y iproute2
	$(PYTEST) tests/hosts $(TEST_ARGS)

lint: $(VENV)/.tlscale-dev ## ruff, its formatter as a check, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.tlscale-dev ## let ruff repair and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --- Targets that are not in `make test` ------------------------------------------------------------------------------

# In an environment of its own (docs/xla.md), which the script makes where it is missing. Programs for the CPU are not
# optimised: to compile them takes most of the time.
test-xla: ## the XLA (TPU) path on this machine's CPU, in an environment with torch_xla; the first time that is several GB
	xla=$$(PYTHON=$(PYTHON) scripts/make_xla_env.sh); \
	  export XLA_FLAGS='--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'; \
	  PJRT_DEVICE=CPU PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 "$$xla/bin/python" -m pytest --durations=10 tests/xla $(TEST_ARGS)

# --- Less often -------------------------------------------------------------------------------------------------------

wheel: $(VENV)/.tlscale ## dist/tlscale-*.whl, with the recipes, the sample of images and the weights in it
	rm -f dist/tlscale-*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@for part in $(RECIPE:recipes/%=tlscale/_recipes/%) tlscale/py.typed tlscale/data/sample/ tlscale/weights/resnet10t.safetensors; do \
	  $(BIN)/python -m zipfile -l dist/tlscale-*.whl | grep "^$$part" >/dev/null || { echo "the wheel lacks $$part" >&2; exit 1; }; \
	done
	@ls dist/tlscale-*.whl

constraints: $(VENV)/.tlscale-dev ## write constraints.txt from what is installed in $(VENV)
	@{ sed -n '/^#/p' constraints.txt; \
	   $(BIN)/python -m pip freeze --exclude-editable \
	   | grep -v '^setuptools=' | sed -E '/^(nvidia-|cuda-|triton=)/ s/$$/ ; sys_platform == "linux"/'; } > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean: ## remove what was built (not .venv, not runs/)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './.git/*' -prune -exec rm -rf {} +
