"""The coordinator's side of the template process: starts it, asks it for workers."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from taskrun import sessions
from taskrun.errors import RunError
from taskrun.reactor import Reactor
from taskrun.wire import FrameReader, header
from taskrun.workers.settings import LEASE, QUIT, SIGNAL, START, UP, Settings, python_command

ON_THEIR_WAY: Final = 8  # workers asked for at a time: each takes descriptors meanwhile
_PATIENCE: Final = 2.0  # seconds to wait for workers before it is woken, in case it was stopped

_IN_ORDER: Final = "exited with status 0"

_living: set[int] = set()  # templates of this process

Message = tuple[Any, ...]
Open = Callable[[int], tuple[Any, list[int]] | None]
Launch = Callable[[int, int], int]


class Nursery:
    """One template process.

    ``opened(worker)`` makes what a worker needs, when its turn has come: what it is told,
    and its descriptors, which are closed here once they are sent; None: it cannot be.
    ``heard`` is called with the template's messages, ``ended`` when it has ended.
    ``launch`` starts a template with such a socket, and without the coordinator's end of it,
    the second; gives its pid.
    """

    def __init__(
        self,
        settings: Settings,
        reactor: Reactor,
        opened: Open,
        heard: Callable[[Message], None],
        ended: Callable[[str], None],
        launch: Launch | None = None,
    ) -> None:
        self._reactor = reactor
        self._opened = opened
        self._heard = heard
        self._ended = ended
        self._wanted: deque[int] = deque()
        self._on_their_way: set[int] = set()
        self._outgoing: deque[tuple[bytes, list[int]]] = deque()
        self._is_up = False
        self._waking = False  # whether it is woken in a while, if workers are still to come
        self._how = ""  # it ended, once that is known
        self.pid: int | None = None
        self._sock, theirs = socket.socketpair()
        try:
            fd = theirs.fileno()
            self.pid = launch(fd, self._sock.fileno()) if launch else launch_fresh(fd)
        except OSError as error:
            self._sock.close()
            raise RunError(f"cannot start a worker process: {error}") from error
        finally:
            theirs.close()
        _living.add(self.pid)
        self._sock.setblocking(False)
        self._reader = FrameReader(self._sock.fileno())
        reactor.add_reader(self._sock.fileno(), self._on_readable)
        self._send((settings,))

    # -- what the engine asks for -----------------------------------------------------

    def start(self, workers: list[int]) -> None:
        """Start these workers, as soon as the template is ready for them."""
        self._wanted.extend(workers)
        self._ask()
        self._wake_later()

    def signal(self, worker: int, number: int, *, whole_session: bool = True) -> None:
        """Signal a worker, or all that is in its session."""
        self._send((SIGNAL, worker, int(number), whole_session))

    def hold(self, until: float) -> None:
        """Have it end by itself then; see ``settings.lease_clock``."""
        self._send((LEASE, until))

    def quit(self, grace: float) -> None:
        """End all workers and all that they started, then the template itself."""
        self._send((QUIT, grace))

    @property
    def busy(self) -> bool:
        """Whether workers were asked for that are not there yet."""
        return bool(self._wanted or self._on_their_way)

    def wanted(self) -> list[int]:
        """The workers that were asked for, and not from the template yet."""
        return list(self._wanted)

    def kill(self) -> None:
        """End the template at once; its workers die with it."""
        if self.pid is not None:
            self._over()

    def abandon(self, deadline: float) -> bool:
        """End a template that is not up yet, if it is not, by ``deadline``.

        It ends what the task file may have started, since it finds its socket closed; what
        the coordinator has made it leaves alone, since it is told so.
        """
        self._wanted.clear()
        if self._is_up or self.pid is None:
            return False
        self.quit(0.0)
        self._sock.shutdown(socket.SHUT_WR)
        while time.monotonic() < deadline and not self._reap(os.WNOHANG):
            time.sleep(0.005)  # nothing else is left to be done
        self.kill()
        return True

    # -- the socket -------------------------------------------------------------------

    def _ask(self) -> None:
        while self._is_up and self._wanted and len(self._on_their_way) < ON_THEIR_WAY:
            worker = self._wanted.popleft()
            opened = self._opened(worker)
            if opened is not None:
                birth, fds = opened
                self._on_their_way.add(worker)
                self._send((START, birth), fds)

    def _wake_later(self) -> None:
        """What was asked for before it was stopped, or while it starts, is waited for, too."""
        if self.busy and not self._waking:
            self._waking = True
            self._reactor.call_at(time.monotonic() + _PATIENCE, self._on_patience_over)

    def _on_patience_over(self) -> None:
        self._waking = False
        self._wake()
        self._wake_later()

    def _wake(self) -> None:
        """Have it go on if somebody has stopped it (SIGSTOP): nobody else starts workers, nor
        ends what they have started."""
        if self.pid is not None:
            sessions.send([self.pid], signal.SIGCONT)

    def _send(self, message: Message, fds: list[int] | None = None) -> None:
        self._wake()
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._outgoing.append((header(len(data)) + data, fds or []))
        if len(self._outgoing) == 1:
            self._write()
            if self._outgoing:
                self._reactor.add_writer(self._sock.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        self._write()
        if not self._outgoing:
            self._reactor.remove_writer(self._sock.fileno())

    def _write(self) -> None:
        while self._outgoing:
            data, fds = self._outgoing[0]
            try:
                sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
            except BlockingIOError:
                return
            except ConnectionError:
                self._forget_outgoing()  # its end is seen where it is read
                return
            _close_all(fds)
            if sent < len(data):
                self._outgoing[0] = (data[sent:], [])
            else:
                self._outgoing.popleft()

    def _forget_outgoing(self) -> None:
        for _, fds in self._outgoing:
            _close_all(fds)
        self._outgoing.clear()

    def _on_readable(self) -> None:
        for frame in self._reader.read():
            self._take(pickle.loads(frame))
        if self._reader.at_end and self.pid is not None:
            self._ended(self._over())  # if it has not ended, it is of no use

    def _take(self, message: Message) -> None:
        if message[0] == UP:
            self._is_up = True
        else:
            self._on_their_way.discard(message[1])
        self._heard(message)
        self._ask()

    def _over(self) -> str:
        """Kill it, if it has not ended, and let go of it; gives how it ended."""
        self._reactor.remove_reader(self._sock.fileno())
        if self._outgoing:
            self._reactor.remove_writer(self._sock.fileno())
            self._forget_outgoing()
        self._sock.close()
        self._is_up = False
        assert self.pid is not None
        if not self._reap(os.WNOHANG):
            sessions.send([self.pid], signal.SIGKILL)
            self._reap(0)
        _living.discard(self.pid)
        self.pid = None
        if self._how != _IN_ORDER:
            sessions.end_adopted(_living)  # what it can end no more
        return self._how

    def _reap(self, options: int) -> bool:
        """Take its exit status, if it has ended.  From then on its number may be a stranger's."""
        if not self._how:
            assert self.pid is not None
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:
                # This process ignores SIGCHLD, or somebody else in it waits for all children.
                self._how = "ended"
            else:
                self._how = how_it_ended(os.waitstatus_to_exitcode(status)) if pid else ""
        return bool(self._how)


