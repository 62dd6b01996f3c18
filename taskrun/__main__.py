"""``python -m taskrun``: the same as the command ``taskrun``."""

import sys

from taskrun.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
