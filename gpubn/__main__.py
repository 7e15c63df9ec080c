"""``python -m gpubn``: the command line."""

import sys

from gpubn.cli import main

if __name__ == "__main__":
    sys.exit(main())
