"""What a connection needs of the server that it belongs to."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from taskrun.manager.administration import Administration
from taskrun.manager.calls import Reply
from taskrun.manager.objects import Objects
from taskrun.reactor import Reactor


@dataclass(frozen=True, slots=True)
class Handover:
    """A connection that leaves the loop, and what was being done for it.

    ``received``: what was read and not dealt with.  ``unsent``: of earlier replies.
    ``reply``: to be sent then.  ``asked``: whether the first request is behind it.
    ``pid``: the client's process, where that is known.
    """

    socket: socket.socket
    received: bytearray
    unsent: memoryview | None
    reply: Reply | None
    asked: bool
    pid: int | None


class Host(Protocol):
    """The server, as ``peer`` and ``promoted`` see it."""

    address: Any
    administration: Administration
    objects: Objects
    plain: bool  # whether it speaks pickles; else every connection gets a thread
    reactor: Reactor
    sessions: Callable[[socket.socket, Any, bytes], object] | None  # see ``server.Server``
    report: Callable[[], object]  # for use in an ``except`` block

    def on_closed(self, peer: Any) -> None:
        """The loop serves the peer no more."""

    def promote(self, handover: Handover) -> None:
        """Have a connection served by a thread from now on."""

    def on_thread_ended(self, promoted: Any) -> None:
        """A promoted connection has ended.  On any thread."""

    def rebuild_proxy(self, make: Any, token: Any, serializer: str, kwds: dict[str, Any]) -> Any:
        """The proxy that somebody sends.  On any thread but the loop's."""
