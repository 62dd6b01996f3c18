"""What a worker has to say, in order: kept in the ledger, sent in batches."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from functools import partial
from time import perf_counter, time
from typing import Any, Final, Protocol

from taskrun.ledger import Ledger, dumps
from taskrun.messages import ITEM, ITEMS
from taskrun.wire import send_frame
from taskrun.workers import native

LATEST: Final = 0.001  # seconds after which records are sent although there is more to do
SMALL: Final = 4096  # bytes of a pickle that is told with others of its bunch
LARGE: Final = 64 * 1024  # bytes after which they are

_PLAIN: Final = frozenset((int, type(None), float, bool))
_FLOAT: Final = struct.Struct(">Bd").pack  # BINFLOAT, and the number
_INT: Final = struct.Struct("<Bi").pack  # BININT, and the number: a third of what pickling takes
_INTS: Final = range(-(2**31), 2**31)


class Port(Protocol):
    """The way to the coordinator."""

    def tell(self, record: tuple[Any, ...]) -> None: ...

    def tell_item(
        self, call: int, attempt: int, value: Any, seconds: float, now: float
    ) -> None: ...

    def flush(self) -> None: ...

    def give_all_back(self) -> None:
        """Return the calls that have not begun, where there are any."""


class Outbox:
    """Records on their way to the coordinator; all of the worker's threads use it.

    A finalizer or a signal handler of a task may have something to say while its thread is in
    the middle of saying something else: that is ``late``, and comes after it.
    """

    def __init__(self, ledger: Ledger, fd: int) -> None:
        self.lock = native.RLock()
        self._ledger = ledger
        self._fd = fd
        self._flushed = 0.0
        self._bunch: int | None = None  # the call whose items what is kept ends with
        self._busy = False  # whoever has the lock is in the middle of it
        self._late: deque[Callable[[], None]] = deque()

    def tell(self, record: tuple[Any, ...]) -> None:
        """Keep a record; send at once what is too large to be kept."""
        try:
            data = dumps(record)
        except OverflowError:
            self._send_alone(record)
            return
        with self.lock:
            if self._busy:
                self._late.append(partial(self.tell, record))
                return
            self._busy = True
            try:
                self._bunch = None
                if self._ledger.append(data):
                    return
                self._send()
                if not self._ledger.append(data):
                    self._send_one(record)
            finally:
                self._busy = False
                if self._late:
                    self._do_late()

    def tell_item(self, call: int, attempt: int, value: Any, seconds: float, now: float) -> None:
        """An item of a bunch has ended ``now``, by perf_counter(); see ``messages.ITEMS``."""
        kind = type(value)
        if kind is int and value in _INTS:
            data = _INT(74, value) + _FLOAT(71, seconds)
        elif kind in _PLAIN or (kind is bytes and len(value) <= SMALL):
            data = dumps(value) + _FLOAT(71, seconds)
        else:
            self.tell((ITEM, call, attempt, value, time() - seconds, seconds))
            data = b""
        if data:
            with self.lock:
                if self._busy:
                    late = partial(self.tell_item, call, attempt, value, seconds, now)
                    self._late.append(late)
                    return
                self._busy = True
                try:
                    if self._bunch != call or not self._ledger.append(data):
                        self._tell_first(call, attempt, data, seconds)
                finally:
                    self._busy = False
                    if self._late:
                        self._do_late()
        if self._ledger.used > LARGE or now - self._flushed > LATEST:
            self.flush()

    def _tell_first(self, call: int, attempt: int, data: bytes, seconds: float) -> None:
        data = dumps((ITEMS, call, attempt, time() - seconds)) + data
        if not self._ledger.append(data):
            self._send()
            self._ledger.append(data)
        self._bunch = call

    def awoke(self) -> None:
        """There is something to do again: what comes of it may wait a moment for more."""
        self._flushed = perf_counter()

    @property
    def is_due(self) -> bool:
        """Whether what is kept should be sent before more is done."""
        return self._ledger.used > LARGE or perf_counter() - self._flushed > LATEST

    def flush(self) -> None:
        """Send what is kept.  Raises ConnectionError where the coordinator is gone."""
        self._do(self._send)

    def _send_alone(self, record: tuple[Any, ...]) -> None:
        self._do(partial(self._send_one, record))

    def _do(self, step: Callable[[], None]) -> None:
        with self.lock:
            if self._busy:
                self._late.append(partial(self._do, step))
                return
            self._busy = True
            try:
                step()
            finally:
                self._busy = False
                if self._late:
                    self._do_late()

    def _do_late(self) -> None:
        while self._late:
            self._late.popleft()()

    # -- the lock is held, and nobody else is in the middle of it ---------------------

    def _send(self) -> None:
        self._bunch = None
        if self._ledger.used:
            self._send_frame(self._ledger.frame())
        self._flushed = perf_counter()

    def _send_one(self, record: tuple[Any, ...]) -> None:
        self._send()
        self._send_frame(self._ledger.frame_of(record))

    def _send_frame(self, frame: bytes | memoryview) -> None:
        ledger = self._ledger
        generation, written = ledger.generation, list[int]()
        try:
            send_frame(self._fd, frame, written)
        finally:
            if written:
                try:
                    ledger.clear()
                except BaseException:  # a signal handler's, just before it or just after
                    if ledger.generation == generation:
                        ledger.clear()
                    raise
