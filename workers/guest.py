"""Taskrun as a guest: calls executed in a process that belongs to another engine.

A *chunk* is the records of some calls, as they go down a call Pipe.  They are executed one
after the other, and everything is caught: what comes back is a piece of bytes, laid out as
on a call Pipe (frames, a pickled record in each), which the engine carries without looking
inside.  Values that are large may stay with the engine: they come beside the records, by
part, and each record says which part is its value.

Where the coordinator shares the machine, the same bytes are written to a file as they come
(the chunk's *notes*), so that a worker's death costs only the call that it was in, and what
a long call has to say is heard before its end.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from time import time
from typing import Any, Final, cast

from taskrun import context, places
from taskrun.context import Future, Outside, left_until
from taskrun.errors import RunError, StateError
from taskrun.messages import AT, ENDED, ITEM, RENDER, SILENT
from taskrun.model import Left, Taken
from taskrun.wire import header
from taskrun.workers.briefs import Brief, Chunk, Part, path_of, size_of
from taskrun.workers.execute import Executor
from taskrun.workers.recipes import Home
from taskrun.workers.scope import Line, WorkerContext
from taskrun.workers.settings import Preloaded
from taskrun.workers.streams import Streams

KEEP: Final = 64 * 1024  # bytes from which on a value stays with the engine
LONGEST_NOTE: Final = 256 * 1024  # bytes of a record that is worth a note
_MOST_RUNS: Final = 4  # runs that a thread knows at a time


# -- the runs that this thread executes calls of --------------------------------------


class _Here(threading.local):
    guests: OrderedDict[bytes, Guest] | None = None


_here = _Here()
_houses: dict[bytes, tuple[Brief, Preloaded]] = {}
_moving_in = threading.RLock()
_all: dict[bytes, list[Guest]] = {}


def guest_of(brief: bytes) -> Guest:
    """This thread's guest of a run; what the run needs here is done by the first."""
    guests = _here.guests
    if guests is None:
        guests = _here.guests = OrderedDict()
    found = guests.get(brief)
    if found is None:
        while len(guests) >= _MOST_RUNS:
            guests.popitem(last=False)[1].close()
        found = guests[brief] = Guest(*_move_in(brief))
        _all.setdefault(brief, []).append(found)
    return found


def _move_in(brief: bytes) -> tuple[Brief, Preloaded]:
    from taskrun.workers import house  # imports the task file, once per process

    with _moving_in:
        if brief not in _houses:
            about: Brief = pickle.loads(brief)
            _houses[brief] = about, house.prepare(about)
        return _houses[brief]


def leave(brief: bytes) -> None:
    """The run is over: finish what per_worker() made in this process."""
    with _moving_in:
        for guest in _all.pop(brief, []):
            guest.close()
        _houses.pop(brief, None)


# -- one run, in one thread -----------------------------------------------------------


