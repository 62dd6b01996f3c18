"""The template process: imports the task file once, then forks every worker from itself.

The standard library's forkserver neither takes over ``sys.path`` nor survives an import
that fails, and does not say how its children ended.  This one is the parent of all workers
and, on Linux, of every process that they leave behind:

- the coordinator asks for workers over a socket, with their descriptors attached;
- a worker's end is told with its exit status, after what is left of its session was killed;
- when the coordinator is gone, so are all of them.

It stays single-threaded, since forking a process that has threads is unsafe.  Where the task
file started some while it was imported, or where the start method is ``spawn``, workers are
fresh interpreters instead.
"""

from __future__ import annotations

import gc
import io
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from taskrun import addresses, places, sessions
from taskrun.ledger import shared_file
from taskrun.wire import Decoder, send_frame
from taskrun.workers import leaving, main
from taskrun.workers.capture import expect_pipes
from taskrun.workers.settings import (
    EXITED,
    FORK,
    FORKSERVER,
    LEASE,
    QUIT,
    SIGNAL,
    START,
    STARTED,
    UP,
    Birth,
    Preloaded,
    Settings,
    apply,
    lease_clock,
    preload,
    python_command,
)

FDS = 5  # of a worker: call Pipe, control Pipe, stdout, stderr, ledger
GREEN = "green"  # the lane whose workers are patched before they import anything
_LOOK = 1.0  # seconds between two looks at the clock, where there is a lease
_LOOKS = 3  # without finding anybody, until nobody is believed to be left
_PATIENCE = 30.0  # seconds after which what cannot even be killed is left alone


def serve(sock: socket.socket) -> NoReturn:
    """Be the template of the coordinator at the other end of ``sock``; never returns."""
    status = 1
    try:
        # Held to the end, and its sockets with it: nobody is to be warned that they are open.
        made = Template(sock)
        made.run()
        status = 0
    except BaseException:
        import traceback  # seen where TASKRUN_DEBUG is set

        traceback.print_exc()
    finally:
        os._exit(status)


