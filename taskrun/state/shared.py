"""The client of a store in a worker with thousands of calls at a time.

What takes no time goes over few connections, which its threads and greenlets use in turn.
Whoever has to wait, for an item or a lock, keeps the connection for himself meanwhile, and
another may be made in its place: so nobody who waits keeps those from going on who could
end that.
"""

from __future__ import annotations

from queue import SimpleQueue
from typing import Final

from taskrun.state.remote import Connection, RemoteClient

MOST_USED: Final = 8  # connections at a time on which an answer is due at once


class SharedClient(RemoteClient):
    """A ``clients.Client`` whose connections belong to no thread."""

    def _begin(self) -> None:
        super()._begin()
        # A queue, because a greenlet that is killed while it waits there takes nothing along.
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(MOST_USED):
            self._room.put(None)

    def _take(self, *, fresh: bool = False) -> Connection:
        self._room.get()
        try:
            found = self._idle.pop() if self._idle and not fresh else self.connect()
        except BaseException:
            self._room.put(None)
            raise
        found.counted = True
        return found

    def _put_back(self, connection: Connection) -> None:
        self._set_aside(connection)
        self._keep(connection)

    def _drop(self, connection: Connection) -> None:
        self._set_aside(connection)
        connection.close()

    def _set_aside(self, connection: Connection) -> None:
        if connection.counted:
            connection.counted = False
            self._room.put(None)
