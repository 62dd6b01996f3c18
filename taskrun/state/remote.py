"""The client of a store in another process: a connection to a coordinator's Manager server.

Each thread has a connection of its own, made at first use and never used in a child that
was forked.  An operation that is interrupted between request and reply (Ctrl-C, a
cancelled call) drops its connection: the next one must not get that reply.
"""

from __future__ import annotations

import os
import pickle
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator
from math import inf
from time import monotonic
from typing import Any, Final, TypeAlias

from taskrun import context
from taskrun.addresses import shown
from taskrun.errors import DialError, StateError, StateLost, StateRefused
from taskrun.manager import protocol
from taskrun.roles import STATE_OF_RUN
from taskrun.state.clients import Changes, concluded, refuse_deadlock, settle
from taskrun.state.wire import (
    ACKNOWLEDGE,
    LEASED,
    OK,
    OPEN,
    PARKED,
    REFUSED,
    TAKING,
    WITHDRAW,
    Owner,
    Reply,
    Request,
)
from taskrun.weakly import living

_READ: Final = 64 * 1024
_READ_LONG: Final = 1024 * 1024
_JOINED: Final = 64 * 1024  # a shorter frame is sent in one piece with its length
_DIAL_SECONDS: Final = 10.0
_AGAIN: Final = 0.01  # seconds until one asks for a place in a full queue again
_POLLED: Final = 1_000_000.0  # seconds; poll() takes 24 days at most
_LENGTH = struct.Struct("!i")
CLOSED: Final = "this connection to shared state was closed"
MOST_IDLE: Final = 8  # connections that are kept for whoever waits next on an event loop


Files: TypeAlias = tuple[str | None, str | None, str | None]
"""A certificate, its key, and who signs the others'; see ``transport.tls``."""


