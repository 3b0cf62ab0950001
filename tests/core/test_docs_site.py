"""The documentation: the messages it quotes exist, its examples work, and every page is in the navigation."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from ocrnet.data.image_io import read_label, write_png

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def source_strings() -> list[str]:
    """Return every string in the source, with … for each replacement field of an f-string."""
    strings = []
    for path in (ROOT / "ocrnet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                strings.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return strings


def quoted_messages() -> list[str]:
    rows = [line for line in (DOCS / "errors.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def occurs(message: str, sources: list[str]) -> bool:
    """Return whether the parts between the … occur in one string of the source, in this order."""
    parts = [part.strip() for part in message.split("…") if part.strip(" ;:,.'()")]
    pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(source) for source in sources)


def test_every_quoted_message_is_in_the_source():
    sources, messages = source_strings(), quoted_messages()
    assert len(messages) >= 40
    assert [message for message in messages if not occurs(message, sources)] == []
    assert not occurs("save_dir '…' holds no checkpoints of an earlier run", sources)


def test_the_documented_color_conversion_works(tmp_path, monkeypatch):
    (block, _) = re.findall(r"^```python\n(.*?)^```", (DOCS / "own_data.md").read_text(encoding="utf-8"), re.M | re.S)
    image = np.array([[(128, 64, 128), (70, 130, 180), (1, 2, 3)]], np.uint8)
    write_png(tmp_path / "mydata/colors/train/a.png", image)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert read_label(tmp_path / "mydata/labels/train/a.png").tolist() == [[0, 2, 255]]


def navigation() -> list[str]:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)

    def pages(node: list) -> list[str]:
        values = [value for entry in node for value in entry.values()]
        return [page for value in values for page in (pages(value) if isinstance(value, list) else [value])]

    return pages(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"])


def test_every_page_is_in_the_navigation_of_mkdocs_yml():
    pages = navigation()
    assert sorted(path.name for path in DOCS.glob("*.md") if path.name not in pages) == []
    assert len(set(pages)) == len(pages)


@pytest.mark.parametrize(("english", "chinese"), [("quickstart", "quickstart_cn"), ("ascend", "ascend_cn")])
def test_both_languages_have_the_same_commands(english, chinese):
    def commands(name: str) -> list[str]:
        return re.findall(r"^```shell\n(.*?)^```", (DOCS / f"{name}.md").read_text(encoding="utf-8"), re.M | re.S)

    assert commands(english) == commands(chinese)
