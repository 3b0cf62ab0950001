"""`python -m ocrnet`: the same as the command `ocrnet`."""

import sys

from ocrnet.cli import main

sys.exit(main())
