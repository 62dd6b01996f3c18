"""A client's connection with a thread of its own.

A connection leaves the loop for good when it first asks for something that may block, that
runs code of users, or that takes long.  From then on it is served as the standard library
serves all connections: a thread reads a request, executes it, and sends the reply.  So a
lock that belongs to the thread that acquired it belongs to the connection.
"""

from __future__ import annotations

import io
import socket
import threading
from typing import Any

from taskrun.manager import calls, pickling, protocol
from taskrun.manager.blocking import Gone, Waiter
from taskrun.manager.hosting import Handover, Host

_READ = 64 * 1024
_READ_LONG = 1024 * 1024
_JOINED = 64 * 1024  # a shorter payload is sent in one piece with its length


class Promoted:
    """Serves one connection on the thread that calls :meth:`run`."""

    def __init__(self, server: Host, handover: Handover) -> None:
        self.server = server
        self.socket = handover.socket
        self._received = handover.received
        self._unsent = handover.unsent
        self._reply = handover.reply
        self._asked = handover.asked
        self._pid = handover.pid
        self._waiter = Waiter(self._is_gone)
        self._in_transit: list[object] = []  # proxies, until the client has its own

    def start(self) -> None:
        """Have it served; first send what the loop has not sent."""
        threading.Thread(target=self.run, name="manager client", daemon=True).start()

    def run(self) -> None:
        self.server.reactor.may_wait_for_this_thread()
        self._waiter.begin()
        try:
            self.socket.setblocking(True)
            self._serve()
        except (OSError, EOFError, Gone):
            pass  # the client is gone, or what it sends is cut off
        except (SystemExit, KeyboardInterrupt):
            pass  # a method ended the connection
        except protocol.ProtocolError:
            pass  # a length that cannot be
        except BaseException:
            self.server.report()
        finally:
            self._waiter.release_all()
            self._in_transit.clear()
            self.socket.close()
            self.server.on_thread_ended(self)

    def _serve(self) -> None:
        if self._unsent is not None:
            self.socket.sendall(self._unsent)
        if self._reply is not None:
            self._send(self._reply)
        elif not self._asked:
            self._first()
        self._unsent = self._reply = None
        while self._asked:
            self._send(self._execute(self._read()))

    def shut(self) -> None:
        """End the connection, from another thread."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended

    # -- requests ---------------------------------------------------------------------

    def _first(self) -> None:
        payload = self._read()
        try:
            request, foreign = self._load(payload)
        except Exception:
            self._send(calls.complaint())
            return
        reply = self.server.administration.execute(request, inline=not foreign, pid=self._pid)
        self._asked = reply[0] == "#RETURN" and request[1] == "accept_connection"
        del request  # it may hold the only reference to something
        self._send(reply)

    def _execute(self, payload: bytes) -> calls.Reply:
        self._in_transit.clear()
        try:
            request, foreign = self._load(payload)
            if foreign:
                self._mark(request)
        except Exception:
            return calls.complaint()
        return calls.execute(
            self.server.objects,
            self.server.address,
            request,
            invoke=self._waiter,
            pid=self._pid,
        )

    def _load(self, payload: bytes) -> tuple[Any, bool]:
        """The request, and whether code other than builtins had to be run for it."""
        if not self.server.plain:
            return pickling.load_xml(payload), True
        try:
            return pickling.load_plain(payload), False
        except pickling.NotPlain:
            return pickling.Loader(payload, self.server.rebuild_proxy).load(), True

    def _mark(self, request: Any) -> None:
        # The object may hold from now on what the loop must not compare, hash or print.
        entry = self.server.objects.find(request[0])
        if entry is not None:
            entry.leave_loop()

    # -- bytes ------------------------------------------------------------------------

    def _read(self) -> bytes:
        received = self._received
        while (found := protocol.announced(received)) is None:
            received += self._receive(_READ)
        start, size = found
        payload = io.BytesIO()
        with memoryview(received) as view:
            payload.write(view[start : start + size])
        del received[: start + size]
        # Memory is taken as the bytes come: an announcement alone costs nothing.
        while payload.tell() < size:
            self._acknowledge()
            payload.write(self._receive(min(size - payload.tell(), _READ_LONG)))
        return payload.getvalue()

    def _receive(self, size: int) -> bytes:
        data = self.socket.recv(size)
        if not data:
            raise EOFError
        return data

    def _acknowledge(self) -> None:
        if self.socket.family != socket.AF_UNIX and hasattr(socket, "TCP_QUICKACK"):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _send(self, reply: calls.Reply) -> None:
        dump = pickling.dump if self.server.plain else pickling.dump_xml
        try:
            payload, self._in_transit = dump(reply)
        except Exception:
            payload, self._in_transit = dump(("#UNSERIALIZABLE", calls.complaint()[1]))
        try:
            if self._is_gone():
                raise EOFError
            if len(payload) < _JOINED:
                self.socket.sendall(protocol.framed(payload))
            else:
                self.socket.sendall(protocol.header(len(payload)))
                self.socket.sendall(payload)
        except (OSError, EOFError):
            self._waiter.undo()
            raise

    def _is_gone(self) -> bool:
        try:
            return self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
