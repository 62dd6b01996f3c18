"""The control thread: what the coordinator can ask of a worker while a call runs."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from taskrun import sessions
from taskrun.messages import BEGAN, INTERRUPT, PING, PONG, REPORT, STACK, STACK_IS
from taskrun.wire import READ_SIZE, Decoder, send_frame
from taskrun.workers import native

if TYPE_CHECKING:
    from collections import deque

    from taskrun.workers.execute import Executor, Running
    from taskrun.workers.outbox import Outbox

TERM_TO_KILL: Final = 0.5  # seconds that an interrupted call's subprocesses have
REMIND_SECONDS: Final = 0.05  # between two signals for one interrupt
REMINDERS: Final = 20
_GONE: Final = 71  # exit status of a worker whose coordinator is gone


class Served(Protocol):
    """The worker, as far as its control thread is concerned."""

    queue: deque[tuple[Any, ...]]
    executor: Executor
    outbox: Outbox

    def read_what_is_there(self) -> None:
        """Read calls that wait in the call Pipe while one is executed."""

    def give_back(self, count: int) -> None:
        """Return up to ``count`` calls that have not begun: the last of the queue."""

    def refuse_queued(self, call: int, attempt: int, reason: str) -> bool:
        """Report a call that has not begun as cancelled; False where it is not queued."""


class ControlThread:
    """Reads the control Pipe in a real thread, also where ``threading`` is gevent's; see
    ``messages`` for what comes on it, and the lanes for what is done then."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._handlers: dict[str, Callable[..., None]] = {
            REPORT: self._report,
            INTERRUPT: self._interrupt,
            PING: self._ping,
            STACK: self._stack,
        }

    def start(self) -> None:
        """Begin to serve.  Raises RuntimeError where no thread is to be had."""
        native.start_thread(self._run)

    def close(self) -> None:
        """In a forked child: the thread is not there, the Pipe is."""
        os.close(self._fd)

    def _run(self) -> None:
        """Serve until the coordinator is gone; the worker then ends as well."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # interrupts are the main's
        try:
            decoder = Decoder()
            while data := os.read(self._fd, READ_SIZE):
                for frame in decoder.feed(data):
                    for record in pickle.loads(frame):
                        self._handlers[record[0]](*record[1:])
        except ConnectionError:
            pass  # as good as the end of the Pipe
        except BaseException as error:
            tell_why(error)
        sessions.kill_others()
        os._exit(_GONE)

    def _answer(self, record: tuple[Any, ...]) -> None:
        send_frame(self._fd, pickle.dumps([record], pickle.HIGHEST_PROTOCOL))

    # -- what is asked ----------------------------------------------------------------

    def _report(self, count: int | None) -> None:
        """Say what runs; give back up to ``count`` calls that have not begun."""
        raise NotImplementedError

    def _interrupt(self, call: int, attempt: int, reason: str) -> None:
        """End one call."""
        raise NotImplementedError

    def _ping(self, token: object) -> None:
        """Say that the worker is there."""
        raise NotImplementedError

    def _stack(self, token: object, call: int | None) -> None:
        """Say where in its code a call is, or the main thread."""
        raise NotImplementedError


class Control(ControlThread):
    """That of a worker that executes one call at a time."""

    def __init__(self, worker: Served, fd: int) -> None:
        super().__init__(fd)
        self._worker = worker
        self._main = threading.main_thread().ident

    def _report(self, count: int | None) -> None:
        worker = self._worker
        worker.read_what_is_there()
        with worker.outbox.lock:
            self._say_began(worker.executor.running)
            if count is not None:
                worker.give_back(count)
            worker.outbox.flush()

    def _say_began(self, running: Running | None) -> None:
        # With the outbox's lock held: the end of an attempt is told after ``done`` is set,
        # so that this cannot come behind it.
        if running is not None and not running.told and not running.done:
            running.told = True
            self._worker.outbox.tell((BEGAN, running.call, running.attempt, running.began, None))

    def _interrupt(self, call: int, attempt: int, reason: str) -> None:
        worker = self._worker
        worker.read_what_is_there()
        if worker.refuse_queued(call, attempt, reason):
            return
        # Found before the attempt is looked at once more: nothing that a later call starts
        # is among them.
        others = sessions.others()
        running = worker.executor.interrupt(call, attempt, reason)
        if running is None:
            worker.refuse_queued(call, attempt, reason)  # it may have come just now
        if running is None or running is not worker.executor.running:
            return  # it is over, or waits for a nested call and sees to it afterwards
        assert self._main is not None
        signal.pthread_kill(self._main, signal.SIGINT)
        self._remind(running)
        self._end_subprocesses(others)

    def _remind(self, running: Running, times: int = REMINDERS) -> None:
        """Signal again until the attempt knows: a signal that comes just before a system call
        does not end that, and its handler would run only afterwards."""

        def remind() -> None:
            over = running.done or running is not self._worker.executor.running
            if not (over or running.raised):
                assert self._main is not None
                signal.pthread_kill(self._main, signal.SIGINT)
                self._remind(running, times - 1)

        if times:
            _start_timer(REMIND_SECONDS, remind)

    def _end_subprocesses(self, others: list[int]) -> None:
        shell = sys.modules.get("taskrun.shell")
        if shell is not None:
            shell.kill_groups()
        if sessions.send(others, signal.SIGTERM):
            _start_timer(TERM_TO_KILL, _kill_survivors, set(others))

    def _ping(self, token: object) -> None:
        self._answer((PONG, token))

    def _stack(self, token: object, call: int | None) -> None:
        assert self._main is not None
        self._answer((STACK_IS, token, _stack_of(self._main)))


def tell_why(error: BaseException) -> None:
    """Say what ends this worker: what this machine, or a call, denies it, or a bug of ours."""
    if isinstance(error, OSError) and error.errno == errno.EBADF:
        print("a call closed file descriptors that are its worker's own", file=sys.stderr)
    elif isinstance(error, RuntimeError) and "start new thread" in str(error):
        print("no thread can be started: there are too many, or no memory", file=sys.stderr)
    else:
        sys.excepthook(type(error), error, error.__traceback__)


def _start_timer(seconds: float, action: Callable[..., None], *args: Any) -> None:
    timer = threading.Timer(seconds, action, args)
    timer.daemon = True
    timer.start()


def _kill_survivors(pids: set[int]) -> None:
    sessions.send(pids.intersection(sessions.others()), signal.SIGKILL)


def _stack_of(thread: int) -> str:
    """The stack of a thread as text, without the frames that are ours."""
    import traceback

    ours = os.path.dirname(os.path.abspath(__file__)), os.path.dirname(sessions.__file__)
    stack = traceback.extract_stack(sys._current_frames()[thread])
    frames = [frame for frame in stack if not frame.filename.startswith((*ours, "<string>"))]
    return "".join(traceback.format_list(frames))
