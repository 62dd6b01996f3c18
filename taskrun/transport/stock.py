"""TLS for clients of ``multiprocessing.managers``, as one more of its serializers.

    import taskrun
    from multiprocessing.managers import SyncManager

    manager = SyncManager(("example.org", 7077), authkey=key, serializer="tls")
    manager.connect()

What such a manager and its proxies say are the standard library's pickles; but they dial
as taskrun does, and so both sides prove the key, bound to the certificate.
"""

from __future__ import annotations

import io
import os
import select
import socket
from multiprocessing import AuthenticationError, connection, current_process
from typing import Any, Final, NoReturn

from taskrun.addresses import Tls
from taskrun.authkey import check_length
from taskrun.errors import DialError, UsageError
from taskrun.manager.protocol import MANAGER
from taskrun.transport.dialling import DIAL_TIMEOUT, Route, open_socket

_READ: Final = 1024 * 1024


class Connection(connection.Connection):
    """A ``multiprocessing.connection.Connection`` over a socket that does TLS."""

    def __init__(self, secured: socket.socket, rest: bytes) -> None:
        super().__init__(secured.fileno())
        self._socket = secured
        self._rest = rest
        self._pid = os.getpid()

    def _close(self) -> None:
        self._socket.close()

    def _send(self, data: Any) -> None:
        self._check_process()
        self._socket.sendall(data)

    def _recv(self, size: int) -> io.BytesIO:
        """Exactly so many bytes."""
        self._check_process()
        buffer = io.BytesIO()
        buffer.write(self._rest[:size])
        self._rest = self._rest[size:]
        while buffer.tell() < size:
            data = self._socket.recv(min(size - buffer.tell(), _READ))
            if not data:
                raise EOFError if not buffer.tell() else OSError("got end of file during message")
            buffer.write(data)
        return buffer

    def _poll(self, timeout: float | None) -> bool:
        if self._rest or getattr(self._socket, "pending", int)():
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise OSError("a TLS connection cannot be used in a child process: connect again")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a TLS connection stays in its process: connect in the other one")


def connect(address: Any, family: str | None = None, authkey: bytes | None = None) -> Connection:
    """Like ``multiprocessing.connection.Client``, for (host, port).  Raises
    AuthenticationError where one of the two does not trust the other, else OSError."""
    key = bytes(current_process().authkey if authkey is None else authkey)
    try:
        check_length(key, "the authkey")
        route = Route.to(Tls(*address))
        return Connection(*open_socket(route, key, MANAGER, DIAL_TIMEOUT))
    except DialError as error:
        raise (ConnectionError if error.retry else AuthenticationError)(str(error)) from None
    except UsageError as error:
        raise AuthenticationError(str(error)) from None


def refuse_to_listen(*_: Any, **__: Any) -> NoReturn:
    """The standard library's server does not say to its listener which key to ask for."""
    raise NotImplementedError(
        "the server of multiprocessing.managers cannot listen with TLS; that of taskrun can: "
        'taskrun.manager.SyncManager(address, authkey, serializer="tls")'
    )