class Template:
    """One template; see the module's own text."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = Decoder()
        self._requests: deque[tuple[Any, ...]] = deque()
        self._fds: deque[int] = deque()
        self._pids: dict[int, int] = {}  # worker -> pid
        self._workers: dict[int, int] = {}  # pid -> worker
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._preloaded = Preloaded(None)
        self._grace: float | None = None  # set: asked to quit
        self._until: float | None = None  # the end of its lease, if it has one
        self._parent_fd: int | None = None
        self._orphaned = False

    # -- the main flow ----------------------------------------------------------------

    def run(self) -> None:
        """Import the task file, serve requests until told to quit, end all workers."""
        _leave_the_terminal()
        sessions.adopt_orphans()
        while not self._requests:  # it may come in several pieces
            if not self._receive():
                return
        self._settings: Settings = self._requests.popleft()[0]
        apply(self._settings)
        self._preload()
        self._listen_to_signals()
        self._watch()
        self._tell((UP, self._preloaded.failure))
        while self._grace is None:
            self._turn(self._patience())
        self._end(self._grace)
        if self._orphaned:
            self._tidy_up()

    def _preload(self) -> None:
        if self._settings.start_method != FORKSERVER:
            return
        if self._settings.captured:
            expect_pipes()
        watch = _Watch(self._sock, self._give_up)
        self._preloaded = preload(self._settings)
        watch.stop()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()  # or every worker would print it
        # What exists now is never garbage: no worker need look at it, and so copy it.
        gc.collect()
        gc.freeze()

    def _give_up(self) -> None:
        self._end(0.0)
        while self._receive():
            pass  # the last of what the coordinator had to say
        if not any(request[0] == QUIT for request in self._requests):
            self._tidy_up()

    def _listen_to_signals(self) -> None:
        # After the import, which may have had ideas of its own.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, _noted)
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        self._wake_writer.send(bytes([signal.SIGCHLD]))  # what ended before we listened

    def _watch(self) -> None:
        self._poll = poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake_reader, select.POLLIN)
        # Another process may hold the coordinator's end of the socket open (a child that it
        # forked): its own end is seen here.
        coordinator = self._settings.coordinator
        self._parent_fd = _watch_process(coordinator)
        if self._parent_fd is not None:
            poll.register(self._parent_fd, select.POLLIN)
        elif os.getppid() != coordinator:
            self._coordinator_is_gone()  # since before we looked

    def _turn(self, timeout: float | None) -> None:
        ready = [fd for fd, _ in self._poll.poll(None if timeout is None else timeout * 1000)]
        if self._wake_reader.fileno() in ready:
            self._on_signals()
        if self._sock.fileno() in ready and not self._receive():
            self._coordinator_is_gone()
        if self._parent_fd in ready:
            self._coordinator_is_gone()
        while self._requests:
            self._serve_one(self._requests.popleft())

    def _patience(self) -> float | None:
        """Seconds to wait for something to happen.  At the end of the lease all ends, even if
        who holds it is stopped."""
        if self._until is None:
            return None
        left = self._until - lease_clock()
        if left <= 0:
            self._grace = 0.0
        return min(max(left, 0.0), _LOOK)  # to sleep with the machine is not to wait

    def _coordinator_is_gone(self) -> None:
        for fd in (self._sock.fileno(), self._parent_fd):
            if fd is not None:
                try:
                    self._poll.unregister(fd)
                except KeyError:
                    pass  # it was seen by the other descriptor
        self._grace = 0.0
        self._orphaned = True

    def _tidy_up(self) -> None:
        """Do what the coordinator cannot any more: remove its large data, and its socket."""
        if self._parent_fd is None:
            self._parent_fd = _watch_process(self._settings.coordinator)
        if self._parent_fd is not None:  # it may still be on its way out
            select.select([self._parent_fd], [], [], _PATIENCE)
        places.sweep_around(self._settings.blobs)
        try:
            addresses.remove_of(self._settings.coordinator)
        except OSError:
            pass  # there is no such folder

    # -- messages ---------------------------------------------------------------------

    def _receive(self) -> bool:
        """Read what there is; False when the coordinator is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, 65536, 64 * FDS)
        except ConnectionError:
            return False
        self._fds.extend(fds)
        for fd in fds:
            os.set_inheritable(fd, False)
        for frame in self._decoder.feed(data):
            self._requests.append(pickle.loads(frame))
        return bool(data)

    def _tell(self, message: tuple[Any, ...]) -> None:
        try:
            send_frame(self._sock.fileno(), pickle.dumps(message))
        except ConnectionError:
            if self._grace is None:  # else it was told to quit, and nobody waits for that
                self._coordinator_is_gone()

    def _serve_one(self, request: tuple[Any, ...]) -> None:
        kind = request[0]
        if kind == START:
            self._start(request[1], [self._fds.popleft() for _ in range(FDS)])
        elif kind == SIGNAL:
            self._signal(*request[1:])
        elif kind == LEASE:
            self._until = request[1]
        elif kind == QUIT:
            self._grace = request[1]
            self._orphaned = False  # it hung up afterwards

    # -- workers ----------------------------------------------------------------------

    def _start(self, birth: Birth, fds: list[int]) -> None:
        may_fork = self._settings.start_method in (FORK, FORKSERVER)
        forks = may_fork and birth.lane != GREEN and len(sys._current_frames()) == 1
        try:
            pid = self._fork(birth, fds) if forks else self._spawn(birth, fds)
        except OSError as error:
            self._tell((EXITED, birth.worker, f"not started: {error.strerror}"))
            return
        finally:
            for fd in fds:
                os.close(fd)
        self._pids[birth.worker] = pid
        self._workers[pid] = birth.worker
        self._tell((STARTED, birth.worker, pid))

    def _fork(self, birth: Birth, fds: list[int]) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._let_go()
            main.run(self._settings, birth, fds, parent, self._preloaded)
        return pid

    def _let_go(self) -> None:
        """In a new worker: nothing of the template's is left open."""
        signal.set_wakeup_fd(-1)
        for owned in (self._sock, self._wake_reader, self._wake_writer):
            owned.close()
        for fd in (self._parent_fd, *self._fds):
            if fd is not None:
                os.close(fd)

    def _spawn(self, birth: Birth, fds: list[int]) -> int:
        told = shared_file(0)
        os.write(told, pickle.dumps((self._settings, birth, os.getpid())))
        os.lseek(told, 0, os.SEEK_SET)
        inherited = [*fds, told]
        try:
            for fd in inherited:
                os.set_inheritable(fd, True)
            numbers = ",".join(map(str, inherited))
            module = "green" if birth.lane == GREEN else "main"
            command = python_command(f"from taskrun.workers.{module} import spawned; {_SPAWNED}")
            return os.posix_spawn(
                command[0],
                [*command, numbers],
                os.environ,
                setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGCHLD],
            )
        finally:
            os.close(told)

    def _signal(self, worker: int, number: int, whole_session: bool) -> None:
        pid = self._pids.get(worker)
        if pid is None:
            return  # it has ended
        if whole_session:
            sessions.signal_session(pid, number)
        sessions.send([pid], number)  # it may not have its session yet

    # -- ends -------------------------------------------------------------------------

    def _on_signals(self) -> None:
        numbers = self._wake_reader.recv(4096)
        if signal.SIGTERM in numbers and self._grace is None:
            self._grace = 1.0
        self._reap()

    def _reap(self) -> bool:
        """Take the ends of all that have ended; False when no child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            worker = self._workers.pop(pid, None)
            if worker is None:
                continue  # an orphan that we adopted
            del self._pids[worker]
            sessions.signal_session(pid, signal.SIGKILL)
            self._tell((EXITED, worker, os.waitstatus_to_exitcode(status)))

    def _end(self, grace: float) -> None:
        """End all workers and all that they started: TERM, a while, KILL."""
        leaving.clean_up()  # what the import has made; nothing is forked any more
        leaving.let_go_of_trackers()
        if grace > 0:
            self._signal_all(signal.SIGTERM)
            self._await_ends(time.monotonic() + grace)
        began, in_vain = time.monotonic(), 0
        while self._reap() and (passed := time.monotonic() - began) < _PATIENCE:
            # What dies leaves its children to us: again, until none is left.  Nothing to be found
            # once may be one that was looked at just before its parent died.
            found = self._signal_all(signal.SIGKILL, trackers=passed > sessions.CLEANING)
            in_vain = 0 if found else in_vain + 1
            if in_vain == _LOOKS:
                break
            self._await_ends(time.monotonic() + 0.05, once=True)

    def _await_ends(self, deadline: float, *, once: bool = False) -> None:
        while self._reap() and (left := deadline - time.monotonic()) > 0:
            if select.select([self._wake_reader], [], [], left)[0]:
                self._wake_reader.recv(4096)
                if once:
                    return

    def _signal_all(self, number: int, *, trackers: bool = False) -> int:
        """Signal every process below this one, resource trackers only if so told; gives how
        many are left."""
        if not sessions.LINUX:  # this system does not tell
            for pid in self._workers:
                sessions.signal_session(pid, number)
            return sessions.send(self._workers, number)
        below = set(sessions.below())
        spared = set() if trackers else set(filter(sessions.is_tracker, below))
        return len(spared) + sessions.send(below - spared, number)


_SPAWNED = "spawned([int(fd) for fd in sys.argv[-1].split(',')])"


class _Watch:
    """Ends everything here if the coordinator ends while the task file is being imported.

    A thread, since the import has the main one; it is gone again before anything is forked.
    """

    def __init__(self, sock: socket.socket, end: Callable[[], None]) -> None:
        self._sock = sock
        self._end = end
        self._reader, self._writer = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._sock, getattr(select, "POLLRDHUP", 0))  # or POLLHUP, unasked
        poll.register(self._reader, select.POLLIN)
        if any(fd == self._sock.fileno() for fd, _ in poll.poll()):
            self._end()
            os._exit(1)

    def stop(self) -> None:
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)


def _noted(number: int, frame: Any) -> None:
    """The wake-up descriptor tells the loop."""


def _leave_the_terminal() -> None:
    """Neither Ctrl-C nor the end of the terminal reaches this process or its workers."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or the import would know no exit status
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    # Workers inherit these very objects, and what the task file may keep of them.  Lines are
    # written whole, also where PYTHONUNBUFFERED is set.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)
            # A stream that was made for a file fails where its descriptor is now a pipe: in a
            # worker that has a pool of its own, or where a daemon has closed it.
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")


def _watch_process(pid: int) -> int | None:
    """A descriptor that is readable when process ``pid``, our parent, has ended (Linux)."""
    if not hasattr(os, "pidfd_open") or os.getppid() != pid:
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None  # an old kernel, or a sandbox


def run(fd: int) -> NoReturn:
    """Serve on a copy of descriptor ``fd``, and free that number."""
    sock = socket.socket(fileno=os.dup(fd))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, fd, inheritable=fd <= 2)
    os.close(null)
    serve(sock)


if __name__ == "__main__":
    run(int(sys.argv[1]))
