"""``python -m fxquant`` is the command ``fxquant``."""

import sys

from fxquant.cli import main

if __name__ == "__main__":
    sys.exit(main())
