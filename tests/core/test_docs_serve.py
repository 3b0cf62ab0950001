"""docs/serve.md: flags, limits and addresses that are the code's."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from ocrnet.cli import flags, main, serve
from ocrnet.config import Eval
from ocrnet.serve import request_body, responses, server, settings, worker
from ocrnet.serve.settings import Settings

TEXT = (Path(__file__).parents[2] / "docs/serve.md").read_text(encoding="utf-8")


def test_commands_have_flags_that_exist():
    for rest in re.findall(r"^ocrnet serve (.*)$", TEXT, re.MULTILINE):
        flags.parse("serve", shlex.split(rest))
    known = {flag.name for flag in flags.FLAGS}
    assert set(re.findall(r"`--(\w+)", TEXT)) <= known


def test_limits_are_the_codes():
    limits = Settings()
    for name, said in (
        ("max_megabytes", f"{limits.max_megabytes}, counted"),
        ("max_megapixels", f"{limits.max_megapixels}, read from the header"),
        ("timeout", f"{limits.timeout:g} seconds"),
        ("max_requests", f"{limits.max_requests} being decoded"),
    ):
        assert f"| `--{name}` | {said}" in TEXT
    for said in (
        f"limits: {limits.max_megabytes} MB and {limits.max_megapixels} megapixels per image, {limits.timeout:g} s "
        f"per request, {limits.max_requests} simultaneous requests, batches of one image",
        f"serving at http://{limits.host}:{limits.port}/",
        f"at most {settings.MOST_MEGAPIXELS} |",
        f"at most {worker.IMAGE_BYTES >> 20} MiB",
        f"within {request_body.FIRST_SECONDS:g} seconds, and comes at {request_body.BYTES_PER_SECOND:,} bytes a second",
        f"silent for {request_body.FIRST_SECONDS:g} seconds at most",
        f"at most {request_body.BODIES} largest ones",
        f"more than {request_body.LONGEST_SIDE:,} pixels",
        f"closed after {server.IDLE_SECONDS:g} to {2 * server.IDLE_SECONDS:g} seconds",
        f"| | {server.CONNECTIONS} connections | 503 |",
        f"`--batch_wait` ({limits.batch_wait} seconds)",
        f"On a GPU the limit is {serve.MAX_BATCH_ELSEWHERE}",
        f"**On a CPU it is {serve.MAX_BATCH['CPU']}**",
        f"({Eval().max_memory:g} GiB",
        f"at least {settings.SHORTEST_TOKEN} characters",
        settings.TOKEN_VARIABLE,
        ", ".join(list(request_body.KINDS.values())[:-1]) + " or " + list(request_body.KINDS.values())[-1],
    ):
        assert said in TEXT, said


def test_the_json_has_the_fields_that_are_shown():
    (block,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    model = SimpleNamespace(names=("road",), palette=((128, 64, 128),))
    made = responses.summary(model, worker.Prediction(np.zeros((2, 2), np.uint8)), 1.0)
    shown = json.loads(block)
    assert list(shown) == list(made)
    assert list(shown["classes"][0]) == list(made["classes"][0])
    assert shown["classes"][0]["color"] == made["classes"][0]["color"]


def test_a_missing_library_is_told_with_its_remedy(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else real(name))
    assert main.main(["serve", "--checkpoint_path", "output"]) == 2
    assert "pip install -e '.[serve]'" in capsys.readouterr().err
