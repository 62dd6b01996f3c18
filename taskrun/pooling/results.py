"""What a Pool gives: results that come later, and iterators over them.

A job is told of its call's end by who runs the loop, keeps what came as it came, and wakes
who waits.  It is decoded by who asks for it, so that a value which cannot be unpickled is
the error of this one ``get()``.  Where there are callbacks, the loop's thread decodes it and
calls them, and only then the result is there.
"""

from __future__ import annotations

import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import TimeoutError
from multiprocessing.pool import RemoteTraceback  # type: ignore[attr-defined]
from typing import Any, Final, NamedTuple

from taskrun import blobs
from taskrun.blobs import Shared
from taskrun.calls import OK
from taskrun.errors import ResultError
from taskrun.model import Failure
from taskrun.pooling.driver import Driver
from taskrun.pooling.inbox import Job, Row
from taskrun.pooling.looping import Waitable
from taskrun.values import decode_failure

Callback = Callable[[Any], object] | None

_STAYS: Final = (
    "results of a pool cannot be passed between processes or pickled: only what they give"
)
_PLAIN: Final = frozenset((int, float, bool, type(None)))


class Outcome(NamedTuple):
    """Where and how a call was executed: the worker's name and pid (None where it is gone),
    how often it was tried, and when its last attempt began (wall clock) and how many seconds
    it took."""

    worker: str
    pid: int | None
    attempts: int
    began: float
    seconds: float


def _outcome(last: Any, pid: int | None) -> Outcome | None:
    if last is None:
        return None
    worker = "" if last.worker is None else f"w{last.worker}"
    return Outcome(worker, pid, last.attempt, last.began, last.seconds)


Raw = tuple[Any, bool]
"""What came of a call, not decoded: a value, or a Failure or an exception of ours, and whether
it is one of these."""


def raw_of(call: Any) -> Raw:
    """What came of a call that has ended; the call itself lets go of it."""
    if call.state is OK:
        value, call.value = call.value, None
        return (pickle.loads(value) if type(value) is bytes else value), False  # a pickle in it
    return call.ended_as(), True


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


