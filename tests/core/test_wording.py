"""Names, docstrings, comments, messages and pages are plain technical English, without the words below.

The standard terms replace them: logged or printed for "told" and "said", next to or besides for "beside", only for
"alone", continues or resumes for "goes on", missing for "not at hand", inspect or predict for "look at", prediction or
response for "answer", failure or error for "fault", ground truth for "truth". Chinese pages are exempt.
"""

import ast
import io
import keyword
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = re.compile(
    r"\b(told|tells?|telling|says?|said|saying|anew|mend(s|ed|ing)?|hindrances?|nobody|wish(es|ed)?|as though"
    r"|at hand|go(es)? on|going on|look(s|ed|ing)? (at|through)|beside|stands? (in )?for|hurts?|swallow(s|ed)?"
    r"|doors?|rooms?|what is there|alone|answer(s|ed)?|faults?|(?<!ground )(?<!ground-)truths?)\b",
    re.IGNORECASE,
)
# The parts of a name between its underscores.
NAMES = re.compile(
    r"(^|_)(told|tells?|sa(id|ys?|ying)|anew|mends?|nobody|beside|hindrance|wish(es)?|hurts?|swallows?|alone|looks?"
    r"|answers?|faults?|doors?|rooms?|truths)(_|$)"
)
# Proper uses: the list itself and the method of files.
EXEMPT = {"tests/core/test_wording.py"}
ALLOWED = {"tell"}
PYTHON = [ROOT / "train.py", ROOT / "eval.py"]
for folder in ("ocrnet", "tests", "benchmarks", "examples"):
    PYTHON += sorted((ROOT / folder).rglob("*.py"))
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "benchmarks/README.md")]
PAGES += sorted(path for path in (ROOT / "docs").glob("*.md") if not path.stem.endswith("_cn"))
PAGES += sorted((ROOT / "config").rglob("*.yml")) + sorted((ROOT / "ocrnet").rglob("*.js"))


def relative_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts(source: str) -> list[tuple[int, str]]:
    """Return the strings and comments of a module, each with its line number."""
    nodes = ast.walk(ast.parse(source))
    strings = [(n.lineno, n.value) for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            strings.append((token.start[0], token.string))
    return strings


def names(source: str) -> list[tuple[int, str]]:
    """Return the identifiers of a module, each with its line number."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(t.start[0], t.string) for t in tokens if t.type == tokenize.NAME and not keyword.iskeyword(t.string)]


def listed_words(path: Path) -> list[str]:
    """Return the words of the list in a file, as "path:line: word"."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        parts, identifiers = list(enumerate(source.splitlines(), 1)), []
    else:
        parts, identifiers = texts(source), names(source)
    found = [(line, match[0]) for line, text in parts for match in WORDS.finditer(text) if not match[0].isupper()]
    found += [(line, name) for line, name in identifiers if NAMES.search(name.lower()) and name not in ALLOWED]
    return [f"{relative_name(path)}:{line}: {word}" for line, word in sorted(found)]


@pytest.mark.parametrize(
    "path", [path for path in PYTHON + PAGES if relative_name(path) not in EXEMPT], ids=relative_name
)
def test_a_file_has_no_words_of_the_list(path):
    assert listed_words(path) == []


def test_words_of_the_list_are_found():
    source = '"""The user is told."""\nx_told = 1  # beside it\ny = "anew"\nground_truth = "the ground truth"\n'
    assert [match[0] for _, part in texts(source) if (match := WORDS.search(part))] == ["told", "anew", "beside"]
    assert [name for _, name in names(source) if NAMES.search(name)] == ["x_told"]
