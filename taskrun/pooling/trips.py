"""The shortest way of a small call: a worker is idle, and its caller waits for the answer.

Who runs the loop writes the call to that worker and reads the answer, and the core need not
hear of it: nothing else happened meanwhile, so for the core the worker was idle all the time.
Where anything but the answer comes first (another thread posts, a timer is due, the worker
dies, the answer is no plain one), or somebody else comes to run the loop, the call is entered
in the core's books before that is looked at.  From there on it is a call like any other.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from taskrun import messages as m
from taskrun.bunch import Bunch
from taskrun.core.scheduler import Scheduler
from taskrun.engines.links import PipeLink
from taskrun.errors import WireError
from taskrun.model import Recipe
from taskrun.pooling.starting import PoolWorkers
from taskrun.reactor import Reactor

_PLAIN: Final = frozenset((int, float, bool, type(None), bytes))


class Answer(NamedTuple):
    """What came of a trip: an encoded value, who executed it, when it began (wall clock), and
    how many seconds it took."""

    bunch: Bunch
    value: Any
    worker: int
    pid: int | None
    wall: float
    seconds: float


class _Trip(NamedTuple):
    link: PipeLink
    call: int
    recipe: Recipe
    bunch: Bunch


class Trips:
    """Makes trips, one at a time; used by who runs the loop.

    ``post`` has the core handle an event.
    """

    def __init__(
        self,
        reactor: Reactor,
        core: Scheduler,
        engine: PoolWorkers,
        post: Callable[[m.Event], None],
    ) -> None:
        self._reactor = reactor
        self._core = core
        self._engine = engine
        self._post = post
        self._trip: _Trip | None = None

    @property
    def bunch(self) -> Bunch | None:
        """What is under way."""
        return None if self._trip is None else self._trip.bunch

    def begin(self, recipe: Recipe, bunch: Bunch) -> bool:
        """Send a bunch of one item to an idle worker; False where none can have it now."""
        worker = self._core.spare()
        link = None if worker is None else self._engine.at_hand(worker.id, recipe)
        if link is None:
            return False
        call = self._core.reserve()
        record = (m.CALL, call, 1, recipe.id, None, bunch.items, None)
        link.send_calls(pickle.dumps([record], pickle.HIGHEST_PROTOCOL))
        self._trip = _Trip(link, call, recipe, bunch)
        return True

    def end(self, timeout: float | None) -> Answer | None:
        """Wait for the answer; None where something else came first, if only the end of
        ``timeout`` seconds: the call is entered."""
        trip = self._trip
        if trip is None:
            return None
        records = self._heard(trip.link, timeout)
        answer = _answer(trip, records)
        if answer is None:
            self.enter()
            self._engine.take(trip.link, records)
        else:
            self._trip = None
        return answer

    def _heard(self, link: PipeLink, timeout: float | None) -> list[tuple[Any, ...]]:
        reader = link.wires.reader
        if not self._reactor.awaits_only(reader.fd, timeout):
            return []
        try:
            return [record for frame in reader.read() for record in link.intake.frame(frame)]
        except WireError as error:
            self._engine.reject(link, f"what it sent could not be read: {error}")
            return []

    def enter(self) -> None:
        """Whatever is under way is a call like any other from now on."""
        trip = self._trip
        if trip is not None:
            self._post(m.Sent(trip.link.id, trip.call, trip.recipe, trip.bunch))
            trip.link.assigned[trip.call] = self._core.find(trip.call)
            self._trip = None

    def give_up(self) -> Bunch | None:
        """Nobody will hear of what is under way; gives that."""
        bunch, self._trip = self.bunch, None
        return bunch


def _answer(trip: _Trip, records: list[Any]) -> Answer | None:
    """What the records say, if that is a plain answer and nothing else."""
    if len(records) != 3 or type(records[1]) not in _PLAIN or type(records[2]) is not float:
        return None
    head, value, seconds = records
    if type(head) is not tuple or head[:3] != (m.ITEMS, trip.call, 1) or len(head) != 4:
        return None
    link = trip.link
    return Answer(trip.bunch, value, link.id, link.pid, head[3], seconds)
