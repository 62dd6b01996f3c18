"""The event loop: descriptors, timers, and what other threads post.

One thread at a time runs it, whichever that is, and everything registered here is called
on that thread, one after the other.  A callback that raises is a bug of ours: the error
leaves the loop through :meth:`Reactor.run_once`, and nothing that was queued is lost.

Callbacks may run the loop themselves (a call in this process that waits for others), so
no state is kept in the middle of a turn.
"""

from __future__ import annotations

import heapq
import selectors
import socket
from collections import deque
from collections.abc import Callable
from time import monotonic

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

    __slots__ = ("reader", "writer")

    def __init__(self) -> None:
        self.reader: Callback | None = None
        self.writer: Callback | None = None

    @property
    def mask(self) -> int:
        reads = selectors.EVENT_READ if self.reader is not None else 0
        return reads | (selectors.EVENT_WRITE if self.writer is not None else 0)


class Reactor:
    """Waits for descriptors, timers and posts, and calls who asked for them."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._interests: dict[int, _Interest] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._ticket = 0
        self._inbox: deque[Callback] = deque()
        self._woken = False
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
        known = fd in self._selector.get_map()
        if not interest.mask:
            del self._interests[fd]
            if known:
                self._selector.unregister(fd)
        elif known:
            self._selector.modify(fd, interest.mask, interest)
        else:
            self._selector.register(fd, interest.mask, interest)

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

    # -- other threads and signals ----------------------------------------------------

    def post(self, callback: Callback, *, first: bool = False) -> None:
        """Call ``callback`` once, on the loop's thread; from any thread, or a signal handler.

        ``first``: before all that was posted already.
        """
        (self._inbox.appendleft if first else self._inbox.append)(callback)
        if not self._woken:
            self._woken = True
            self._wake()

    @property
    def wakeup_fd(self) -> int:
        """For ``signal.set_wakeup_fd``: a signal then ends the loop's waiting."""
        return self._wake_writer.fileno()

    def _wake(self) -> None:
        try:
            self._wake_writer.send(b"\0")
        except BlockingIOError:
            pass  # it is full of wake-ups already

    def _on_wakeup(self) -> None:
        # Unset before the inbox is emptied: what is posted from now on wakes again.
        self._woken = False
        try:
            self._wake_reader.recv(4096)
        except BlockingIOError:
            pass  # a nested turn took it

    # -- running ----------------------------------------------------------------------

    def run_until(self, predicate: Callable[[], bool], deadline: float | None = None) -> bool:
        """Run until ``predicate()`` holds; False when ``deadline`` (monotonic) came first."""
        while not predicate():
            timeout = None if deadline is None else deadline - monotonic()
            if timeout is not None and timeout <= 0:
                return False
            self.run_once(timeout)
        return True

    def run_once(self, timeout: float | None = None) -> None:
        """One turn: wait at most ``timeout`` seconds, then call whatever is due."""
        for key, mask in self._selector.select(self._patience(timeout)):
            interest: _Interest = key.data
            if mask & selectors.EVENT_READ and interest.reader is not None:
                interest.reader()
            if mask & selectors.EVENT_WRITE and interest.writer is not None:
                interest.writer()
        self._call_due()
        self._call_posted()

    def patience(self) -> float | None:
        """Seconds until something is due without any descriptor; None: nothing is."""
        if self._inbox:
            return 0.0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - monotonic()) if self._timers else None

    def _patience(self, timeout: float | None) -> float | None:
        patience = self.patience()
        if timeout is None:
            return patience
        return max(0.0, timeout if patience is None else min(timeout, patience))

    def _call_due(self) -> None:
        if not self._timers:
            return
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
        return self._selector.fileno()

    def close(self) -> None:
        """Let go of everything; nothing is called any more."""
        self._selector.close()
        self._interests.clear()
        self._timers.clear()
        self._inbox.clear()
        self._wake_reader.close()
        self._wake_writer.close()
