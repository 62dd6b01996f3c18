"""How a run tells its server how many slots it has work for, whenever that changes."""

from __future__ import annotations

import json
import math
from time import monotonic
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from taskrun.core.scheduler import Scheduler
    from taskrun.reactor import Reactor
    from taskrun.transport import Peer

_PAUSE: Final = 0.05  # seconds between two looks: events come much faster
_EXACT: Final = 64  # more than that is said roughly, so that it changes seldom


class Wanting:
    """Tells ``peer``; ``look()`` is to be called after each event."""

    def __init__(self, core: Scheduler, reactor: Reactor, peer: Peer) -> None:
        self._core = core
        self._reactor = reactor
        self._peer = peer
        self._said: int | None = None
        self._due = False
        self._say()

    def look(self) -> None:
        """Something has happened in the run."""
        if not self._due:
            self._due = True
            self._reactor.call_at(monotonic() + _PAUSE, self._say)

    def _say(self) -> None:
        self._due = False
        wants = roughly(self._core.wanted_slots())
        if wants != self._said and not self._peer.closed:
            self._said = wants
            self._peer.send(json.dumps({"wants": wants}).encode())


def roughly(slots: float) -> int:
    """A whole number that is not less; where it is large, a power of two."""
    whole = math.ceil(slots - 1e-9)
    return whole if whole <= _EXACT else 1 << (whole - 1).bit_length()
