"""docs/serve.md: its flags exist; its limits, startup lines and JSON fields match the code."""

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


def test_limits_match_the_code():
    limits = Settings()
    for name, row in (
        ("max_megabytes", f"{limits.max_megabytes}, counted"),
        ("max_megapixels", f"{limits.max_megapixels}, read from the header"),
        ("timeout", f"{limits.timeout:g} seconds"),
        ("max_requests", f"{limits.max_requests} being decoded"),
    ):
        assert f"| `--{name}` | {row}" in TEXT
    for text in (
        f"limits: {limits.max_megabytes} MB and {limits.max_megapixels} megapixels per image, {limits.timeout:g} s "
        f"per request, {limits.max_requests} simultaneous requests, batches of one image",
        f"serving at http://{limits.host}:{limits.port}/",
        f"at most {settings.MOST_MEGAPIXELS} |",
        f"at most {worker.IMAGE_BYTES >> 20} MiB",
        f"begin within {request_body.FIRST_SECONDS:g} seconds",
        f"arrive at {request_body.BYTES_PER_SECOND:,} bytes a second or faster",
        f"silent for {request_body.FIRST_SECONDS:g} seconds at most",
        f"the memory of {request_body.BODIES} bodies of the largest size",
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
        assert text in TEXT, text


def test_the_json_has_the_documented_fields():
    (block,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    model = SimpleNamespace(names=("road",), palette=((128, 64, 128),))
    response = responses.summary(model, worker.Prediction(np.zeros((2, 2), np.uint8)), 1.0)
    documented = json.loads(block)
    assert list(documented) == list(response)
    assert list(documented["classes"][0]) == list(response["classes"][0])
    assert documented["classes"][0]["color"] == response["classes"][0]["color"]


def test_a_missing_library_is_reported_with_its_install_command(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    assert main.main(["serve", "--checkpoint_path", "output"]) == 2
    assert "pip install -e '.[serve]'" in capsys.readouterr().err
