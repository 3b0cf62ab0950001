"""The texts that tests/mutations.py takes out still stand in their files, and its tests exist."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("mutations", ROOT / "tests/mutations.py")
assert SPEC is not None
mutations = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutations)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.mechanism)
def test_a_mutation_still_fits(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    path, _, name = mutation.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()
