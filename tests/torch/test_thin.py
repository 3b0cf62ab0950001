"""Memory for a very long and thin image grows with its number of pixels, not with the square of a side."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tiny import ARCH

from ocrnet import architecture
from ocrnet.engines.torch import ocr
from ocrnet.engines.torch.ocr import OCRNet

CODE = """
import resource, numpy as np
from tiny import ARCH, CONFIG
from ocrnet import architecture
from ocrnet.config import Eval
from ocrnet.engines.torch.engine import TorchEngine
from ocrnet.engines.tta import make_passes
from ocrnet.distributed.launcher import World
engine = TorchEngine(CONFIG, ARCH, world=World())
engine.restore(architecture.init(ARCH, 1), 0)
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
engine.predict(np.zeros((1, 64, 64, 3), np.uint8), make_passes(Eval(), (64, 64)))
before = rss()
for size in ((1, 65000), (65000, 1)):
    engine.predict(np.zeros((1, *size, 3), np.uint8), make_passes(Eval(), size))
print((rss() - before) // 1024)
"""


def test_an_image_side_of_65000_pixels_takes_little_memory():
    """Dense upsampling matrices would take 6 GB."""
    completed = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=Path(__file__).parents[1] / "contract",
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert int(completed.stdout) < 500


def test_long_images_give_the_same_logits_with_either_upsampling(monkeypatch):
    model = OCRNet(ARCH).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in architecture.init(ARCH, 1).items()})
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 40, 400)).astype(np.float32))
    with torch.inference_mode():
        default = model(x)
        monkeypatch.setattr(ocr, "LONGEST", 99)
        long = model(x)
    for a, b in zip(default, long, strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
