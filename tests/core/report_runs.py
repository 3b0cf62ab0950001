"""Synthetic runs for the tests of the report: a run folder like one of training, and figures of a stand-in engine."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import yaml

from ocrnet import config
from ocrnet.config import Config, Data
from ocrnet.data.datasets.base import ClassTable, Dataset, Pair
from ocrnet.data.image_io import write_png
from ocrnet.report import compute
from ocrnet.report.compute import Figures

HOSTILE = (
    "road",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "a|b`c` [x](http://evil.test)",
)


class Engine:
    """Predicts the class painted into the image's red channel, wrong in one corner; regions and relation are random."""

    def predict(self, images, passes, outputs=("labels",)):
        labels = images[..., 0] % 4
        labels[:, :20, :20] = 1
        count, height, width = labels.shape
        small = -(-height // 4), -(-width // 4)
        regions = np.random.default_rng(0).random((count, 4, *small)).astype(np.float32)
        relation = np.random.default_rng(1).random((count, 4, *small)).astype(np.float32)
        arrays = {
            "labels": labels.astype(np.uint8),
            "confidence": np.full(labels.shape, 0.9, np.float32),
            "regions": regions / regions.sum((2, 3), keepdims=True),
            "relation": relation / relation.sum(1, keepdims=True),
        }
        return {name: arrays[name] for name in outputs}


def write_run(folder: Path, *, steps=(10, 20, 30), gain=0.0, **changes) -> Path:
    folder.mkdir(parents=True)
    cfg = Config(total_step=30, save_dir=str(folder), data=Data(dataset_dir="/home/somebody/secret place/camvid"))
    (folder / "config.yml").write_text(yaml.safe_dump(config.as_dict(dataclasses.replace(cfg, **changes))))
    rows = []
    for step in steps:
        rows.append({
            "kind": "train", "step": step, "loss": 3 / step, "loss_aux": 2 / step, "loss_ocr": 1 / step,
            "learning_rate": 0.01, "skipped": 0, "images_per_second": 4.0 + step, "seconds_per_step": 0.5,
            "data_seconds_per_step": 0.1, "memory_bytes": 2**30,
        })  # fmt: skip
        classes = {name: {"iou": 0.1 * i + gain * i, "accuracy": 0.5, "share": 0.25} for i, name in enumerate(HOSTILE)}
        rows.append({
            "kind": "eval", "step": step, "mean_iou": step / 100 + gain, "pixel_accuracy": 0.5, "mean_accuracy": 0.4,
            "classes": classes, "categories": {},
        })  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {
        "time": "2026-01-02T03:04:05+0000",
        "command": ["/home/somebody/train.py", "--save_dir", str(folder), "--note=<b>x</b>"],
        "commit": "0123abc",
        "versions": {"ocrnet": "1.0", "<i>": "<u>2</u>"},
    }
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    return folder


def made_up_figures(root: Path) -> Figures:
    pairs = []
    for number in range(8):
        label = np.kron(np.arange(12).reshape(3, 4) % 4, np.ones((20, 20))).astype(np.uint8)
        label[:, : 5 * number] = 0
        image = np.repeat(label[..., None], 3, axis=2)
        label[-8:] = 255
        write_png(root / f"{number}.png", image)
        write_png(root / f"{number}_label.png", label)
        pairs.append(Pair(f"<s>{number}</s>", root / f"{number}.png", root / f"{number}_label.png"))
    table = ClassTable(HOSTILE, ((9, 9, 9), (200, 0, 0), (0, 200, 0), (0, 0, 200)), (0, 1, 2, 3), frozenset({255}))
    figures = compute.compute_figures(Engine(), Config(num_workers=0), Dataset(table, pairs, root), 0)
    eval_cfg = {"scales": [1.0], "flip": False, "slide": None}
    figures.facts.update(
        checkpoint="x.safetensors", step=30, eval=eval_cfg, parameters=12, arch={"width": 18}, versions={}
    )
    return figures
