"""The state of a run, for those who come by the address of its server.

Such a client proves the key to the server, and says in its first request which run it means.
It is then joined to a connection to the run's process: frames pass unread.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from time import monotonic
from typing import Any, Final, TypeAlias

from taskrun import transport
from taskrun.errors import UsageError
from taskrun.manager import pickling
from taskrun.manager.protocol import MANAGER
from taskrun.reactor import Reactor
from taskrun.serving.hosts import relay
from taskrun.serving.runs import RUNNING, ServedRun
from taskrun.state.wire import REFUSED
from taskrun.wire import MAX_FRAME

_PATIENCE: Final = 10.0  # seconds for a client to say which run it means
_MOST: Final = 64 * 1024  # bytes that it takes to say so

Find: TypeAlias = Callable[[str], ServedRun]


class States:
    """``find`` gives the run of a name, or raises UsageError; ``key`` is that of the runs."""

    def __init__(self, reactor: Reactor, find: Find, key: Callable[[], bytes]) -> None:
        self._reactor = reactor
        self._find = find
        self._key = key

    def accept(self, peer: transport.Peer) -> None:
        """Somebody who has the key wants the state of a run."""
        peer.limit(_MOST)
        timer = self._reactor.call_at(monotonic() + _PATIENCE, peer.close)

        def first(frame: memoryview) -> None:
            timer.cancel()
            self._on_request(peer, bytes(frame))

        peer.listen(first, lambda reason: timer.cancel())

    def _on_request(self, peer: transport.Peer, frame: bytes) -> None:
        try:
            run = self._find(_run_in(frame))
            if run.state != RUNNING:
                raise UsageError(f"{run.name} is {run.state}: it has no state")
        except UsageError as error:
            _refuse(peer, str(error))
            return
        peer.pause()  # what it says next is for the run
        peer.limit(MAX_FRAME)
        relay(
            peer, run.address, self._key(), self._reactor, role=MANAGER, first=frame,
            refuse=lambda: _refuse(peer, f"{run.name} does not answer: it may be starting"),
        )  # fmt: skip


def _run_in(frame: bytes) -> str:
    """Which run is meant.  Raises UsageError."""
    try:
        return str(pickling.load_plain(frame)[3]["run"])
    except Exception:  # a broken pickle raises anything
        raise UsageError("that does not say which run is meant") from None


def _refuse(peer: transport.Peer, reason: str) -> None:
    answer: Any = (REFUSED, reason)
    peer.send(pickle.dumps(answer))
    peer.finish()
