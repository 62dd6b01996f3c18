"""Waiting on behalf of a client, who may die meanwhile.

A thread that waits in a lock or a queue cannot see that its client's connection has ended.
So it waits in slices, and looks between them: it then ends within seconds, instead of
waiting for ever.  What it got for a client that is gone by the time it would be told goes
back: the item to the front of the queue, the lock is released.

RLocks, and Conditions on them, belong to the connection, as they do in the standard
library, where each connection has a thread: they are released when it ends.  A Lock or a
Semaphore belongs to nobody; who was told that it has it, has it.

Objects that are ours know how to wait for a client themselves: see :func:`waiter`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from taskrun.manager.objects import Entry

SLICE = 2.0  # seconds between two looks at the client

_RLOCK = type(threading.RLock())
_QUEUES = (queue.Queue, queue.LifoQueue, queue.PriorityQueue)


class Gone(BaseException):
    """Raised in a call when its client is gone; not caught by what catches errors."""


class Waiter:
    """Makes the calls of one promoted connection, on the thread that serves it."""

    def __init__(self, gone: Callable[[], bool]) -> None:
        self._gone = gone
        self._owned: dict[int, Any] = {}  # RLocks and Conditions that were ever acquired
        self._undo: Callable[[], object] | None = None
        self._at_end: list[Callable[[], object]] = []

    def begin(self) -> None:
        """On the thread that will make the calls."""
        _served.waiter = self

    def __call__(
        self,
        entry: Entry,
        method: str,
        function: Callable[..., Any],
        args: Any,
        kwds: Mapping[str, Any],
    ) -> Any:
        """Call ``function``, a method of the entry's object.  Raises Gone, or its errors."""
        self._undo = None
        value = entry.value
        how = _WAYS.get((type(value), method))
        if how is None:
            return function(*args, **kwds)
        return how(self, value, function, args, kwds)

    def undo(self) -> None:
        """The client was not told: take the last call back, where that can be."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def release_all(self) -> None:
        """The connection has ended: what it owns is released.  On its own thread."""
        for lock in self._owned.values():
            while lock._is_owned():
                lock.release()
        for callback in self._at_end:
            callback()

    # -- for objects that wait by themselves ------------------------------------------

    def undo_by(self, undo: Callable[[], object]) -> None:
        """What takes this call back, if the client is not told."""
        self._undo = undo

    def at_end(self, callback: Callable[[], object]) -> None:
        """Have it called when the connection has ended."""
        self._at_end.append(callback)

    # -- the ways to wait -------------------------------------------------------------

    def slices(self, attempt: Callable[[float], bool], timeout: float | None) -> bool:
        """Call ``attempt(seconds)`` until it says True or the time is up.  Raises Gone."""
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            left = SLICE if deadline is None else max(0.0, deadline - monotonic())
            if attempt(min(left, SLICE)):
                return True
            if deadline is not None and left <= SLICE:
                return False
            if self._gone():
                raise Gone

    def get(self, value: Any, function: Callable[..., Any], args: Any, kwds: Any) -> Any:
        timeout = _Patience.get(*args, **kwds)
        item = function(*args, **kwds) if timeout == 0 else self._get(value, timeout)
        self._undo = lambda: _put_back(value, item)
        return item

    def _get(self, value: Any, timeout: float | None) -> Any:
        got: list[Any] = []

        def attempt(seconds: float) -> bool:
            try:
                got.append(value.get(True, seconds))
            except queue.Empty:
                return False
            return True

        if not self.slices(attempt, timeout):
            raise queue.Empty
        return got[0]

    def get_nowait(self, value: Any, function: Callable[..., Any], args: Any, kwds: Any) -> Any:
        item = function(*args, **kwds)
        self._undo = lambda: _put_back(value, item)
        return item

    def put(self, value: Any, function: Callable[..., Any], args: Any, kwds: Any) -> Any:
        timeout = _Patience.put(*args, **kwds)
        if timeout == 0:
            return function(*args, **kwds)
        item = args[0] if args else kwds["item"]

        def attempt(seconds: float) -> bool:
            try:
                value.put(item, True, seconds)
            except queue.Full:
                return False
            return True

        if not self.slices(attempt, timeout):
            raise queue.Full
        return None

    def join(self, value: Any, function: Callable[..., Any], args: Any, kwds: Any) -> None:
        if args or kwds:
            function(*args, **kwds)  # it takes none, and says so

        def attempt(seconds: float) -> bool:
            with value.all_tasks_done:
                return bool(
                    value.all_tasks_done.wait_for(lambda: not value.unfinished_tasks, seconds)
                )

        self.slices(attempt, None)

    def acquire(self, value: Any, function: Callable[..., Any], args: Any, kwds: Any) -> bool:
        timeout = _PATIENCE_OF.get(type(value), _Patience.acquire)(*args, **kwds)
        if timeout == 0:
            done = bool(function(*args, **kwds))
        else:
            done = self.slices(lambda seconds: bool(value.acquire(True, seconds)), timeout)
        if _belongs_to_its_thread(value):
            self._owned[id(value)] = value
        elif done:
            self._undo = value.release
        return done

    def wait(self, value: Any, function: Callable[..., Any], args: Any, kwds: Any) -> Any:
        # Event.wait() in slices would lose a set() that is followed by a clear() between two.
        timeout = _Patience.wait(*args, **kwds)
        with value._cond:
            return value._flag or self._wait_enlisted(value._cond, timeout)

    def wait_notified(self, value: Any, function: Callable[..., Any], args: Any, kwds: Any) -> Any:
        timeout = _Patience.wait(*args, **kwds)
        if not value._is_owned():
            raise RuntimeError("cannot wait on un-acquired lock")
        notified = self._wait_enlisted(value, timeout, pass_on=value.notify)
        if notified:
            self._undo = value.notify
        return notified

    def _wait_enlisted(
        self, condition: Any, timeout: float | None, pass_on: Callable[[], object] | None = None
    ) -> bool:
        """Whether it was notified; ``pass_on`` is called if it was for a client who is gone."""
        # Condition.wait() in slices could lose a notification between two of them, so
        # this waiter stays enlisted: the steps are those of Condition.wait().
        bell = threading.Lock()
        bell.acquire()
        condition._waiters.append(bell)
        saved = condition._release_save()
        notified = gone = False
        try:
            notified = self.slices(lambda seconds: bell.acquire(True, seconds), timeout)
        except Gone:
            gone = True
            raise
        finally:
            condition._acquire_restore(saved)
            if not notified:
                notified = _has_rung(condition, bell)
            if gone and notified and pass_on is not None:
                pass_on()
        return notified

    def wait_at_barrier(
        self, value: Any, function: Callable[..., Any], args: Any, kwds: Any
    ) -> int:
        # Barrier.wait() leaves only when the others have come, or breaks it when its time is
        # up; who is gone leaves as if it had not come.  The steps are those of Barrier.wait().
        timeout = _Patience.wait(*args, **kwds)
        with value._cond:
            value._enter()
            place: int = value._count
            value._count += 1
            try:
                if value._count == value.parties:
                    value._release()
                else:
                    self._pass(value, value._timeout if timeout is None else timeout)
            finally:
                value._count -= 1
                value._exit()
        return place

    def _pass(self, barrier: Any, timeout: float | None) -> None:
        def attempt(seconds: float) -> bool:
            return bool(barrier._cond.wait_for(lambda: barrier._state != 0, seconds))

        if not self.slices(attempt, timeout):
            barrier._break()
        if barrier._state < 0:  # broken, or reset
            raise threading.BrokenBarrierError


def _has_rung(condition: Any, bell: Any) -> bool:
    """Strike a waiter off the list; True if it rang meanwhile, and is off it already."""
    try:
        condition._waiters.remove(bell)
    except ValueError:
        return True
    return False


class _Patience:
    """How long a call waits, with the signatures of the methods, so that what they refuse is
    refused: None is for ever; 0 is not at all, or so shortly (or so wrongly said) that it
    needs no slices."""

    @staticmethod
    def get(block: Any = True, timeout: Any = None) -> float | None:
        return _sliced(timeout) if block else 0

    @staticmethod
    def put(item: Any, block: Any = True, timeout: Any = None) -> float | None:
        return _sliced(timeout) if block else 0

    @staticmethod
    def acquire(blocking: Any = True, timeout: Any = -1) -> float | None:
        """Of a lock, or a Condition with one."""
        if not blocking or timeout is None:
            return 0
        return None if timeout == -1 else _sliced(timeout)

    @staticmethod
    def acquire_permit(blocking: Any = True, timeout: Any = None) -> float | None:
        """Of a semaphore."""
        return _sliced(timeout) if blocking else 0

    @staticmethod
    def wait(timeout: float | None = None) -> float | None:
        return timeout


_PATIENCE_OF = dict.fromkeys(
    (threading.Semaphore, threading.BoundedSemaphore), _Patience.acquire_permit
)


def _sliced(timeout: Any) -> float | None:
    if timeout is None:
        return None
    return timeout if isinstance(timeout, (int, float)) and timeout > SLICE else 0


def _belongs_to_its_thread(value: Any) -> bool:
    return isinstance(value, _RLOCK) or (
        isinstance(value, threading.Condition) and isinstance(value._lock, _RLOCK)  # type: ignore[attr-defined]
    )


def _put_back(value: Any, item: Any) -> None:
    """To the front: it is the one that would have been taken next."""
    with value.mutex:
        if type(value) is queue.Queue:
            value.queue.appendleft(item)
        else:
            value._put(item)
        value.not_empty.notify()


_Way = Callable[[Waiter, Any, Callable[..., Any], Any, Any], Any]
_WAYS: dict[tuple[type, str], _Way] = {
    (threading.Event, "wait"): Waiter.wait,
    (threading.Condition, "wait"): Waiter.wait_notified,
    (threading.Barrier, "wait"): Waiter.wait_at_barrier,
    **{
        (kind, "acquire"): Waiter.acquire
        for kind in (type(threading.Lock()), _RLOCK, threading.Semaphore,
                     threading.BoundedSemaphore, threading.Condition)
    },
    **{
        (kind, method): way
        for kind in _QUEUES
        for method, way in (("get", Waiter.get), ("get_nowait", Waiter.get_nowait),
                            ("put", Waiter.put), ("join", Waiter.join))
    },
}  # fmt: skip


class _Served(threading.local):
    waiter: Waiter | None = None


_served = _Served()


def waiter() -> Waiter:
    """That of the connection which this thread serves.  Raises RuntimeError elsewhere."""
    if _served.waiter is None:
        raise RuntimeError("this thread serves no connection of a Manager server")
    return _served.waiter
