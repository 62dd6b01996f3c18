"""Listening sockets: taking connections in, and doing without when there are too many.

With no descriptor left, accept() fails while its socket stays readable: a loop that tried
again at once would do nothing else.  So the listener gives up the descriptor it keeps in
reserve, and when that is used up it pauses.  Those who connect meanwhile wait in the
system's queue, which is as long as the system lets it be.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any

from taskrun.reactor import Reactor

Address = Any  # (host, port), or a path; "\0name" is an abstract one

BACKLOG = 4096  # clipped by the system
_AT_ONCE = 64  # connections taken in one turn of the loop
_PAUSE = 0.1  # seconds
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def _new_path() -> str:
    import tempfile
    from multiprocessing.util import get_temp_dir

    return tempfile.mktemp(prefix="listener-", dir=get_temp_dir())


def bound(address: Address) -> socket.socket:
    """A listening socket; None as the address is a new path in a folder of our own."""
    address = _new_path() if address is None else address
    if isinstance(address, tuple):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        if "%" in address[0]:
            address = _scoped(*address[:2])
    else:
        family = socket.AF_UNIX
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setblocking(False)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError:
        found.close()
        raise
    return found


def _scoped(host: str, port: int) -> Address:
    """An address of one network only, with that network's number.  Raises OSError."""
    return socket.getaddrinfo(host, port, socket.AF_INET6, socket.SOCK_STREAM)[0][4]


def _with_network(address: Address) -> Address:
    """What others write to reach it: the system leaves out the network's name."""
    if isinstance(address, tuple) and address[3:] not in ((), (0,)):
        return (f"{address[0]}%{socket.if_indextoname(address[3])}", *address[1:])
    return address


class Listener:
    """A bound socket; once started, every connection goes to ``on_connection``.

    ``address`` may also be a socket that listens already.
    ``has_room`` is asked before each; where it says no, :meth:`resume` goes on.
    """

    def __init__(self, address: Address) -> None:
        self._socket = address if isinstance(address, socket.socket) else bound(address)
        self.address: Address = _with_network(self._socket.getsockname())
        self._owner = os.getpid()
        self._reactor: Reactor | None = None
        self._on_connection: Callable[[socket.socket], object] = socket.socket.close
        self._has_room: Callable[[], bool] = bool
        self._reserve: int | None = None
        self._paused = True

    def start(
        self,
        reactor: Reactor,
        on_connection: Callable[[socket.socket], object],
        has_room: Callable[[], bool],
    ) -> None:
        self._reactor = reactor
        self._on_connection = on_connection
        self._has_room = has_room
        self.resume()

    def resume(self) -> None:
        """Take connections again."""
        if self._reactor is None or not self._paused or self._socket.fileno() < 0:
            return
        self._paused = False
        if self._reserve is None:
            self._reserve = _spare()
        self._reactor.add_reader(self._socket.fileno(), self._on_readable)

    def pause(self, seconds: float = _PAUSE) -> None:
        """Take none for a while."""
        if self._reactor is not None and not self._paused:
            self._paused = True
            self._reactor.remove_reader(self._socket.fileno())
            self._reactor.call_at(monotonic() + seconds, self.resume)

    def _on_readable(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._has_room():
                self.pause()
                return
            try:
                connection, _ = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED and not self._use_reserve():
                    self.pause()
                    return
                continue  # ECONNABORTED and the like: that client is gone, not the others
            self._on_connection(connection)

    def _use_reserve(self) -> bool:
        reserve, self._reserve = self._reserve, None
        if reserve is not None:
            os.close(reserve)
        return reserve is not None

    def close(self) -> None:
        """Listen no more; the path of a Unix socket is removed."""
        if self._reactor is not None and not self._paused:
            self._reactor.remove_reader(self._socket.fileno())
        self._paused = True
        self._use_reserve()
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        if isinstance(self.address, str) and self.address and os.getpid() == self._owner:
            try:
                os.unlink(self.address)
            except FileNotFoundError:
                pass  # somebody tidied up

    def forget(self) -> None:
        """Let go of the descriptors, in a child process: the socket is the parent's."""
        self._socket.close()
        self._use_reserve()


def _spare() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # there is none to keep; the next resume tries again
