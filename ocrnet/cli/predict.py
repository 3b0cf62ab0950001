"""`ocrnet predict`: segment images and videos, and write the results to files."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ocrnet import config
from ocrnet.cli import flags
from ocrnet.config import loader
from ocrnet.predict.model import load
from ocrnet.predict.predictor import Job, predict, text
from ocrnet.predict.sources import find
from ocrnet.predict.writers import DEFAULT, DEFAULT_OF_VIDEO, IMAGE_KINDS, parse_save
from ocrnet.utils.errors import OcrnetError, printable
from ocrnet.utils.signals import Stopped, StopRequest
from ocrnet.weights import checkpoint

logger = logging.getLogger(__name__)

OUTPUT = "predictions"


def main(argv: Sequence[str]) -> int:
    """Segment images and videos, and write the results to files."""
    args = flags.parse("predict", argv)
    cfg = loader.build(args.given)
    config.check(cfg)
    unsupported = [
        name for name in args.given if name not in ("device_target", "engine", "mix") and name[:5] != "eval."
    ]
    if unsupported:
        raise OcrnetError(f"--set {unsupported[0]}: no effect on predict; the architecture is read from the checkpoint")
    path = checkpoint.resolve(flags.required(args, "checkpoint_path"))
    save, output = parse_save(args.options.get("save")), Path(args.options.get("output", OUTPUT))
    # Find the sources before the weights are read, so that a wrong path is reported at once.
    sources = find(args.options["source"], output, offline=flags.as_bool(args, "offline"))
    model = load(path, engine=cfg.engine, device_target=cfg.device_target, mix=cfg.mix)

    def check() -> None:
        if stop():
            raise Stopped(stop())

    with StopRequest(message="stopping; finished results are kept") as stop:
        report = predict(Job(model, output, cfg.eval, save, check), sources)
    print(text(report))
    outputs = _describe_outputs(save, {source.kind for source in sources})
    logger.info(f"{report.written} predicted, written to {output}: {outputs}")
    if report.problems:
        print(f"{len(report.problems)} unreadable:", *map(printable, report.problems), sep="\n  ", file=sys.stderr)
    return int(bool(report.problems))


def _describe_outputs(save: Sequence[str] | None, sources: set[str]) -> str:
    """Return a description of the files in the output folder."""
    defaults = [kind for kind in DEFAULT if "image" in sources or kind in DEFAULT_OF_VIDEO]
    kinds = defaults if save is None else save
    parts = [f"{kind}/ ({IMAGE_KINDS[kind]})" for kind in kinds if kind != "json"]
    json_file = ["areas.json (pixels and share of each class)"] if "json" in kinds else []
    return ", ".join([*parts, *json_file, "legend.png"])
