"""`ocrnet export`: export a checkpoint for another runtime."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ocrnet.cli import flags
from ocrnet.export import triton
from ocrnet.export.exporter import ExportOptions, export
from ocrnet.train.setup import open_split
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Export a checkpoint for another runtime, and compare the predictions of the exported file and the checkpoint."""
    args = flags.parse("export", argv)
    options = args.options
    path = checkpoint.resolve(flags.required(args, "checkpoint_path"))
    export_options = ExportOptions(
        checkpoint=path,
        output=Path(flags.required(args, "output")),
        size=flags.as_size(args, "size", None),
        dynamic=flags.as_bool(args, "dynamic"),
        num_images=flags.as_number(args, "num_images", ExportOptions.num_images),
        tolerance=flags.as_number(args, "tolerance", None),
        **{name: options.get(name) for name in ("format", "precision", "input", "outputs", "calibration", "images")},
    )
    if "config" not in options and args.given:
        raise OcrnetError(f"--set {next(iter(args.given))}: no effect on export without --config")
    dataset = open_split(flags.load_config(args), "val") if "config" in options else None
    logger.info(f"checkpoint: {path}")
    write = triton.export_repository if export_options.format == triton.FORMAT else export
    comparison = write(export_options, dataset)
    logger.info(f"wrote {export_options.output} and its model card: {comparison.text()}")
    return 0
