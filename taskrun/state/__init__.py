"""Shared state: named objects that every task can see.

    from taskrun import state

    seen = state.set("seen")          # a name; the set itself is the coordinator's

    @task
    def visit(url):
        if seen.add(url):             # of all who try, one gets True
            ...

Each function here gives a handle, for an object that is made when it is first used.  In a
task of a run it is in the run's coordinator; elsewhere it is this process's own.
"""

from __future__ import annotations

from taskrun.state.containers import Dict, List, Set
from taskrun.state.handles import Barrier, Counter, Event, Lock, Queue, Semaphore

__all__ = ["barrier", "counter", "dict", "event", "list", "lock", "queue", "semaphore", "set"]


def dict(name: str) -> Dict:
    """The shared dict of that name."""
    return Dict(name)


def list(name: str) -> List:
    """The shared list of that name."""
    return List(name)


def set(name: str) -> Set:
    """The shared set of that name; its ``add`` says whether the item was new."""
    return Set(name)


def counter(name: str) -> Counter:
    """The shared number of that name, 0 at first."""
    return Counter(name)


def queue(name: str, maxsize: int | None = None) -> Queue:
    """The shared queue of that name; with ``maxsize``, ``put`` waits while it is full."""
    return Queue(name) if maxsize is None else Queue(name, int(maxsize))


def lock(name: str) -> Lock:
    """The shared lock of that name: ``with state.lock("x"): ...``."""
    return Lock(name)


def semaphore(name: str, permits: int | None = None) -> Semaphore:
    """The shared semaphore of that name, with so many permits."""
    return Semaphore(name) if permits is None else Semaphore(name, _positive(permits))


def event(name: str) -> Event:
    """The shared flag of that name."""
    return Event(name)


def barrier(name: str, parties: int | None = None) -> Barrier:
    """The shared barrier of that name, for so many parties."""
    return Barrier(name) if parties is None else Barrier(name, _positive(parties))


def _positive(number: int) -> int:
    if number < 1:
        raise ValueError(f"it takes at least 1, not {number}")
    return int(number)


def reset() -> None:
    """Forget this process's own objects: for tests of tasks."""
    from taskrun.state.local import forget

    forget()
