# make quickstart: a small network trained on made-up street scenes, in about three minutes; STEPS=70 only shows that it runs.
# make test: everything that CI checks, in environments that it makes itself (Python 3.11 with venv and pip is enough).
PYTHON ?= python3
# Most of what is installed is never imported; what is gets compiled then, and kept for the next of hundreds of processes.
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

# The documentation as a site, in site/: a dead link or a missing page is an error.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The core, in an environment that has no framework, on NumPy 2.
core: .venv-core/ready
	$(CORE_BIN)/python -m pytest tests/core -n 3 --dist worksteal

# Everything else, with both frameworks, on NumPy 1.26. One thread a process, and more of them for when some wait. MindSpore's
# tests come after, apart: what it must find in the environment would slow PyTorch down and change its rounding.
engine: export OMP_NUM_THREADS = 1
engine: .venv/both
	$(BIN)/python -m pytest tests --ignore tests/core --ignore tests/mindspore -m "not mindspore" -n 4 --dist worksteal
	$(BIN)/python -m pytest tests/contract tests/mindspore -m mindspore -n 3 --dist worksteal

# The slow cases too, and the core on NumPy 1.26: run by hand, results in docs/ascend.md.
test-long: export OCRNET_TEST_LONG = 1
test-long: .venv/both
	$(BIN)/python -m pytest tests/core -n 3 --dist worksteal
	$(MAKE) engine

# Breaks each marked safety mechanism in a copy and requires that its test fails: about an hour, results in docs/reliability.md.
mutations: .venv/both
	$(BIN)/python tests/mutations.py --jobs 2 --table

fix: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The lock takes PyTorch without what CUDA needs, so a CUDA build does not even load; the last line says what then helps.
.venv/run: requirements-run.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) -r requirements-run.lock
	$(BIN)/python $(INSTALL) -e .
	@$(BIN)/python -c "import torch" || { echo "PyTorch does not load: take its CPU build, from PyTorch's CPU index \
	(the selector on pytorch.org shows its address): make clean; PIP_EXTRA_INDEX_URL=ADDRESS make quickstart"; exit 1; }
	touch $@

# The quick start does without what these take: tools, servers to test with, and the gigabytes of MindSpore.
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
