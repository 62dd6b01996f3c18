"""What a Pool gives: results that come later (``iterators`` has those of imap).

A job is told of its call's end by who runs the loop, keeps what came as it came, and wakes
who waits.  It is decoded by who asks for it, so that a value which cannot be unpickled is
the error of this one ``get()``.  Where there are callbacks, the loop's thread decodes it and
calls them, and only then the result is there.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import TimeoutError
from multiprocessing import pool as standard
from multiprocessing.pool import RemoteTraceback  # type: ignore[attr-defined]
from typing import Any, Final, NamedTuple

from taskrun import blobs
from taskrun import messages as m
from taskrun.blobs import Shared
from taskrun.calls import OK
from taskrun.errors import ResultError
from taskrun.model import Failure, Recipe
from taskrun.pooling.driver import Driver
from taskrun.pooling.inbox import Job, Row
from taskrun.pooling.looping import Waitable
from taskrun.values import decode_failure

Callback = Callable[[Any], object] | None

STAYS: Final = (
    "results of a pool cannot be passed between processes or pickled: only what they give"
)
_PLAIN: Final = frozenset((int, float, bool, type(None)))

_decided: dict[int, tuple[bool, Any]] = {}  # of results that are being decoded, by their id()


class Outcome(NamedTuple):
    """Where and how a call was executed: the worker's name and pid (None where it is gone),
    how often it was tried, and when its last attempt began (wall clock) and how many seconds
    it took."""

    worker: str
    pid: int | None
    attempts: int
    began: float
    seconds: float


class Raw(tuple[Any, bool]):
    """What came of a call, not decoded: a value, or a Failure or an exception of ours, and
    whether it is one of these.  No user's value is one, so it may be where a value will be."""

    __slots__ = ()


def raw_of(call: Any) -> Raw:
    """What came of a call that has ended; the call itself lets go of it."""
    if call.state is OK:
        value, call.value = call.value, None
        value = pickle.loads(value) if type(value) is bytes else value  # a pickle in it
        return Raw((value, False))
    return Raw((call.ended_as(), True))


def decoded(raw: Raw) -> tuple[bool, Any]:
    """Whether it succeeded, and the value or the exception."""
    value, failed = raw
    if not failed:
        kind = type(value)
        if kind is not bytes and kind is not Shared:
            return True, value
        try:
            return True, blobs.loads(value) if kind is Shared else pickle.loads(value)
        except Exception as error:
            error.add_note("It was raised while the result was unpickled.")
            return False, error
        except BaseException as error:
            if _is_ctrl_c(error):
                raise
            return False, ResultError(f"the result, being unpickled, raised {error!r}")
    return False, exception_of(value) if isinstance(value, Failure) else value


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether it may be the user's own: only the main thread is told of that."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and isinstance(error, KeyboardInterrupt)


def exception_of(failure: Failure) -> BaseException:
    """The exception of a failed call, with where it was raised as its cause."""
    error = decode_failure(failure)
    if failure.kind == "error" and failure.traceback:
        # Not plain assignment: a frozen dataclass refuses it.
        cause = RemoteTraceback(f'\n"""\n{failure.traceback}"""')
        BaseException.__setattr__(error, "__cause__", cause)
    return error


