"""One client of the shared state, on the coordinator's loop."""

from __future__ import annotations

import pickle
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

from taskrun.errors import StateError
from taskrun.manager import pickling, protocol
from taskrun.reactor import Reactor
from taskrun.state.store import Store
from taskrun.state.waiting import Wait
from taskrun.state.wire import (
    ACKNOWLEDGE,
    CHANGE,
    MISSED,
    OK,
    WITHDRAW,
    Owner,
    Reply,
    refusal,
)

_READ: Final = 64 * 1024
_READ_LONG: Final = 1024 * 1024
_LONGEST: Final = 1 << 40  # bytes; memory is taken only as they come
_MOST_UNSENT: Final = 1024 * 1024  # bytes that wait for one who watches too slowly
_DONE: Final = protocol.framed(pickle.dumps((OK, None)))


class Host(Protocol):
    """What a session is part of."""

    reactor: Reactor
    sessions: set[Any]
    thread: int  # that runs the reactor

    @property
    def store(self) -> Store: ...

    @property
    def report(self) -> Callable[[], object]: ...  # for use in an ``except`` block


class Session:
    """A client past the handshake, until it leaves; see ``wire`` for what is said."""

    acknowledges = True

    def __init__(
        self, service: Host, connection: socket.socket, owner: Owner, received: bytes
    ) -> None:
        self.wait: Wait | None = None
        self.undo: Callable[[], object] | None = None
        self._service = service
        self._store: Store = service.store
        self._reactor: Reactor = service.reactor
        self._socket = connection
        self._owner = owner
        self._frames = protocol.Frames(_LONGEST)
        self._unsent = bytearray()
        self._missed = 0
        self._closed = False
        service.sessions.add(self)
        self._store.joined(self, owner)
        self._reactor.add_reader(connection.fileno(), self._on_readable)
        self._send(protocol.framed(pickle.dumps(("#RETURN", None))))
        if received:
            self._frames.feed(received)
            self._guarded(self._serve)

    # -- requests ---------------------------------------------------------------------

    def _on_readable(self) -> None:
        pending = self._frames.pending
        try:
            data = self._socket.recv(_READ_LONG if pending else _READ)
            # The usual case: one whole request, and nothing before it.
            if not pending and int.from_bytes(data[:4], "big") == len(data) - 4:
                self._handle(data[4:])
                self._reactor.expect_soon()
            elif data:
                self._frames.feed(data)
                self._serve()
            else:
                self.close()
        except (BlockingIOError, InterruptedError):
            return
        except Exception:
            self._on_error()

    def _guarded(self, serve: Callable[[], object]) -> None:
        try:
            serve()
        except Exception:
            self._on_error()

    def _on_error(self) -> None:
        """In an ``except`` block: end the connection.  Only a bug of ours is reported."""
        if not isinstance(sys.exc_info()[1], (protocol.ProtocolError, OSError)):
            self._service.report()
        self.close()

    def _serve(self) -> None:
        while not self._closed and not self._unsent:
            payload = self._frames.pop()
            if payload is None:
                return
            self._handle(payload)

    def _handle(self, payload: bytes) -> None:
        try:
            request = pickling.load_plain(payload)
        except pickling.NotPlain as error:
            self._refuse(error)
            return
        except Exception as error:  # a broken pickle raises anything
            raise protocol.ProtocolError(f"no request: {error}") from None
        if self.wait is None and type(request) is tuple:
            self._reply(self._store.execute(request, self))
        else:
            self._on_word(request)

    def _refuse(self, error: pickling.NotPlain) -> None:
        """It is whole, but with something in it that is not loaded here."""
        if self.wait is not None:
            raise protocol.ProtocolError("one request while another waits")
        self._reply(refusal(StateError(f"the coordinator does not load {error} of a request")))

    def _on_word(self, word: Any) -> None:
        if word == ACKNOWLEDGE:
            self.undo = None
        elif word == WITHDRAW:
            reply = self._store.withdraw(self)
            if reply is not None:
                self._reply(reply)
        else:
            raise protocol.ProtocolError("no request, or one while another waits")

    def answer(self, reply: Reply) -> None:
        """See ``waiting.Client``."""
        if threading.get_ident() != self._service.thread:
            self._reactor.post(lambda: self._answer(reply))
        else:
            self._answer(reply)

    def _answer(self, reply: Reply) -> None:
        if self._closed:
            return
        if reply[0] == CHANGE and len(self._unsent) > _MOST_UNSENT:
            self._missed += 1
            return
        self._reply(reply)

    # -- sending ----------------------------------------------------------------------

    def _reply(self, reply: Reply) -> None:
        if reply[1] is None and reply[0] == OK:
            self._send(_DONE)
        else:
            self._send(protocol.framed(pickle.dumps(reply, pickle.HIGHEST_PROTOCOL)))

    def _send(self, data: bytes) -> None:
        sent = 0
        if not self._unsent:
            try:
                sent = self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                self.close()
                return
            if sent == len(data):
                return
            # Nothing more is read from a client that does not read.
            self._reactor.remove_reader(self._socket.fileno())
            self._reactor.add_writer(self._socket.fileno(), self._on_writable)
        self._unsent += memoryview(data)[sent:]

    def _on_writable(self) -> None:
        try:
            with memoryview(self._unsent) as view:
                sent = self._socket.send(view[:_READ_LONG])
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        del self._unsent[:sent]
        if self._unsent:
            return
        self._reactor.remove_writer(self._socket.fileno())
        self._reactor.add_reader(self._socket.fileno(), self._on_readable)
        if self._missed:
            missed, self._missed = self._missed, 0
            self._reply((MISSED, missed))
        self._guarded(self._serve)

    # -- leaving ----------------------------------------------------------------------

    def close(self) -> None:
        """End the connection; what it waits for, and holds, it does not any more."""
        if self._closed:
            return
        self._closed = True
        fd = self._socket.fileno()
        self._reactor.remove_reader(fd)
        self._reactor.remove_writer(fd)
        self._socket.close()
        self._service.sessions.discard(self)
        self._store.left(self, self._owner)
