"""The lane ``thread``: each call in a thread, some dozens at a time.

A thread cannot be ended from outside.  So a call that is to end is reported as ended at
once and left alone; the worker gets no more calls, and is gone as soon as its others are.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any

from taskrun.workers import native
from taskrun.workers.items import Flusher
from taskrun.workers.lanes.base import LaneWorker
from taskrun.workers.lanes.calls import LaneRunning
from taskrun.workers.lanes.stacks import Place, walk_up


class ThreadWorker(LaneWorker):
    """A worker whose calls have a thread each; threads are kept from call to call."""

    def prepare(self) -> None:
        """See ``base``."""
        self._waking, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._posted: deque[Callable[[], None]] = deque()
        self._flusher = Flusher()
        self._begun: SimpleQueue[tuple[LaneRunning, Any]] = SimpleQueue()
        self._free = 0
        self._counting = threading.Lock()
        self._around = copy_context()

    def serve(self) -> None:
        """See ``base``."""
        poll = native.poll()
        for fd in (self._fd, self._waking):
            poll.register(fd, native.POLLIN)
        while not self.is_over:
            ready = [fd for fd, _ in poll.poll()]
            if self._waking in ready:
                os.read(self._waking, 4096)
            while self._posted:
                self._posted.popleft()()
            if self._fd in ready:
                self.read()

    # -- calls ------------------------------------------------------------------------

    def begin(self, running: LaneRunning, args: Any) -> None:
        """See ``base``."""
        with self._counting:
            self._free -= 1
            more = self._free < 0
            if more:
                self._free += 1
        self._begun.put((running, args))
        if more:
            threading.Thread(target=self._work, name="taskrun call", daemon=True).start()

    def _work(self) -> None:
        try:
            while True:
                running, args = self._begun.get()
                running.handle = native.get_ident()
                self._around.copy().run(self.executor.perform, running, args)
                with self._counting:
                    self._free += 1
                if self._begun.empty() or self.outbox.is_due:
                    self.outbox.flush()
                if self.quitting:
                    self.post(_nothing)
        except ConnectionError:
            pass  # the coordinator is gone: the home thread finds out, and ends all

    def cancel(self, running: LaneRunning) -> None:
        """See ``base``."""
        self.give_up(running, "was abandoned in its thread, which nothing can end")
        running.wake()  # there, at least, it can be ended
        shell = sys.modules.get("taskrun.shell")
        if shell is not None:
            threading.Thread(
                target=shell.kill_groups, kwargs={"owner": running}, daemon=True
            ).start()

    def frames_of(self, running: LaneRunning) -> Iterable[Place] | None:
        """See ``base``."""
        return walk_up(sys._current_frames().get(running.handle))

    # -- around -----------------------------------------------------------------------

    def post(self, callback: Callable[[], None]) -> None:
        """See ``base``."""
        self._posted.append(callback)
        try:
            os.write(self._wake, b"\0")
        except BlockingIOError:
            pass  # it is about to wake anyway

    def later(self, callback: Callable[[], None]) -> None:
        """See ``base``."""
        self._flusher.later(callback)

    def flush(self) -> None:
        """See ``base``."""
        if self.outbox.is_due:
            self.outbox.flush()
        else:
            self._flusher.later(self.outbox.flush)


def _nothing() -> None:
    """It was woken to see that there is nothing left to do."""
