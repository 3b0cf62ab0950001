"""The network as the worker thread calls it: images in batches, or in tiles if they exceed the memory limit."""

from collections.abc import Sequence

import numpy as np

from ocrnet.architecture import flops
from ocrnet.config import Eval
from ocrnet.predict.model import Model
from ocrnet.predict.tiles import predict_tiled, tile_size
from ocrnet.serve.worker import Job, Prediction
from ocrnet.utils.errors import OcrnetError

PROBE_SIZES = (64, 96), (96, 64)


class Network:
    """A model and its capabilities.

    ``explains``: it outputs the relation. ``averages``: it can average over passes. ``max_batch_bytes`` limits the
    memory of one batch.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.max_batch_bytes = model, Eval().max_memory * 2**30
        self.explains, self.averages = self._probe()

    def _probe(self) -> tuple[bool, bool]:
        """Return whether the model outputs the relation, and whether it can average over passes.

        An exported file may support neither. Raise `OcrnetError` if the model does not accept images of any size.
        """
        try:
            for size in PROBE_SIZES:
                self.model.predict(np.zeros((*size, 3), np.uint8))
        except OcrnetError as error:
            raise OcrnetError(
                f"{error}\nocrnet serve supports checkpoints and files exported with --dynamic True"
            ) from None
        image = np.zeros((*PROBE_SIZES[0], 3), np.uint8)
        supported = []
        for outputs in (("relation",), ("confidence",)):
            try:
                self.model.outputs(image, outputs)
                supported.append(True)
            except OcrnetError:
                supported.append(False)
        return supported[0], supported[1]

    def __call__(self, jobs: Sequence[Job]) -> list[Prediction]:
        """Return the predictions of images that have one size and the same options, in the order of ``jobs``.

        They are predicted in batches that fit the memory limit; an image that exceeds the limit, in tiles.
        """
        image, eval_cfg = jobs[0].image, jobs[0].eval_cfg
        size = image.shape[0], image.shape[1]
        if tile_size(self.model.arch, size, eval_cfg) != size:
            return [self._predict_tiled(job) for job in jobs]
        image_bytes = flops.predict_bytes(self.model.arch, size, max(eval_cfg.scales))
        batch_size = max(1, int(self.max_batch_bytes // image_bytes))
        batches = (jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size))
        return [prediction for batch in batches for prediction in self._predict_batch(batch)]

    def _predict_tiled(self, job: Job) -> Prediction:
        prediction = predict_tiled(self.model, job.image, job.eval_cfg, confidence=job.explain and self.averages)
        return Prediction(prediction.labels, prediction.confidence, tiles=prediction.tiles)

    def _predict_batch(self, jobs: Sequence[Job]) -> list[Prediction]:
        eval_cfg, explain = jobs[0].eval_cfg, jobs[0].explain
        images = np.stack([job.image for job in jobs])
        single = len(eval_cfg.scales) == 1 and eval_cfg.scales[0] == 1 and not eval_cfg.flip
        outputs = ["labels"]
        if explain and self.averages:
            outputs.append("confidence")
        if explain and self.explains and single:
            outputs.append("relation")
        predicted = self.model.outputs_of(images, outputs, eval_cfg.scales, eval_cfg.flip)
        if explain and self.explains and not single:  # the relation comes from one pass, even if labels are averaged
            predicted |= self.model.outputs_of(images, ("relation",))
        quantized = {name: np.rint(predicted[name] * 255).astype(np.uint8) for name in predicted.keys() - {"labels"}}
        return [
            Prediction(predicted["labels"][i], **{name: array[i] for name, array in quantized.items()}, batch=len(jobs))
            for i in range(len(jobs))
        ]
