"""`python -m forwardgrad` is the command `forwardgrad`."""

import sys

from forwardgrad.cli import main

sys.exit(main())
