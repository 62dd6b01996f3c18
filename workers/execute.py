"""Call in, outcome out: executes one attempt after the other and catches everything.

Whatever a task does, short of ending the process, becomes a report: values are pickled
here, so that one which cannot be is an outcome and not a hang, and exceptions are tried
out in both directions.

An attempt that is interrupted gets ``Interrupted`` raised in it, from a signal handler.
That must never happen while our own code is in the middle of something: ``Running.user``
says when it may.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from contextvars import ContextVar
from time import perf_counter, time
from types import FrameType
from typing import Any, NoReturn, Protocol

from taskrun import context
from taskrun.bunch import TINY
from taskrun.context import Future
from taskrun.errors import (
    ArgumentError,
    Interrupted,
    LoadError,
    ResultError,
    Retry,
    Skip,
    TaskExit,
)
from taskrun.messages import BEGAN, DROP_VALUE, ENDED, RENDER, STOPS, WANT_ITEMS
from taskrun.model import Failure
from taskrun.values import are_plain, encode, encode_failure, encode_items
from taskrun.workers import native
from taskrun.workers.folder import Folder
from taskrun.workers.items import Items, Later
from taskrun.workers.loops import Loops, standing_still
from taskrun.workers.outbox import Port
from taskrun.workers.recipes import ASYNC, GENERATOR, PLAIN, Home, Known

Outcome = tuple[str, Any, Any]
"""Kind, payload and items of a Report."""

_OWNER: ContextVar[Running | None] = ContextVar("taskrun_owner")
"""In a thread that a call has started: its attempt."""

_QUICK = frozenset((int, float, str, bool, type(None)))
_RECURSION = 1000
_DEEPEST = 20_000  # as much as the main thread's stack surely has room for
_CONTAINERS = frozenset((list, tuple, dict, Future))


class Running:
    """One attempt while it is executed.

    ``below``: the attempt that waits for this one, on the same stack.  ``user``: code of
    the task is running, and may be interrupted.  ``interrupt``: why it is to end.
    ``raised``: the task knows.  ``told``: that it began.  ``cancel`` ends its coroutine,
    ``on_end`` is called when that has ended.
    ``resumed``: how often it went on after a nested call.  ``keys``: of the calls that it
    submitted; ``futures``: those still unknown here.  ``items``: what it produced so far,
    where it is a generator whose items are wanted.
    """

    # Here, and not in each: of most attempts they stay as they are.
    user = raised = told = done = False
    resumed = 0
    interrupt: str | None = None
    cancel: Callable[[], object] | None = None
    on_end: Callable[[], object] | None = None
    keys: set[bytes] | None = None
    futures: dict[bytes, Future] | None = None
    ordinals: dict[bytes, int] | None = None
    items: Items | None = None

    def __init__(
        self, call: int, attempt: int, known: Known, index: Any, units: Any, below: Running | None
    ) -> None:
        self.call = call
        self.attempt = attempt
        self.known = known
        self.index = index
        self.units = units
        self.below = below
        self.began = time()

    def enter_user(self) -> None:
        """The task's code runs from here.  Raises Interrupted where it is to end."""
        self.user = True
        if self.interrupt is not None and not self.raised:
            self.raised = True
            raise Interrupted(self.interrupt)


class Book(Protocol):
    """Where it is noted what is being executed: a Ledger, or nowhere."""

    def begin(self, call: int, attempt: int, resumed: int = 0) -> None: ...


class Marks(Protocol):
    """Who sees to the output of calls: a Capture, or nobody."""

    def ended(self, call: int, attempt: int, *, ended: bool = True) -> bool: ...


