"""`ocrnet report`: write an HTML page about runs."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ocrnet.cli import flags
from ocrnet.report import build as report
from ocrnet.report.compute import ReportFilter
from ocrnet.utils.errors import printable
from ocrnet.weights import checkpoint

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Write a report on runs as one HTML file, with a model card for a single run; --watch follows runs in progress."""
    args = flags.parse("report", argv)
    path = args.options.get("checkpoint_path")
    output = args.options.get("output")
    options = report.ReportOptions(
        runs=[Path(run) for run in args.inputs],
        output=Path(output) if output else None,
        report_filter=ReportFilter(
            args.given, checkpoint.resolve(path) if path else None, flags.as_number(args, "images", 0)
        ),
        curves_only=flags.as_bool(args, "curves_only"),
    )
    if flags.as_bool(args, "watch"):
        logger.info(f"wrote {printable(str(report.watch(options)))}")
        return 0
    logger.info(f"wrote {printable(' and '.join(map(str, report.make(options))))}")
    return 0
