"""Train OCRNet: python train.py --config CONFIG [FLAGS]; the same as the command `ocrnet train`."""

import sys

from ocrnet.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
