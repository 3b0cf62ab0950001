"""Engine for exported files: it resizes, mirrors, windows and averages in NumPy, and runs the file for each pass."""

from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np

from ocrnet.config import Config
from ocrnet.distributed.launcher import World
from ocrnet.engines.base import ATTENTION, Stats, check_outputs
from ocrnet.engines.tta import Pass, cuts
from ocrnet.export.formats import Exported
from ocrnet.utils.errors import OcrnetError

Size = tuple[int, int]


class RuntimeEngine:
    """Predicts with an exported file, but cannot train; `ocrnet.engines.base.Engine` documents each method."""

    def __init__(self, cfg: Config, exported: Exported, *, world: World) -> None:
        if world.size > 1:
            raise OcrnetError(f"{exported.path}: an exported file runs in one process; start it without a launcher")
        self.world, self.path, self.metadata, self.session = world, exported.path, exported.metadata, exported.session
        self.device_target = "GPU" if self.metadata.format == "tensorrt" else "CPU"
        self.name, _, version = self.session.runtime.partition(" ")
        self.versions: Mapping[str, str] = {self.name: version}
        size = "any size" if self.metadata.size is None else "{}x{} only".format(*self.metadata.size)
        ignored = cfg.mix and self.metadata.format != "openvino"
        self.startup_messages: Sequence[str] = [
            f"engine: {self.session.runtime}, an exported file: {self.metadata.precision}, "
            f"{self.metadata.input} images of {size} -> {self.metadata.outputs}",
            *self.session.notes,
            *([f"mix: no effect on {self.name}; the file is {self.metadata.precision}"] if ignored else []),
        ]

    def predict(
        self, images: np.ndarray, passes: Sequence[Pass], outputs: Sequence[str] = ("labels",)
    ) -> dict[str, np.ndarray]:
        """Predict a batch of images, averaged over ``passes`` if the file outputs probabilities or logits.

        A file that outputs labels allows only a single pass at the image's size, not mirrored.

        Args:
            images: uint8 N,H,W,3 RGB.
            passes: The passes over each image.
            outputs: Names of the outputs to return: labels, confidence or probabilities.

        Returns:
            The outputs by name, as `Engine.predict` defines them.

        Raises:
            OcrnetError: The file cannot provide an output, cannot run these passes, or fails in its runtime.
        """
        check_outputs(outputs, passes)
        if unavailable := sorted(set(ATTENTION) & set(outputs)):
            raise OcrnetError(
                f"{self.path}: an exported file has no {' and no '.join(unavailable)}; use its checkpoint"
            )
        if self.metadata.outputs == "labels":
            if list(outputs) != ["labels"]:
                raise self._labels_only_error(", ".join(outputs))
            return {"labels": np.stack([self._labels(image, passes) for image in images])}
        probabilities = np.stack(
            [np.mean([self._probabilities(image, pass_) for pass_ in passes], axis=0) for image in images]
        )
        available = {
            "labels": probabilities.argmax(1).astype(np.uint8),
            "confidence": probabilities.max(1),
            "probabilities": probabilities,
        }
        return {name: available[name] for name in outputs}

    def _labels_only_error(self, requested: str) -> OcrnetError:
        return OcrnetError(
            f"{self.path} outputs only labels, and {requested} cannot be computed from them; export the checkpoint "
            "with --outputs probabilities or --outputs logits"
        )

    def _labels(self, image: np.ndarray, passes: Sequence[Pass]) -> np.ndarray:
        """Return class indices uint8 H,W from a single pass.

        In overlapping windows, take each pixel from the window in which it is farther from the border.
        """
        pass_, size = passes[0], image.shape[:2]
        if len(passes) > 1 or pass_.flip or pass_.size != size:
            raise self._labels_only_error("an average over scales or the mirrored image")
        height, width = pass_.windows[0][2:]
        rows, columns = (cuts((w[axis] for w in pass_.windows), (height, width)[axis], size[axis]) for axis in (0, 1))
        labels = np.empty(size, np.uint8)
        for top, left, _, _ in pass_.windows:
            window_labels = self._run(image[top : top + height, left : left + width])
            (first, last), (begin, end) = rows[top], columns[left]
            labels[first:last, begin:end] = window_labels[first - top : last - top, begin - left : end - left]
        return labels

    def _probabilities(self, image: np.ndarray, pass_: Pass) -> np.ndarray:
        """Return the probabilities of one pass, float32 num_classes,H,W.

        Overlapping windows are averaged as probabilities or as logits, depending on the output of the file.
        """
        size: Size = (image.shape[0], image.shape[1])
        x = image if pass_.size == size else cv2.resize(image.astype(np.float32), pass_.size[::-1])
        x = x[:, ::-1] if pass_.flip else x
        if len(pass_.windows) == 1:
            total = self._run(x)
        else:
            shape = (len(self.metadata.names), *pass_.size)
            size_of_window = pass_.windows[0][2:]
            total = pass_.average_windows(
                np.zeros(shape, np.float32),
                np.zeros(pass_.size, np.float32),
                lambda window: self._resize(self._run(x[window[1:]]), size_of_window),
            )
        total = self._resize(total[..., ::-1] if pass_.flip else total, size)
        return total if self.metadata.outputs == "probabilities" else softmax(total)

    def _resize(self, x: np.ndarray, size: Size) -> np.ndarray:
        return resize(x, size, align_corners=self.metadata.align_corners)

    def _run(self, image: np.ndarray) -> np.ndarray:
        """Run the graph on one image H,W,3 with values 0 to 255; return its output without the batch axis."""
        size, required = image.shape[:2], self.metadata.size
        if required not in (None, size):
            height, width = required
            windows = f"predict in windows of that size (--set eval.slide=[{height},{width}]), or "
            raise OcrnetError(
                f"{self.path} accepts only images of {height}x{width}, not {size[0]}x{size[1]}: "
                f"{windows if size[0] >= height and size[1] >= width else ''}export with --size or --dynamic True"
            )
        x = as_input(image, self.metadata.input, self.metadata.mean, self.metadata.std)
        try:
            output = self.session.run(x)[0]
        except Exception as error:  # each runtime raises its own types
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OcrnetError(f"{self.path} cannot be run in {self.session.runtime}: {first}") from error
        if (
            output.shape != size
            if self.metadata.outputs == "labels"
            else output.shape[:-2] != (len(self.metadata.names),)
        ):
            raise OcrnetError(
                f"{self.path} outputs {self.metadata.outputs} according to its metadata, but its output has the shape "
                f"{output.shape}; export it again"
            )
        return output

    def logits(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Raise `OcrnetError`: an exported file has no auxiliary head and may not accept normalized input."""
        raise OcrnetError(f"{self.path}: an exported file does not support logits(); use its checkpoint")

    def train(self, steps: int, stopped: Callable[[], bool] = lambda: False) -> Stats:
        """Raise `OcrnetError`: an exported file cannot be trained."""
        raise OcrnetError(f"{self.path}: an exported file cannot be trained")

    def state(self) -> dict[str, np.ndarray]:
        """Return an empty state dict: the weights stay in the file."""
        return {}

    def restore(self, state: Mapping[str, np.ndarray], step: int) -> None:
        """Do nothing: the weights are in the file."""

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return ``array`` unchanged: there is only one process."""
        return array

    def close(self) -> None:
        """Do nothing."""


def as_input(image: np.ndarray, kind: str, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Convert an image to the input of an exported file, a batch of one.

    Args:
        image: H,W,3 RGB with values from 0 to 255.
        kind: The input format, ``"uint8"`` or ``"normalized"``.
        mean: Mean of R, G and B in the range 0 to 1; unused for ``"uint8"``.
        std: Standard deviation of R, G and B in the range 0 to 1; unused for ``"uint8"``.

    Returns:
        uint8 1,H,W,3, or normalized float32 1,3,H,W.
    """
    if kind == "uint8":
        return np.ascontiguousarray(image if image.dtype == np.uint8 else np.rint(image).astype(np.uint8))[None]
    scaled = (image.astype(np.float32) - 255 * np.array(mean, np.float32)) / (255 * np.array(std, np.float32))
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))[None]


def softmax(x: np.ndarray) -> np.ndarray:
    """Return the softmax over the first axis."""
    x = np.exp(x - x.max(0, keepdims=True))
    return x / x.sum(0, keepdims=True)


def resize(x: np.ndarray, size: Size, *, align_corners: bool) -> np.ndarray:
    """Resize an array bilinearly, as PyTorch's interpolate does.

    Args:
        x: float32 C,H,W.
        size: The new height and width.
        align_corners: As in PyTorch's interpolate.

    Returns:
        float32 C,height,width; ``x`` itself if it already has that size.
    """
    if x.shape[-2:] == size:
        return x
    for axis, length in ((1, size[0]), (2, size[1])):
        low, high, weight = _interpolation_weights(x.shape[axis], length, align_corners)
        below, above = x.take(low, axis), x.take(high, axis)
        above -= below
        above *= weight[:, None] if axis == 1 else weight
        x = below + above
    return x


def _interpolation_weights(length: int, size: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the lower and upper index, and the float32 weight of the upper index, for each interpolated position.

    An axis of ``length`` elements is resized to ``size`` positions.
    """
    if align_corners:
        at = np.arange(size) * ((length - 1) / (size - 1) if size > 1 else 0.0)
    else:
        at = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    low = np.minimum(at.astype(int), length - 1)
    return low, np.minimum(low + 1, length - 1), (at - low).astype(np.float32)