class Connection:
    """A socket, past the handshake; frames in and out, in pickles.

    ``counted``: it is one of the few that ``shared.SharedClient`` has in use at a time.
    """

    def __init__(
        self,
        address: Any,
        authkey: bytes,
        owner: Owner,
        tls: Files,
        role: bytes,
        run: str | None = None,
    ) -> None:
        """Raises StateError or StateLost."""
        self._address = address
        self._role = role
        self._tls = tls
        self._rest = b""
        self.alone = False
        self.counted = False
        self.over = False
        self._open_by = monotonic() + _DIAL_SECONDS
        self._socket = self._dial(address, authkey)
        try:
            self._socket.settimeout(_DIAL_SECONDS)
            if self._is_near(address):
                protocol.greet(authkey, self._send_bytes, self._receive_greeting)
            self.send((None, OPEN, (owner,), {} if run is None else {"run": run}))
            kind, content = self.receive()
            if kind == REFUSED:
                raise StateRefused(f"{shown(address)}: {content}")
            if kind != "#RETURN":
                raise StateError(f"{shown(address)} holds no shared state of taskrun: {content}")
            self._socket.settimeout(None)
            self._open_by = inf  # from now on it has all the time
        except BaseException as error:
            self.close()
            if isinstance(error, protocol.ProtocolError):
                raise StateRefused(
                    f"{shown(address)} does not accept this authkey: {error}"
                ) from None
            raise

    def _dial(self, address: Any, authkey: bytes) -> socket.socket:
        if not self._is_near(address):
            return self._dial_far(address, authkey)
        # Workers are many, and near: this takes a tenth of the time.
        made = self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(_DIAL_SECONDS)
            self._queue_up(made, address)
        except OSError as error:
            made.close()
            if not self.is_broken_by(error):
                raise
            raise StateLost(
                f"the coordinator at {shown(address)} cannot be reached: {error.strerror or error}"
            ) from None
        return made

    def _queue_up(self, made: socket.socket, path: str) -> None:
        """Connect to a Unix socket.  Where its queue is full, the system says so at once, and
        does not say when there is room."""
        while True:
            try:
                made.connect(path)
                return
            except BlockingIOError:
                if monotonic() >= self._open_by:
                    raise
                time.sleep(_AGAIN)

    def _is_near(self, address: Any) -> bool:
        return isinstance(address, str) and self._role == protocol.MANAGER

    def _dial_far(self, address: Any, authkey: bytes) -> socket.socket:
        """Past the handshake already."""
        from taskrun.transport.dialling import Route, open_socket

        try:
            # Whether in plain was decided where the address was read.
            route = Route.to(address, self._certificates(), insecure_plain=True)
            made, self._rest = open_socket(route, authkey, self._role, _DIAL_SECONDS)
        except DialError as error:
            raise (StateLost if error.retry else StateRefused)(str(error)) from None
        return made

    def _certificates(self) -> Any:
        if not any(self._tls):
            return None  # as the environment says
        from taskrun.transport.tls import Certificates

        return Certificates(*self._tls)

    def fileno(self) -> int:
        return self._socket.fileno()

    # -- frames -----------------------------------------------------------------------

    def send(self, value: object) -> None:
        """Raises OSError where the other end is gone."""
        self._send_bytes(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))

    def _send_bytes(self, payload: bytes) -> None:
        if len(payload) < _JOINED:
            self._socket.sendall(_LENGTH.pack(len(payload)) + payload)
        else:
            self._socket.sendall(protocol.header(len(payload)))
            self._socket.sendall(payload)

    def receive(self) -> Any:
        """The next frame.  Raises StateLost where the other end is gone."""
        if not self._rest:
            data = self._read(_READ)
            # The usual case: one whole frame.
            if len(data) > 3 and _LENGTH.unpack_from(data)[0] == len(data) - 4:
                return pickle.loads(data[4:])
            self._rest = data
        return pickle.loads(self._receive_bytes())

    def _receive_greeting(self, longest: int) -> bytes:
        return bytes(self._receive_bytes())

    def _receive_bytes(self) -> bytes | memoryview:
        data = self._rest or self._read(_READ)
        while (found := protocol.announced(data)) is None:
            data += self._read(_READ)
        start, size = found
        if len(data) == start + size:
            self._rest = b""
            return memoryview(data)[start:]
        if len(data) > start + size:
            self._rest = data[start + size :]
            return data[start : start + size]
        self._rest = b""
        return self._receive_long(data[start:], size)

    def _receive_long(self, begun: bytes, size: int) -> memoryview:
        buffer = bytearray(size)
        buffer[: len(begun)] = begun
        view, at = memoryview(buffer), len(begun)
        while at < size:
            try:
                count = self._socket.recv_into(view[at : at + _READ_LONG])
            except OSError as error:
                raise self._failed(error) from None
            if not count:
                raise self._lost()
            at += count
        return view

    def _read(self, size: int) -> bytes:
        try:
            data = self._socket.recv(size)
        except OSError as error:
            raise self._failed(error) from None
        if not data:
            raise self._lost()
        return data

    def is_broken_by(self, error: BaseException) -> bool:
        """Whether that says that the connection does not work any more.  A signal handler of
        the user's may raise an OSError as well: one without the number of the system's."""
        return isinstance(error, OSError) and (
            error.errno is not None or monotonic() >= self._open_by
        )

    def _failed(self, error: OSError) -> OSError:
        """What to raise for it."""
        if not self.is_broken_by(error):
            return error
        if isinstance(error, TimeoutError):
            return StateLost(f"the coordinator at {shown(self._address)} does not answer")
        return self._lost()

    def _lost(self) -> StateLost:
        if self.over:
            return StateLost(CLOSED)
        return StateLost(
            f"the coordinator at {shown(self._address)} is gone, and the shared state with it"
        )

    # -- context.Outside --------------------------------------------------------------

    def ready(self) -> bool:
        return self.block(0)

    def block(self, timeout: float | None) -> bool:
        # With TLS there may be more than the system knows of.
        if self._rest or getattr(self._socket, "pending", int)():
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while timeout is not None and timeout > _POLLED:
            if poll.poll(_POLLED * 1000):
                return True
            timeout -= _POLLED
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def close(self) -> None:
        self._socket.close()

    def hang_up(self) -> None:
        """Whoever waits for it hears that it is over, and closes it; on any thread."""
        self.over = True
        try:
            # close() would wake nobody, and with TLS its own shutdown() makes the socket plain.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was faster

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()


