"""The event loop: descriptors, timers, and what other threads post.

One thread at a time runs it, whichever that is, and everything registered here is called
on that thread, one after the other.  A callback that raises is a bug of ours: the error
leaves the loop through :meth:`Reactor.run_once`, and nothing that was queued is lost.

Callbacks may run the loop themselves (a call in this process that waits for others), so
no state is kept in the middle of a turn.
"""

from __future__ import annotations

import errno
import heapq
import select
import selectors
import socket
from collections import deque
from collections.abc import Callable
from threading import get_ident, local
from time import monotonic, perf_counter
from typing import Any

from taskrun.hunch import Hunch

Callback = Callable[[], object]


class Timer:
    """A callback that is due at a time; see :meth:`Reactor.call_at`."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callback) -> None:
        self.when = when
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Do not call it any more; does nothing where it was called already."""
        self.callback = None


class _Interest:
    """Who wants to know about one descriptor.  It outlives its registration: what is
    removed in the middle of a turn is not called any more in that turn."""

    __slots__ = ("mask", "reader", "writer")

    def __init__(self) -> None:
        self.reader: Callback | None = None
        self.writer: Callback | None = None
        self.mask = 0  # that the system has been told


_READ, _WRITE = 1, 4  # as epoll has them
_AT_ONCE = 64  # descriptors of one turn; the others' turn comes
_LONGEST = 86400.0  # seconds to wait at once: the system counts milliseconds, up to 25 days
_MOMENT = 50e-6  # seconds: about what it takes to be put to sleep and woken