def how_it_ended(status: int | str) -> str:
    """An exit status in words: ``killed by SIGKILL``, ``exited with status 3``."""
    if isinstance(status, str):
        return status
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def launch_fresh(fd: int, *, writes: bool = False) -> int:
    """Start a template that finds its socket as descriptor 0; gives its pid.

    ``writes``: it has our stdout and stderr, and its workers too; else what it writes is lost.
    """
    command = python_command("from taskrun.workers.template import run; run(0)")
    if not command[0]:
        raise OSError("this Python does not know where its interpreter is (sys.executable)")
    actions: list[Any] = [(os.POSIX_SPAWN_DUP2, fd, 0)]
    if writes:
        actions += map(_as_it_is, (1, 2))
    elif os.environ.get("TASKRUN_DEBUG"):
        actions.append((os.POSIX_SPAWN_DUP2, 2, 1))
    else:
        actions.append((os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0))
        actions.append((os.POSIX_SPAWN_DUP2, 1, 2))
    return os.posix_spawn(command[0], command, os.environ, file_actions=actions)


def _as_it_is(fd: int) -> tuple[Any, ...]:
    """What makes a child have this descriptor, even if it is closed or not to be inherited."""
    try:
        os.fstat(fd)
    except OSError:
        return os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0
    return os.POSIX_SPAWN_DUP2, fd, fd


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
