# make quickstart: train a small network on synthetic street scenes, in about three minutes; with STEPS=70 only a quick test.
# make test: everything that CI checks, in environments that it creates (it requires only Python 3.11 with venv and pip).
PYTHON ?= python3
# Modules are compiled at their first import, not at installation (--no-compile), because most are never imported. The bytecode is
# kept for the hundreds of processes of the tests.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := -m pip install --quiet --disable-pip-version-check --no-deps --no-compile
BIN := .venv/bin
CORE_BIN := .venv-core/bin

.PHONY: quickstart test test-long mutations lint types docs core engine fix clean

quickstart: .venv/run
	$(BIN)/python examples/quickstart.py $(if $(STEPS),--steps $(STEPS))

test:
	$(MAKE) -j3 lint types core
	$(MAKE) engine

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/codespell

types: .venv/ready
	$(BIN)/mypy

# Build the documentation in site/: a dead link or a missing page is an error.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Tests of the core, in an environment without a framework, with NumPy 2.
core: .venv-core/ready
	$(CORE_BIN)/python -m pytest tests/core -n 3 --dist worksteal

# All other tests, with both frameworks and NumPy 1.26: one thread per process, and more processes than cores, because some wait.
# MindSpore's tests run afterwards in other processes: its environment variables slow PyTorch down and change its rounding.
engine: export OMP_NUM_THREADS = 1
engine: .venv/both
	$(BIN)/python -m pytest tests --ignore tests/core --ignore tests/mindspore -m "not mindspore" -n 4 --dist worksteal
	$(BIN)/python -m pytest tests/contract tests/mindspore -m mindspore -n 3 --dist worksteal

# Also the slow tests, and the core with NumPy 1.26; not part of CI. docs/ascend.md has the results.
test-long: export OCRNET_TEST_LONG = 1
test-long: .venv/both
	$(BIN)/python -m pytest tests/core -n 3 --dist worksteal
	$(MAKE) engine

# Break each marked safety mechanism in a copy and require that its test fails: about an hour. docs/reliability.md has the results.
mutations: .venv/both
	$(BIN)/python tests/mutations.py --jobs 2 --table

fix: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The lock file omits the CUDA packages, so a CUDA build of PyTorch cannot be imported; the message below gives the remedy.
.venv/run: requirements-run.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) -r requirements-run.lock
	$(BIN)/python $(INSTALL) -e .
	@$(BIN)/python -c "import torch" || { echo "PyTorch cannot be imported: install its CPU build from PyTorch's CPU index \
	(the selector on pytorch.org shows its address): make clean; PIP_EXTRA_INDEX_URL=ADDRESS make quickstart"; exit 1; }
	touch $@

# The next environments are not needed for the quick start: tools, test servers, and MindSpore (gigabytes).
.venv/ready: .venv/run requirements-dev.lock
	$(BIN)/python $(INSTALL) -r requirements-dev.lock
	touch $@

.venv/mindspore: .venv/run requirements-mindspore.lock
	$(BIN)/python $(INSTALL) -r requirements-mindspore.lock
	touch $@

.venv/both: .venv/ready .venv/mindspore
	touch $@

.venv-core/ready: requirements-core.lock pyproject.toml
	$(PYTHON) -m venv .venv-core
	$(CORE_BIN)/python $(INSTALL) -r requirements-core.lock
	$(CORE_BIN)/python $(INSTALL) -e .
	touch $@

clean:
	rm -rf .venv .venv-core quickstart build site *.egg-info .mypy_cache .ruff_cache
