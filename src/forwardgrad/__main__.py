"""`python -m forwardgrad` is the command `forwardgrad`."""

import sys

from forwardgrad.cli import main

if __name__ == "__main__":
    sys.exit(main())
