"""Those who watch a run: output, progress, summary, job log, events.

An observer sees what happens and changes nothing.  One that raises is disabled and named
once; the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from taskrun.messages import AttemptEnded, Succeeded
from taskrun.telling import tell


class Observer:
    """Override what you want to see; everything defaults to nothing.

    ``call`` is the core's Call: ``id``, ``name`` (``fetch[3]``), ``title`` (label or name),
    ``task`` (a Task), ``parent``, ``state``, ``attempt``, ``failure`` (Failure or None),
    ``cause`` (the call whose failure made this one be skipped, or None) and ``tolerated``.
    Times are wall clock seconds since the epoch.
    """

    def run_started(self, run: Any) -> None:
        """The run begins; ``run`` is the coordinator's Run (plan, settings, core)."""

    def calls_added(self, calls: Sequence[Any]) -> None:
        """Calls became part of the run."""

    def calls_to_come(self, count: int) -> None:
        """So many calls are known of, beside those that are part of the run."""

    def call_began(self, call: Any, attempt: int, worker: str, wall: float) -> None:
        """An attempt is known to execute (small batched calls are not announced one by one)."""

    def output(self, call: Any | None, stream: str, data: bytes, worker: str = "") -> None:
        """Bytes that a call wrote to ``stdout`` or ``stderr``, in order, not split at lines.
        ``call`` is None for what belongs to no call (a worker's start and end, and what calls
        leave behind): then it is the ``worker``'s, where that is known."""

    def output_ended(self, call: Any) -> None:
        """An attempt wrote all that it will write."""

    def progressed(self, call: Any, done: float, total: float | None) -> None:
        """A call said how far it is."""

    def attempt_ended(self, event: AttemptEnded, worker: str) -> None:
        """An attempt ended; ``event.again`` says whether it is tried again."""

    def call_ended(self, call: Any) -> None:
        """A call reached its final state."""

    def succeeded(self, event: Succeeded, worker: str) -> None:
        """Attempts gave their values, and with that their calls ended.  Override it to be
        told of many at once; otherwise you are told of each."""
        for call in event.calls:
            self.attempt_ended(event.attempt(call), worker)
            self.call_ended(call)

    def worker_changed(self, worker: str, what: str) -> None:
        """A worker started or was lost; ``what`` reads like ``started, pid 31``."""

    def notice(self, text: str) -> None:
        """taskrun itself has something to say to the person."""

    def signalled(self) -> None:
        """A signal came, which the loop takes when it gets to it.  Perhaps its handler says
        so, in the middle of anything: it is only to be noted."""

    def stopping(self, reason: str) -> None:
        """The run was asked to stop (Ctrl-C, SIGTERM)."""

    def run_ended(self, status: int, reason: str) -> None:
        """The run is over; called once, last."""


class Observers(Observer):
    """Many observers as one; disables those that raise."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._active = list(observers)
        self._bind()

    def _bind(self) -> None:
        # Most observers override few methods: call only those that do something.
        for name in _EVENTS:
            interested = [observer for observer in self._active if _overrides(observer, name)]
            setattr(self, name, self._fan(name, interested))

    def _fan(self, name: str, observers: list[Observer]) -> Callable[..., None]:
        handlers = [getattr(observer, name) for observer in observers]  # bound once

        def fan(*args: Any) -> None:
            for handler in handlers:
                try:
                    handler(*args)
                except Exception as error:
                    self._disable(handler.__self__, name, error)

        return fan

    def _disable(self, observer: Observer, name: str, error: Exception) -> None:
        if observer not in self._active:
            return
        self._active.remove(observer)
        self._bind()
        text = (
            f"{type(observer).__name__} failed in {name} and is switched off: "
            f"{type(error).__name__}: {error}"
        )
        if any(_overrides(one, "notice") for one in self._active):
            self.notice(text)
        else:
            tell(text)  # it was the one that shows notices


def _overrides(observer: Observer, name: str) -> bool:
    names = (name, "attempt_ended", "call_ended") if name == "succeeded" else (name,)
    return any(getattr(type(observer), name) is not getattr(Observer, name) for name in names)


_EVENTS = tuple(name for name in vars(Observer) if not name.startswith("_"))
