"""Every command of the README, run section by section as it stands, on small data and with a small network."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from commands import ROOT, SMALL, run

from ocrnet.data.datasets import camvid
from ocrnet.data.image_io import read_image, write_png

READMES = ("README.md", "README_CN.md")
CODE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SCENE = "leftImg8bit/val/demo/demo_000000_000019_leftImg8bit.png"

# Pages whose commands are run after those of a section, on what these have made.
PAGES = {"Quick start": "quickstart", "Your own images": "own_data", "Cityscapes": "cityscapes"}

# Commands that are not run here, and the lines of .ci/run that run them.
ELSEWHERE = {"make quickstart": "make quickstart STEPS=20", "make test": "make test"}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(markdown: str) -> list[str]:
    shell = [block for kind, block in CODE.findall(markdown) if kind == "shell"]
    return [line for block in shell for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def sections(markdown: str) -> dict[str, list[str]]:
    """Return the commands of each section that has some, by its title."""
    parts = re.split(r"^## (.+)$", markdown, flags=re.MULTILINE)
    found = {title: commands(body) for title, body in zip(parts[1::2], parts[2::2], strict=True)}
    return {title: lines for title, lines in found.items() if lines}


def test_both_languages_have_the_same_commands():
    english, chinese = (commands(text(name)) for name in READMES)
    assert english == chinese
    assert len(english) >= 15
    assert [block for kind, block in CODE.findall(text("README.md")) if kind == "python"] == [
        re.sub("类别序号", "class indices", block)
        for kind, block in CODE.findall(text("README_CN.md"))
        if kind == "python"
    ]


def test_links_lead_somewhere():
    for name in READMES:
        for target in re.findall(r"\]\(([^)#]+)\)", text(name)):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"


def quick_start(folder: Path, cityscapes: Path) -> None:
    run("train.py", "--config", "config/quickstart.yml", "--save_dir", folder / "quickstart/run",
        "--set", f"data.dataset_dir={cityscapes}", *SMALL)  # fmt: skip
    cv2.imwrite(str(folder / "photo.jpg"), cv2.imread(str(cityscapes / SCENE)))


def own_images(folder: Path, cityscapes: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(2):
            write_png(folder / f"mydata/images/{split}/{i}.png", rng.integers(0, 256, (80, 96, 3), np.uint8))
            write_png(folder / f"mydata/labels/{split}/{i}.png", rng.integers(0, 3, (80, 96), np.uint8))
    (folder / "mydata/classes.yml").write_text("[road, building, sky]")
    shutil.copytree(folder / "mydata/images/val", folder / "photos")


def full_cityscapes(folder: Path, cityscapes: Path) -> None:
    """Put the data's folder into config/cityscapes.yml, as the README says."""
    path = folder / "config/cityscapes.yml"
    edited = path.read_text().replace("your cityscapes", str(cityscapes))
    assert str(cityscapes) in edited
    path.write_text(edited)


def real_camvid(folder: Path, cityscapes: Path) -> None:
    rng = np.random.default_rng(0)
    count = len(camvid.classes(folder))
    for split in ("train", "val"):
        for i in range(2):
            write_png(folder / f"camvid/images/{split}/{i}.png", rng.integers(0, 256, (80, 96, 3), np.uint8))
            write_png(folder / f"camvid/labels/{split}/{i}.png", rng.integers(0, count + 1, (80, 96), np.uint8))


PREPARE: dict[str, Callable[[Path, Path], None]] = {
    "Quick start": quick_start,
    "Install": lambda folder, cityscapes: None,
    "Your own images": own_images,
    "Cityscapes": full_cityscapes,
    "What it reaches": real_camvid,
}


def test_every_section_with_commands_is_run():
    assert sections(text("README.md")).keys() == PREPARE.keys()


def made_small(line: str, folder: Path) -> str:
    """Return the command as it is run here: a small network, few steps, the CPU, nothing installed."""
    words = shlex.split(line)
    if words[0] == "pip":
        return f"cd {ROOT} && pip {words[1]} --dry-run --quiet --no-build-isolation {shlex.join(words[2:])}"
    trains = words[:2] in (["python", "train.py"], ["ocrnet", "train"])
    if trains and "--resume_ckpt" not in words and "--save_dir" not in words:
        shutil.rmtree(folder / "output", ignore_errors=True)
    if trains or words[:2] == ["python", "eval.py"]:
        return f"{line.replace('--device_target GPU', '--device_target CPU')} --set {' '.join(SMALL)}"
    return line


@pytest.mark.parametrize("title", PREPARE)
def test_a_section_runs_as_it_stands(title, cityscapes, tmp_path):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for entry in ("train.py", "eval.py"):
        os.symlink(ROOT / entry, tmp_path / entry)
    os.symlink(sys.prefix, tmp_path / ".venv")
    PREPARE[title](tmp_path, cityscapes)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    lines = sections(text("README.md"))[title]
    if title in PAGES:
        lines += [line for line in commands(text(f"docs/{PAGES[title]}.md")) if line not in commands(text("README.md"))]
    for line in lines:
        if line in ELSEWHERE:
            assert ELSEWHERE[line] in (ROOT / ".ci/run").read_text().splitlines()
            continue
        small = made_small(line, tmp_path)
        done = subprocess.run(
            ["bash", "-ec", small], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        allowed = (0, 1) if line == "ocrnet doctor" else (0,)  # this machine may be short of something
        assert done.returncode in allowed, f"{small}\n{done.stdout}{done.stderr}"
        last = tmp_path / "output/checkpoint/OCRNet_hrnet_seg_w32_4_rank0.safetensors"
        if last.exists():  # what the shipped number of steps would have left
            shutil.copy(last, last.with_name(last.name.replace("_4_", "_160000_")))
    if title == "Quick start":
        assert (tmp_path / "predictions/overlay/photo.png").is_file()
    if title == "Cityscapes":
        assert len(list((tmp_path / "output/visualize").glob("*.png"))) == 3
    if title == "Your own images":
        assert len(list((tmp_path / "predictions/indices").glob("*.png"))) == 2
        run_the_python_block(tmp_path)


def run_the_python_block(folder: Path) -> None:
    (block,) = [block for kind, block in CODE.findall(text("README.md")) if kind == "python"]
    before = "from ocrnet.data.image_io import read_image\nimage = read_image('photos/0.png')\n"
    after = "assert labels.shape == image.shape[:2] and scores.shape == (3, *image.shape[:2])\n"
    subprocess.run([sys.executable, "-c", before + block + after], cwd=folder, check=True, timeout=120)
    assert read_image(folder / "predictions/overlay/0.png").shape == (80, 96, 3)
