"""`python -m ocrnet`: run the command `ocrnet`."""

import sys

from ocrnet.cli.main import main

sys.exit(main())