class Executor:
    """Executes calls in the thread that made it, one at a time, or nested while one waits.

    ``on_ctrl_c``: called where a KeyboardInterrupt has ended a call, which then counts as
    cancelled; without it, that is an exception like any other.  ``later``: how items of a
    generator are sent while it runs; without it, they go with its report.  ``folder``: the
    working directory of all calls; without it, one takes over what another has made of it.
    """

    running: Running | None = None

    def __init__(
        self,
        port: Port,
        home: Home,
        book: Book,
        marks: Marks,
        *,
        thread_variables: frozenset[str] = frozenset(),
        on_ctrl_c: Callable[[], object] | None = None,
        later: Later | None = None,
        folder: Folder | None = None,
    ) -> None:
        self.made: dict[Any, Any] = {}
        self.forked = False
        self.loops = Loops()
        self.context: context.Context  # made around it
        self._thread = native.get_ident()
        self._making = 0  # per_worker() values, which are no call's
        self._port = port
        self._home = home
        self._known: dict[int, Known] = {}
        self._book = book
        self._marks = marks
        self._thread_variables = thread_variables
        self._on_ctrl_c = on_ctrl_c
        self._later = later
        self._folder = folder
        self._generators: list[Any] = []
        self.early: dict[tuple[int, int], str] = {}  # interrupted before they came
        self._bunch: tuple[int, int, deque[Any]] | None = None  # that is executed: what is left

    # -- the main flow ----------------------------------------------------------------

    def asking(self) -> Running | None:
        """The attempt that the code which asks belongs to: in a thread that a call started it
        is that call's, whatever is executed on top of it, until it has ended."""
        if native.get_ident() == self._thread:
            return self.running
        running = _OWNER.get(self.running)
        return None if running is None or running.done else running

    def attempt(self) -> tuple[int, int] | None:
        """(call, attempt) of the code which asks."""
        running = self.asking()
        return None if running is None else (running.call, running.attempt)

    # -- threads that a call starts; see ``threads.Calls`` ----------------------------

    def found(self) -> Running | None:
        """See ``threads.Calls``.  Threads that no call has started are nobody's."""
        here = native.get_ident() == self._thread
        return self.running if here else _OWNER.get(None)

    def owner(self) -> Running | None:
        """See ``threads.Calls``."""
        return None if self._making else self.found()

    def run_for(
        self, owner: Running | None, function: Callable[..., Any], /, *args: Any, **kw: Any
    ) -> Any:
        """See ``threads.Calls``."""
        token = _OWNER.set(owner)
        active = None if owner is None else context.activate(self.context)
        try:
            return function(*args, **kw)
        finally:
            _OWNER.reset(token)
            if active is not None:
                context.deactivate(active)

    def learn(self, record: tuple[Any, ...]) -> None:
        """Take a TASK record."""
        self._known[record[1]] = Known(record, self._home)

    def forget(self, recipe: int) -> None:
        """Take a FORGET record's."""
        self._known.pop(recipe, None)

    def execute(self, record: tuple[Any, ...]) -> None:
        """Execute a CALL record and report how it ended."""
        _, call, attempt, recipe, index, args, units = record
        known = self._known[recipe]
        if type(args) is list:
            self._execute_bunch(call, attempt, known, args)
            return
        below = self.running
        self.running = running = Running(call, attempt, known, index, units, below)
        self._book.begin(call, attempt)
        if self.early:
            running.interrupt = self.early.pop((call, attempt), None)
        start = perf_counter()
        try:
            kind, payload, items = self._attempt(running, args)
        except BaseException as error:  # an interrupt in the few steps around the call
            running.user = False
            kind, payload, items = self._failed(running, error)
        seconds = perf_counter() - start
        wrote = self._marks.ended(call, attempt)
        if self._folder is not None:
            self._folder.restore()
        self._report(running, (ENDED, call, attempt, kind, payload, items, running.began,
                               seconds, wrote))  # fmt: skip
        if kind == "error" and known.flags & STOPS:
            self._port.give_all_back()

    def _execute_bunch(self, call: int, attempt: int, known: Known, items: list[Any]) -> None:
        """Execute items one after the other, as long as there are any: some may be cut off."""
        running = Running(call, attempt, known, None, None, self.running)
        if self.early:
            running.interrupt = self.early.pop((call, attempt), None)
        self.running = running
        left = deque(items)
        outer, self._bunch = self._bunch, (call, attempt, left)
        begin, tell = self._book.begin, self._port.tell_item
        function = known.function if known.found else None
        place = 0
        clock = perf_counter()
        while left:
            try:
                item = left.popleft()
            except IndexError:  # cut off just now
                break
            running.resumed = place
            begin(call, attempt, place)
            value = self._item(running, function, item)
            before, clock = clock, perf_counter()
            tell(call, attempt, value, clock - before, clock)
            place += 1
        self._bunch = outer
        running.done = True
        self._marks.ended(call, attempt)
        self._uncover(running.below)

    def _item(self, running: Running, function: Callable[..., Any] | None, item: Any) -> Any:
        """Execute one item by its function, if that is found already; gives its Encoded value,
        or a Failure."""
        try:
            running.enter_user()
            known = running.known
            alone = type(item) in TINY
            if alone or type(item) is tuple:
                function = function or known.task.function
                value = function(item) if alone else function(*item)
            else:
                known.task  # noqa: B018 - as in _call()
                positional, keywords = known.arguments((item, {}), self.per_worker)
                value = known.function(*positional, **keywords)
            running.user = False
            if self.forked:
                self.leave(None)
            return value
        except BaseException as error:
            running.user = False
            if self.forked:
                self.leave(error)
            kind, payload, _ = self._failed(running, error)
        if kind == "skip":
            return Failure("skipped", "Skip", payload)
        failure: Failure = payload[1] if kind == "retry" else payload[0]
        return failure

    @property
    def has_more(self) -> bool:
        """Whether there are items of a bunch that have not begun."""
        return self._bunch is not None and bool(self._bunch[2])

    def cut(self, count: int) -> tuple[int, int, int] | None:
        """Another thread's part: take back up to ``count`` items of the bunch that is executed,
        its last ones; gives call, attempt and how many."""
        if self._bunch is None:
            return None
        call, attempt, left = self._bunch
        taken = 0
        while taken < count and left:
            try:
                left.pop()
            except IndexError:
                break  # it was begun just now
            taken += 1
        return (call, attempt, taken) if taken else None

    def execute_nested(self, record: tuple[Any, ...]) -> None:
        """Execute a CALL record while the running attempt waits."""
        waiting = self.running
        assert waiting is not None
        self._marks.ended(waiting.call, waiting.attempt, ended=False)
        aside = nullcontext() if self._folder is None else self._folder.set_aside()
        with standing_still(), _room_to_recurse(), aside:
            self.execute(record)

    def _report(self, running: Running, record: tuple[Any, ...]) -> None:
        running.done = True
        self._port.tell(record)
        # Only now: an attempt whose outcome is not kept yet is one that was lost.
        self._uncover(running.below)

    def _uncover(self, below: Running | None) -> None:
        """What was executed is over; ``below`` goes on."""
        self.running = below
        if below is not None:
            below.resumed += 1
            self._book.begin(below.call, below.attempt, below.resumed)

    def refuse(self, record: tuple[Any, ...], reason: str) -> None:
        """Report a CALL record that was cancelled before it began."""
        self.early.pop(record[1:3], None)
        failure = encode_failure(Interrupted(reason), "cancelled")
        self._port.tell(
            (ENDED, record[1], record[2], "error", (failure, False), None, time(), 0.0, False)
        )

    def _attempt(self, running: Running, args: Any) -> Outcome:
        known = running.known
        restore = self._grant(running.units) if running.units else None
        try:
            if known.says_began:
                self._say_began(running)
            running.enter_user()
            if known.quick and type(args[0]) in _QUICK:
                value = known.function(args[0])
            else:
                value = self._call(running, args)
            if self.forked:
                self.leave(None)
            outcome = self._outcome(running, value)
            running.user = False
            return outcome
        except BaseException as error:
            running.user = False
            if self.forked:
                self.leave(error)
            return self._failed(running, error)
        finally:
            if restore is not None:
                _set_environment(restore)

    def _call(self, running: Running, args: Any) -> Any:
        known = running.known
        made = self._made(running, args)
        if known.style == PLAIN:
            return made
        if known.style == GENERATOR:
            return self._listed(running, made)
        coroutine = made if known.style == ASYNC else self._listed_async(running, made)
        return self.loops.run(coroutine, running)

    def _made(self, running: Running, args: Any) -> Any:
        """What the task's function gives for these arguments: a value, a coroutine, ..."""
        known = running.known
        known.task  # noqa: B018 - it is looked up, or the reason why it is not there is raised
        positional, keywords = known.arguments(args, self.per_worker)
        if known.says_began and not running.told:
            self._say_began(running, known.label(positional, keywords))
        return known.function(*positional, **keywords)

    # -- generators -------------------------------------------------------------------

    def _listed(self, running: Running, made: Any) -> list[Any]:
        """Run a generator to its end; its items go ahead where they are wanted."""
        if not running.known.flags & WANT_ITEMS:
            return list(made)
        items = self._begin_items(running)
        for value in made:
            self._take_item(running, items, value)
        return items.values

    async def _listed_async(self, running: Running, made: Any) -> list[Any]:
        if not running.known.flags & WANT_ITEMS:
            return [item async for item in made]
        items = self._begin_items(running)
        async with aclosing(made):  # where an item cannot travel
            async for value in made:
                self._take_item(running, items, value)
        return items.values

    def _begin_items(self, running: Running) -> Items:
        keeps = not running.known.flags & DROP_VALUE
        running.items = Items(running.call, running.attempt, keeps, self._port, self._later)
        return running.items

    def _take_item(self, running: Running, items: Items, value: Any) -> None:
        try:
            held = encode(value)
        except ResultError as error:
            name = running.known.name
            raise ResultError(f"{name} yielded what cannot travel: {error}") from None
        was_user, running.user = running.user, False
        items.add(value, held)
        if was_user:
            running.enter_user()

    # -- outcomes ---------------------------------------------------------------------

    def _outcome(self, running: Running, value: Any) -> Outcome:
        known = running.known
        flags = known.flags
        if flags & RENDER and value is not None:
            if type(value) in _CONTAINERS and self._encode(known, value)[1]:
                return "held", self._encode(known, value), None
            value = str(value)
        items = None
        if flags & WANT_ITEMS:
            if type(value) is list and running.items is None and are_plain(value):
                return "value", None if flags & DROP_VALUE else encode(value)[0], value[:]
            items = self._items(running, value)
        payload, keys = self._encode(known, value)
        if keys:
            return "held", (payload, keys), items
        if flags & DROP_VALUE:
            payload = None
        return "value", payload, None if items is None else [item for item, _ in items]

    def _encode(self, known: Known, value: Any) -> tuple[Any, Any]:
        try:
            return encode(value)
        except ResultError as error:
            raise ResultError(f"{known.name} returned what cannot travel: {error}") from None

    def _items(self, running: Running, value: Any) -> list[tuple[Any, Any]]:
        if running.items is not None:
            return running.items.rest()
        try:
            return encode_items(value)
        except ResultError as error:
            raise ResultError(f"{running.known.name}: {error}") from None

    def _failed(self, running: Running, error: BaseException) -> Outcome:
        if isinstance(error, KeyboardInterrupt) and self._on_ctrl_c is not None:
            self._on_ctrl_c()
            error = Interrupted("Ctrl-C").with_traceback(error.__traceback__)
        items = None if running.items is None else running.items.known()
        if running.interrupt is not None or isinstance(error, Interrupted):
            return "error", (encode_failure(error, "cancelled"), False), items
        if isinstance(error, Skip):
            return "skip", str(error), items
        if isinstance(error, Retry):
            return "retry", (float(error.after), encode_failure(error, "retry")), items
        if not isinstance(error, Exception):
            return "error", (encode_failure(_exit(running.known, error)), False), items
        return "error", (encode_failure(error), self._is_retryable(running, error)), items

    def _is_retryable(self, running: Running, error: Exception) -> bool:
        if isinstance(error, ResultError | ArgumentError | LoadError):
            return False  # it would end the same way again
        return isinstance(error, running.known.task.options.retry_on)

    # -- around a call ----------------------------------------------------------------

    def _say_began(self, running: Running, label: str | None = None) -> None:
        if label is None and running.known.task.options.label is not None:
            return  # it is said as soon as the label's arguments are there
        was_user, running.user = running.user, False
        running.told = True
        self._port.tell((BEGAN, running.call, running.attempt, running.began, label))
        self._port.flush()
        if was_user:
            running.enter_user()

    def _grant(self, units: dict[str, Any]) -> dict[str, str | None]:
        """Tell libraries and subprocesses what the call got; gives what was set before."""
        wanted: dict[str, str | None] = {}
        if "gpu" in units and "CUDA_VISIBLE_DEVICES" not in os.environ:
            wanted["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, units["gpu"]))
        if units.get("cpu", 1) > 1:
            wanted.update(dict.fromkeys(self._thread_variables, f"{int(units['cpu'])}"))
        before = {name: os.environ.get(name) for name in wanted}
        _set_environment(wanted)
        return before

    def per_worker(self, make: Callable[[], Any]) -> Any:
        """The value of ``make()``, made once; a generator goes on when the worker ends."""
        if make not in self.made:
            self._making += 1
            try:
                made = make()
                if hasattr(made, "__next__"):
                    self._generators.append(made)
                    made = context.yielded(make, made)
            finally:
                self._making -= 1
            self.made[make] = made
        return self.made[make]

    def close(self) -> None:
        """Finish what per_worker() made, last first; what that raises is shown."""
        while self._generators:
            generator = self._generators.pop()
            try:
                next(generator, None)
            except BaseException as error:  # sys.exit() too is of this one, and of no other
                print(encode_failure(error).traceback, end="", file=sys.stderr)
        self.loops.close()

    # -- interrupts -------------------------------------------------------------------

    def on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """The signal that follows an INTERRUPT.  Raises Interrupted where it may."""
        running = self.running
        if running is None or running.interrupt is None or running.raised:
            return  # that attempt is over
        if running.cancel is not None:
            running.raised = True
            running.cancel()
        elif running.user:
            running.raised = True
            raise Interrupted(running.interrupt)

    def interrupt(self, call: int, attempt: int, reason: str) -> Running | None:
        """Another thread's part: the attempt is to end; a signal must follow.

        None: it is not on the stack.  It may be over; if it is about to begin, it ends.
        """
        running = self._find(call, attempt)
        if running is None:
            self.early[call, attempt] = reason
            running = self._find(call, attempt)  # it may have missed that
        if running is not None:
            running.interrupt = reason
            self.early.pop((call, attempt), None)
        return running

    def _find(self, call: int, attempt: int) -> Running | None:
        running = self.running
        while running is not None and (running.call, running.attempt) != (call, attempt):
            running = running.below
        return running

    # -- forked children --------------------------------------------------------------

    def leave_behind(self) -> None:
        """In a child that the task forked: it never gets back into the worker's loop."""
        self.forked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def leave(self, error: BaseException | None) -> NoReturn:
        """The task's function ended in a child that it forked: so does the child."""
        status = 0
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            if not isinstance(error.code, int | None):
                print(error.code, file=sys.stderr)
        elif error is not None:
            status = 1
            print(encode_failure(error).traceback, end="", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status & 0xFF)


@contextmanager
def _room_to_recurse() -> Iterator[None]:
    """Let a nested call recurse as deeply as any other, however deep the stack is already."""
    before = sys.getrecursionlimit()
    frame: FrameType | None = sys._getframe()
    depth = 0
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    sys.setrecursionlimit(max(before, min(depth + _RECURSION, _DEEPEST)))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _exit(known: Known, error: BaseException) -> TaskExit:
    said = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else repr(error)
    what = "called" if isinstance(error, SystemExit) else "raised"
    made = TaskExit(f"{known.name} {what} {said}").with_traceback(error.__traceback__)
    if isinstance(error, SystemExit):
        made.exited = True
        made.code = error.code if isinstance(error.code, int | None) else str(error.code)
    else:
        made.raised = encode_failure(error)
    return made


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