class AsyncResult(Waitable):
    """What ``apply_async`` gives, as ``multiprocessing.pool.AsyncResult``."""

    # Slots: see Waitable.  The dict is for attributes of users.
    __slots__ = (
        "__dict__", "__weakref__", "_callback", "_driver", "_error_callback", "_found", "_last",
        "_pid", "_place", "_pool", "_raw", "_ready", "_row", "call",
    )  # fmt: skip

    def __init__(self, pool: Any, driver: Driver, callback: Callback, on_error: Callback) -> None:
        self.event = None
        self.call: int | None = None
        self._ready = False
        self._raw: Raw | None = None
        self._found: tuple[bool, Any] | None = None
        self._last: Any = None
        self._pid: int | None = None
        self._row: Row | None = None
        self._place = 0
        self._pool = pool  # lives as long as somebody waits for it
        self._driver = driver
        self._callback = callback
        self._error_callback = on_error

    # -- what users use ---------------------------------------------------------------

    def ready(self) -> bool:
        """Whether the call has ended."""
        return self._ready

    def successful(self) -> bool:
        """Whether it ended without an error.  Raises ValueError where it has not ended."""
        if not self._ready:
            raise ValueError(f"{self!r} not ready")
        return self._decoded()[0]

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the call has ended, or ``timeout`` seconds are over."""
        if not self._ready:
            self._driver.loop.wait(self, timeout)

    def get(self, timeout: float | None = None) -> Any:
        """The value; raises what the call raised, or TimeoutError."""
        if not self._ready and not self._driver.loop.wait(self, timeout):
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
        if self._ready:
            return False
        self._driver.cancel(self._jobs)
        return True

    @property
    def outcome(self) -> Outcome | None:
        """Where and how the call was executed; None as long as it has not ended."""
        row = self._row
        if row is None:
            return _outcome(self._last, self._pid)
        seconds, place = row.seconds, self._place
        began = row.wall + sum(seconds[:place])
        return Outcome(f"w{row.worker}", row.pid, row.attempt, began, seconds[place])

    def _jobs(self) -> list[Job]:
        return [self]

    def __reduce__(self) -> Any:
        raise NotImplementedError(_STAYS)

    # -- what came --------------------------------------------------------------------

    def settled(self) -> bool:
        """See ``looping.Waitable``."""
        return self._ready

    def ended(self, call: Any, last: Any, pid: int | None) -> None:
        """See ``driver.Job``."""
        self._last = last
        self._pid = pid
        self._raw = raw_of(call)
        if self._callback is None and self._error_callback is None:
            self._settle()
        else:
            self._driver.loop.call_back(self._call_back)

    def failed(self, error: BaseException) -> None:
        """See ``driver.Job``."""
        self._set((error, True))

    def _set(self, raw: Raw) -> None:
        self._raw = raw
        if self._callback is None and self._error_callback is None:
            self._settle()
        else:
            self._driver.loop.call_back(self._call_back)

    def _call_back(self) -> None:
        success, value = self._decoded()
        callback = self._callback if success else self._error_callback
        try:
            if callback is not None:
                callback(value)
        except BaseException as error:
            # As in the standard library from 3.16 on; but somebody is to see it in any case.
            self._found = (False, error)
            report(error)
        finally:
            self._settle()

    def _settle(self) -> None:
        self._callback = self._error_callback = self._pool = None
        self._ready = True
        if self.event is not None:
            self.event.set()

    def _decoded(self) -> tuple[bool, Any]:
        found = self._found
        if found is None:
            raw = self._raw
            if raw is None:
                return self._decoded()  # another thread has decoded it just now
            found = self._found = self._decode(raw)
            self._raw = None
        return found

    def _decode(self, raw: Raw) -> tuple[bool, Any]:
        return decoded(raw)


class Singles:
    """The owner of results of one small call each; see ``driver.Owner``."""

    def __init__(self, driver: Driver) -> None:
        self._loop = driver.loop

    def items_ended(self, tokens: Sequence[AsyncResult], values: list[Any], row: Row) -> None:
        """Each has its value, or calls its user back."""
        waiting = []
        for place, result in enumerate(tokens):
            value = values[place]
            result._raw = (value, type(value) is Failure)
            result._row = row
            result._place = place
            if result._callback is None and result._error_callback is None:
                result._settle()
            else:
                waiting.append(result)
        if waiting:
            self._loop.call_back(partial(_call_back_each, waiting))

    def items_failed(self, tokens: Sequence[AsyncResult], error: BaseException | Failure) -> None:
        """They get the error."""
        for result in tokens:
            result._set((error, True))

    def is_withdrawn(self, token: AsyncResult) -> bool:
        """See ``driver.Owner``."""
        return token.call is not None


def _call_back_each(results: list[AsyncResult]) -> None:
    for result in results:
        callback, raw = result._callback, result._raw
        if callback is None or raw is None or type(raw[0]) not in _PLAIN:
            result._call_back()
            continue
        value = raw[0]  # nothing is to be decoded
        result._found = True, value
        try:
            callback(value)
        except BaseException as error:
            result._found = False, error
            report(error)
        finally:
            result._settle()


class MapResult(AsyncResult):
    """What ``map_async`` gives: all the values, or the first error."""

    def __init__(
        self, pool: Any, driver: Driver, callback: Callback, on_error: Callback, chunks: int
    ) -> None:
        super().__init__(pool, driver, callback, on_error)
        self._left = chunks
        self._parts: list[Any] = [None] * chunks
        self._chunks: list[_Chunk] = []
        self._advance: Callable[[int], None] | None = None
        self.held: Any = None  # what the calls need as long as there are any

    def start(self) -> None:
        """There are no chunks: there is nothing to do."""
        self._set(([], False))

    def chunk(self, number: int, size: int) -> _Chunk:
        """The job of one chunk of so many items."""
        made = _Chunk(self, number, size)
        self._chunks.append(made)
        return made

    def _jobs(self) -> list[Job]:
        return list(self._chunks)

    def part_ended(self, chunk: _Chunk, raw: Raw) -> None:
        """One of the chunks has ended."""
        if raw[1] and self._found is None and self._raw is None:
            self._raw = raw  # the first error is the map's
        self._parts[chunk.number] = raw[0]
        self._left -= 1
        if self._advance is not None:
            advance, size = self._advance, chunk.size
            self._driver.loop.call_back(lambda: advance(size))
        if not self._left:
            self._chunks.clear()
            self.held = None
            failed = self._raw
            self._set(failed or (self._parts, False))
            self._parts = []

    def _decode(self, raw: Raw) -> tuple[bool, Any]:
        if raw[1]:
            return decoded(raw)
        values: list[Any] = []
        for number, part in enumerate(raw[0]):
            raw[0][number] = None  # nothing is kept twice
            success, value = decoded((part, False))
            if not success:
                return False, value
            values += value
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
        self.result._last, self.result._pid = last, pid
        self.result.part_ended(self, raw_of(call))

    def failed(self, error: BaseException) -> None:
        self.result.part_ended(self, (error, True))


def report(error: BaseException) -> None:
    """What a user's callback raised: shown as an error in a thread is."""
    args = threading.ExceptHookArgs(
        (type(error), error, error.__traceback__, threading.current_thread())
    )
    try:
        threading.excepthook(args)
    except Exception:
        threading.__excepthook__(args)


# -- iterators ------------------------------------------------------------------------


class _Item:
    """The job of one item, or one chunk of items, of an imap."""

    __slots__ = ("call", "number", "owner")

    def __init__(self, owner: IMapIterator, number: int) -> None:
        self.owner = owner
        self.number = number
        self.call: int | None = None

    def ended(self, call: Any, last: Any, pid: int | None) -> None:
        self.owner.item_ended(self, raw_of(call))

    def failed(self, error: BaseException) -> None:
        self.owner.item_ended(self, (error, True))


