"""Docstrings and comments of the package are plain technical English: none of the words below, which say too little.

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
    """Return the docstrings and comments of a module, each with its line number."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            found.append((node.body[0].lineno, text))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found.append((token.start[0], token.string))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "ocrnet")))
def test_docstrings_and_comments_are_plain(path):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]}"
        for line, text in texts(path.read_text(encoding="utf-8"))
        if (match := WORDS.search(text)) and not match[0].isupper()  # a constant's name
    ]
    assert found == []


def test_a_word_of_the_list_is_found():
    found = texts('"""The user is told."""\nx = 1  # beside it\ny = "told"\n')
    assert [WORDS.search(text)[0] for _, text in found] == ["told", "beside"]
