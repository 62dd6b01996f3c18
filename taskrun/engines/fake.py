"""A stand-in for engines that are not ours: executes chunks one by one in a thread, loses what
it is told to lose.  For tests of tasks and of taskrun itself; no process is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

from taskrun.engines.hosts import Done, Lost, Returned, Terms
from taskrun.network.bundles import Bundle
from taskrun.workers.briefs import VERSION
from taskrun.workers.chunks import execute, leave


class FakeHost:
    """A ``hosts.Host`` without processes, which keeps large values in a dict.

    ``losses``: so many chunks, the first ones, end as if their worker had died.
    ``terms`` and ``submitted`` tell what it was asked.
    """

    name = "fake"
    keeps = True
    here = False
    alone = False
    isolated = True
    far = False

    def __init__(self, slots: int = 1, *, losses: int = 0) -> None:
        self.losses = losses
        self.terms: list[Terms] = []
        self.submitted = 0
        self.places: dict[int, dict[Any, Any]] = {}
        self._slots = slots
        self._ids = count(1)
        self._thread = ThreadPoolExecutor(1)

    def open(self, files: Bundle | None = None) -> int:
        """See ``hosts.Host``."""
        return self._slots

    def submit(
        self, brief: bytes, chunk: bytes, inputs: Sequence[Any], terms: Terms, done: Done
    ) -> None:
        """See ``hosts.Host``."""
        self.submitted += 1
        self.terms.append(terms)
        lost, self.losses = self.losses > 0, max(0, self.losses - 1)
        self._thread.submit(self._execute, brief, chunk, list(inputs), done, lost)

    def _execute(
        self, brief: bytes, chunk: bytes, inputs: list[Place], done: Done, lost: bool
    ) -> None:
        if lost:
            done(Lost("was killed by a test"))
            return
        records, values = execute(VERSION, brief, chunk, [place.values for place in inputs])
        done(Returned(records, Place(self, next(self._ids), values) if values else None))

    def cancel(self, handle: Any) -> None:
        """See ``hosts.Host``; what is on its way is executed."""

    def interrupt(self, brief: bytes, call: int, attempt: int) -> bool:
        """See ``hosts.Host``."""
        return False

    def fetch(self, place: Any) -> Mapping[Any, Any]:
        """See ``hosts.Host``."""
        values: Mapping[Any, Any] = place.values
        return values

    def missing(self, resources: Mapping[str, float]) -> str | None:
        """See ``hosts.Host``."""
        return None

    def is_gone(self) -> str | None:
        """See ``hosts.Host``."""
        return None

    def close(self, brief: bytes | None, deadline: float) -> None:
        """See ``hosts.Host``."""
        if brief is not None:
            leave(brief)
        self._thread.shutdown(wait=False, cancel_futures=True)


class Place:
    """Values that were kept; forgotten when nobody has it any more."""

    def __init__(self, host: FakeHost, id: int, values: dict[Any, Any]) -> None:
        self._host, self._id = host, id
        self.values = host.places[id] = values

    def __del__(self) -> None:
        self._host.places.pop(self._id, None)
