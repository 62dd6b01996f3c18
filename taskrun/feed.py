"""``taskrun map``: arguments in, as fast as workers take them; results out.

A thread of its own reads the arguments, since stdin may block for ever.  It stops when a
window of calls is unfinished, so an endless input costs no memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from taskrun import messages as m
from taskrun.blobs import Portable
from taskrun.calls import OK
from taskrun.errors import UsageError
from taskrun.model import Task
from taskrun.observers import Observer
from taskrun.recipes import make_recipe
from taskrun.values import decode, dumps_arguments


class Feed:
    """Reads ``lines`` and feeds a call per item to the run.

    ``run`` is the coordinator's Run.  ``error``: why reading ended early, if it did: a line
    that does not convert.
    """

    def __init__(self, run: Any, task: Task, lines: Iterator[Any]) -> None:
        self.error: UsageError | None = None
        self._run = run
        self._lines = lines
        flags = m.RENDER if run.settings.policy == "keep-going" else m.RENDER | m.STOPS
        self._recipe = make_recipe(task, next(run.recipe_ids), names=None, flags=flags)
        self._read: deque[Portable] = deque()
        self._room = threading.Semaphore(max(1000, 64 * run.settings.jobs))
        self._posted = False

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read_all, name="taskrun-feed", daemon=True).start()

    def taken(self, call: Any) -> None:
        """The result of a call was used: there is room for another one."""
        self._run.core.release(call)
        self._room.release()

    def _read_all(self) -> None:
        self._run.reactor.may_wait_for_this_thread()  # in the semaphore
        try:
            for item in self._lines:
                self._room.acquire()
                blob, _ = dumps_arguments((item,), {})
                self._read.append(blob)
                if not self._posted:
                    self._posted = True
                    self._run.reactor.post(self._feed)
        except UsageError as error:
            self.error = error
        finally:
            self._run.reactor.post(self._end)

    def _feed(self) -> None:
        self._posted = False  # before taking, so that nothing is left without a post
        blobs = [self._read.popleft() for _ in range(len(self._read))]
        if blobs:
            self._run.post(m.Fed(self._recipe, blobs))

    def _end(self) -> None:
        self._feed()
        self._run.post(m.Fed(self._recipe, [], last=True))


class Results(Observer):
    """Shows what calls return, as they end or in the order of the arguments.

    ``show`` gets each call and its value as text.  ``taken`` is told of each call whose result
    was used.
    """

    def __init__(self, show: Callable[[Any, str], None], keep_order: bool) -> None:
        self.taken: Callable[[Any], None]
        self._show_result = show
        self._keep_order = keep_order
        self._ended: dict[int, Any] = {}
        self._next = 0

    def call_ended(self, call: Any) -> None:
        if call.parent is not None:
            return
        if not self._keep_order:
            self._show(call)
            return
        self._ended[call.index] = call
        while self._next in self._ended:
            self._show(self._ended.pop(self._next))
            self._next += 1

    def _show(self, call: Any) -> None:
        text = decode(call.value) if call.state == OK else None
        if text is not None:
            self._show_result(call, text)
        self.taken(call)
