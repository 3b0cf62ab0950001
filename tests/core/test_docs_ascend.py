"""docs/ascend.md and docs/ascend_cn.md: one set of commands whose flags exist, and tests and messages that exist."""

import re
import shlex
from pathlib import Path

import pytest

from ocrnet.cli import flags, main

ROOT = Path(__file__).parents[2]
PAGES = ("docs/ascend.md", "docs/ascend_cn.md")
OURS = re.compile(r"(?:\b(train|eval)\.py|\bocrnet (\w+)) ([^&\n]*)")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)


def messages(page: str) -> list[str]:
    return re.findall(r'^\*\*"(.+)"\*\*', text(page), re.MULTILINE)


def test_both_languages_have_the_same_commands_tests_and_messages():
    english, chinese = PAGES
    assert blocks(english) == blocks(chinese)
    assert messages(english) == messages(chinese)
    assert re.findall(r"`(test_\w+)`( †)?", text(english)) == re.findall(r"`(test_\w+)`( †)?", text(chinese))


def test_commands_have_flags_and_configs_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = 0
    for _, block in (block for block in blocks(PAGES[0]) if block[0] == "shell"):
        for script, command, rest in OURS.findall(block.replace("\\\n", " ")):
            args = flags.parse(script or command, shlex.split(rest))
            assert (script or command) in main.COMMANDS
            if "config" in args.options:
                flags.load_config(args)
            found += 1
    assert found >= 12


def test_every_test_that_is_named_exists():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text(PAGES[0])))
    assert len(named) > 20
    assert {name for name in named if f"def {name}(" not in source} == set()


def test_every_message_that_is_quoted_is_in_the_code():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "ocrnet").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a text over several lines
    quoted = messages(PAGES[0])
    assert len(quoted) > 15
    assert [part for message in quoted for part in message.split("...") if part.strip() not in source] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", text(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], anchor
