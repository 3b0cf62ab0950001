"""The network as the worker thread uses it: batches of whole images, and tiles for images that exceed memory."""

from collections.abc import Sequence

import numpy as np

from ocrnet.architecture import flops
from ocrnet.config import Eval
from ocrnet.predict.model import Model
from ocrnet.predict.tiles import predict_tiled, tile_size
from ocrnet.serve.worker import Job, Prediction
from ocrnet.utils.errors import OcrnetError

PROBES = (64, 96), (96, 64)


class Network:
    """A model and its capabilities; ``most_bytes`` limits the memory of one batch."""

    def __init__(self, model: Model) -> None:
        self.model, self.most_bytes = model, Eval().max_memory * 2**30
        self.explains, self.averages = self._can()

    def _can(self) -> tuple[bool, bool]:
        """Return whether the model outputs the relation, and whether it can average over passes.

        Exported files may lack either. Raise OcrnetError if the model does not predict images of different sizes.
        """
        try:
            for size in PROBES:
                self.model.predict(np.zeros((*size, 3), np.uint8))
        except OcrnetError as error:
            raise OcrnetError(
                f"{error}\nocrnet serve supports checkpoints and files exported with --dynamic True"
            ) from None
        image = np.zeros((*PROBES[0], 3), np.uint8)
        found = []
        for outputs in (("relation",), ("confidence",)):
            try:
                self.model.outputs(image, outputs)
                found.append(True)
            except OcrnetError:
                found.append(False)
        return found[0], found[1]

    def __call__(self, jobs: Sequence[Job]) -> list[Prediction]:
        """Predict images of one size with the same options, in batches that fit into memory.

        An image that does not fit into memory is predicted in tiles.
        """
        image, eval_cfg = jobs[0].image, jobs[0].eval_cfg
        size = image.shape[0], image.shape[1]
        if tile_size(self.model.arch, size, eval_cfg) != size:
            return [self._in_tiles(job) for job in jobs]
        need = flops.predict_bytes(self.model.arch, size, max(eval_cfg.scales))
        together = max(1, int(self.most_bytes // need))
        return [seen for i in range(0, len(jobs), together) for seen in self._whole(jobs[i : i + together])]

    def _in_tiles(self, job: Job) -> Prediction:
        seen = predict_tiled(self.model, job.image, job.eval_cfg, confidence=job.explain and self.averages)
        return Prediction(seen.labels, seen.confidence, tiles=seen.tiles)

    def _whole(self, jobs: Sequence[Job]) -> list[Prediction]:
        eval_cfg, explain = jobs[0].eval_cfg, jobs[0].explain
        images = np.stack([job.image for job in jobs])
        single = len(eval_cfg.scales) == 1 and eval_cfg.scales[0] == 1 and not eval_cfg.flip
        outputs = ["labels"]
        if explain and self.averages:
            outputs.append("confidence")
        if explain and self.explains and single:
            outputs.append("relation")
        found = self.model.outputs_of(images, outputs, eval_cfg.scales, eval_cfg.flip)
        if explain and self.explains and not single:  # the relation comes from one pass, even if labels are averaged
            found |= self.model.outputs_of(images, ("relation",))
        bytewise = {name: np.rint(found[name] * 255).astype(np.uint8) for name in found.keys() - {"labels"}}
        return [
            Prediction(found["labels"][i], **{name: array[i] for name, array in bytewise.items()}, batch=len(jobs))
            for i in range(len(jobs))
        ]
