"""One worker, as the coordinator sees it: a `Link`; of this machine, one over Pipes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from taskrun.bunch import Bunch
from taskrun.engines.capture import Attempt
from taskrun.engines.wires import Wires
from taskrun.ledger import Intake, executing_at, times_at
from taskrun.messages import FORGET, TASK
from taskrun.reactor import Reactor, Timer
from taskrun.workers.settings import SLOTS

if TYPE_CHECKING:
    from taskrun.model import Recipe

PROCESS: Final = "process"
LAST_OUTPUT: Final = 2048  # bytes that are kept for when the worker is lost

Refused: TypeAlias = "tuple[tuple[Any, ...], Exception]"


class Link:
    """The coordinator's end of one worker, wherever that is.

    ``name``: what people see of it.  ``assigned``: the calls that it has and that have not
    ended, by id.  ``known``: the ids of the recipes it was sent.  ``escalations``: what
    follows if an interrupted call does not end.  ``rejected``: why it was killed, where that
    was our doing.  ``moment``: see ``Ledger.moment``.  ``slots``: how many calls it executes
    at a time, in its ``lane``.
    """

    def __init__(self, worker: int, name: str, emit: Callable[..., None]) -> None:
        self.id = worker
        self.name = name
        self.node = ""  # of another machine
        self.lane = PROCESS
        self.slots = 1
        self.pid: int | None = None
        self.ready = self.stopping = self.over = False
        self.retiring = False  # it gets no more calls
        self.blameless = False  # it is gone because its machine is, or who started it
        self.denied = False  # there was no process for it to be had
        self.rejected: str | None = None
        self.assigned: dict[int, Any] = {}
        self.known: set[int] = set()
        self.escalations: dict[int, Timer] = {}
        self.bunch: tuple[int, int, float] | None = None  # see ``records.Source``
        self.seen: Attempt | None = None  # what it was in when it was last looked at
        self.asked: Attempt | None = None  # what it was asked to tell the beginning of
        self.intake = Intake()
        self._emit_to = emit
        self._outgoing: list[tuple[Any, ...]] = []
        self._last_output = b""
        self._last_owner: Attempt | None = None

    # -- what depends on where it is --------------------------------------------------

    @property
    def moment(self) -> int:
        raise NotImplementedError

    def send_calls(self, frame: bytes | memoryview) -> None:
        """Send a frame to its call Pipe."""
        raise NotImplementedError

    def send_control(self, frame: bytes | memoryview) -> None:
        """Send a frame to its control Pipe, past what waits for the other one."""
        raise NotImplementedError

    def signal(self, number: int, executing: Attempt | None = None) -> None:
        """Signal all that is in its session; with ``executing``, if that is what it is in."""
        raise NotImplementedError

    def look(self) -> list[tuple[Any, ...]]:
        """New records in its ledger that it has not sent.  Raises WireError."""
        raise NotImplementedError

    def read_the_last(self) -> Iterator[list[tuple[Any, ...]]]:
        """It has ended: the records that have not been read.  Raises WireError."""
        raise NotImplementedError

    def read_the_last_output(self) -> None:
        """It has ended: have all shown that it wrote."""
        raise NotImplementedError

    def read_output_of(self, call: int, attempt: int) -> None:
        """Have all shown that this attempt wrote, which has ended."""
        raise NotImplementedError

    def stop_listening(self) -> None:
        """Take nothing more from it; what the outputs hold still comes."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of everything."""
        self.over = True
        for timer in self.escalations.values():
            timer.cancel()

    # -- to the worker ----------------------------------------------------------------

    def teach(self, recipe: Recipe) -> None:
        """Tell the worker of a task, before the first call of it."""
        if recipe.id not in self.known:
            self.known.add(recipe.id)
            self.queue(
                (TASK, recipe.id, recipe.name, recipe.reference, recipe.blob, recipe.names,
                 recipe.constants, recipe.flags)
            )  # fmt: skip

    def forget(self, recipe: int) -> bool:
        """Have the worker forget a task of which no calls are left; False where it has none."""
        if recipe not in self.known:
            return False
        self.known.discard(recipe)
        self.queue((FORGET, recipe))
        return True

    def queue(self, record: tuple[Any, ...]) -> None:
        """Put a record into the next frame on the call Pipe."""
        self._outgoing.append(record)

    def flush(self) -> list[Refused]:
        """Send what was queued as one frame; gives what cannot be pickled, and why."""
        records, self._outgoing = self._outgoing, []
        if not records:
            return []
        try:
            data = _dumps(records)
        except Exception:
            return self._send_one_by_one(records)
        self.send_calls(data)
        return []

    def _send_one_by_one(self, records: list[tuple[Any, ...]]) -> list[Refused]:
        refused: list[Refused] = []
        for record in records:
            try:
                data = _dumps([record])
            except Exception as error:
                refused.append((record, error))
            else:
                self.send_calls(data)
        return refused

    def tell_control(self, record: tuple[Any, ...]) -> None:
        """Send a record on the control Pipe, at once."""
        self.send_control(_dumps([record]))

    # -- what it is in ----------------------------------------------------------------

    @property
    def executing(self) -> Attempt | None:
        """The attempt that the worker is in, if its end is not known here already."""
        moment = self.moment
        executing = executing_at(moment)
        if executing is None or executing[0] not in self.assigned:
            return None
        call = self.assigned[executing[0]]
        if type(call.blob) is Bunch and has_ended(call.blob, moment):
            return None
        return executing[0], call.attempt

    @property
    def is_shared(self) -> bool:
        """Whether many calls run in it at a time."""
        return self.lane != PROCESS

    @property
    def is_idle(self) -> bool:
        """Whether it is in no attempt."""
        return executing_at(self.moment) is None

    @property
    def last_output(self) -> str:
        """The last that was written by the attempt in which the worker is."""
        if self._last_owner != executing_at(self.moment):
            return ""
        return self._last_output.decode(errors="replace")

    def _emit(self, to: Attempt | None, stream: str, data: bytes) -> None:
        if to != self._last_owner:
            self._last_owner, self._last_output = to, b""
        self._last_output = (self._last_output + data[-LAST_OUTPUT:])[-LAST_OUTPUT:]
        self._emit_to(None if to is None else self.assigned.get(to[0]), stream, data, self.name)


