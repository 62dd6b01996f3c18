"""How a run tells its server what it has work for, whenever that changes: how many slots,
which lanes, and what of the resources that the server lends."""

from __future__ import annotations

import json
import math
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from taskrun.demand import NO_DEMAND, Demand

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
        self._said: dict[str, Any] = {}
        self._due = False
        self._say()

    def look(self) -> None:
        """Something has happened in the run."""
        if not self._due:
            self._due = True
            self._reactor.call_at(monotonic() + _PAUSE, self._say)

    def _say(self) -> None:
        self._due = False
        core = self._core
        says = {
            "wants": roughly(core.wanted_slots()), "lanes": core.wanted_lanes(),
            "demand": self._demand(),
        }  # fmt: skip
        back = core.returned()
        if (says != self._said or back) and not self._peer.closed:
            self._said = says
            self._peer.send(json.dumps({**says, "back": back}).encode())

    def _demand(self) -> Demand:
        if not self._core.borrows:
            return NO_DEMAND
        demand = self._core.demand()
        # Not more than there are: what is wanted beside them must not look less.
        needs = [need._replace(calls=at_least(need.calls)) for need in demand.needs]
        return demand._replace(needs=needs)


def at_least(calls: int) -> int:
    """A number that is not more; where it is large, a power of two."""
    return calls if calls <= _EXACT else 1 << (calls.bit_length() - 1)


def roughly(slots: float) -> int:
    """A whole number that is not less; where it is large, a power of two."""
    whole = math.ceil(slots - 1e-9)
    return whole if whole <= _EXACT else 1 << (whole - 1).bit_length()
