"""A network, a config and samples small enough for tests of whole training steps."""

import numpy as np

from ocrnet.architecture import Arch
from ocrnet.config import Config, Data
from ocrnet.data.sampler import Sample

ARCH = Arch(width=4, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8)
CONFIG = Config(
    engine="torch",
    device_target="CPU",
    num_classes=5,
    batch_size=2,
    total_step=50,
    warmup_step=0,
    lr_init=0.01,
    num_workers=0,
    data=Data(class_weights=(0.5, 1.0, 1.5, 1.0, 2.0)),
)


class MemoryStream:
    """Random samples seeded by their number. Some labels are mostly 255, so that the number of valid pixels differs."""

    channels = 16

    def __init__(self, *, same_image: bool = False, label: int | None = None) -> None:
        self.same_image, self.label = same_image, label

    def __getitem__(self, number: int) -> Sample:
        rng = np.random.default_rng(number)
        image = np.random.default_rng(0 if self.same_image else number).integers(0, 256, (64, 96, 3), np.uint8)
        label = rng.integers(0, 5, (64, 96)).astype(np.uint8)
        label[rng.random((64, 96)) < (0.95, 0.3)[number % 2]] = 255
        if self.label is not None:
            label[:] = self.label
        return Sample(image, label, np.ones(16, bool) if self.same_image else rng.random(16) >= 0.05)
