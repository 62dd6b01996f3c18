"""One client's connection on the event loop.

It has been let in by then (see ``taskrun.transport.gate``), and goes through two phases: the
first request, which most connections end with, and the calls of a proxy.  What must not run
on the loop takes the connection off it: see ``promoted``.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from taskrun.manager import calls, hosted, pickling, protocol
from taskrun.manager.hosting import Handover, Host
from taskrun.manager.objects import Entry

_READ = 64 * 1024
_RETURN_NONE = protocol.framed(pickling.dump_plain(("#RETURN", None)))


class Peer:
    """A client, as long as the loop serves it."""

    __slots__ = (
        "_asked", "_finishing", "_frames", "_guest", "_left", "_unsent",
        "pid", "server", "socket", "tcp",
    )  # fmt: skip

    def __init__(self, server: Host, connection: socket.socket, *, guest: bool = False) -> None:
        """``guest``: it may speak of the named state, and of nothing else."""
        self.server = server
        self.socket = connection
        self.tcp = connection.family != socket.AF_UNIX
        self.pid = _process_of(connection) if not self.tcp else None
        self._frames = protocol.Frames(pickling.LARGEST_INLINE)
        self._guest = guest
        self._asked = False  # whether its first request is behind it
        self._left = False  # whether it is closed, or has a thread
        self._finishing = False  # whether to close when everything is sent
        self._unsent: memoryview | None = None

    def start(self, received: bytes) -> None:
        """Serve it; it has sent ``received`` already."""
        self.server.reactor.add_reader(self.socket.fileno(), self.on_readable)
        if received:
            self._frames.feed(received)
        if not self.server.plain:
            self.promote()
        elif received:
            self._guarded(self._on_first)

    def _acknowledge(self) -> None:
        # A client that sends two small messages in a row, or a long one in two pieces,
        # waits for the first to be acknowledged; the system delays that by 40 ms, unless
        # told otherwise, again and again.
        if self.tcp and hasattr(socket, "TCP_QUICKACK"):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    # -- reading ----------------------------------------------------------------------

    def on_readable(self) -> None:
        try:
            data = self.socket.recv(_READ)
            # The usual case: one whole request, and nothing before it.
            whole = int.from_bytes(data[:4], "big") == len(data) - 4
            if whole and self._asked and not self._frames.pending:
                self._on_request(data[4:])
                self.server.reactor.expect_soon()
            else:
                self._on_bytes(data)
        except (BlockingIOError, InterruptedError):
            return
        except Exception:
            self._on_error()

    def _on_bytes(self, data: bytes) -> None:
        if not data:
            self.close()
            return
        self._frames.feed(data)
        if self._asked:
            self._on_frames()
        else:
            self._on_first()

    def _guarded(self, serve: Callable[[], object]) -> None:
        try:
            serve()
        except Exception:
            self._on_error()

    def _on_error(self) -> None:
        """In an ``except`` block: end the connection."""
        error = sys.exc_info()[1]
        if isinstance(error, protocol.ProtocolError):
            self._send(error.last_words)
        elif not isinstance(error, OSError):  # that is a peer who has closed its end
            self.server.report()
        self.close()

    def _on_frames(self) -> None:
        frames = self._frames
        while self._unsent is None and not self._left:
            payload = frames.pop()
            if frames.oversized is not None:
                self.promote()
                return
            if payload is None:
                if frames.pending:
                    self._acknowledge()
                return
            self._on_request(payload)

    # -- the calls of a proxy ---------------------------------------------------------

    def _on_request(self, payload: bytes) -> None:
        try:
            request = pickling.load_plain(payload)
            ident, method, args, kwds = request
            entry = self.server.objects.find(ident)
            quick = None if entry is None else entry.quick.get(method)
            if quick is None:
                self._on_other_request(payload, request, entry)
                return
        except pickling.NotPlain:
            self.promote(payload)
            return
        except Exception:
            self._reply(calls.complaint())
            return
        try:
            result = quick(*args, **kwds)
        except Exception as error:
            self._reply(calls.failure(error))
            return
        if result is None:
            self._send(_RETURN_NONE)
        else:
            self._reply(("#RETURN", result))

    def _on_other_request(self, payload: bytes, request: Any, entry: Entry | None) -> None:
        _, method, args, _ = request
        if entry is not None and (not entry.inline or hosted.takes_long(entry.value, method, args)):
            self.promote(payload)
            return
        server = self.server
        self._reply(
            calls.execute(server.objects, server.address, request, inline=True, pid=self.pid)
        )

    def _reply(self, reply: calls.Reply) -> None:
        try:
            payload = pickling.dump_plain(reply)
        except Exception:  # pickling may raise anything; the thread finds out for good
            self.promote(reply=reply)
        else:
            self._send(protocol.framed(payload))

    # -- the first request ------------------------------------------------------------

    def _on_first(self) -> None:
        frames = self._frames
        payload = frames.pop()
        if frames.oversized is not None and self._guest:
            self.close()
        elif frames.oversized is not None:
            self.promote()
        elif payload is None:
            self._acknowledge()
        else:
            self._on_first_request(payload)

    def _on_first_request(self, payload: bytes) -> None:
        if self._guest:
            self._on_guest(pickling.load_plain(payload))
            return
        try:
            request = pickling.load_plain(payload)
        except pickling.NotPlain:
            self.promote(payload)
            return
        except Exception:
            self._reply(calls.complaint())
            self.finish()
            return
        if self.server.sessions is not None and _asks_for_a_session(request):
            self._hand_over(request)
            return
        if not self.server.administration.is_quick(request):
            self.promote(payload)
            return
        reply = self.server.administration.execute(request, inline=True, pid=self.pid)
        self._asked = reply[0] == "#RETURN" and request[1] == "accept_connection"
        self._reply(reply)
        if self._asked:
            self._on_frames()
        else:
            self.finish()

    def _on_guest(self, request: Any) -> None:
        if self.server.sessions is not None and _asks_for_a_session(request):
            self._hand_over(request)
        else:
            self.close()

    def _hand_over(self, request: Any) -> None:
        """The connection speaks something else from now on."""
        assert self.server.sessions is not None
        rest = bytes(self._frames.rest())
        self._detach()
        self.server.on_closed(self)
        self.server.sessions(self.socket, request, rest)

    # -- writing ----------------------------------------------------------------------

    def _send(self, data: bytes | memoryview) -> None:
        try:
            sent = self.socket.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(data):
            self._wait_to_send(memoryview(data)[sent:])

    def _wait_to_send(self, rest: memoryview) -> None:
        # Nothing more is read from a client that does not read: it cannot make us hoard.
        if self._unsent is not None:
            rest = memoryview(b"".join((self._unsent, rest)))
        else:
            self.server.reactor.remove_reader(self.socket.fileno())
            self.server.reactor.add_writer(self.socket.fileno(), self.on_writable)
        self._unsent = rest

    def on_writable(self) -> None:
        rest, self._unsent = self._unsent or memoryview(b""), None
        fd = self.socket.fileno()
        try:
            sent = self.socket.send(rest)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(rest):
            self._unsent = rest[sent:]
            return
        self.server.reactor.remove_writer(fd)
        if self._finishing:
            self.close()
            return
        self.server.reactor.add_reader(fd, self.on_readable)
        if self._asked:
            self._guarded(self._on_frames)

    # -- leaving ----------------------------------------------------------------------

    def promote(self, payload: bytes | None = None, reply: calls.Reply | None = None) -> None:
        """Give the connection, and what was being done for it, to a thread of its own."""
        if self._left:
            return
        rest = self._frames.rest()
        if payload is not None:
            rest[:0] = protocol.framed(payload)
        self._detach()
        self.server.on_closed(self)
        self.server.promote(
            Handover(self.socket, rest, self._unsent, reply, asked=self._asked, pid=self.pid)
        )

    def finish(self) -> None:
        """Close once everything is sent."""
        self._finishing = True
        if self._unsent is None:
            self.close()

    def _detach(self) -> None:
        self._left = True
        fd = self.socket.fileno()
        self.server.reactor.remove_reader(fd)
        if self._unsent is not None:
            self.server.reactor.remove_writer(fd)

    def close(self) -> None:
        if not self._left:
            self._detach()
            self.socket.close()
            self.server.on_closed(self)


def _asks_for_a_session(request: Any) -> bool:
    return isinstance(request, tuple) and len(request) == 4 and request[1] == "state"


_CREDENTIALS = struct.Struct("3i")


def _process_of(connection: socket.socket) -> int | None:
    """The process at the other end of a Unix socket, where the system says."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(found)[0]
    # 0: it is in another container.  This very process needs no watching.
    return pid if pid not in (0, os.getpid()) else None
