"""Connections to the shared state, carried over the conversation with a node.

A worker on a node connects to a socket of the node's; the other end of that connection is
one to the coordinator's own socket.  What goes over it is not looked at: the worker and the
coordinator prove the key to each other as anywhere else.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Final

from taskrun.errors import WireError
from taskrun.network import channels as ch
from taskrun.network.conversation import Conversation, Data
from taskrun.reactor import Reactor

_READ: Final = 64 * 1024
_AGAIN: Final = 0.01  # seconds until it is tried again where many connect at once
_MOST_WAITING: Final = 8 * 1024 * 1024  # bytes in the conversation; then nothing more is read


class Relay:
    """One side's ends of all the connections that are carried."""

    def __init__(
        self,
        reactor: Reactor,
        conversation: Conversation,
        connect: Callable[[], socket.socket] | None = None,
    ) -> None:
        """``connect`` makes the other connection for one that was opened over there; it raises
        OSError, and BlockingIOError where that is to be tried again."""
        self._reactor = reactor
        self._conversation = conversation
        self._connect = connect
        self._ends: dict[int, _End] = {}
        self._opening: dict[int, list[tuple[int, Data]]] = {}  # what came for them meanwhile
        self._next = 0

    def carry(self, connection: socket.socket) -> None:
        """Carry a connection that was opened here."""
        number, self._next = self._next, self._next + 1
        self._conversation.send(ch.of_state(number), ch.OPEN, b"")
        self._add(number, connection)

    def _add(self, number: int, connection: socket.socket) -> None:
        self._ends[number] = _End(number, connection, self)

    def take(self, number: int, channel: int, data: Data) -> None:
        """A message came for one of them."""
        end, opening = self._ends.get(number), self._opening.get(number)
        if channel == ch.OPEN and self._connect is not None:
            if end is not None or opening is not None:
                raise WireError(f"connection {number} was opened twice")
            self._opening[number] = []
            self._open(number, self._connect)
        elif opening is not None:
            opening.append((channel, data))
        elif end is None:
            return  # it was closed here at the same time
        elif channel == ch.PASS:
            end.write(data)
        elif channel == ch.CLOSE:
            del self._ends[number]
            end.finish()

    def _open(self, number: int, connect: Callable[[], socket.socket]) -> None:
        if number not in self._opening:
            return  # all were closed
        try:
            connection = connect()
        except BlockingIOError:
            # Others have to be let in first, perhaps on this very thread; nobody says when.
            self._reactor.call_at(monotonic() + _AGAIN, lambda: self._open(number, connect))
            return
        except OSError:
            del self._opening[number]
            self.say(number, ch.CLOSE, b"")  # nobody is there any more
            return
        self._add(number, connection)
        for channel, data in self._opening.pop(number):
            self.take(number, channel, data)

    def say(self, number: int, channel: int, data: bytes) -> None:
        """Tell the other side."""
        self._conversation.send(ch.of_state(number), channel, data)

    def ended(self, number: int) -> None:
        """One of our ends was closed."""
        if self._ends.pop(number, None) is not None:
            self.say(number, ch.CLOSE, b"")

    @property
    def reactor(self) -> Reactor:
        return self._reactor

    @property
    def is_full(self) -> bool:
        """Whether enough is waiting in the conversation."""
        return self._conversation.waiting > _MOST_WAITING

    def resume(self) -> None:
        """There is room in the conversation again."""
        for end in self._ends.values():
            end.resume()

    def close(self) -> None:
        """Close all."""
        self._opening.clear()
        ends, self._ends = self._ends, {}
        for end in ends.values():
            end.close()


class _End:
    """One connection here."""

    def __init__(self, number: int, connection: socket.socket, relay: Relay) -> None:
        self._number = number
        self._socket = connection
        self._relay = relay
        self._outgoing: deque[Data] = deque()
        self._finishing = self._closed = False
        self._paused = True
        connection.setblocking(False)
        self.resume()

    def resume(self) -> None:
        if self._paused and not self._closed:
            self._paused = False
            self._relay.reactor.add_reader(self._socket.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        if self._relay.is_full:
            self._paused = True
            self._relay.reactor.remove_reader(self._socket.fileno())
            return
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._relay.say(self._number, ch.PASS, data)
        else:
            self._relay.ended(self._number)
            self.close()

    def write(self, data: Data) -> None:
        """Write, now or as soon as there is room."""
        self._outgoing.append(data)
        if len(self._outgoing) == 1:
            self._write()
            if self._outgoing and not self._closed:
                self._relay.reactor.add_writer(self._socket.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        self._write()
        if not self._outgoing and not self._closed:
            self._relay.reactor.remove_writer(self._socket.fileno())
            if self._finishing:
                self.close()

    def _write(self) -> None:
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing[0])
            except BlockingIOError:
                return
            except OSError:
                self._relay.ended(self._number)
                self.close()
                return
            first = self._outgoing.popleft()
            if sent < len(first):
                self._outgoing.appendleft(memoryview(first)[sent:])

    def finish(self) -> None:
        """The other side has closed: so do we, when all is written."""
        self._finishing = True
        if not self._outgoing:
            self.close()

    def close(self) -> None:
        """Close it now."""
        if self._closed:
            return
        self._closed = True
        self._outgoing.clear()
        self._relay.reactor.remove_reader(self._socket.fileno())
        self._relay.reactor.remove_writer(self._socket.fileno())
        self._socket.close()
