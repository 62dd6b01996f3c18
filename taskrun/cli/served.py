"""The process of one run of a server: ``taskrun`` as anybody starts it, that ends with the
server.

    python -m taskrun.cli.served PID exec FILE ...
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run ``taskrun`` as long as the parent, whose PID comes first, lives."""
    from taskrun import sessions
    from taskrun.cli.main import main as run

    sessions.die_with_parent(int(sys.argv[1]))
    del sys.argv[1]
    return run(sys.argv[1:], served=True)


if __name__ == "__main__":
    sys.exit(main())
