"""The control thread of a worker that executes many calls at a time.

Whatever it is asked is done in the thread in which calls are begun, between two of them.
Where that does not come about, a call keeps all others from running: the coordinator asks
every half a second while there are calls, and so that is noticed here and told, with the
name of the call and where in its code it is.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Final, Protocol

from taskrun.messages import PONG, STACK_IS
from taskrun.workers import native
from taskrun.workers.control import ControlThread
from taskrun.workers.lanes.stacks import Place, extract, text, walk_up

if TYPE_CHECKING:
    from traceback import StackSummary

    from taskrun.workers.lanes.calls import LaneRunning
    from taskrun.workers.outbox import Outbox

BLOCKED: Final = 1.0  # seconds in which no other call could run, until that is said
_LOOK: Final = 0.3  # seconds within which Python code lets a signal in


class Served(Protocol):
    """The worker, as far as its control thread is concerned."""

    outbox: Outbox

    def post(self, callback: Callable[[], None]) -> None:
        """Have something done in the home thread."""

    def report(self, count: int | None) -> None:
        """In the home thread: say what runs."""

    def interrupt(self, call: int, attempt: int, reason: str) -> None:
        """In the home thread: end one call."""

    def found(self) -> LaneRunning | None:
        """The attempt that the code which asks belongs to."""

    def running(self, call: int) -> LaneRunning | None:
        """The attempt of a call that runs."""

    def frames_of(self, running: LaneRunning) -> Iterable[Place] | None:
        """Where it is, the outermost first; None: it is what the home thread executes."""

    def warn_that_it_blocks(self, running: LaneRunning | None, seconds: float, stack: str) -> None:
        """Say that a call keeps all others from running."""


class LaneControl(ControlThread):
    """That of a worker that executes many."""

    def __init__(self, worker: Served, fd: int) -> None:
        super().__init__(fd)
        self._worker = worker
        self._main = native.get_ident()
        self._asked: float | None = None  # when the other thread was asked for what it owes
        self._told: float | None = None  # ... and people what keeps it from answering
        self._seen: tuple[LaneRunning | None, StackSummary] | None = None
        self._looking = False

    def start(self) -> None:
        """Begin to serve; in the thread in which calls are begun."""
        signal.signal(signal.SIGINT, self._on_signal)
        super().start()

    # -- what is asked ----------------------------------------------------------------

    def _report(self, count: int | None) -> None:
        worker = self._worker
        asked = self._asked  # the home thread may answer at any moment
        if asked is not None:
            worker.outbox.flush()
            if monotonic() - asked > BLOCKED and self._told != asked:
                self._tell_who_blocks(asked)
            return
        self._asked = monotonic()

        def report() -> None:
            self._asked = None
            worker.report(count)

        worker.post(report)

    def _interrupt(self, call: int, attempt: int, reason: str) -> None:
        self._worker.post(lambda: self._worker.interrupt(call, attempt, reason))

    def _ping(self, token: object) -> None:
        self._worker.post(lambda: self._answer((PONG, token)))

    def _stack(self, token: object, call: int | None) -> None:
        """Say where a call is; of the one that runs in the home thread, where that is."""
        worker = self._worker
        running = None if call is None else worker.running(call)
        frames = None if running is None else worker.frames_of(running)
        stack = self._stack_at_home() if frames is None else extract(frames)
        self._answer((STACK_IS, token, text(stack)))

    def _stack_at_home(self) -> StackSummary:
        return extract(walk_up(sys._current_frames()[self._main]))

    # -- a call that lets no other run ------------------------------------------------

    def _tell_who_blocks(self, asked: float) -> None:
        """Say which call it is, if it is one, and not very many that each run for a moment.
        ``asked``: when the home thread was, which has not answered."""
        before, _ = self._look(asked)
        native.sleep(_LOOK)
        running, stack = self._look(asked)
        if self._asked is not asked or running is not before:
            return  # it went on meanwhile
        if shown := text(stack):
            self._told = asked
            self._worker.warn_that_it_blocks(running, monotonic() - asked, shown)

    def _look(self, asked: float) -> tuple[LaneRunning | None, StackSummary]:
        """Which call runs now, and where in its code.

        A signal handler finds out: it runs in that call's own context.
        """
        self._seen, self._looking = None, True
        signal.pthread_kill(self._main, signal.SIGINT)
        deadline = monotonic() + _LOOK
        while self._seen is None and self._asked is asked and monotonic() < deadline:
            native.sleep(0.01)
        self._looking = False
        return self._seen or (None, self._stack_at_home())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._looking and frame is not None:
            self._seen = self._worker.found(), extract(walk_up(frame))
