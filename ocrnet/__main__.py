"""`python -m ocrnet`: the same as the command `ocrnet`."""

import sys

from ocrnet.cli.main import main

sys.exit(main())
