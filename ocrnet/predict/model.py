"""A trained network from Python: `ocrnet.load(path)`, then labels, probabilities or logits as NumPy arrays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ocrnet import config
from ocrnet.config import Config, Data, Eval
from ocrnet.distributed.launcher import World
from ocrnet.engines.base import Engine
from ocrnet.engines.tta import make_passes
from ocrnet.export.open import as_weights, open_engine, read
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import Weights, checkpoint
from ocrnet.weights.classes import classes_of


class Model:
    """A network ready to predict.

    ``arch`` tells what it is; ``names`` and ``palette`` (RGB) are those of its classes; ``decisions`` say what it
    computes on, and in which precision; ``notes`` what reading another implementation's weights did.
    """

    def __init__(self, engine: Engine, found: Weights) -> None:
        self._engine, self.arch, self.decisions, self.notes = engine, found.arch, engine.startup_messages, found.notes
        self.names, self.palette = classes_of(found)

    def predict(
        self,
        image: np.ndarray,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        slide: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Return class indices uint8 H,W for an image uint8 H,W,3 RGB of any size.

        Probabilities are averaged over ``scales`` and, with ``flip``, over the mirrored image; ``slide`` (height,
        width) looks through windows, for images too large to look at whole.
        """
        return self.outputs(image, ("labels",), scales, flip, slide)["labels"]

    def probabilities(
        self,
        image: np.ndarray,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        slide: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Return probabilities float32 num_classes,H,W for an image uint8 H,W,3 RGB; arguments as for `predict`."""
        return self.outputs(image, ("probabilities",), scales, flip, slide)["probabilities"]

    def outputs(
        self,
        image: np.ndarray,
        outputs: Sequence[str] = ("labels",),
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        slide: tuple[int, int] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return any of labels, confidence, probabilities, regions and relation; arguments as for `predict`.

        labels uint8 H,W; confidence float32 H,W; probabilities float32 num_classes,H,W; regions and relation float32
        num_classes,ceil(H/4),ceil(W/4), of one look at the whole image alone: see `ocrnet.engines.base.Engine.predict`.
        """
        if not isinstance(image, np.ndarray):
            raise OcrnetError(f"an image must be a NumPy array, uint8 H,W,3 in RGB order, not {type(image).__name__}")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise OcrnetError(f"an image must be uint8 H,W,3 in RGB order, not {image.dtype} {image.shape}")
        found = self.outputs_of(np.ascontiguousarray(image)[None], outputs, scales, flip, slide)
        return {name: array[0] for name, array in found.items()}

    def outputs_of(
        self,
        images: np.ndarray,
        outputs: Sequence[str] = ("labels",),
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        slide: tuple[int, int] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return what `outputs` does, with an axis N first, for a batch of images uint8 N,H,W,3 RGB.

        A batch is not rounded as its images are alone: of the last bit of a probability the label may depend.
        """
        passes = make_passes(Eval(scales=tuple(scales), flip=flip, slide=slide), (images.shape[1], images.shape[2]))
        return self._engine.predict(images, passes, tuple(outputs))

    def logits(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (aux, ocr), each float32 N,num_classes,ceil(H/4),ceil(W/4), for normalised float32 N,3,H,W."""
        return self._engine.logits(np.ascontiguousarray(x, dtype=np.float32))


def load(
    path: str | Path,
    engine: Literal["auto", "torch", "mindspore"] = "auto",
    device_target: Literal["CPU", "GPU", "Ascend"] | None = None,
    mix: bool = False,
) -> Model:
    """Return the network in a checkpoint of ours, a run's folder, or another implementation's weights.

    So does a file of `ocrnet export`, in its own runtime. The architecture comes from the file; a folder means its
    newest valid checkpoint. Raise `OcrnetError` where the file is missing, damaged or not an OCRNet.
    """
    path = checkpoint.resolve(path)[0]
    given = read(path, Config(device_target=device_target, mix=mix))
    found = as_weights(given)
    data = found.meta.get("config", {}).get("data", {})
    normal = Data(mean=tuple(data.get("mean", Data.mean)), std=tuple(data.get("std", Data.std)))
    cfg = Config(engine=engine, device_target=device_target, mix=mix, data=normal)
    config.check(cfg)
    opened = open_engine(cfg, given, world=World())
    opened.restore(found.tensors, 0)
    return Model(opened, found)