class AsyncResult(Waitable, standard.ApplyResult[Any]):
    """What ``apply_async`` gives: a ``multiprocessing.pool.AsyncResult`` for who asks, of which
    nothing is used."""

    # Slots: see Waitable.  There may be very many results, and the collector looks at each of
    # them, and of their attributes, again and again.  The base has a dict, for users'.
    __slots__ = (
        "_callback", "_error_callback", "_place", "_pool", "_success", "_value", "_where", "call",
    )  # fmt: skip

    def __init__(self, pool: Any, callback: Callback, on_error: Callback) -> None:
        self.event = None
        self.call: int | None = None
        self._success: bool | None = None  # once it is decoded, as ``_value`` then is
        self._value: Any = None  # first its arguments (see ``inbox.Single``), then a Raw
        self._where: Recipe | Row | m.AttemptEnded | None = None
        self._pool = pool  # lives as long as somebody waits for it; None: the call has ended
        self._callback = callback
        self._error_callback = on_error

    # -- what users use ---------------------------------------------------------------

    def ready(self) -> bool:
        """Whether the call has ended."""
        return self._pool is None

    def successful(self) -> bool:
        """Whether it ended without an error.  Raises ValueError where it has not ended."""
        if self._pool is not None:
            raise ValueError(f"{self!r} not ready")
        return self._decoded()[0]

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the call has ended, or ``timeout`` seconds are over."""
        if (pool := self._pool) is not None:
            pool._driver.loop.wait(self, timeout)

    def get(self, timeout: float | None = None) -> Any:
        """The value; raises what the call raised, or TimeoutError."""
        if (pool := self._pool) is not None and not pool._driver.loop.wait(self, timeout):
            raise TimeoutError
        success, value = self._decoded()
        if success:
            return value
        try:
            raise value
        finally:
            del value, self

    def cancel(self) -> bool:
        """End the call, also while it runs; ``get()`` raises CallCancelled then.  False
        where it has ended already."""
        pool = self._pool
        if pool is None:
            return False
        pool._driver.cancel(self._jobs)
        return True

    @property
    def outcome(self) -> Outcome | None:
        """Where and how the call was executed; None as long as it has not ended."""
        where = self._where
        if where is None or isinstance(where, Recipe):
            return None
        if isinstance(where, m.AttemptEnded):
            worker = "" if where.worker is None else f"w{where.worker}"
            return Outcome(worker, self._place, where.attempt, where.began, where.seconds)
        seconds, place = where.seconds, self._place or 0
        began = where.wall + sum(seconds[:place])
        return Outcome(f"w{where.worker}", where.pid, where.attempt, began, seconds[place])

    def _jobs(self) -> list[Job]:
        return [self]

    def __reduce__(self) -> Any:
        raise NotImplementedError(STAYS)

    # -- what came --------------------------------------------------------------------

    def settled(self) -> bool:
        """See ``looping.Waitable``."""
        return self._pool is None

    def ended(self, call: Any, last: Any, pid: int | None) -> None:
        """See ``inbox.Job``."""
        self._was(last, pid)
        self._set(raw_of(call))

    def failed(self, error: BaseException) -> None:
        """See ``inbox.Job``."""
        self._set(Raw((error, True)))

    def _was(self, where: Row | m.AttemptEnded | None, place: int | None) -> None:
        """It was executed there: as the item of a row that has that place, or alone in the
        process with that pid."""
        self._place = place  # first: who sees where asks for it
        self._where = where

    def _set(self, raw: Raw) -> None:
        self._value = raw
        if self._callback is None and self._error_callback is None:
            self._settle()
        else:
            self._pool._driver.loop.call_back(self._call_back)

    def _call_back(self) -> None:
        """Tell the user, and whoever waits."""
        if self._success is None:
            self._decoded()
        callback = self._callback if self._success else self._error_callback
        try:
            if callback is not None:
                callback(self._value)
        except BaseException as error:
            # As in the standard library from 3.16 on; but somebody is to see it in any case.
            self._value, self._success = error, False
            report(error)
        finally:
            self._settle()

    def _settle(self) -> None:
        self._callback = self._error_callback = self._pool = None
        if self.event is not None:
            self.event.set()

    def _decoded(self) -> tuple[bool, Any]:
        while self._success is None:
            raw = self._value
            self._decide(self._decode(raw) if type(raw) is Raw else _decided.get(id(self)))
        return bool(self._success), self._value

    def _decide(self, decoded: tuple[bool, Any] | None) -> None:
        """Several threads may have decoded it at the same time: all of them get what the first
        one did.  No lock: a signal handler may come in between, and wait for another thread
        that asks for it.  None: another one has decided that just now."""
        if decoded is None:
            return
        try:
            success, value = _decided.setdefault(id(self), decoded)
            if self._success is None:
                self._value = value
                self._success = success  # behind the value, for other threads
        finally:
            _decided.pop(id(self), None)

    def _decode(self, raw: Raw) -> tuple[bool, Any]:
        return decoded(raw)


class Singles:
    """The owner of results of one small call each; see ``inbox.Owner``."""

    def __init__(self, driver: Driver) -> None:
        self._loop = driver.loop

    def items_ended(self, tokens: Sequence[AsyncResult], values: list[Any], row: Row) -> None:
        """Each has its value, or calls its user back."""
        waiting = []
        for place, result in enumerate(tokens):
            value = values[place]
            if type(value) in _PLAIN:
                result._value = value  # nothing is to be decoded
                result._success = True
            else:
                result._value = Raw((value, type(value) is Failure))
            result._place = place
            result._where = row
            if result._callback is None and result._error_callback is None:
                result._settle()
            else:
                waiting.append(result)
        if waiting:
            self._loop.call_back(partial(_call_back_each, waiting))

    def items_failed(self, tokens: Sequence[AsyncResult], error: BaseException | Failure) -> None:
        """They get the error."""
        for result in tokens:
            result._set(Raw((error, True)))

    def is_withdrawn(self, token: AsyncResult) -> bool:
        """See ``inbox.Owner``."""
        return token.call is not None


def _call_back_each(results: list[AsyncResult]) -> None:
    for result in results:
        result._call_back()


class MapResult(AsyncResult, standard.MapResult[Any]):
    """What ``map_async`` gives: all the values, or the first error."""

    def __init__(
        self, pool: Any, callback: Callback, on_error: Callback, chunks: int, size: int
    ) -> None:
        super().__init__(pool, callback, on_error)
        self._error: Raw | None = None  # the first
        self._number_left = chunks  # many show it, times the next, as progress
        self._chunksize = size
        self._parts: list[Any] = [None] * chunks
        self._chunks: list[_Chunk] = []
        self._advance: Callable[[int], None] | None = None
        self.held: Any = None  # what the calls need as long as there are any

    def start(self) -> None:
        """There are no chunks: there is nothing to do."""
        self._set(Raw(([], False)))

    def chunk(self, number: int, size: int) -> _Chunk:
        """The job of one chunk of so many items."""
        made = _Chunk(self, number, size)
        self._chunks.append(made)
        return made

    def _jobs(self) -> list[Job]:
        return list(self._chunks)

    def part_ended(self, chunk: _Chunk, raw: Raw) -> None:
        """One of the chunks has ended."""
        if raw[1] and self._error is None:
            self._error = raw  # the map's
        self._parts[chunk.number] = raw[0]
        self._number_left -= 1
        if self._advance is not None:
            advance, size = self._advance, chunk.size
            self._pool._driver.loop.call_back(lambda: advance(size))
        if not self._number_left:
            self._chunks.clear()
            self.held = None
            self._set(self._error or Raw((self._parts, False)))
            self._parts = []

    def _decode(self, raw: Raw) -> tuple[bool, Any]:
        if raw[1]:
            return decoded(raw)
        values: list[Any] = []
        parts = raw[0]
        for number, part in enumerate(parts):
            if type(part) is not list:  # as none is that is not decoded
                success, part = decoded(Raw((part, False)))
                if not success:
                    return False, part
                parts[number] = part  # nothing is kept twice, and another thread may be at it
            values += part
        return True, values


class _Chunk:
    """The job of one chunk of a map."""

    __slots__ = ("call", "number", "result", "size")

    def __init__(self, result: MapResult, number: int, size: int) -> None:
        self.result = result
        self.number = number
        self.size = size
        self.call: int | None = None

    def ended(self, call: Any, last: Any, pid: int | None) -> None:
        self.result._was(last, pid)
        self.result.part_ended(self, raw_of(call))

    def failed(self, error: BaseException) -> None:
        self.result.part_ended(self, Raw((error, True)))


def report(error: BaseException) -> None:
    """What a user's callback raised: shown as an error in a thread is."""
    args = threading.ExceptHookArgs(
        (type(error), error, error.__traceback__, threading.current_thread())
    )
    try:
        threading.excepthook(args)
    except Exception:
        threading.__excepthook__(args)
