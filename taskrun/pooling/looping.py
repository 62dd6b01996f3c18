"""One event loop that two parties can run: a thread of its own, or whoever waits.

    resting         the thread runs the loop, and calls callbacks
    a guest waits   the guest runs the loop; the thread is parked and calls callbacks

A caller that waits for a result takes the loop over: what arrives need not wake a thread
that then wakes the caller.  The thread is parked a moment longer than the visit, since the
next guest is often there at once; whoever needs the loop meanwhile unparks it.

``_owner`` is held by who runs the loop.  A guest shows ``_guest`` first, so that the thread
leaves the loop alone; it hides it when it leaves, and only then looks for what others have
posted, who in turn post first and look for a guest then: one of the two sees the other.

A turn is made whole or not at all.  So nobody becomes a guest whose stack is nearly full.

Signals: in the main thread Python's signal handlers may raise between any two steps.  While
that thread is a guest they are put off until the loop is in order again.  What else is raised
in a guest from outside (by the signals of real time, or for a thread by another) is his own
while the loop waits, which is nearly always; in the middle of a turn it is the end of the pool.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # signal.py makes enums: that is slow
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import get_ident
from time import monotonic, sleep
from typing import Any, Final

from taskrun.flag import Flag
from taskrun.hunch import Hunch
from taskrun.reactor import Reactor

FOREIGN: Final = "this pool belongs to the process that this one was forked from"
AMID: Final = (
    "the pool cannot be waited for in the middle of its own work "
    "(in a __del__, where the garbage collector has called it there)"
)
PARKED: Final = 0.003  # seconds that the thread leaves the loop alone after a guest
_HOPELESS: Final = ("SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")
# Those of which a handler may be told; not of real time, since to ask for each takes a while.
_PUT_OFF: Final = tuple(
    {*range(1, 32)} - {int(getattr(_signal, name)) for name in _HOPELESS if hasattr(_signal, name)}
)
_ROOM: Final = 250  # on the stack, in calls of functions: what a turn may need


class Waitable:
    """What one can wait for.  ``event`` wakes those who cannot run the loop.

    In a slot, since who waits sets it while another thread sets what there is to be had: an
    attribute that is added to a dict by one, while another adds another, crashes Python 3.11.
    """

    __slots__ = ("event",)

    def __init__(self) -> None:
        self.event: Flag | None = None

    def settled(self) -> bool:
        """Whether the wait is over; never blocks."""
        raise NotImplementedError

    def wake(self) -> None:
        """Wake who sleeps."""
        if self.event is not None:
            self.event.set()


class Loop:
    """A reactor with a thread; see the module's own text.

    ``finish`` is called once, by the thread, which owns the loop then, when ``over`` was set.
    """

    def __init__(self, reactor: Reactor, name: str) -> None:
        self.reactor = reactor
        self.over = False
        self.finish: Callable[[], None] = lambda: None
        # Called by who comes to run the loop: what it waits for, and at most how long.
        self.entered: Callable[[Waitable | None, float | None], None] = _nobody_cares
        self.broken: Callable[[BaseException], None] = lambda error: None
        self.finished = Flag()
        self._pid = os.getpid()  # of the process that it runs in
        self._owner = threading.Lock()
        self._runner: int | None = None  # the thread that holds it
        self._posting: set[int] = set()  # threads that are in the middle of it
        self._closed = False
        self._visitors = threading.Lock()
        self._guest = False
        self._visited = False
        self._visits = 0
        self._needed = False
        self._parked = False
        self._sleepers = 0
        self._unpark = Flag()
        self._hunch = Hunch()
        self._callbacks: deque[Callable[[], None]] = deque()
        self._gone = False  # the thread: it will look for no more callbacks
        # By who runs the loop: the thread is to call a user's callback, and not to own the
        # loop meanwhile.
        self.call_back = self._callbacks.append
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether this is the process that made it, not a fork of that."""
        return os.getpid() == self._pid

    @property
    def in_thread(self) -> bool:
        """Whether the caller is the loop's own thread: another may have its number after it."""
        return get_ident() == self._thread.ident and not self.finished.is_set()

    @property
    def is_run_here(self) -> bool:
        """Whether the caller is in the middle of running it, wherever that has called him."""
        return self._runner == get_ident()

    # -- from any thread --------------------------------------------------------------

    def post(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called by whoever runs the loop."""
        self._post(callback)
        if self._parked and not self._guest:
            self._need()

    def _post(self, callback: Callable[[], object]) -> None:
        # While anybody is at it, the reactor is not closed.  No lock: a signal handler may come
        # in between and wait, for what others have to post.
        here = get_ident()
        amid = here in self._posting
        try:
            self._posting.add(here)
            if not self._closed:
                self.reactor.post(callback)
        finally:
            if not amid:
                self._posting.discard(here)
                if self._closed:
                    self._close_reactor()

    def _need(self) -> None:
        self._needed = True
        self._unpark.set()

    def nudge(self) -> None:
        """A callback was left by somebody who does not run the loop; where the thread is gone,
        he calls it."""
        if self._gone:
            self._run_callbacks()
        else:
            self.post(_nothing)
            self._unpark.set()

    def give_way(self, most: float) -> None:
        """Let the loop have a turn, at most so many seconds long.  Who never waits keeps the
        interpreter to himself, but for a moment every 5 ms; and at every step of a turn that
        is a system call the next such moment has to come."""
        if self.in_thread or self._guest or self.over or not self._hunch:
            return
        turn = threading.Lock()
        turn.acquire()
        self.post(turn.release)
        if turn.acquire(timeout=most):
            self._hunch.came_true()
        else:  # the thread is in a callback, or others do not wait either
            self._hunch.was_in_vain()

    def end(self) -> None:
        """The thread is to call ``finish`` and to end.  The collector and signal handlers may
        call this in the middle of anything."""
        self.over = True
        self._post(_nothing)
        self._unpark.set()

    # -- waiting ----------------------------------------------------------------------

    def wait(self, waitable: Waitable, timeout: float | None) -> bool:
        """Wait until ``waitable`` has settled; False where ``timeout`` seconds came first.
        Raises ValueError where it never could, in a forked process, and RuntimeError where the
        caller would wait for himself."""
        deadline = None if timeout is None else monotonic() + timeout
        in_main = threading.current_thread() is threading.main_thread()
        hopeless = self.is_run_here or not self.is_here
        while not waitable.settled():
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                return False
            if hopeless:
                self._wait_in_vain(left)
                continue
            stay = partial(self._stay, waitable, deadline)
            if self.over or not self._visit_safely(stay, in_main):
                self._sleep(waitable, left)
        return True

    def _wait_in_vain(self, left: float | None) -> None:
        if self.is_here:
            raise RuntimeError(AMID)
        if left is None:
            raise ValueError(FOREIGN)
        sleep(left)

    def _sleep(self, waitable: Waitable, left: float | None) -> None:
        """Another guest runs the loop, or nobody any more."""
        event = waitable.event or _event_of(waitable)
        event.clear()
        if waitable.settled():
            event.set()
            return
        self._sleepers += 1
        try:
            if self.reactor.patience() == 0.0:
                self.post(_nothing)  # what was left for us to do is for others now
            if self.in_thread:  # a callback waits: those that come now are called here
                self._run_callbacks()
                left = 0.01 if left is None else min(left, 0.01)
            event.wait(left)
        finally:
            self._sleepers -= 1

    def borrow(self, action: Callable[[], None]) -> bool:
        """Have ``action`` called as a guest would, without waiting for the loop; False where
        the thread runs it, or another guest."""
        if not self._parked or self._guest or self.over:
            return False
        in_main = threading.current_thread() is threading.main_thread()
        return self._visit_safely(lambda noted: action(), in_main)

    def _visit_safely(self, stay: Callable[[Sequence[int]], None], in_main: bool) -> bool:
        try:
            sys._getframe(sys.getrecursionlimit() >> 3)
        except ValueError:
            pass  # so few functions are on the stack that there is room, whatever they called
        else:
            if not self._has_room():
                return False
        return self._visit_from_main(stay) if in_main else self._visit(stay, ())

    def _has_room(self) -> bool:
        """Whether there is, on the caller's stack, for a turn; else the thread makes it."""
        try:
            _descend(_ROOM)
        except RecursionError:
            if self.in_thread:
                raise
            self._need()
            return False
        return True

    def _visit_from_main(self, stay: Callable[[Sequence[int]], None]) -> bool:
        noted: list[int] = []
        handlers: dict[int, Any] = {}
        visiting = True

        def note(number: int, frame: Any) -> None:
            if visiting:
                noted.append(number)
                self.reactor.post(_nothing)
            else:  # what another handler raised has kept this one from being put back
                _signal.signal(number, handlers[number])
                handlers[number](number, frame)

        try:
            for number in _PUT_OFF:
                handler = _signal.getsignal(number)
                if callable(handler):
                    handlers[number] = handler
                    _signal.signal(number, note)
            visited = self._visit(stay, noted)
        finally:
            try:
                for number in handlers:
                    _signal.signal(number, handlers[number])
            finally:
                visiting = False
                if noted:
                    _handle(noted, handlers)
        return visited or bool(noted)

    def _visit(self, stay: Callable[[Sequence[int]], None], noted: Sequence[int]) -> bool:
        """Run the loop in the thread's place; False where another guest does."""
        if not self._visitors.acquire(blocking=False):
            return False
        since = monotonic()
        self._visits += 1
        self._guest = True
        try:
            self._take_over()
            self._runner = get_ident()
            stay(noted)
        except BaseException as error:
            if self.reactor.was_waiting():
                raise
            self.broken(error)  # a bug of ours: the thread sees to what follows
            if not isinstance(error, Exception):
                raise
        finally:
            self._visited = True
            self._guest = False
            self._runner = None
            self._owner.release()
            self._visitors.release()
            if self._sleepers or self.over or self.reactor.patience() == 0.0:
                self._need()
            elif monotonic() - since > PARKED / 2:
                self._unpark.set()
        if self._callbacks and self.in_thread:
            self._run_callbacks()
        return True

    def _stay(self, waitable: Waitable, deadline: float | None, noted: Sequence[int]) -> None:
        """Run the loop until there is no need any more."""
        self.entered(waitable, None if deadline is None else deadline - monotonic())
        run_once, settled = self.reactor.run_once, waitable.settled
        callbacks = self._callbacks if self.in_thread else None
        while not (settled() or noted or self.over or callbacks):
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                break
            run_once(left)
            if self._callbacks:
                self._unpark.set()

    def _take_over(self) -> None:
        if not self._owner.acquire(blocking=False):
            self.reactor.post(_nothing)
            self._owner.acquire()

    # -- the thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self.over:
                self._run_callbacks()
                # Not waited for: the guest that has it may wait for a callback of ours.
                if self._owner.acquire(blocking=False):
                    self._runner = get_ident()
                    try:
                        self.entered(None, None)
                        self._run_loop()
                    finally:
                        self._runner = None
                        self._owner.release()
                self._park()
            with self._owner:
                self._runner = get_ident()
                try:
                    self.entered(None, None)
                finally:
                    self.finish()
                self._closed = True
                self._close_reactor()
        except BaseException as error:
            self.broken(error)
            threading.excepthook(
                threading.ExceptHookArgs((type(error), error, error.__traceback__, None))
            )
        finally:
            self.over = True
            self._runner = None
            self._gone = True  # first, so that no callback is left behind the last
            try:
                self._run_callbacks()
            finally:
                self.finished.set()

    def _close_reactor(self) -> None:
        """Unless somebody is about to post: then he does."""
        if not self._posting:
            self.reactor.close()

    def _run_loop(self) -> None:
        callbacks, run_once = self._callbacks, self.reactor.run_once
        while not (self._guest or callbacks or self.over):
            run_once(None)

    def _park(self) -> None:
        """Leave the loop to guests, as long as they come."""
        self._parked = True
        stays = False  # one guest, for long: it unparks us when it leaves
        while not self.over and (self._guest or (self._visited and not self._needed)):
            if not self._guest and self.reactor.patience() == 0.0:
                break
            self._visited = False
            before, guest = self._visits, self._guest
            unparked = self._unpark.wait(None if stays else PARKED)
            self._unpark.clear()
            stays = not unparked and guest and self._guest and before == self._visits
            self._run_callbacks()
        self._parked = self._needed = self._visited = False

    def _run_callbacks(self) -> None:
        callbacks = self._callbacks
        if not callbacks:
            return
        while callbacks:
            try:
                call_back = callbacks.popleft()
            except IndexError:  # another thread took it: when ours is gone there may be several
                break
            call_back()
        if self._guest:
            self.post(_nothing)  # what it waits for may be there now


_made: dict[int, Flag] = {}  # for Waitables that are about to have one, by their id()


def _event_of(waitable: Waitable) -> Flag:
    """One for all who wait for it: several threads may be the first.  No lock: a signal handler
    may come in between and wait."""
    try:
        event = _made.setdefault(id(waitable), Flag())
        if waitable.event is None:
            waitable.event = event
    finally:
        _made.pop(id(waitable), None)  # whoever comes from now on finds the other
    return waitable.event


def _handle(noted: Sequence[int], handlers: Mapping[int, Any]) -> None:
    """Call the handlers of these signals, each of them, whatever those before it raise."""
    for place, number in enumerate(noted):
        try:
            handlers[number](number, sys._getframe())
        except BaseException:
            _handle(noted[place + 1 :], handlers)
            raise


def _descend(depth: int) -> None:
    if depth:
        _descend(depth - 1)


def _nobody_cares(waitable: Waitable | None, timeout: float | None) -> None:
    """Nothing is to be done before the loop is run."""


def _nothing() -> None:
    """To wake the loop."""
