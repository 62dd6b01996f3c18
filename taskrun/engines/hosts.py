"""What an engine that is not ours must be able to do: carry chunks, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from taskrun.network.bundles import Bundle


@dataclass(frozen=True, slots=True)
class Returned:
    """A chunk was executed: the records, and where its kept values are."""

    records: bytes
    place: Any = None


@dataclass(frozen=True, slots=True)
class Lost:
    """The process that executed a chunk, or was about to, is gone; ``reason`` reads like
    ``was killed``."""

    reason: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A chunk was cancelled."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine did not execute a chunk, and would not if it were asked again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The engine is of no use any more."""

    reason: str


Result: TypeAlias = Returned | Lost | Withdrawn | Refused | Broken
Done: TypeAlias = Callable[[Result], object]


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms a chunk is to be executed: higher ``priority`` first; ``resources``
    that its calls need, each at a time."""

    priority: float = 0
    resources: Mapping[str, float] | None = None


class Host(Protocol):
    """A system that executes functions somewhere else: Dask, Ray, an executor.

    ``name``: as people know it.  ``keeps``: values can stay with it.  ``here``: its processes
    are on this machine, and end with the run.  ``alone``: each of these executes one chunk at
    a time and nothing else.  ``isolated``: the end of one is no harm to the others.
    ``far``: they may be on machines that have other files than this one.
    """

    name: str
    keeps: bool
    here: bool
    alone: bool
    isolated: bool
    far: bool

    def open(self, files: Bundle | None) -> int:
        """Start it or connect to it, on any thread; gives how many chunks it executes at a
        time.  ``files``: where it is far, those that each of its processes has to have before
        it executes a chunk (``workers.luggage``).  Raises RunError."""

    def submit(
        self, brief: bytes, chunk: bytes, inputs: Sequence[Any], terms: Terms, done: Done
    ) -> Any:
        """Have a chunk executed (``workers.chunks.execute``), with the values at the places
        ``inputs``; ``done`` is called once, on any thread.  Gives a handle."""

    def cancel(self, handle: Any) -> None:
        """End a chunk, where that can be done; it is then ``Withdrawn`` or ``Lost``."""

    def interrupt(self, brief: bytes, call: int, attempt: int) -> bool:
        """Tell the worker that executes a call of this run in a kept child to end it; False
        where it cannot be told."""

    def fetch(self, place: Any) -> Mapping[Any, Any]:
        """The values at a place, by part.  Raises LookupError where they are lost."""

    def missing(self, resources: Mapping[str, float]) -> str | None:
        """Which of these nobody there has; None: somebody has them all."""

    def is_gone(self) -> str | None:
        """Why nothing will come of it any more; None: it is there."""

    def close(self, brief: bytes | None, deadline: float) -> None:
        """Leave it; what was started with it ends, by ``deadline`` (monotonic seconds)."""


def first_line(error: BaseException) -> str:
    """What an error of another library says first: the rest is often a traceback of its own."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
