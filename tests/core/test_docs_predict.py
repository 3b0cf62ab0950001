"""docs/predict.md: its flags exist; its kinds of results, file extensions, limits and JSON fields match the code."""

import json
import re
import shlex
from pathlib import Path

from ocrnet.cli import flags, submit
from ocrnet.config import Eval
from ocrnet.data.datasets.files import IMAGES
from ocrnet.predict import download, video
from ocrnet.predict.sources import VIDEOS, Source
from ocrnet.predict.writers import DEFAULT, DEFAULT_OF_VIDEO, KINDS, Areas, parse_save

TEXT = (Path(__file__).parents[2] / "docs/predict.md").read_text(encoding="utf-8")


def test_commands_have_flags_that_exist():
    commands = re.findall(r"^ocrnet (predict|submit) (.*)$", TEXT.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) == 4
    for command, rest in commands:
        flags.parse(command, shlex.split(rest))


def test_kinds_extensions_and_limits_match_the_code():
    rows = re.findall(r"^\| `(\w+)` \| `", TEXT, re.MULTILINE)
    assert (*rows, "json") == KINDS
    defaults = re.search(r"an image gets `([\w,]+)`, a video `([\w,]+)`", TEXT)
    assert defaults is not None
    assert [parse_save(text) for text in defaults.groups()] == [DEFAULT, DEFAULT_OF_VIDEO]
    for extensions in (IMAGES, VIDEOS):
        assert ", ".join(extension[1:] for extension in extensions) in TEXT
    limits = (
        f"{download.MOST_SECONDS:g} seconds, {download.MOST_BYTES >> 20} MiB and {download.MOST_PIXELS // 10**6} mega"
    )
    assert limits in TEXT
    assert download.MOST_REDIRECTS == 5
    assert "at most five redirects" in TEXT
    assert f"`eval.max_memory` ({Eval().max_memory:g} GiB)" in TEXT
    assert (video.TOLERANCE, video.FALLBACK_RATE) == (0.01, 25)
    assert "more than one in a hundred" in TEXT
    assert "25 a second" in TEXT
    assert [f"{sum(cities.values()):,}" in TEXT for cities in submit.CITIES.values()] == [True, True]


def test_the_json_has_the_documented_fields(tmp_path):
    (block,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    areas = Areas(("road", "sky"))
    areas.add(Source("photo", "photos/photo.jpg"), (2, 2), areas.total + 2)
    areas.write(tmp_path / "areas.json", complete=True)
    documented, written = json.loads(block), json.loads((tmp_path / "areas.json").read_text())
    assert list(documented) == list(written)
    assert list(documented["images"][0]) == list(written["images"][0])
    assert list(documented["all"]) == list(written["all"])
