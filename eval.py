"""Evaluate OCRNet: python eval.py --config CONFIG --checkpoint_path PATH [FLAGS]; the same as `ocrnet eval`."""

import sys

from ocrnet.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
