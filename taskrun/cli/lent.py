"""The node that a server has on its own machine, for one Pool; it ends with the server.

    python -m taskrun.cli.lent PID SOCKET POOL SLOTS

The key is where ``TASKRUN_AUTHKEY_FILE`` says.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Be the node called ``local`` of that Pool; gives the exit status."""
    from taskrun import sessions
    from taskrun.authkey import authkey
    from taskrun.cli.worker import Coordinator, take_part
    from taskrun.errors import TaskrunError
    from taskrun.network.channels import Offer
    from taskrun.settings import memory_here
    from taskrun.telling import tell
    from taskrun.transport.tls import Certificates

    parent, path, pool, slots = sys.argv[1:]
    sessions.die_with_parent(int(parent))
    offer = Offer("local", int(slots), {"memory": memory_here()})
    try:
        server = Coordinator("the server", path, authkey(), Certificates(), insecure_plain=False)
        return take_part(server, pool, offer)
    except TaskrunError as error:
        tell(f"error: {pool}: {error}")
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
