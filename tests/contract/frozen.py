"""Load, resume, evaluate and run the files that commit 6f9cdcc wrote, and print the results as JSON.

    python tests/contract/frozen.py [ENGINE]

`tests/data/frozen` holds a run stopped at step 400 of 404, its dataset, and its network as ONNX. Every later version
must read them. `tests/contract/test_frozen.py` compares the results with those of that commit within a tolerance. The
digests that this script prints are equal for two versions if no bit has changed, on one machine with one thread count.

Only commands, files and the public Python API are used here, so that the same script runs on any version.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
FROZEN = ROOT / "tests/data/frozen"
RUN, ONNX, SCENES = FROZEN / "run", FROZEN / "run.onnx", FROZEN / "scenes"
LAST = "checkpoint/OCRNet_hrnet_seg_w4_404_rank0.safetensors"


def run_command(*argv: str | Path) -> None:
    """Run a command of this checkout."""
    subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def resume(
    folder: Path, engine: str, run: Callable, *changes: str
) -> tuple[dict[str, np.ndarray], np.ndarray, list[float]]:
    """Finish a copy of the run, with ``changes`` to its config.

    Return its last tensors, the losses of its steps 4,2 (aux, ocr), and its mIoU and pixel accuracy.
    """
    from safetensors.numpy import load_file

    copy = folder / f"resumed-{engine}"
    shutil.copytree(RUN, copy)
    run(
        *("train.py", "--config", copy / "config.yml", "--engine", engine, "--save_dir", copy, "--resume_ckpt", "auto"),
        *("--log_interval", "1", "--set", f"data.dataset_dir={SCENES}", *changes),
    )
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    losses = [[row["loss_aux"], row["loss_ocr"]] for row in rows if row["kind"] == "train" and row["step"] > 400]
    (scores,) = (
        [row["mean_iou"], row["pixel_accuracy"]] for row in rows if row["kind"] == "eval" and row["step"] == 404
    )
    return load_file(copy / LAST), np.array(losses), scores


def evaluate(folder: Path, engine: str, checkpoint: Path, run: Callable, *flags: str) -> list[float]:
    """Return mIoU and pixel accuracy of a checkpoint or an exported file on the validation split."""
    out = folder / f"eval-{engine}-{Path(checkpoint).name}-{len(flags)}"
    run(
        *("eval.py", "--config", RUN / "config.yml", "--engine", engine, "--checkpoint_path", checkpoint),
        *("--save_dir", out, *flags, "--set", f"data.dataset_dir={SCENES}"),
    )
    row = json.loads((out / "eval.jsonl").read_text())
    return [row["mean_iou"], row["pixel_accuracy"]]


def probabilities(checkpoint: Path, engine: str) -> np.ndarray:
    """Return the probabilities float32 19,64,128 of the first validation image, from Python."""
    from PIL import Image

    import ocrnet

    image = np.array(Image.open(next(iter(sorted(SCENES.glob("leftImg8bit/val/*/*.png"))))).convert("RGB"))
    return ocrnet.load(checkpoint, engine=engine, device_target="CPU").probabilities(image)


def digest(*arrays: np.ndarray) -> str:
    """Return a sha256 over arrays, shortened."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]


def main() -> None:
    """Print the results of this version for the frozen files."""
    engine = sys.argv[1] if len(sys.argv) > 1 else "torch"
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors, losses, scores = resume(folder, engine, run_command)
        found = {
            "engine": engine,
            "losses": losses.tolist(),
            "scores": {
                "resumed": scores,
                "run": evaluate(folder, engine, RUN, run_command),
                "run, scales and flip": evaluate(
                    folder, engine, RUN, run_command, "--multi_scale", "True", "--flip", "True"
                ),
                "onnx": evaluate(folder, engine, ONNX, run_command),
            },
            "digests": {
                "state after step 404": digest(*(tensors[key] for key in sorted(tensors))),
                "probabilities": digest(probabilities(RUN, engine)),
                "probabilities of the ONNX file": digest(probabilities(ONNX, engine)),
            },
            "probabilities": probabilities(RUN, engine)[:, ::16, ::16].tolist(),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