class Guest:
    """Executes the chunks of one run in one thread; the executor's way to the coordinator."""

    def __init__(self, brief: Brief, preloaded: Preloaded) -> None:
        self._brief = brief
        self._said: list[bytes] = []
        self._notes: int | None = None
        self._values: dict[Part, Any] = {}
        self._state: Any = None
        self._streams = Streams(self, alone=brief.alone)
        self._executor = Executor(
            self,
            Home(brief.file.module if brief.file else None, preloaded),
            self,
            self._streams,
            thread_variables=frozenset(brief.environment),
        )
        self._context = GuestContext(
            self._executor,
            cast(Line, self),  # of which it only tells: it never waits for an answer
            worker=f"{os.uname().nodename}:{os.getpid()}",
            node=os.uname().nodename,
            set_by_user=brief.set_by_user,
        )
        self._context.engine = brief.engine

    def execute(self, chunk: Chunk, inputs: Sequence[Any]) -> tuple[bytes, dict[Part, Any]]:
        """Execute the calls of a chunk; see :func:`execute`."""
        self._said, self._values = [], {}
        self._notes = self._open_notes(chunk.id)
        self._context.forget_definitions()
        for recipe in chunk.recipes:
            self._executor.learn(recipe)
        token = context.activate(self._context)
        try:
            with self._streams, _state_of(self), places.nowhere():
                for call in chunk.calls:
                    self._executor.execute(with_inputs(call, inputs))
        finally:
            context.deactivate(token)
            self._close_notes()
        return b"".join(self._said), self._values

    def close(self) -> None:
        """Finish what per_worker() made."""
        self._executor.close()
        if self._state is not None:
            self._state.close()

    @property
    def executor(self) -> Executor:
        """What executes the calls."""
        return self._executor

    # -- what calls have to say -------------------------------------------------------

    def tell(self, record: tuple[Any, ...]) -> None:
        """See ``execute.Port``."""
        if record[0] == ENDED and self._brief.keep and record[3] == "value":
            record = self._keep(record)
        data = pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
        frame = header(len(data)) + data
        self._said.append(frame)
        if self._notes is not None:
            self._note(frame)

    def tell_item(self, call: int, attempt: int, value: Any, seconds: float, now: float) -> None:
        """See ``outbox.Port``."""
        self.tell((ITEM, call, attempt, value, time() - seconds, seconds))

    def flush(self) -> None:
        """What there is to say goes with the chunk."""

    def give_all_back(self) -> None:
        """See ``outbox.Port``.  What a chunk has is executed."""

    def flush_soon(self) -> None:
        """The same."""

    def _keep(self, record: tuple[Any, ...]) -> tuple[Any, ...]:
        """An outcome whose large values are left with the engine."""
        running = self._executor.running
        if running is not None and running.known.flags & RENDER:
            return record  # the coordinator is going to show it
        call, payload, items = record[1], record[4], record[5]
        kept = [self._leave((call, place), item) for place, item in enumerate(items or ())]
        return (*record[:4], self._leave((call, None), payload), items and kept, *record[6:])

    def _leave(self, part: Part, payload: Any) -> Any:
        if size_of(payload) < KEEP:
            return payload
        self._values[part] = payload
        return Left(part)

    # -- notes ------------------------------------------------------------------------

    def _open_notes(self, chunk: int) -> int | None:
        if self._brief.notes is None:
            return None
        path = path_of(self._brief.notes, chunk)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            return None  # the coordinator is on another machine, or has gone
        except FileExistsError:
            raise RunError(
                f"{self._brief.engine} executes a chunk of calls twice; switch its own retries off"
            ) from None

    def _note(self, frame: bytes) -> None:
        assert self._notes is not None
        if len(frame) > LONGEST_NOTE:
            data = pickle.dumps((SILENT,))
            frame = header(len(data)) + data
        os.write(self._notes, frame)

    def _close_notes(self) -> None:
        if self._notes is not None:
            os.close(self._notes)
            self._notes = None

    # -- execute.Book -----------------------------------------------------------------

    def begin(self, call: int, attempt: int, resumed: int = 0) -> None:
        """A call begins: where this process dies, it is known in which."""
        self._streams.began(call, attempt)
        if self._notes is not None:
            data = pickle.dumps((AT, call, attempt, time(), os.getpid()), pickle.HIGHEST_PROTOCOL)
            frame = header(len(data)) + data
            self._said.append(frame)
            self._note(frame)

    # -- shared state -----------------------------------------------------------------

    def client(self) -> Any:
        """The client of the run's shared state.  Raises StateError where it is out of reach."""
        if self._state is None:
            from taskrun.manager.protocol import GUEST
            from taskrun.state.remote import RemoteClient

            attempt = self._executor.attempt
            self._state = RemoteClient(*self._reachable(), attempt, role=GUEST)
        return self._state

    def _reachable(self) -> tuple[Any, bytes]:
        addresses, key = self._brief.state or ((), b"")
        for address in addresses:
            if not isinstance(address, str) or os.path.exists(address):
                return address, key
        raise StateError(
            f"shared state is out of reach from {os.uname().nodename}, where this call runs: "
            "start the run with --listen ADDRESS, an address that this machine can reach"
        )


def with_inputs(record: tuple[Any, ...], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """A CALL record with the kept values that its arguments take."""
    if not inputs:
        return record
    return (*record[:5], _filled(record[5], inputs), record[6])


def _filled(encoded: Any, inputs: Sequence[Any]) -> Any:
    kind = type(encoded)
    if kind is Taken:
        return inputs[encoded.input][encoded.part]
    if kind is tuple:
        return tuple([_filled(item, inputs) for item in encoded])
    if kind is list:
        return [_filled(item, inputs) for item in encoded]
    if kind is dict:
        return {key: _filled(item, inputs) for key, item in encoded.items()}
    return encoded


class GuestContext(WorkerContext):
    """What task code reaches of its run, where no slot can be lent: calls may be submitted,
    and their futures passed on or returned, but not waited for."""

    engine = ""

    def forget_definitions(self) -> None:
        """What is told of tasks is told in every chunk: chunks may arrive in any order."""
        self._defined.clear()

    def wait(self, futures: Sequence[Future], *, any_of: bool, timeout: float | None) -> bool:
        running = self._here("waiting for a call")
        if self._pending(running, futures):
            raise self._refusal()
        return True

    def watch(self, future: Future) -> None:
        if self._pending(self._here("waiting for a call"), [future]):
            raise self._refusal()

    def _refusal(self) -> RuntimeError:
        return RuntimeError(
            f"a call cannot wait for another one on the engine {self.engine}, which has no slot "
            "to lend: return the future, or pass it to another submit()"
        )

    def lend(self, outside: Outside, deadline: float | None) -> bool:
        return outside.block(left_until(deadline))

    def lend_awaiting(self, *, alone: bool = False) -> Callable[[], None]:
        return lambda: None


# -- where shared state is ------------------------------------------------------------
#
# One process may execute calls of several runs, each with its own state: which one is meant
# depends on the thread.  A thread that a task has started belongs to the only run there is.

_active: dict[int, Guest] = {}
_elsewhere: list[Callable[[], Any] | None] = []


class _state_of:
    """While it lasts, shared state in this thread is that of a guest's run."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def __enter__(self) -> None:
        with _moving_in:
            if not _active:
                _elsewhere[:] = [context.state_home]
                context.state_home = _client
            _active[threading.get_ident()] = self._guest

    def __exit__(self, *_: object) -> None:
        with _moving_in:
            del _active[threading.get_ident()]
            if not _active:
                context.state_home = _elsewhere.pop()


def _client() -> Any:
    guest = _active.get(threading.get_ident())
    if guest is None and len(set(_active.values())) == 1:
        guest = next(iter(_active.values()))
    if guest is not None:
        return guest.client()
    from taskrun.state.local import own_client

    home = _elsewhere[0] if _elsewhere else None
    return own_client() if home is None else home()
