"""`python -m raylhf.cli`."""

import sys

from raylhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
