"""``taskrun map``: arguments in, as fast as workers take them; results out.

A thread of its own reads the arguments, since stdin may block for ever.  It stops when a
window of calls is unfinished, so an endless input costs no memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from taskrun import messages as m
from taskrun.blobs import Portable
from taskrun.calls import OK
from taskrun.model import Task
from taskrun.observers import Observer
from taskrun.recipes import make_recipe
from taskrun.reporting.text import shorten
from taskrun.values import decode, dumps_arguments, unfit_arguments

WIDEST = 30  # characters of an argument in the title of its call


class Argument(NamedTuple):
    """What one call gets: the text that was given, and what that means; or why it means
    nothing, and then the call fails."""

    text: str
    value: Any = None
    unfit: str = ""


class Feed:
    """Feeds a call per argument to the run, which is the coordinator's Run."""

    def __init__(self, run: Any, task: Task, arguments: Iterator[Argument]) -> None:
        self._run = run
        self._task = task
        self._arguments = arguments
        flags = m.RENDER
        flags |= 0 if run.settings.policy == "keep-going" else m.STOPS
        flags |= m.SAY_BEGAN if task.options.says_began else 0
        self._recipe = make_recipe(task, next(run.recipe_ids), names=None, flags=flags)
        self._read: deque[tuple[str, Portable]] = deque()
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
            for argument in self._arguments:
                self._room.acquire()
                self._read.append((self._title(argument), _pickled(argument)))
                if not self._posted:
                    self._posted = True
                    self._run.reactor.post(self._feed)
        finally:
            self._run.reactor.post(self._end)

    def _feed(self) -> None:
        self._posted = False  # before taking, so that nothing is left without a post
        read = [self._read.popleft() for _ in range(len(self._read))]
        if read:
            labels, blobs = zip(*read, strict=True)
            self._run.post(m.Fed(self._recipe, list(blobs), labels))

    def _end(self) -> None:
        self._feed()
        self._run.post(m.Fed(self._recipe, [], last=True))

    def _title(self, argument: Argument) -> str:
        return f"{self._task.name}({shorten(argument.text, WIDEST)})"


def _pickled(argument: Argument) -> Portable:
    if argument.unfit:
        return unfit_arguments(argument.unfit)
    blob, _ = dumps_arguments((argument.value,), {})
    return blob


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
