# make quickstart: a small network trained on made-up street scenes, in about three minutes; STEPS=70 only shows that it runs.
# make test: everything that CI checks, in environments that it makes itself (Python 3.11 with venv and pip is enough).
PYTHON ?= python3
BIN := .venv/bin
CORE_BIN := .venv-core/bin

.PHONY: quickstart test test-long lint types docs core engine fix clean

quickstart: .venv/ready
	$(BIN)/python examples/quickstart.py $(if $(STEPS),--steps $(STEPS))

test: lint types core engine

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell

types: .venv/ready
	$(BIN)/mypy

# The documentation as a site, in site/: a dead link or a missing page is an error.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The core, in an environment that has no framework, on NumPy 2.
core: .venv-core/ready
	$(CORE_BIN)/python -m pytest tests/core -n 3 --dist worksteal

# Everything else, with both frameworks, on NumPy 1.26. One thread a process, and a third one for when one waits. MindSpore's
# tests come after, apart: what it must find in the environment would slow PyTorch down and change its rounding.
engine: .venv/both
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/mindspore -m "not mindspore" -n 3 --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/contract tests/mindspore -m mindspore -n 2

# The slow cases too: run by hand, results in docs/ascend.md.
test-long: export OCRNET_TEST_LONG = 1
test-long: engine

fix: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The lock takes PyTorch without what CUDA needs, so a CUDA build does not even load; the last line says what then helps.
.venv/ready: requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@$(BIN)/python -c "import torch" || { echo "PyTorch does not load: take its CPU build, from PyTorch's CPU index \
	(the selector on pytorch.org shows its address): make clean; PIP_EXTRA_INDEX_URL=ADDRESS make quickstart"; exit 1; }
	touch $@

# MindSpore comes on top, because the quick start does without its gigabytes.
.venv/both: .venv/ready requirements-mindspore.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-mindspore.lock
	touch $@

.venv-core/ready: requirements-core.lock pyproject.toml
	$(PYTHON) -m venv .venv-core
	$(CORE_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-core.lock
	$(CORE_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf .venv .venv-core quickstart build site *.egg-info .mypy_cache .ruff_cache
