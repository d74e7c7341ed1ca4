"""`python -m crystal`, and the `crystal` script: the command line."""

import sys

from crystal.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
