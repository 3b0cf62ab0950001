"""docs/weights.md: its commands are valid, and its tables have every family and every target of convert."""

import re
import shlex
from pathlib import Path

from ocrnet import weights
from ocrnet.cli import flags
from ocrnet.weights import to_foreign

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/weights.md").read_text(encoding="utf-8")


def test_commands_have_flags_that_exist():
    commands = re.findall(r"^ocrnet convert (.*)$", TEXT, re.MULTILINE)
    assert len(commands) > 8
    for command in commands:
        options = flags.parse("convert", shlex.split(command)).options
        target = to_foreign.target(options["to"]) if "to" in options else None
        assert options["output"].endswith(target.suffix if target else ".safetensors")


def test_every_family_and_every_target_has_a_row():
    rows = [line.split("|")[1].strip() for line in TEXT.splitlines() if line.startswith("| ")]
    for family in weights.FAMILIES:
        assert family.title.replace("mmsegmentation", "mmsegmentation 0.x, 1.x") in rows
    assert set(to_foreign.TARGETS) <= {row.strip("`") for row in rows}
