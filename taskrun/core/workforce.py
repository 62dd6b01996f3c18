"""What the scheduler knows of its workers, and of the attempts in them that wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from taskrun import bunch
from taskrun.calls import FINAL, HELD, Call

if TYPE_CHECKING:
    from taskrun.core.ready import ReadyCalls

DEFAULT_CPU = 1.0


def worker_name(worker: int | None, node: str = "") -> str:
    """What people see of a worker: ``w1``, on another machine ``lab2/w3``."""
    if worker is None:
        return ""
    return f"{node}/w{worker}" if node else f"w{worker}"


class Home(Protocol):
    """Who gives a worker its calls: ``placement`` or ``crowd``.

    ``lane``: how they execute them.  ``begins_at_once``: whether a worker begins every call
    when it gets it.  ``offered``: how many workers nodes have that are for its lane alone.
    """

    lane: str
    begins_at_once: bool
    offered: int
    ready: ReadyCalls
    workers: dict[int, Worker]

    def join(self, worker: Worker) -> None:
        """A worker can take calls."""

    def leave(self, id: int) -> Worker | None:
        """A worker is gone; None if it never was ready."""

    def retire(self, worker: Worker) -> None:
        """A worker finishes what it has, and is to get no more."""

    def make_do(self, workers: int) -> None:
        """Want no more workers than these, until :meth:`want_all`."""

    def want_all(self) -> None:
        """Want as many workers as there may be."""

    def heard(self, worker: Worker, now: float) -> None:
        """A worker reported something."""

    def top_up(self, worker: Worker, now: float) -> None:
        """A worker that is at work may get more calls."""

    def wait(self, worker: Worker, call: Call, any_of: bool) -> Wait:
        """A running attempt waits."""

    def go_on(self, wait: Wait) -> None:
        """A waiting attempt goes on, if it can."""

    def resumed(self, worker: Worker, call: Call) -> None:
        """A waiting attempt went on by itself."""

    def schedule(self, now: float) -> None:
        """Assign what can be assigned.  Raises Impossible for a call that can never start,
        which is ready no more: fail it and come again."""

    def is_idle(self) -> bool:
        """Whether nothing runs here and nothing is about to."""


class Worker:
    """What the scheduler knows of a worker.

    ``calls``: assigned and not ended, in order.  ``waits``: the attempts in it that wait, by
    call; where calls are nested, innermost last.  ``slots``: how many calls it executes at a
    time; where that is one, only the first of ``calls`` may have begun.  ``node``: the other
    machine that it is on.  ``lent``: nothing in
    it runs just now.  ``cpu``: what its running call takes of the slots.  ``heard``: when it
    last reported.  ``checked``: an overdue check is pending.  ``given``: how many calls it
    was given, without those that came back.
    """

    __slots__ = (
        "calls", "checked", "cpu", "given", "heard", "home", "id", "lent", "node", "pid",
        "retiring", "slots", "waits",
    )  # fmt: skip

    def __init__(
        self, id: int, pid: int, home: Home, slots: int, now: float, node: str = ""
    ) -> None:
        self.id = id
        self.node = node
        self.pid = pid
        self.home = home
        self.slots = slots
        self.calls: dict[int, Call] = {}
        self.waits: dict[int, Wait] = {}
        self.lent = False
        self.cpu = 0.0
        self.heard = now
        self.checked = False
        self.given = 0
        self.retiring = False  # it gets no more

    @property
    def name(self) -> str:
        """What people see of it."""
        return worker_name(self.id, self.node)

    @property
    def running(self) -> int:
        """How many calls it has that do not wait."""
        return len(self.calls) - len(self.waits)

    @property
    def ahead(self) -> int:
        """How many calls it has beyond the one that runs, items of bunches each counted."""
        return bunch.count(self.calls) - len(self.waits) - 1

    @property
    def innermost(self) -> Wait:
        """The attempt that waited last."""
        return next(reversed(self.waits.values()))

    def end_wait(self, call: Call) -> None:
        """``call`` waits no more, if it did: it has ended, or went on by itself."""
        wait = self.waits.pop(call.id, None)
        if wait is not None:
            wait.unwatch()


class Wait:
    """A running attempt that waits for calls it submitted, or for something *outside* that
    is no call: then it says itself when it goes on.  One that *hosts* lets its worker execute
    any call meanwhile, if need be."""

    __slots__ = ("any_of", "call", "hosts", "outside", "over", "pending", "worker")

    def __init__(self, worker: Worker, call: Call) -> None:
        self.worker = worker
        self.call = call
        self.any_of = False
        self.outside = self.hosts = False
        self.pending: dict[bytes, Call] = {}
        self.over = False  # what it waits for is there

    def watch(self, child: Call) -> None:
        """It is for ``child``, among others."""
        if child.key in self.pending:
            return
        self.pending[child.key] = child
        if child.state not in FINAL:
            child.watchers = child.watchers or []
            child.watchers.append(self)

    def unwatch(self) -> None:
        """It is for nothing any more."""
        for child in self.pending.values():
            if child.watchers and self in child.watchers:
                child.watchers.remove(self)
        self.pending.clear()

    def ended(self, child: Call) -> None:
        """``child``, which it was for, has ended."""
        del self.pending[child.key]
        self.over = self.any_of or not self.pending


def waits_for(everyone: dict[int, Worker], parent: Call, child: Call) -> bool:
    """Whether ``parent`` cannot go on before ``child`` has ended."""
    if parent.state is HELD:
        return parent.inputs is not None and parent.inputs.get(child.key) is child
    worker = None if parent.worker is None else everyone.get(parent.worker)
    wait = worker.waits.get(parent.id) if worker else None
    if wait is None or wait.pending.get(child.key) is not child:
        return False
    return not wait.any_of or len(wait.pending) == 1
