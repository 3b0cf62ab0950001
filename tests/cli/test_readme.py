"""The READMEs' commands: the first block runs as it stands, every other one is a command line that is understood."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

from ocrnet.flags import load_config, parse

READMES = ("README.md", "README_CN.md")
CODE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(name: str, language: str) -> list[str]:
    found = CODE.findall((ROOT / name).read_text(encoding="utf-8"))
    return [text for kind, text in found if kind == language]


def commands(name: str) -> list[str]:
    return [line for text in blocks(name, "shell") for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_both_languages_have_the_same_commands():
    english, chinese = map(commands, READMES)
    assert english == chinese
    assert len(english) >= 10


@pytest.mark.parametrize("line", [c for c in commands("README.md") if c.startswith("python ")])
def test_a_command_line_is_understood(line):
    _, script, *argv = shlex.split(line)
    args = parse(Path(script).stem, argv)
    cfg, _ = load_config(args)
    assert cfg.total_step > 0
    assert (ROOT / script).is_file()


def test_the_first_block_and_the_python_block_run_as_they_stand(tmp_path):
    for entry in ("config", "train.py", "eval.py"):
        os.symlink(ROOT / entry, tmp_path / entry)
    (first,) = [text for text in blocks("README.md", "shell") if "ocrnet synthetic" in text]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", first], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mIoU" in done.stdout
    assert len(list((tmp_path / "demo/visualize").glob("*.png"))) == 4
    (python,) = blocks("README.md", "python")
    scene = "scenes/leftImg8bit/val/demo/demo_000000_000019_leftImg8bit.png"
    image = f"from ocrnet.images import read_image\nimage = read_image('{scene}')\n"
    check = "assert labels.shape == image.shape[:2] and scores.shape == (19, *image.shape[:2])\n"
    subprocess.run([sys.executable, "-c", image + python + check], cwd=tmp_path, check=True, timeout=120)