class RemoteClient:
    """A ``clients.Client`` of a coordinator.

    ``attempt`` gives the (call, attempt) that is being executed in this process.
    ``tls``: see ``taskrun.connect``.  ``role``: GUEST where ``authkey`` is a guest's.
    ``run``: the one that is meant of those of a server.
    """

    def __init__(
        self,
        address: Any,
        authkey: bytes,
        attempt: Callable[[], tuple[int, int] | None] = lambda: None,
        *,
        tls: Files = (None, None, None),
        role: bytes = protocol.MANAGER,
        run: str | None = None,
    ) -> None:
        self._address = address
        self._run = run
        self._role = role if run is None else STATE_OF_RUN
        self._authkey = authkey
        self._attempt = attempt
        self._tls = tls
        self._closed = False
        self._begin()
        _clients.add(self)

    def _begin(self) -> None:
        self._own: Owner = ("client", os.urandom(8).hex())
        self._thread = threading.local()
        self._idle: list[Connection] = []  # for coroutines
        self._all: weakref.WeakSet[Connection] = weakref.WeakSet()

    def owner(self) -> Owner:
        attempt = self._attempt()
        return self._own if attempt is None else ("attempt", *attempt)

    # -- connections ------------------------------------------------------------------

    def connect(self) -> Connection:
        """A new connection.  Raises StateError or StateLost."""
        if self._closed:
            raise StateLost(CLOSED)
        made = Connection(self._address, self._authkey, self._own, self._tls, self._role, self._run)
        self._all.add(made)
        return made

    def _take(self, *, fresh: bool = False) -> Connection:
        """This thread's connection, or a new one.  Until it is put back nobody uses it: what
        is executed on top of this operation (another call, a finalizer, a signal handler)
        makes its own."""
        found: Connection | None = getattr(self._thread, "connection", None)
        self._thread.connection = None
        return self.connect() if fresh or found is None else found

    def _put_back(self, connection: Connection) -> None:
        other: Connection | None = getattr(self._thread, "connection", None)
        self._thread.connection = connection
        if other is not None:
            other.close()

    def _drop(self, connection: Connection) -> None:
        """It is not to be used again: nobody knows what will be read from it."""
        connection.close()

    def _set_aside(self, connection: Connection) -> None:
        """It waits, perhaps for long."""

    def _keep(self, connection: Connection) -> None:
        if len(self._idle) < MOST_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """End all connections; what they hold is released, and who waits there is told."""
        self._closed = True
        for connection in living(self._all):
            connection.hang_up()
        self._begin()

    def leave_to_parent(self) -> None:
        """In a forked child: the connections are the parent's."""
        for connection in living(self._all):
            connection.close()
        self._begin()

    # -- operations -------------------------------------------------------------------

    def call(self, request: Request) -> Any:
        connection = self._ask(request)
        try:
            reply = connection.receive()
        except BaseException:
            self._drop(connection)
            raise
        self._put_back(connection)
        return reply[1] if reply[0] == OK else concluded(reply)

    def _ask(self, request: Request, *, fresh: bool = False) -> Connection:
        """Send a request.  Where the connection has ended meanwhile, it has not been read,
        and goes over a new one."""
        connection = self._take(fresh=fresh)
        try:
            connection.send(request)
        except BaseException as error:
            self._drop(connection)
            if fresh or not connection.is_broken_by(error):
                raise
            return self._ask(request, fresh=True)
        return connection

    def wait(self, request: Request, timeout: float | None) -> Any:
        connection = self._ask(request)
        try:
            reply = connection.receive()
            if reply[0] == PARKED:
                self._set_aside(connection)
                reply = self._wait(connection, request, reply, timeout)
            _acknowledge(connection, request, reply)
        except BaseException:
            self._drop(connection)
            raise
        self._put_back(connection)
        return concluded(reply)

    def _wait(
        self, connection: Connection, request: Request, reply: Reply, timeout: float | None
    ) -> Reply:
        refuse_deadlock(reply[1])
        connection.alone = request[0] in LEASED
        deadline = None if timeout is None else monotonic() + timeout
        if not context.active().lend(connection, deadline):
            connection.send(WITHDRAW)
        final: Reply = connection.receive()
        return final

    async def wait_async(self, request: Request, timeout: float | None) -> Any:
        connection = self._idle.pop() if self._idle else self.connect()
        try:
            connection.send(request)
            reply = connection.receive()
            if reply[0] == PARKED:
                refuse_deadlock(reply[1])
                if not await _readable(connection, timeout, alone=request[0] in LEASED):
                    connection.send(WITHDRAW)
                reply = connection.receive()
            _acknowledge(connection, request, reply)
        except BaseException:
            connection.close()
            raise
        self._keep(connection)
        return concluded(reply)

    # -- watching ---------------------------------------------------------------------

    def watch(self, request: Request) -> Changes:
        connection = self._watching(request)
        return Changes(self._changes(connection), connection.hang_up)

    def _watching(self, request: Request) -> Connection:
        connection = self.connect()
        connection.send(request)
        concluded(connection.receive())
        return connection

    def _changes(self, connection: Connection) -> Generator[Reply]:
        try:
            while not connection.over:
                if not connection.ready():
                    context.active().lend(connection, None)
                yield connection.receive()
        except StateLost:
            return  # the run has ended, or the connection, and so do its changes
        finally:
            connection.close()

    async def watch_async(self, request: Request) -> AsyncIterator[Reply]:
        connection = self._watching(request)
        try:
            while True:
                if not connection.ready():
                    await _readable(connection, None)
                yield connection.receive()
        except StateLost:
            return
        finally:
            connection.close()


async def _readable(connection: Connection, timeout: float | None, *, alone: bool = False) -> bool:
    """Wait on the running event loop; False when the time is up."""
    if connection.ready():
        return True  # perhaps it came together with what was read before
    import asyncio

    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    fd = connection.fileno()
    over = context.active().lend_awaiting(alone=alone)
    loop.add_reader(fd, settle, future)
    try:
        return bool((await asyncio.wait([future], timeout=timeout))[0])
    finally:
        loop.remove_reader(fd)
        over()


def _acknowledge(connection: Connection, request: Request, reply: Reply) -> None:
    if (request[0] in TAKING or request[0] in LEASED) and reply[0] == OK:
        try:
            connection.send(ACKNOWLEDGE)
        except OSError as error:
            if not connection.is_broken_by(error):
                raise
            # The coordinator is gone, but an item is here.


_clients: weakref.WeakSet[RemoteClient] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in living(_clients):
        client.leave_to_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)
