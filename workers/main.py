"""A worker: reads calls from its call Pipe, executes them, reports how they ended.

The main thread reads many calls at once and executes one after the other.  The control
thread (``control``) speaks on the control Pipe meanwhile, and may take back calls that
the main thread has not begun.  What both touch: the queue, whose ends are atomic to pop;
the call Pipe, under ``reading``; the outbox, which has a lock of its own.

When the coordinator is gone, so is the worker, with all that its calls have started.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, Final, NoReturn

from taskrun import context, places, sessions
from taskrun.ledger import Ledger
from taskrun.messages import (
    CALL,
    DELIVER,
    FORGET,
    GAVE_BACK,
    NESTED,
    QUIT,
    READY,
    RETIRE,
    TASK,
)
from taskrun.wire import READ_SIZE, Decoder
from taskrun.workers import leaving
from taskrun.workers.capture import Capture, Uncaptured, expect_pipes
from taskrun.workers.control import Control, tell_why
from taskrun.workers.execute import Executor, Running
from taskrun.workers.folder import Folder
from taskrun.workers.items import Flusher
from taskrun.workers.outbox import Outbox
from taskrun.workers.recipes import Home
from taskrun.workers.scope import WorkerContext, state_home
from taskrun.workers.settings import (
    FINISH_SECONDS,
    Birth,
    Preloaded,
    Settings,
    apply,
    place_of,
    preload,
)
from taskrun.workers.threads import follow_calls

ALL: Final = 1 << 60  # more calls than there are
_POLLED: Final = 1_000_000.0  # seconds; poll() takes 24 days at most
_FAILED: Final = 70  # exit status of a worker that cannot go on, whatever its calls did


def run(
    settings: Settings, birth: Birth, fds: list[int], parent: int, preloaded: Preloaded
) -> NoReturn:
    """Be a worker, in a process made for it; never returns."""
    status = _FAILED
    try:
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        sessions.die_with_parent(parent)
        _close_stdin()
        _make(settings, birth, fds, preloaded).run()
        status = 0
    except ConnectionError:
        sessions.kill_others()  # the coordinator is gone
    except SystemExit as error:  # of a signal handler that is not ours, between calls
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        tell_why(error)
    finally:
        os._exit(status)


def _make(settings: Settings, birth: Birth, fds: list[int], preloaded: Preloaded) -> Any:
    """The worker that its lane asks for."""
    if birth.lane == "process":
        return Worker(settings, birth, fds, preloaded)
    from taskrun.workers.lanes import worker_class  # only workers of other lanes pay for it

    return worker_class(birth.lane)(settings, birth, fds, preloaded)


def spawned(fds: list[int]) -> NoReturn:
    """Be a worker in a fresh interpreter; the last of ``fds`` says what for."""
    with open(fds.pop(), "rb") as told:
        settings, birth, parent = pickle.load(told)
    for fd in fds:
        os.set_inheritable(fd, False)
    apply(settings)
    if settings.captured:
        expect_pipes()
    run(settings, birth, fds, parent, preload(settings))


class Worker:
    """One worker process; the executor's way to the coordinator."""

    def __init__(
        self, settings: Settings, birth: Birth, fds: list[int], preloaded: Preloaded
    ) -> None:
        self._settings, self._birth = settings, birth
        places.settle(place_of(settings, birth.worker))
        self._fd, control, stdout, stderr, ledger_fd = fds
        self._ledger = Ledger(ledger_fd)
        os.close(ledger_fd)
        self.queue: deque[tuple[Any, ...]] = deque()
        self.reading = threading.Lock()
        self.outbox = Outbox(self._ledger, self._fd)
        self.tell, self.flush = self.outbox.tell, self.outbox.flush
        self.tell_item = self.outbox.tell_item
        self._flusher = Flusher()
        self._about_to_flush = False
        self._capture: Capture
        if settings.captured:
            self._capture = Capture(self._ledger, birth.token, (stdout, stderr))
        else:
            self._capture = Uncaptured((stdout, stderr))
        self._home = home = Home(settings.module, preloaded)
        variables = frozenset(settings.environment)
        self.executor = Executor(
            self,
            home,
            self._ledger,
            self._capture,
            thread_variables=variables,
            later=self._flusher.later,
            folder=Folder() if settings.pool is None else None,
        )
        self._context = WorkerContext(
            self.executor,
            self,
            worker=f"w{birth.worker}",
            node=settings.node,
            set_by_user=settings.set_by_user,
        )
        self._control = Control(self, control)
        self._decoder = Decoder()
        self._delivered: deque[tuple[Any, ...]] = deque()
        self._nested: deque[tuple[Any, ...]] = deque()
        self._quitting = self._waits = False
        self._state = state_home(settings, self.executor)
        self._most_memory = None if settings.pool is None else settings.pool.maxrss
        self.waiting = 0  # attempts that wait; the main thread then reads the Pipe itself

    # -- the main flow ----------------------------------------------------------------

    def run(self) -> None:
        """Work until told to quit."""
        signal.signal(signal.SIGINT, self.executor.on_interrupt)
        os.register_at_fork(after_in_child=self._leave_behind)
        context.activate(self._context)
        if self._settings.pool is None:
            follow_calls(self.executor)
        context.state_home = self._state
        context.state_address = self._settings.state
        if self._settings.pool is not None:
            from taskrun.pooling import remote

            remote.begin(self._settings.pool, self._birth.worker, self._settings.coordinator)
            self._home.check = remote.check
        self._control.start()
        self.tell((READY, os.getpid()))
        queue, outbox, execute = self.queue, self.outbox, self.executor.execute
        while not self._quitting or queue:
            if not queue:
                outbox.flush()
                self._await_calls()
                continue
            try:
                record = queue.popleft()
            except IndexError:  # given back just now
                continue
            execute(record)
            if self._most_memory is not None:
                self._retire_if_large(self._most_memory)
            if outbox.is_due:
                outbox.flush()
        self._finish()

    def _retire_if_large(self, most: int) -> None:
        from taskrun.pooling.memory import shown, used

        size = used()
        if size > most:
            self._most_memory = None  # it is told once
            self.tell((RETIRE, f"it uses {shown(size)} of memory"))
            self.flush()

    def _finish(self) -> None:
        """Finish what per_worker() made, and what multiprocessing did, within a time."""
        alarm = threading.Timer(FINISH_SECONDS, os._exit, [0])
        alarm.daemon = True
        with suppress(RuntimeError):  # no thread is to be had: the coordinator sees to it
            alarm.start()
        self.executor.close()
        if self._settings.pool is not None:
            from taskrun.pooling import remote

            remote.end(self._settings.pool, waits=self._waits)
        else:
            leaving.clean_up()
        places.leave()
        self._capture.flush()
        self.flush()

    # -- the call Pipe ----------------------------------------------------------------

    def _await_calls(self) -> None:
        self._ledger.end()
        with self.reading:
            # The control thread may have read some.
            if not (self.queue or self._delivered or self._nested or self._quitting):
                self._read()
                self.outbox.awoke()
        if self._delivered or self._nested:
            self._attend()

    def read_what_is_there(self) -> None:
        """In the control thread: read calls that wait in the Pipe while one is executed."""
        if not self.reading.acquire(blocking=False):
            return  # the main thread is about to read: nothing is executed
        try:
            while not self.waiting and _is_readable(self._fd):
                self._read()
        finally:
            self.reading.release()

    def _read(self) -> None:
        """One read; ``reading`` is held.  What runs code of tasks is left to the main thread."""
        data = os.read(self._fd, READ_SIZE)
        if not data:
            raise ConnectionResetError("the coordinator closed the call Pipe")
        for frame in self._decoder.feed(data):
            for record in pickle.loads(frame):
                kind = record[0]
                if kind == CALL:
                    self.queue.append(record)
                elif kind == TASK:
                    self.executor.learn(record)
                elif kind == FORGET:
                    self.executor.forget(record[1])
                elif kind == DELIVER:
                    self._delivered.append(record)
                elif kind == NESTED:
                    self._nested.append(record)
                elif kind == QUIT:
                    self._quitting, self._waits = True, record[1]
        for (call, attempt), reason in list(self.executor.early.items()):
            self.refuse_queued(call, attempt, reason)  # the interrupt overtook the call

    def give_back(self, count: int) -> None:
        """Return up to ``count`` calls that have not begun: the last of the queue, whole ones,
        and then the last items of the bunch that is executed."""
        calls: list[tuple[int, int]] = []
        while count > 0 and self.queue:
            try:
                record = self.queue.pop()
            except IndexError:
                break  # it was begun just now
            calls.append(record[1:3])
            count -= len(record[5]) if type(record[5]) is list else 1
        calls.reverse()  # in the order in which they came
        self.tell((GAVE_BACK, calls, self.executor.cut(count)))

    def give_all_back(self) -> None:
        """Return all calls that have not begun."""
        if self.queue or self.executor.has_more:
            self.give_back(ALL)

    def refuse_queued(self, call: int, attempt: int, reason: str) -> bool:
        """Report a call that has not begun as cancelled; False where it is not queued."""
        for record in list(self.queue):
            if record[1:3] == (call, attempt):
                try:
                    self.queue.remove(record)
                except ValueError:
                    return False  # the other thread took it
                self.executor.refuse(record, reason)
                self.flush()
                return True
        return False

    def _attend(self) -> None:
        """Deliver outcomes; execute nested calls, if something waits for them."""
        while self._delivered:
            self._context.deliver(*self._delivered.popleft()[1:])
        while self._nested:
            record = self._nested.popleft()
            if self.waiting:
                self.executor.execute_nested(record)
            else:
                self.tell((GAVE_BACK, [record[1:3]], None))  # the wait was over when it came

    # -- waiting attempts -------------------------------------------------------------

    def flush_soon(self) -> None:
        """See ``scope.Line``."""
        if self.outbox.is_due:
            self.flush()
        elif not self._about_to_flush:
            self._about_to_flush = True
            self._flusher.later(self._flush_late)

    def _flush_late(self) -> None:
        self._about_to_flush = False
        self.flush()

    def _wait_begins(self) -> None:
        with self.reading:  # from here on the control thread reads nothing
            self.waiting += 1
        self.give_all_back()

    def _wait_ends(self) -> None:
        with self.reading:
            self.waiting -= 1

    def converse(
        self,
        running: Running,
        wait: tuple[Any, ...],
        satisfied: Callable[[], bool],
        deadline: float | None,
        outside: int | None = None,
    ) -> bool:
        """See ``scope.Line``."""
        self._wait_begins()
        try:
            self._attend()
            self.tell(wait)
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            if outside is not None:
                poll.register(outside, select.POLLIN)
            while not satisfied():
                self.flush()
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    return False
                self._pause(poll, running, left)
                self._take_what_came()
            return True
        finally:
            self._wait_ends()

    def _pause(self, poll: select.poll, running: Running, seconds: float | None) -> None:
        running.enter_user()  # here, and only here, may a waiting attempt be interrupted
        poll.poll(None if seconds is None else min(seconds, _POLLED) * 1000)
        running.user = False

    def _take_what_came(self) -> None:
        while _is_readable(self._fd):
            with self.reading:
                self._read()
            self._attend()
        self.give_all_back()  # what was sent before the coordinator knew of the wait

    def listen(self, loop: Any, heard: Callable[[], object]) -> None:
        """See ``scope.Line``."""

        def readable() -> None:
            self._take_what_came()
            heard()
            self.flush()

        self._wait_begins()
        self._attend()
        loop.add_reader(self._fd, readable)

    def stop_listening(self, loop: Any) -> None:
        """See ``scope.Line``."""
        loop.remove_reader(self._fd)
        self._wait_ends()

    # -- ends -------------------------------------------------------------------------

    def _leave_behind(self) -> None:
        """In a child that a task forked: nothing of the worker's is left in it."""
        if self.executor.forked:
            return  # a child of that child
        self.executor.leave_behind()
        os.close(self._fd)
        self._control.close()
        self._capture.close()
        try:
            self._ledger.close()
        except BufferError:
            pass  # the control thread, which is not in this child, was sending from it


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _close_stdin() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
