"""The output of a run, as far as it is kept, and those who follow it."""

from __future__ import annotations

from collections import deque
from typing import Any, Final, Protocol

from taskrun.serving.talk import STDERR, STDOUT, said

MOST: Final = 1024 * 1024  # bytes of a run's output that are kept
LONGEST: Final = 64 * 1024  # bytes of a line that are waited for
AHEAD: Final = 8 * 1024 * 1024  # bytes that wait for one who follows


class Peer(Protocol):
    """A connection; see ``transport.peer``."""

    unsent: int
    closed: bool
    on_drained: Any

    def send(self, *parts: bytes | memoryview) -> None: ...


class Kept:
    """The last of what a run wrote, in whole lines, in the order in which it came."""

    def __init__(self, most: int = MOST) -> None:
        self.begin = self.end = 0  # numbers of the first piece kept, and of the next one
        self.lines = 0  # that came
        self.lines_gone = 0  # ... and are not kept any more
        self._most = most
        self._size = 0
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._tails = {STDOUT: b"", STDERR: b""}

    def write(self, stream: int, data: bytes) -> None:
        """This came; what is after its last newline waits for the rest of the line."""
        whole, newline, tail = (self._tails[stream] + data).rpartition(b"\n")
        if len(tail) > LONGEST:
            whole, newline, tail = whole + newline + tail, b"", b""
        self._tails[stream] = tail
        self._keep(stream, whole + newline)

    def finish(self) -> None:
        """Nothing more comes."""
        for stream, tail in self._tails.items():
            self._keep(stream, tail)
            self._tails[stream] = b""

    def _keep(self, stream: int, data: bytes) -> None:
        if not data:
            return
        self._pieces.append((stream, data))
        self.end += 1
        self.lines += data.count(b"\n")
        self._size += len(data)
        while self._size > self._most and len(self._pieces) > 1:
            gone = self._pieces.popleft()[1]
            self._size -= len(gone)
            self.begin += 1
            self.lines_gone += gone.count(b"\n")

    def piece(self, number: int) -> tuple[int, bytes]:
        """The stream and the bytes of a piece that is kept."""
        return self._pieces[number - self.begin]


class Follower:
    """One who follows a run from the beginning of what is kept.

    Nobody waits for him: what he does not take in time goes by, and he is told how much.
    """

    def __init__(self, kept: Kept, peer: Peer) -> None:
        self._kept = kept
        self._peer = peer
        self._next = 0  # piece
        self._lines = 0  # that he got, or was told of
        self._status: int | None = None
        peer.on_drained = self.pump

    def pump(self) -> None:
        """Tell him what is new, as much as he takes."""
        kept, peer = self._kept, self._peer
        if self._next < kept.begin:
            if peer.unsent > AHEAD:
                return
            peer.send(said(skipped=kept.lines_gone - self._lines))
            self._next, self._lines = kept.begin, kept.lines_gone
        while self._next < kept.end:
            if peer.unsent > AHEAD:
                return
            stream, data = kept.piece(self._next)
            peer.send(bytes([stream]), data)
            self._next += 1
            self._lines += data.count(b"\n")
        if self._status is not None:
            # He closes when he has heard it: who reads slowly has all the time for what waits.
            peer.on_drained = None
            peer.send(said(ended=self._status))

    def ended(self, status: int) -> None:
        """The run has ended, and written all."""
        self._status = status
        self.pump()