class PipeLink(Link):
    """A worker on this machine.

    ``told`` has a worker signalled: (worker, signal number).
    """

    def __init__(
        self,
        worker: int,
        reactor: Reactor,
        emit: Callable[..., None],
        told: Callable[[int, int], None],
        lane: str = PROCESS,
    ) -> None:
        """Raises OSError where no more descriptors are to be had."""
        super().__init__(worker, f"w{worker}", emit)
        self.lane, self.slots = lane, SLOTS[lane]
        self.wires = Wires(worker, reactor, self._emit, lane)
        self._told = told

    def send_calls(self, frame: bytes | memoryview) -> None:
        self.wires.send_calls(frame)

    def send_control(self, frame: bytes | memoryview) -> None:
        self.wires.send_control(frame)

    @property
    def moment(self) -> int:
        return self.wires.ledger.moment

    def signal(self, number: int, executing: Attempt | None = None) -> None:
        self._told(self.id, number)

    def look(self) -> list[tuple[Any, ...]]:
        return self.intake.look(self.wires.ledger)

    def read_the_last(self) -> Iterator[list[tuple[Any, ...]]]:
        reader = self.wires.reader
        while not self.rejected:
            for frame in reader.read():
                yield self.intake.frame(frame)
            if reader.drained:
                break
        yield self.look()

    def read_the_last_output(self) -> None:
        self.wires.outputs.read_the_last(self.wires.ledger.executing)

    def read_output_of(self, call: int, attempt: int) -> None:
        self.wires.outputs.read_to_mark((call, attempt))

    def stop_listening(self) -> None:
        self.wires.stop_listening()

    def close(self) -> None:
        super().close()
        self.wires.close()


def has_ended(bunch: Bunch, moment: int) -> bool:
    """Whether the item in which a worker is at a moment is one that is known to have ended:
    it is between two of them."""
    return (bunch.done - bunch.base - 1 - times_at(moment)) & 0xFFF == 0


def _dumps(records: list[tuple[Any, ...]]) -> bytes:
    return pickle.dumps(records, pickle.HIGHEST_PROTOCOL)
