"""Where the operations of a handle go: to the store of this process, or to a run's.

Which one it is, is asked at each use: a handle is only a name.  In a worker, and inside a
run in this process, ``context.state_home`` gives the client; elsewhere there is a store of
this process's own.
"""

from __future__ import annotations

from taskrun import context
from taskrun.errors import StateError
from taskrun.state.clients import Client


def current() -> Client:
    """The client of the code that asks.  Raises StateError while a task file is imported."""
    if context.importing:
        raise StateError(
            "shared state is used while the task file is imported: every process imports it; "
            "use state inside a task (handles may be made anywhere)"
        )
    home = context.state_home
    if home is not None:
        client: Client = home()
        return client
    from taskrun.state.local import own_client

    return own_client()
