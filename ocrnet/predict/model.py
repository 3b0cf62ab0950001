"""Python API: `ocrnet.load(path)` returns a `Model`, which predicts labels, probabilities or logits as NumPy arrays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ocrnet import config
from ocrnet.config import Config, Eval
from ocrnet.engines.base import Engine
from ocrnet.engines.tta import make_passes
from ocrnet.export.open import open_for_inference
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import Weights
from ocrnet.weights.classes import classes_of


class Model:
    """A trained network that predicts images.

    ``arch`` is its architecture. ``names`` and ``palette`` are the names and RGB colors of its classes.
    ``device_target`` is CPU, GPU or Ascend.
    """

    def __init__(self, engine: Engine, weights: Weights) -> None:
        self._engine, self.arch, self.device_target = engine, weights.arch, engine.device_target
        self.names, self.palette = classes_of(weights)

    def predict(
        self,
        image: np.ndarray,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        slide: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Predict the class of each pixel.

        Args:
            image: uint8 H,W,3 RGB of any size.
            scales: Factors by which the image is resized; the probabilities at all scales are averaged.
            flip: Also average with the probabilities of the mirrored image.
            slide: Height and width of sliding windows, for images too large for a single forward pass; None predicts
                the image as a whole.

        Returns:
            Class indices uint8 H,W.
        """
        return self.outputs(image, ("labels",), scales, flip, slide)["labels"]

    def probabilities(
        self,
        image: np.ndarray,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        slide: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Predict the probability of each class at each pixel.

        Args:
            image: uint8 H,W,3 RGB of any size.
            scales: As for `predict`.
            flip: As for `predict`.
            slide: As for `predict`.

        Returns:
            Probabilities float32 num_classes,H,W.
        """
        return self.outputs(image, ("probabilities",), scales, flip, slide)["probabilities"]

    def outputs(
        self,
        image: np.ndarray,
        outputs: Sequence[str] = ("labels",),
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        slide: tuple[int, int] | None = None,
    ) -> dict[str, np.ndarray]:
        """Predict several outputs of one image.

        Args:
            image: uint8 H,W,3 RGB of any size.
            outputs: Any of labels, confidence, probabilities, regions and relation; see
                `ocrnet.engines.base.Engine.predict`.
            scales: As for `predict`.
            flip: As for `predict`.
            slide: As for `predict`.

        Returns:
            The outputs by name: labels uint8 H,W; confidence float32 H,W; probabilities float32 num_classes,H,W;
            regions and relation float32 num_classes,ceil(H/4),ceil(W/4).

        Raises:
            OcrnetError: ``image`` has the wrong type or shape, an output is unknown or unavailable, or regions or
                relation are requested with several scales, flip or sliding windows.
        """
        if not isinstance(image, np.ndarray):
            raise OcrnetError(f"an image must be a NumPy array, uint8 H,W,3 in RGB order, not {type(image).__name__}")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise OcrnetError(f"an image must be uint8 H,W,3 in RGB order, not {image.dtype} {image.shape}")
        batch = self.outputs_of(np.ascontiguousarray(image)[None], outputs, scales, flip, slide)
        return {name: array[0] for name, array in batch.items()}

    def outputs_of(
        self,
        images: np.ndarray,
        outputs: Sequence[str] = ("labels",),
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        slide: tuple[int, int] | None = None,
    ) -> dict[str, np.ndarray]:
        """Predict several outputs of a batch of images.

        Results of a batch and of a single image differ by rounding, so labels may differ where two classes tie.

        Args:
            images: uint8 N,H,W,3 RGB.
            outputs: As for `outputs`.
            scales: As for `predict`.
            flip: As for `predict`.
            slide: As for `predict`.

        Returns:
            The outputs by name, as from `outputs`, with a first axis N.
        """
        passes = make_passes(Eval(scales=tuple(scales), flip=flip, slide=slide), (images.shape[1], images.shape[2]))
        return self._engine.predict(images, passes, tuple(outputs))

    def logits(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the logits of the auxiliary and the OCR head for normalized images, float32 N,3,H,W.

        Each is float32 N,num_classes,ceil(H/4),ceil(W/4).
        """
        return self._engine.logits(np.ascontiguousarray(x, dtype=np.float32))


def load(
    path: str | Path,
    engine: Literal["auto", "torch", "mindspore"] = "auto",
    device_target: Literal["CPU", "GPU", "Ascend"] | None = None,
    mix: bool = False,
) -> Model:
    """Load a trained network; the file determines its architecture.

    Args:
        path: A checkpoint, a run folder (its newest valid checkpoint is loaded), the weights of another implementation,
            or a file of `ocrnet export`, which runs in the runtime of its format.
        engine: The framework that runs a checkpoint; ``"auto"`` selects one.
        device_target: The device; None selects one.
        mix: Use mixed precision.

    Returns:
        The model, which predicts images.

    Raises:
        OcrnetError: The file is missing, damaged or not an OCRNet.
    """
    cfg = Config(engine=engine, device_target=device_target, mix=mix)
    config.check(cfg)
    opened = open_for_inference(path, cfg)
    return Model(opened.engine, opened.weights)
