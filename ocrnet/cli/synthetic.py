"""`ocrnet synthetic`: write procedural street scenes in the layout of Cityscapes."""

from collections.abc import Sequence

from ocrnet.cli.common import Parser
from ocrnet.data.datasets import synthetic


def main(argv: Sequence[str]) -> int:
    """Write procedural street scenes in the layout of Cityscapes."""
    parser = Parser(prog="ocrnet synthetic", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help="output folder, which must be empty or new")
    for split, count in (("train", 16), ("val", 4), ("test", 2)):
        what = f"number of scenes in {split} (default: {count})"
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=what)
    size = "height and width of the images (default: 512 1024)"
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"), help=size)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the scenes (default: 0)")
    args = parser.parse_args(argv)
    synthetic.write(args.folder, train=args.train, val=args.val, test=args.test, size=tuple(args.size), seed=args.seed)
    print(f"wrote {args.train} train, {args.val} val and {args.test} test scenes to {args.folder}")
    return 0
