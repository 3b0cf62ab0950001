"""Docstrings, comments and messages of the package are plain technical English, without the words below.

What each should be instead is usually the standard term: logged or printed for "told", next to or besides for "beside",
only for "alone", continues or resumes for "goes on", missing for "not at hand", inspect or predict for "look at".
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "ocrnet").rglob("*.py"))
WORDS = re.compile(
    r"\b(told|tells?|anew|mend(s|ed|ing)?|hindrances?|nobody|wish(es)?|as though|at hand|go(es)? on"
    r"|look(s|ed|ing)? (at|through)|beside|stands? (in )?for|hurts?|swallow(s|ed)?|doors?|what is there)\b",
    re.IGNORECASE,
)


def texts(source: str) -> list[tuple[int, str]]:
    """Return the strings and comments of a module, each with its line number."""
    nodes = ast.walk(ast.parse(source))
    found = [(n.lineno, n.value) for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found.append((token.start[0], token.string))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "ocrnet")))
def test_a_module_is_worded_plainly(path):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]}"
        for line, text in texts(path.read_text(encoding="utf-8"))
        if (match := WORDS.search(text)) and not match[0].isupper()  # a constant's name
    ]
    assert found == []


@pytest.mark.parametrize("page", ["design.md", "decisions.md"])
def test_a_page_is_worded_plainly(page):
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    assert [f"{page}:{number}: {line}" for number, line in enumerate(lines, 1) if WORDS.search(line)] == []


def test_a_word_of_the_list_is_found():
    found = texts('"""The user is told."""\nx = 1  # beside it\ny = "anew"\nz = "new"\n')
    assert [match[0] for _, text in found if (match := WORDS.search(text))] == ["told", "anew", "beside"]
