"""Dialling a Manager server: like ``multiprocessing.connection.Client``, with our own
handshake.  It knows digests on every Python, and refuses a server that sends a challenge
of ours back."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable
from multiprocessing import AuthenticationError, connection
from multiprocessing.managers import convert_to_error  # type: ignore[attr-defined]
from multiprocessing.reduction import ForkingPickler
from typing import Any

from taskrun.manager import protocol


def connect(address: Any, family: str | None = None, authkey: bytes | None = None) -> Any:
    """A connection to the server there.  Raises AuthenticationError, OSError, EOFError."""
    found = connection.Client(address, family)
    try:
        if isinstance(address, tuple):
            _without_delay(found.fileno())
        if authkey is not None:
            protocol.greet(authkey, found.send_bytes, found.recv_bytes)
    except protocol.Refused as refused:
        found.close()
        raise AuthenticationError(str(refused)) from None
    except BaseException:
        found.close()
        raise
    return found


def _without_delay(fd: int) -> None:
    with socket.fromfd(fd, socket.AF_INET, socket.SOCK_STREAM) as copy:
        copy.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def client_for(serializer: str) -> Callable[..., Any]:
    """What dials for a serializer; XML-RPC stays the standard library's."""
    if serializer == "pickle":
        return connect
    if serializer == "tls":
        from taskrun.transport import stock

        return stock.connect
    return connection.XmlClient  # type: ignore[attr-defined,no-any-return]


class _RequestPickler(ForkingPickler):
    """Our proxies travel to a server as those of the standard library: whoever gets them
    from there may not have taskrun."""

    def reducer_override(self, value: Any) -> Any:
        reduce = getattr(type(value), "_reduce_as_standard", None)
        return NotImplemented if reduce is None else reduce(value)


def pickled(request: tuple[Any, ...]) -> memoryview:
    """A request as it is sent."""
    buffer = io.BytesIO()
    _RequestPickler(buffer).dump(request)
    return buffer.getbuffer()


def send(conn: Any, request: tuple[Any, ...]) -> None:
    """Send a request."""
    if isinstance(conn, connection.Connection):
        conn.send_bytes(pickled(request))
    else:
        conn.send(request)


def ask(conn: Any, name: str, *args: Any, **kwds: Any) -> Any:
    """A first request, and what it returns."""
    send(conn, (None, name, args, kwds))
    kind, result = conn.recv()
    if kind == "#RETURN":
        return result
    raise convert_to_error(kind, result)
