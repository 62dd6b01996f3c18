"""A connection whose other end has proved the authkey: whole messages in and out."""

from __future__ import annotations

import os
import socket
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Final

from taskrun.errors import WireError
from taskrun.reactor import Reactor
from taskrun.wire import READ_SIZE, Decoder, header

OnFrame = Callable[[memoryview], object]
OnEnd = Callable[[str], object]

_CHUNK: Final = 64 * 1024  # bytes that are joined into one write; longer parts are not copied
_AT_ONCE: Final = 1024 * 1024  # bytes written in one turn of the loop: others wait, too
_PATIENCE: Final = 5.0  # seconds for the other end to take the last words


class Peer:
    """Frames over one connection, on a reactor; everything on the reactor's thread.

    ``name`` says who is at the other end, as messages say it.  ``hello`` is what the
    dialling side proved the key for: its role, such as ``b"node"``.  Frames are those of a
    Pipe (see ``taskrun.wire``).  What is sent in one turn of the loop goes out together.
    """

    def __init__(
        self,
        reactor: Reactor,
        connection: socket.socket,
        name: str,
        hello: bytes,
        rest: bytes,
        report: Callable[[], object] | None = None,
    ) -> None:
        """``rest``: what has been received already.  ``report`` is called in an ``except``
        block where ``on_frame`` raises, which then ends this connection only."""
        self.name = name
        self.hello = hello
        self.unsent = 0  # bytes that wait
        self.on_drained: Callable[[], object] | None = None
        """Called whenever everything is written, whether or not the other end made it wait."""
        self._reactor = reactor
        self._socket = connection
        self._decoder = Decoder()
        self._rest = rest
        self._report = report
        self._frames: deque[memoryview] = deque()  # that came, and wait to be taken
        self._on_frame: OnFrame = _ignore
        self._on_end: OnEnd = _ignore
        self._queue: deque[memoryview] = deque()
        self._sizes: deque[int] = deque()  # of the frames in it, with what they begin by
        self._into = 0  # bytes of the first of them that are written
        self._first: deque[memoryview] = deque()  # frames that go before those that wait
        self._insists = False  # what was tried last has to be tried again
        self._scheduled = self._blocked = self._finishing = self._listening = False
        self.closed = False
        _peers.add(self)

    def __repr__(self) -> str:
        return f"<{self.hello.decode(errors='replace')} at {self.name}>"

    # -- receiving --------------------------------------------------------------------

    def listen(self, on_frame: OnFrame, on_end: OnEnd) -> None:
        """Begin to receive.  ``on_frame`` gets each frame; its memory stays as it is.
        ``on_end`` is called once, with the reason, when the other end is gone or sends what
        is no frame; not after :meth:`close`."""
        self._on_frame = on_frame
        self._on_end = on_end
        if self._is_behind:
            self._reactor.call_soon(self._catch_up)
        self.resume()

    def limit(self, size: int) -> None:
        """From now on a frame of more than ``size`` bytes ends the connection."""
        self._decoder.most = size

    def pause(self) -> None:
        """Receive no more for now: the other end has to wait.  What has come already is kept,
        also where this is called by ``on_frame``."""
        if self._listening:
            self._listening = False
            self._reactor.remove_reader(self._socket.fileno())

    def resume(self) -> None:
        """Receive again."""
        if not self._listening and not self.closed:
            self._listening = True
            self._reactor.add_reader(self._socket.fileno(), self._on_readable)
            if self._is_behind:
                self._reactor.call_soon(self._catch_up)

    @property
    def _is_behind(self) -> bool:
        """Whether something came that was not taken."""
        return bool(self._frames or self._rest)

    def _catch_up(self) -> None:
        if self._listening:
            rest, self._rest = self._rest, b""
            self._take(rest)

    def _on_readable(self) -> None:
        if self._is_behind:
            self._catch_up()  # what is to be read came later
            return
        try:
            # With TLS this takes the whole of a record: what it left would not be seen.
            data = self._socket.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(_reason(error))
            return
        if data:
            self._take(data)
        else:
            self._end("the other end closed the connection")

    def _take(self, data: bytes) -> None:
        if self.closed or self._finishing:
            return
        try:
            self._frames.extend(self._decoder.feed(data))
        except WireError as error:
            self._end(str(error))
            return
        frames = self._frames
        try:
            while frames and self._listening:
                self._on_frame(frames.popleft())
        except Exception:
            if self._report is None:
                raise
            self._report()
            self._end("what it said could not be taken")

    # -- sending ----------------------------------------------------------------------

    def send(self, *parts: bytes | memoryview) -> None:
        """Send one frame made of the parts, as soon as there is room.  They must not be
        changed meanwhile.  Does nothing once the connection has ended."""
        if self.closed or self._finishing:
            return
        size = sum(len(part) for part in parts)
        start = header(size)
        self._queue.append(memoryview(start))
        self._queue.extend(memoryview(part) for part in parts if part)
        self._sizes.append(len(start) + size)
        self._wait(len(start) + size)

    def send_first(self, frame: bytes) -> None:
        """The same, before all frames that wait: what is short and belongs to no order."""
        if self.closed or self._finishing:
            return
        whole = header(len(frame)) + frame
        self._first.append(memoryview(whole))
        self._wait(len(whole))

    def _wait(self, size: int) -> None:
        self.unsent += size
        if not self._scheduled and not self._blocked:
            self._scheduled = True
            self._reactor.call_soon(self._on_turn)

    def _on_turn(self) -> None:
        self._scheduled = False
        if not self._blocked and not self.closed:
            self._flush()

    def _flush(self) -> None:
        try:
            self._write()
        except OSError as error:
            self._end(_reason(error))
            return
        if self._waits and not self._blocked:
            self._blocked = True
            self._reactor.add_writer(self._socket.fileno(), self._flush)
        elif self._blocked and not self._waits:
            self._blocked = False
            self._reactor.remove_writer(self._socket.fileno())
        if not self._waits and self.on_drained is not None:
            self.on_drained()
        if self._finishing and not self._waits:
            self._say_goodbye()

    @property
    def _waits(self) -> bool:
        """Whether anything is to be written."""
        return bool(self._queue or self._first)

    def _write(self) -> None:
        """Write until there is no room, or enough is written for this turn."""
        written = 0
        while written < _AT_ONCE:
            if self._first and not self._into and not self._insists:
                self._let_first_go()
            if not self._queue:
                return
            chunk = self._next_chunk()
            try:
                sent = self._socket.send(chunk)
            except (BlockingIOError, InterruptedError):
                # The same bytes have to come first next time: TLS insists.
                self._insists = True
                self._queue.appendleft(chunk)
                return
            self._insists = False
            written += sent
            self._count(sent)
            if sent < len(chunk):
                self._queue.appendleft(chunk[sent:])

    def _let_first_go(self) -> None:
        self._sizes.extendleft(len(frame) for frame in reversed(self._first))
        self._queue.extendleft(reversed(self._first))
        self._first.clear()

    def _count(self, sent: int) -> None:
        """So many bytes more are written."""
        self.unsent -= sent
        self._into += sent
        while self._sizes and self._into >= self._sizes[0]:
            self._into -= self._sizes.popleft()

    def _next_chunk(self) -> memoryview:
        """The first buffer of the queue, joined with those after it while it is short, and
        nothing waits for the end of a frame."""
        first = self._queue.popleft()
        if self._first or not self._queue or len(first) + len(self._queue[0]) > _CHUNK:
            return first
        pieces, size = [first], len(first)
        while self._queue and size + len(self._queue[0]) <= _CHUNK:
            pieces.append(self._queue.popleft())
            size += len(pieces[-1])
        return memoryview(b"".join(pieces))

    # -- leaving ----------------------------------------------------------------------

    def finish(self) -> None:
        """Send what waits, then close; nothing more is received.  A last message that says
        why arrives, if the other end takes it within seconds."""
        if self.closed or self._finishing:
            return
        self._finishing = True
        self._on_end = _ignore
        self._forget_frames()
        self._reactor.call_at(monotonic() + _PATIENCE, self.close)
        self.resume()
        if not self._waits:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        # To close with bytes unread would reset the connection, and lose what was sent.
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()  # it is gone already

    def _end(self, reason: str) -> None:
        if not self.closed:
            self.close()
            self._on_end(reason)

    def close(self) -> None:
        """End the connection now; what waits is lost."""
        if self.closed:
            return
        self.closed = True
        self._reactor.remove_reader(self._socket.fileno())
        self._reactor.remove_writer(self._socket.fileno())
        self._forget_frames()
        self._queue.clear()
        self._first.clear()
        self.unsent = 0
        self._socket.close()

    def _forget_frames(self) -> None:
        self._frames.clear()
        self._rest = b""

    def _leave_to_parent(self) -> None:
        """In a forked child: the connection is the parent's."""
        self.closed = True
        self._socket.close()


def _ignore(_: object) -> None:
    """Nobody listens."""


def _reason(error: OSError) -> str:
    return f"the connection broke: {error.strerror or error}"


_peers: weakref.WeakSet[Peer] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for peer in list(_peers):
        peer._leave_to_parent()
    _peers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
