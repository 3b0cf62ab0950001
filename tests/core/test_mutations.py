"""Every mutation of tests/mutations.py applies to a marked statement, and its test exists."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("mutations", ROOT / "tests/mutations.py")
assert SPEC is not None
mutations = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutations)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_applies(mutation):
    changed, text = mutations.mutated(mutation)
    compile(text, str(changed), "exec")
    path, _, name = mutation.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()


def test_every_marker_has_a_mutation():
    names = [mutation.name for mutation in mutations.MUTATIONS]
    assert len(set(names)) == len(names)
    assert set(mutations.markers()) == set(names)


def test_an_operator_that_does_not_apply_is_an_error():
    with pytest.raises(ValueError, match="no marker"):
        mutations.mutated(mutations.Mutation("no-such-name", mutations.delete, ""))
    with pytest.raises(ValueError, match="matches 0 times"):
        mutations.mutated(mutations.MUTATIONS[0]._replace(operator=mutations.edit("no such text", "")))