class IMapIterator(Waitable):
    """What ``imap`` gives, in the order of the items; see ``multiprocessing.pool``.

    ``window``: so many calls may be under way at a time.  ``buffered``: results that nobody
    has taken count as well.
    """

    def __init__(
        self, pool: Any, driver: Driver, *, chunked: bool, window: int, buffered: bool
    ) -> None:
        super().__init__()
        self._pool = pool
        self._driver = driver
        self._chunked = chunked
        self._buffered = buffered
        self._window = window
        self._taken = 0  # calls that were submitted
        self._over = 0  # those that are not under way any more
        self._room = threading.Event()
        self._came: deque[Any] = deque()  # encoded values, and (error, True)
        self._values: Iterator[Any] = iter(())  # the rest of a chunk
        self._length: int | None = None
        self._given = 0
        self._ended = 0
        self.held: Any = None  # what the calls need as long as there are any

    # -- what users use ---------------------------------------------------------------

    def __iter__(self) -> IMapIterator:
        return self

    def next(self, timeout: float | None = None) -> Any:
        """The next value; raises what its call raised, StopIteration, or TimeoutError."""
        for value in self._values:
            return value
        while True:
            if not self._came:
                if not self.settled() and not self._driver.loop.wait(self, timeout):
                    raise TimeoutError
                if not self._came:
                    self._pool = None
                    raise StopIteration
            try:
                raw = self._came.popleft()
            except IndexError:  # another thread took it
                continue
            self._given += 1
            if self._buffered:
                self._make_room(1)
            if type(raw) is int and not self._chunked:
                return raw
            success, value = decoded(raw if type(raw) is tuple else (raw, type(raw) is Failure))
            del raw
            if not success:
                raise value
            if not self._chunked:
                return value
            self._values = iter(value)
            for item in self._values:
                return item

    __next__ = next

    def __reduce__(self) -> Any:
        raise NotImplementedError(_STAYS)

    # -- what comes -------------------------------------------------------------------

    def settled(self) -> bool:
        """Whether there is something to take, or nothing more will come."""
        return bool(self._came) or self._given == self._length

    def item(self, number: int) -> _Item:
        """The job of the next item."""
        return _Item(self, number)

    def item_ended(self, item: _Item, raw: Raw) -> None:
        """One of the items has ended."""
        self._have_ended([item.number], [raw])

    def items_ended(self, tokens: Sequence[int], values: list[Any], row: Row) -> None:
        """See ``driver.Owner``."""
        self._have_ended(tokens, values)

    def items_failed(self, tokens: Sequence[int], error: BaseException | Failure) -> None:
        """See ``driver.Owner``."""
        self._have_ended(tokens, [(error, True)] * len(tokens))

    def is_withdrawn(self, token: int) -> bool:
        """See ``driver.Owner``."""
        return False

    def _have_ended(self, numbers: Sequence[int], raws: list[Any]) -> None:
        self._ended += len(numbers)
        self._arrive(numbers, raws)
        if not self._buffered:
            self._make_room(len(numbers))
        if self._ended == self._length:
            self._pool = self.held = None
        if self.event is not None:
            self.event.set()

    def _arrive(self, numbers: Sequence[int], raws: list[Any]) -> None:
        """These came; the numbers follow each other."""
        raise NotImplementedError

    def _make_room(self, count: int) -> None:
        self._over += count
        if not self._room.is_set():
            self._room.set()

    def await_room(self) -> bool:
        """In the feeding thread: wait until one more may be under way; False: no more may."""
        while self._taken - self._over >= self._window:
            self._room.clear()
            if self._taken - self._over >= self._window:
                self._room.wait(1.0)
            if self._driver.loop.over:
                return False
        self._taken += 1
        return not self._driver.loop.over

    def fed(self, count: int, error: BaseException | None) -> None:
        """On the loop: so many items were submitted, and then ``error`` was raised, if any."""
        if error is not None:
            self._ended += 1
            self._arrive([count], [(error, True)])
            count += 1
        self._length = count
        if self._ended == count:
            self._pool = self.held = None
        if self.event is not None:
            self.event.set()


class OrderedIterator(IMapIterator):
    """In the order of the items."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._next = 0
        self._early: dict[int, Any] = {}

    def _arrive(self, numbers: Sequence[int], raws: list[Any]) -> None:
        if numbers[0] != self._next:
            self._early.update(zip(numbers, raws, strict=True))
            return
        self._came.extend(raws)
        self._next += len(raws)
        while self._early and self._next in self._early:
            self._came.append(self._early.pop(self._next))
            self._next += 1


class UnorderedIterator(IMapIterator):
    """As they come."""

    def _arrive(self, numbers: Sequence[int], raws: list[Any]) -> None:
        self._came.extend(raws)
