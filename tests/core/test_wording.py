"""Names, docstrings, comments, messages and pages are plain technical English, without the words below.

What each should be instead is usually the standard term: logged or printed for "told" and "said", next to or besides for
"beside", only for "alone", continues or resumes for "goes on", missing for "not at hand", inspect or predict for "look at",
prediction or response for "answer", failure or error for "fault", ground truth for "truth". Chinese pages are exempt.
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
    r"\b(told|tells?|telling|says?|said|saying|anew|mend(s|ed|ing)?|hindrances?|nobody|wish(es|ed)?|as though|at hand"
    r"|go(es)? on|going on|look(s|ed|ing)? (at|through)|beside|stands? (in )?for|hurts?|swallow(s|ed)?|doors?|rooms?"
    r"|what is there|alone|answer(s|ed)?|faults?|(?<!ground )(?<!ground-)truths?)\b",
    re.IGNORECASE,
)
# The parts of a name between its underscores.
NAMES = frozenset(
    "told tell tells said says saying anew mend mends nobody beside hindrance wish wishes hurt hurts swallow swallows"
    " alone look looks answer answers fault faults door room truths".split()
)
ALLOWED = {
    "tests/core/test_wording.py": WORDS.pattern,  # the list itself
}
PYTHON = [ROOT / "train.py", ROOT / "eval.py"]
PYTHON += sorted(path for folder in ("ocrnet", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "benchmarks/README.md"]
PAGES += sorted(path for path in (ROOT / "docs").glob("*.md") if not path.stem.endswith("_cn"))
PAGES += sorted((ROOT / "config").rglob("*.yml")) + sorted((ROOT / "ocrnet").rglob("*.js"))


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts(source: str) -> list[tuple[int, str]]:
    """Return the strings and comments of a module, each with its line number."""
    nodes = ast.walk(ast.parse(source))
    found = [(n.lineno, n.value) for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found.append((token.start[0], token.string))
    return found


def names(source: str) -> list[tuple[int, str]]:
    """Return the identifiers of a module, each with its line number."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(t.start[0], t.string) for t in tokens if t.type == tokenize.NAME and not keyword.iskeyword(t.string)]


def unplain(path: Path) -> list[str]:
    """Return what is not worded plainly in a file, as "path:line: word"."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        parts, identifiers = list(enumerate(source.splitlines(), 1)), []
    else:
        parts, identifiers = texts(source), names(source)
    found = [(line, match[0]) for line, text in parts for match in WORDS.finditer(text) if not match[0].isupper()]
    found += [(line, name) for line, name in identifiers if NAMES & set(name.lower().split("_"))]
    return [f"{shown(path)}:{line}: {word}" for line, word in sorted(found)]


@pytest.mark.parametrize("path", [path for path in PYTHON + PAGES if shown(path) not in ALLOWED], ids=shown)
def test_a_file_is_worded_plainly(path):
    assert unplain(path) == []


def test_a_word_of_the_list_is_found(tmp_path):
    module = tmp_path / "module.py"
    module.write_text('"""The user is told."""\nx_told = 1  # beside it\ny = "anew"\nground_truth = "the ground truth"\n')
    text = module.read_text()
    assert [match[0] for _, part in texts(text) if (match := WORDS.search(part))] == ["told", "anew", "beside"]
    assert [name for _, name in names(text) if NAMES & set(name.split("_"))] == ["x_told"]
