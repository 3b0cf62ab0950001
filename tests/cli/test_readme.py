"""The commands of the README run section by section, unedited except for a smaller network and fewer steps."""

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

# Pages whose commands run after those of a section, on the files that these have written.
PAGES = {"Quick start": "quickstart", "Your own images": "own_data", "Cityscapes": "cityscapes"}

# Commands that .ci/run runs instead, with the line that does.
ELSEWHERE = {"make quickstart": "make quickstart STEPS=20", "make test": "make test"}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(markdown: str) -> list[str]:
    shell = [block for kind, block in CODE.findall(markdown) if kind == "shell"]
    return [line for block in shell for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def sections(markdown: str) -> dict[str, list[str]]:
    """Return {title: commands} of the sections that have commands."""
    parts = re.split(r"^## (.+)$", markdown, flags=re.MULTILINE)
    by_title = {title: commands(body) for title, body in zip(parts[1::2], parts[2::2], strict=True)}
    return {title: lines for title, lines in by_title.items() if lines}


def test_both_languages_have_the_same_commands():
    english, chinese = (commands(text(name)) for name in READMES)
    assert english == chinese
    assert len(english) >= 15
    assert [block for kind, block in CODE.findall(text("README.md")) if kind == "python"] == [
        re.sub("类别序号", "class indices", block)
        for kind, block in CODE.findall(text("README_CN.md"))
        if kind == "python"
    ]


def test_relative_links_point_to_existing_files():
    for name in READMES:
        for target in re.findall(r"\]\(([^)#]+)\)", text(name)):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"


def quick_start(folder: Path, cityscapes: Path) -> None:
    run("train.py", "--config", "config/quickstart.yml", "--save_dir", folder / "quickstart/run",
        "--set", f"data.dataset_dir={cityscapes}", *SMALL)  # fmt: skip
    cv2.imwrite(str(folder / "photo.jpg"), cv2.imread(str(cityscapes / SCENE)))


def own_dataset(folder: Path, cityscapes: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(2):
            write_png(folder / f"mydata/images/{split}/{i}.png", rng.integers(0, 256, (80, 96, 3), np.uint8))
            write_png(folder / f"mydata/labels/{split}/{i}.png", rng.integers(0, 3, (80, 96), np.uint8))
    (folder / "mydata/classes.yml").write_text("[road, building, sky]")
    shutil.copytree(folder / "mydata/images/val", folder / "photos")


def cityscapes_config(folder: Path, cityscapes: Path) -> None:
    """Write the dataset folder into config/cityscapes.yml, as the README instructs."""
    path = folder / "config/cityscapes.yml"
    edited = path.read_text().replace("your cityscapes", str(cityscapes))
    assert str(cityscapes) in edited
    path.write_text(edited)


def camvid_dataset(folder: Path, cityscapes: Path) -> None:
    rng = np.random.default_rng(0)
    count = len(camvid.classes(folder))
    for split in ("train", "val"):
        for i in range(2):
            write_png(folder / f"camvid/images/{split}/{i}.png", rng.integers(0, 256, (80, 96, 3), np.uint8))
            write_png(folder / f"camvid/labels/{split}/{i}.png", rng.integers(0, count + 1, (80, 96), np.uint8))


PREPARE: dict[str, Callable[[Path, Path], None]] = {
    "Quick start": quick_start,
    "Install": lambda folder, cityscapes: None,
    "Your own images": own_dataset,
    "Cityscapes": cityscapes_config,
    "What it reaches": camvid_dataset,
}


def test_every_section_with_commands_is_tested():
    assert sections(text("README.md")).keys() == PREPARE.keys()


def shrink(line: str, folder: Path) -> str:
    """Return the command with a small network, few steps, the CPU, and pip in `--dry-run` mode."""
    argv = shlex.split(line)
    if argv[0] == "pip":
        return f"cd {ROOT} && pip {argv[1]} --dry-run --quiet --no-build-isolation {shlex.join(argv[2:])}"
    trains = argv[:2] in (["python", "train.py"], ["ocrnet", "train"])
    if trains and "--resume_ckpt" not in argv and "--save_dir" not in argv:
        shutil.rmtree(folder / "output", ignore_errors=True)
    if trains or argv[:2] == ["python", "eval.py"]:
        return f"{line.replace('--device_target GPU', '--device_target CPU')} --set {' '.join(SMALL)}"
    return line


@pytest.mark.parametrize("title", PREPARE)
def test_commands_of_a_section_succeed(title, cityscapes, tmp_path):
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
        command = shrink(line, tmp_path)
        result = subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        allowed = (0, 1) if line == "ocrnet doctor" else (0,)  # 1: doctor reports a problem of this machine
        assert result.returncode in allowed, f"{command}\n{result.stdout}{result.stderr}"
        last = tmp_path / "output/checkpoint/OCRNet_hrnet_seg_w32_4_rank0.safetensors"
        if last.exists():  # copy it to the name that it has after the shipped number of steps
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
    prologue = "from ocrnet.data.image_io import read_image\nimage = read_image('photos/0.png')\n"
    epilogue = "assert labels.shape == image.shape[:2] and scores.shape == (3, *image.shape[:2])\n"
    subprocess.run([sys.executable, "-c", prologue + block + epilogue], cwd=folder, check=True, timeout=120)
    assert read_image(folder / "predictions/overlay/0.png").shape == (80, 96, 3)
