"""The quick start: draw synthetic street scenes, train a small network on them, evaluate it and predict images.

    make quickstart                       (creates .venv first)
    python examples/quickstart.py         (in an environment with ocrnet)

It prints every command before running it. The results are in quickstart/.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = Path("quickstart")
CONFIG = ["--config", "config/quickstart.yml"]


def run(*argv: str) -> None:
    """Print a command and run it; if it fails, exit with its exit status."""
    print(f"\n$ {shlex.join(argv)}", flush=True)
    command = [sys.executable, "-m", *argv] if argv[0] == "ocrnet" else [sys.executable, *argv[1:]]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        print(f"quickstart: the last command failed with exit status {status}", file=sys.stderr)
        sys.exit(status)


def _shell_command(command: str) -> str:
    """Return how to call a command of this environment in the repository's root, even if it is not activated."""
    folder = Path(sys.executable).parent
    return str(folder.relative_to(ROOT) / command) if folder.is_relative_to(ROOT) else command


def summary(seconds: float) -> str:
    """Return the scores and output files of the run as Markdown."""
    run_folder = ROOT / OUT / "run"
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    score = json.loads((run_folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    best = sorted(((row["iou"] or 0.0, name) for name, row in score["classes"].items()), reverse=True)[:4]
    return "\n".join(
        [
            "# Quickstart",
            "",
            "The scenes are synthetic: drawn by a program, not photographed. The scores show that everything works on",
            "this machine; they do not predict scores on real streets.",
            "",
            f"- training loss: {losses[0]:.2f} at the start, {losses[-1]:.2f} at the end",
            f"- validation mIoU: {100 * score['mean_iou']:.2f} at {len(score['scales'])} scales with flip, "
            f"pixel accuracy {100 * score['pixel_accuracy']:.2f}",
            f"- best classes: {', '.join(f'{name} {100 * iou:.0f}' for iou, name in best)}",
            f"- time: {seconds / 60:.1f} minutes",
            "",
            f"- {OUT}/predictions/overlay   predictions for three scenes that were not trained on",
            f"- {OUT}/run/visualize         the validation scenes: image, ground truth, prediction",
            f"- {OUT}/run/curves.png        loss and mIoU over the steps",
            f"- {OUT}/run/checkpoint        the trained network",
            "",
            "Next, your own photo:",
            "",
            f"    {_shell_command('ocrnet')} predict PHOTO.jpg --checkpoint_path {OUT}/run",
            "",
        ]
    )


def main() -> None:
    """Write scenes, train, evaluate, predict, and print where the results are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, help="number of training steps, for a quick test; the score is then not checked"
    )
    steps = parser.parse_args().steps
    config = CONFIG if steps is None else [*CONFIG, "--set", f"total_step={steps}", "min_miou=null"]
    started = time.monotonic()
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    scenes, checkpoint = str(OUT / "scenes"), str(OUT / "run")
    print("Quickstart: about three minutes on two cores. The scenes are synthetic: drawn by a program.")
    val = "12" if steps is None else "4"
    run("ocrnet", "synthetic", scenes, "--train", "80", "--val", val, "--test", "3", "--size", "256", "512")
    run("python", "train.py", *config)
    run("python", "eval.py", *config, "--checkpoint_path", checkpoint, "--multi_scale", "True", "--flip", "True",
        "--visualize", "True")  # fmt: skip
    run("ocrnet", "predict", f"{scenes}/leftImg8bit/test", "--checkpoint_path", checkpoint,
        "--output", str(OUT / "predictions"), "--device_target", "CPU", "--mix", "True")  # fmt: skip
    text = summary(time.monotonic() - started)
    (ROOT / OUT / "summary.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nThis summary: {OUT}/summary.md")


if __name__ == "__main__":
    main()