class _Selector:
    """Which descriptors are ready, where there is no epoll."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.fileno = getattr(self._selector, "fileno", lambda: -1)
        self.close = self._selector.close
        self.unregister = self._selector.unregister

    def register(self, fd: int, mask: int) -> None:
        self._selector.register(fd, _events_of(mask))

    def modify(self, fd: int, mask: int) -> None:
        self._selector.modify(fd, _events_of(mask))

    def poll(self, timeout: float | None, most: int) -> list[tuple[int, int]]:
        return [
            (key.fd, (_READ if mask & selectors.EVENT_READ else 0)
             | (_WRITE if mask & selectors.EVENT_WRITE else 0))
            for key, mask in self._selector.select(timeout)
        ]  # fmt: skip


def _events_of(mask: int) -> int:
    reads = selectors.EVENT_READ if mask & _READ else 0
    return reads | (selectors.EVENT_WRITE if mask & _WRITE else 0)


# Without the selectors module in between a turn takes half the time.
_make_poller: Callable[[], Any] = getattr(select, "epoll", _Selector)


_thread = local()  # .loop: that may wait for this thread


def waiting_loop() -> Reactor | None:
    """The loop that may wait for this thread: what is done here must not wait for it."""
    return getattr(_thread, "loop", None)


class Reactor:
    """Waits for descriptors, timers and posts, and calls who asked for them."""

    def __init__(self) -> None:
        self._poller = _make_poller()
        self._interests: dict[int, _Interest] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._ticket = 0
        self._inbox: deque[Callback] = deque()
        self._woken = self._closed = False
        self._waking = False  # whether it is not known that the wake-up was sent
        self._expecting = False
        self._hunch = Hunch()
        self.thread: int | None = None  # that is in the middle of a turn
        self._waiting = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self.add_reader(self._wake_reader.fileno(), self._on_wakeup)

    # -- descriptors ------------------------------------------------------------------

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call ``callback`` whenever ``fd`` can be read, or is at its end."""
        self._interest(fd).reader = callback
        self._register(fd)

    def remove_reader(self, fd: int) -> None:
        """Undo :meth:`add_reader`; do so before the descriptor is closed."""
        if fd in self._interests:
            self._interests[fd].reader = None
            self._register(fd)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call ``callback`` whenever ``fd`` can be written to."""
        self._interest(fd).writer = callback
        self._register(fd)

    def remove_writer(self, fd: int) -> None:
        """Undo :meth:`add_writer`; do so before the descriptor is closed."""
        if fd in self._interests:
            self._interests[fd].writer = None
            self._register(fd)

    def _interest(self, fd: int) -> _Interest:
        return self._interests.setdefault(fd, _Interest())

    def _register(self, fd: int) -> None:
        interest = self._interests[fd]
        mask = (_READ if interest.reader else 0) | (_WRITE if interest.writer else 0)
        before, interest.mask = interest.mask, mask
        if not mask:
            del self._interests[fd]
        if mask == before:
            return
        if not mask:
            self._forget(fd)
        elif before:
            self._poller.modify(fd, mask)
        else:
            self._poller.register(fd, mask)

    def _forget(self, fd: int) -> None:
        try:
            self._poller.unregister(fd)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOENT):  # it was closed before
                raise

    # -- time -------------------------------------------------------------------------

    def call_at(self, when: float, callback: Callback) -> Timer:
        """Call ``callback`` once, at ``when`` (``time.monotonic()`` seconds) or soon after."""
        timer = Timer(when, callback)
        self._ticket += 1
        heapq.heappush(self._timers, (when, self._ticket, timer))
        return timer

    def call_soon(self, callback: Callback) -> None:
        """Call ``callback`` once, in the next turn; on the loop's own thread only."""
        self._inbox.append(callback)

    def expect_soon(self) -> None:
        """The next turn looks for what is ready for a moment, before it goes to sleep: whoever
        was answered just now is about to ask again, and to be woken takes longer than that.

        Ever more seldom where it is in vain: a processor is for those who have work for it.
        """
        if self._hunch:
            self._expecting = True

    # -- other threads and signals ----------------------------------------------------

    def post(self, callback: Callback, *, first: bool = False) -> None:
        """Call ``callback`` once, on the loop's thread; from any thread, or a signal handler.

        ``first``: before all that was posted already.
        """
        (self._inbox.appendleft if first else self._inbox.append)(callback)
        if self._woken and not self._waking:
            return
        # A signal handler that comes in between, posts and waits does not count on our wake-up,
        # which we cannot send meanwhile; nor does another thread, for which it may wait.
        try:
            self._waking = self._woken = True
            self._wake()
        except BaseException:  # of a signal handler: it is not known whether that was sent
            self._woken = False
            raise
        finally:
            self._waking = False

    def may_wait_for_this_thread(self) -> None:
        """From now on this thread holds locks, now and then, that the loop takes as well."""
        _thread.loop = self

    @property
    def wakeup_fd(self) -> int:
        """For ``signal.set_wakeup_fd``: a signal then ends the loop's waiting."""
        return self._wake_writer.fileno()

    def _wake(self) -> None:
        try:
            self._wake_writer.send(b"\0")
        except BlockingIOError:
            pass  # it is full of wake-ups already
        except OSError:
            if not self._closed:  # meanwhile, by the loop's own thread
                raise

    def _on_wakeup(self) -> None:
        try:
            self._wake_reader.recv(4096)
        except BlockingIOError:
            pass  # a nested turn took it
        # Unset before the inbox is emptied: what is posted from now on wakes again.  But not
        # before the wake-ups were taken: one that comes in between would be taken with them,
        # and, since it counts as on its way, be the last one.
        self._woken = False

    # -- running ----------------------------------------------------------------------

    def run_until(self, predicate: Callable[[], bool], deadline: float | None = None) -> bool:
        """Run until ``predicate()`` holds; False when ``deadline`` (monotonic) came first."""
        while not predicate():
            timeout = None if deadline is None else deadline - monotonic()
            if timeout is not None and timeout <= 0:
                return False
            self.run_once(timeout)
        return True

    def awaits_only(self, fd: int, timeout: float | None) -> bool:
        """Wait at most ``timeout`` seconds for anything, and call nobody: whether ``fd`` can be
        read, and nothing else is to be done.  Whatever it is, the next turn finds it."""
        if self._inbox:
            return False
        patience = self._patience(timeout)
        self._waiting = self.thread is None
        found = self._poller.poll(patience, _AT_ONCE)
        self._waiting = False
        return bool(found == [(fd, _READ)])

    def was_waiting(self) -> bool:
        """Whether what a turn has raised came while it waited, and called nobody: then another
        may follow.  To be asked once, by who made it."""
        waiting, self._waiting = self._waiting, False
        return waiting

    def run_once(self, timeout: float | None = None) -> None:
        """One turn: wait at most ``timeout`` seconds, then call whatever is due."""
        before, self.thread = self.thread, get_ident()
        interests = self._interests
        try:
            self._waiting = before is None
            found = self._found_soon() if self._expecting else None
            if not found:
                found = self._poller.poll(self._patience(timeout), _AT_ONCE)
            self._waiting = False
            for interest, mask in [(interests[fd], mask) for fd, mask in found if fd in interests]:
                # An error or the end of a connection is for whoever waits, reader or writer.
                if mask & ~_WRITE and interest.reader is not None:
                    interest.reader()
                if mask & ~_READ and interest.writer is not None:
                    interest.writer()
            if self._timers:
                self._call_due()
            if self._inbox:
                self._call_posted()
        finally:
            self.thread = before

    def _found_soon(self) -> list[tuple[int, int]] | None:
        self._expecting = False
        if self._inbox:
            return None
        poll, until = self._poller.poll, perf_counter() + _MOMENT
        while True:
            found: list[tuple[int, int]] = poll(0, _AT_ONCE)
            if found:
                self._hunch.came_true()
                return found
            if perf_counter() > until:
                self._hunch.was_in_vain()
                return None

    def patience(self) -> float | None:
        """Seconds until something is due without any descriptor; None: nothing is."""
        if self._inbox:
            return 0.0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, min(self._timers[0][0] - monotonic(), _LONGEST))

    def _patience(self, timeout: float | None) -> float | None:
        patience = self.patience()
        if timeout is None:
            return patience
        return max(0.0, min(timeout, _LONGEST if patience is None else patience))

    def _call_due(self) -> None:
        now = monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()

    def _call_posted(self) -> None:
        # Only what is there now: a callback that posts another does not starve the rest.
        for _ in range(len(self._inbox)):
            if self._inbox:  # a nested turn may have emptied it
                self._inbox.popleft()()

    def fileno(self) -> int:
        """A descriptor that is readable when a turn would find something to do (not timers)."""
        number: int = self._poller.fileno()
        return number

    def close(self) -> None:
        """Let go of everything; nothing is called any more, whatever is posted."""
        self._closed = True
        self._poller.close()
        self._interests.clear()
        self._timers.clear()
        self._inbox.clear()
        self._wake_reader.close()
        self._wake_writer.close()
