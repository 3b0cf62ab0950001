"""`ocrnet convert`: convert weights from and to the formats of other implementations."""

from collections.abc import Sequence
from pathlib import Path

from ocrnet.cli import flags
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint, convert


def main(argv: Sequence[str]) -> int:
    """Convert weights of another implementation to a checkpoint, or a checkpoint to another implementation's format."""
    args = flags.parse("convert", argv)
    for name in args.given:
        raise OcrnetError(f"--set {name}: no effect on convert; the architecture is read from the weights")
    source = checkpoint.resolve(flags.required(args, "input"))
    output = Path(flags.required(args, "output"))
    partial = flags.as_bool(args, "allow_partial")
    convert.convert(source, output, to=args.options.get("to"), allow_partial=partial)
    return 0
