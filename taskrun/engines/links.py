"""One worker, as the coordinator sees it: two Pipes, two outputs, a ledger."""

from __future__ import annotations

import os
import pickle
import select
from collections.abc import Callable
from multiprocessing import Pipe
from typing import TYPE_CHECKING, Any, Final

from taskrun.engines.capture import Attempt, Emit, Outputs, Stream
from taskrun.ledger import Intake, Ledger, shared_file
from taskrun.messages import TASK
from taskrun.reactor import Reactor, Timer
from taskrun.wire import FrameReader, FrameWriter
from taskrun.workers.settings import Birth

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from taskrun.model import Recipe

LAST_OUTPUT: Final = 2048  # bytes that are kept for when the worker is lost


class Link:
    """The coordinator's end of one worker.

    ``assigned``: the calls that it has and that have not ended, by id.  ``known``: the ids
    of the recipes it was sent.  ``escalations``: what follows if an interrupted call does
    not end.  ``rejected``: why it was killed, where that was our doing.
    """

    def __init__(self, worker: int, reactor: Reactor, emit: Callable[..., None]) -> None:
        """Raises OSError where no more descriptors are to be had."""
        self.id = worker
        self.pid: int | None = None
        self.ready = self.stopping = False
        self.rejected: str | None = None
        self.assigned: dict[int, Any] = {}
        self.known: set[int] = set()
        self.escalations: dict[int, Timer] = {}
        self.heard = 0.0
        self.seen: Attempt | None = None  # what it was in when it was last looked at
        self.asked: Attempt | None = None  # what it was asked to tell the beginning of
        self.intake = Intake()
        self._reactor = reactor
        self._emit_to = emit
        self._outgoing: list[tuple[Any, ...]] = []
        self._last_output = b""
        self._last_owner: Attempt | None = None
        with _Opening() as opening:
            self._open(opening)
            self.handed_over = opening.keep_own_ends()

    def _open(self, opening: _Opening) -> None:
        self._calls, self._control = opening.pipe(), opening.pipe()
        outputs = opening.output(), opening.output()
        self.ledger = opening.ledger()
        token = os.urandom(8).hex().encode()  # no NUL in it, which begins a mark
        self.birth = Birth(self.id, token)
        emit: Emit = self._emit
        streams = [Stream(fd, n, token, self.ledger, emit) for n, fd in enumerate(outputs)]
        self.outputs = Outputs((streams[0], streams[1]), self._reactor)
        for end in (self._calls, self._control):
            os.set_blocking(end.fileno(), False)
        self.reader = FrameReader(self._calls.fileno())
        self.control_reader = FrameReader(self._control.fileno())
        self._writer = FrameWriter(self._calls.fileno(), self._reactor)
        self._control_writer = FrameWriter(self._control.fileno(), self._reactor)

    def listen(self, on_calls: Callable[[], None], on_control: Callable[[], None]) -> None:
        """Begin to read the Pipes."""
        self._reactor.add_reader(self._calls.fileno(), on_calls)
        self._reactor.add_reader(self._control.fileno(), on_control)

    def stop_listening(self) -> None:
        """Read the Pipes no more; what the outputs hold still comes."""
        for end in (self._calls, self._control):
            self._reactor.remove_reader(end.fileno())

    def close(self) -> None:
        """Close everything."""
        for timer in self.escalations.values():
            timer.cancel()
        self.stop_listening()
        self._writer.close()
        self._control_writer.close()
        self._calls.close()
        self._control.close()
        self.outputs.close()
        self.ledger.close()

    # -- to the worker ----------------------------------------------------------------

    def teach(self, recipe: Recipe) -> None:
        """Tell the worker of a task, before the first call of it."""
        if recipe.id not in self.known:
            self.known.add(recipe.id)
            self.queue(
                (TASK, recipe.id, recipe.name, recipe.reference, recipe.blob, recipe.names,
                 recipe.constants, recipe.flags)
            )  # fmt: skip

    def queue(self, record: tuple[Any, ...]) -> None:
        """Put a record into the next frame on the call Pipe."""
        self._outgoing.append(record)

    def flush(self) -> list[tuple[tuple[Any, ...], Exception]]:
        """Send what was queued as one frame; gives what cannot be pickled, and why."""
        records, self._outgoing = self._outgoing, []
        if not records:
            return []
        try:
            data = _dumps(records)
        except Exception:
            return self._send_one_by_one(records)
        self._writer.send(data)
        return []

    def _send_one_by_one(
        self, records: list[tuple[Any, ...]]
    ) -> list[tuple[tuple[Any, ...], Exception]]:
        refused: list[tuple[tuple[Any, ...], Exception]] = []
        for record in records:
            try:
                data = _dumps([record])
            except Exception as error:
                refused.append((record, error))
            else:
                self._writer.send(data)
        return refused

    def tell_control(self, record: tuple[Any, ...]) -> None:
        """Send a record on the control Pipe, at once."""
        self._control_writer.send(_dumps([record]))

    # -- from the worker --------------------------------------------------------------

    def read_output_of(self, call: int, attempt: int) -> None:
        """Read the outputs up to the end of this attempt, which has left its mark there."""
        self.outputs.read_to_mark((call, attempt))

    def await_end(self, seconds: float) -> None:
        """Wait until the worker has let go of its call Pipe, but not for long."""
        poll = select.poll()
        poll.register(self._calls, 0)  # the other end's closing is told in any case
        poll.poll(seconds * 1000)

    @property
    def executing(self) -> Attempt | None:
        """The attempt that the worker is in, if its end is not known here already."""
        executing = self.ledger.executing
        if executing is None or executing[0] not in self.assigned:
            return None
        return executing[0], self.assigned[executing[0]].attempt

    @property
    def last_output(self) -> str:
        """The last that was written by the attempt in which the worker is."""
        if self._last_owner != self.ledger.executing:
            return ""
        return self._last_output.decode(errors="replace")

    def _emit(self, to: Attempt | None, stream: str, data: bytes) -> None:
        if to != self._last_owner:
            self._last_owner, self._last_output = to, b""
        self._last_output = (self._last_output + data[-LAST_OUTPUT:])[-LAST_OUTPUT:]
        self._emit_to(None if to is None else self.assigned.get(to[0]), stream, data)


def _dumps(records: list[tuple[Any, ...]]) -> bytes:
    return pickle.dumps(records, pickle.HIGHEST_PROTOCOL)


class _Opening:
    """Descriptors while they are being opened: all are closed if one cannot be had."""

    def __init__(self) -> None:
        self._own: list[Any] = []
        self._theirs: list[int] = []
        self._kept = False

    def pipe(self) -> Connection:
        own, theirs = Pipe()
        self._own.append(own.close)
        self._theirs.append(os.dup(theirs.fileno()))
        theirs.close()
        return own

    def output(self) -> int:
        own, theirs = os.pipe()
        self._own.append(lambda: os.close(own))
        self._theirs.append(theirs)
        return own

    def ledger(self) -> Ledger:
        fd = shared_file()
        self._theirs.append(fd)
        ledger = Ledger(fd)
        self._own.append(ledger.close)
        return ledger

    def keep_own_ends(self) -> list[int]:
        """All went well; gives the worker's ends."""
        self._kept = True
        return self._theirs

    def __enter__(self) -> _Opening:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            for close in self._own:
                close()
            for fd in self._theirs:
                os.close(fd)
