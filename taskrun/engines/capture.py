"""Whose is it: what comes out of a worker's two output Pipes, attributed to its calls.

The worker writes a mark behind what an attempt wrote (see ``workers.capture``): the bytes
before a mark are certain.  Bytes behind the last mark, of a call that is still at work,
are shown as they come, and to show them under the wrong name would be worse than late.
They are attempt X's if X is executing *now*, was executing *before* the Pipe was last seen
empty (or as much as it can hold was read), and no mark came: an attempt that ended before
X began would have left its mark.  From then on, all bytes up to the next mark are X's.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from time import monotonic
from typing import Final, TypeAlias

from taskrun.ledger import STREAMS, Ledger, executing_at
from taskrun.reactor import Reactor, Timer
from taskrun.workers.capture import MARK_BYTES, unpack_mark

Attempt: TypeAlias = tuple[int, int]
Emit: TypeAlias = Callable[[Attempt | None, str, bytes], None]

READ_SIZE: Final = 256 * 1024  # per stream and turn of the loop
# Wider than the default of 64 KiB, but not by so much that a few dozen workers use up what
# one user's Pipes may hold together (64 MiB on Linux).
PIPE_SIZE: Final = 256 * 1024
AGAIN: Final = 0.002  # seconds until bytes that nobody could be named for are looked at again
_LARGEST_PIPE: Final = 1024 * 1024
_MOST_READS: Final = 1 + _LARGEST_PIPE // READ_SIZE  # until what was there has been read


class Stream:
    """One output Pipe of a worker."""

    def __init__(self, fd: int, number: int, token: bytes, ledger: Ledger, emit: Emit) -> None:
        self.fd = fd
        self.at_end = False
        self._number = number
        self._name = STREAMS[number]
        self._start_of_mark = b"\0" + token
        self._ledger = ledger
        self._emit = emit
        self._capacity = _widened(fd)
        self._marked: set[Attempt] = set()  # ended, by its mark; nobody has asked yet
        self._owner: Attempt | None = None  # whose all is up to the next mark
        self._held: list[bytes] = []  # behind the last mark; whose is not known yet
        self._partial = b""  # may be the first bytes of a mark
        self._moment = -1  # of the ledger, before `_since` bytes were read
        self._since = 0

    @property
    def undecided(self) -> bool:
        """Whether it holds bytes that it can attribute to nobody yet."""
        return bool(self._held)

    def read(self) -> bool:
        """One read, and what it says; False where there was nothing to read."""
        before = self._ledger.moment
        self._ledger.reading(self._number)
        data = self._read()
        self._ledger.have_read(self._number, len(data))
        if data:
            self._take(data)
        if self._held:
            self._decide(before, len(data), empty=len(data) < READ_SIZE)
        return bool(data)

    def _read(self) -> bytes:
        try:
            data = os.read(self.fd, READ_SIZE)
        except BlockingIOError:
            return b""
        self.at_end = not data
        return data

    def _take(self, data: bytes) -> None:
        """Take the marks out of ``data`` and give away what they decide."""
        data = self._partial + data if self._partial else data
        start = 0
        at = data.find(self._start_of_mark)
        while at >= 0 and at + MARK_BYTES <= len(data):
            call, attempt, ended = unpack_mark(data, at)
            self._give(data[start:at], (call, attempt))
            if ended:
                self._marked.add((call, attempt))
            self._owner = None
            start = at + MARK_BYTES
            at = data.find(self._start_of_mark, start)
        end = at if at >= 0 else len(data) - self._length_of_partial(data, start)
        self._partial = data[end:]
        if start < end:
            rest = data[start:end] if start or end < len(data) else data
            if self._owner is not None:
                self._emit(self._owner, self._name, rest)
            else:
                self._held.append(rest)

    def _length_of_partial(self, data: bytes, start: int) -> int:
        """How many bytes at the end of ``data`` may be the beginning of a mark."""
        at = data.rfind(b"\0", max(start, len(data) - len(self._start_of_mark)))
        if at < 0 or not self._start_of_mark.startswith(data[at:]):
            return 0
        return len(data) - at

    def _give(self, data: bytes, to: Attempt | None) -> None:
        held, self._held = self._held, []
        for piece in (*held, data):
            if piece:
                self._emit(to, self._name, piece)

    def _decide(self, before: int, size: int, *, empty: bool) -> None:
        """Find out whose the held bytes are; see the module's own text."""
        if before != self._moment:
            self._moment, self._since = before, 0
        self._since += size
        now = self._ledger.moment
        if now != self._moment:
            self._moment, self._since = now, 0
        elif empty or self._since >= self._capacity:
            # While nothing is executed nobody marks the end: that has no owner.
            self._owner = executing_at(now)
            self._give(b"", self._owner)

    # -- ends -------------------------------------------------------------------------

    def read_to_mark(self, attempt: Attempt) -> None:
        """Read until the end of an attempt that has ended and left a mark."""
        for _ in range(_MOST_READS):  # it is in the Pipe by now
            if attempt in self._marked or not self.read():
                break
        self._marked.discard(attempt)

    def drain(self) -> None:
        """Read what is there, but not for ever: what follows comes as fast."""
        for _ in range(_MOST_READS):
            if not self.read():
                break

    def read_the_last(self, executing: Attempt | None) -> None:
        """The worker is dead: read what it left; what has no mark was ``executing``'s."""
        self.drain()  # a process that outlives it may write on
        partial, self._partial = self._partial, b""
        self._give(partial, executing)


class Outputs:
    """Both output Pipes of a worker, on the reactor."""

    def __init__(self, streams: tuple[Stream, Stream], reactor: Reactor) -> None:
        self._streams = streams
        self._reactor = reactor
        self._timers: dict[int, Timer] = {}
        for stream in streams:
            os.set_blocking(stream.fd, False)
        self.resume()

    def _reader(self, stream: Stream) -> Callable[[], None]:
        return lambda: self._read(stream)

    def _read(self, stream: Stream) -> None:
        stream.read()
        if stream.at_end:
            self._reactor.remove_reader(stream.fd)
        elif stream.undecided and stream.fd not in self._timers:
            self._timers[stream.fd] = self._reactor.call_at(
                monotonic() + AGAIN, lambda: self._read_again(stream)
            )

    def _read_again(self, stream: Stream) -> None:
        del self._timers[stream.fd]
        if stream.undecided:
            self._read(stream)

    def read_to_mark(self, attempt: Attempt) -> None:
        """See :meth:`Stream.read_to_mark`."""
        for stream in self._streams:
            stream.read_to_mark(attempt)

    def drain(self) -> None:
        """See :meth:`Stream.drain`."""
        for stream in self._streams:
            stream.drain()

    def pause(self) -> None:
        """Read no more for now: whoever writes has to wait."""
        for stream in self._streams:
            self._reactor.remove_reader(stream.fd)

    def resume(self) -> None:
        """Read again."""
        for stream in self._streams:
            if not stream.at_end:
                self._reactor.add_reader(stream.fd, self._reader(stream))

    def read_the_last(self, executing: Attempt | None) -> None:
        """See :meth:`Stream.read_the_last`."""
        for stream in self._streams:
            stream.read_the_last(executing)

    def close(self) -> None:
        """Close both Pipes."""
        for timer in self._timers.values():
            timer.cancel()
        for stream in self._streams:
            self._reactor.remove_reader(stream.fd)
            os.close(stream.fd)


def _widened(fd: int) -> int:
    """Make a Pipe hold more, where that is allowed; gives how much it holds."""
    if not hasattr(fcntl, "F_SETPIPE_SZ"):
        return _LARGEST_PIPE
    try:
        return fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
