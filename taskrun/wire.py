"""Frames on a Pipe: a length, then so many bytes, exactly as ``multiprocessing.connection``.

The length is four bytes, big-endian and signed; -1 announces eight more bytes, unsigned,
for what is longer than 2 GiB.  The coordinator's ends do not block: what cannot be written
yet waits in a queue, and what has been read of a frame waits for the rest of it.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol

from taskrun.errors import WireError

READ_SIZE = 64 * 1024  # of a larger one the buffer would be mapped afresh each time: 12 us
MAX_FRAME = 64 * 1024**3
_SHORT = struct.Struct("!i")
_LONG = struct.Struct("!Q")
_LARGEST_SHORT = 0x7FFFFFFF
_JOINED = 16 * 1024  # shorter payloads are copied behind their header: one buffer, not two
_MAX_BUFFERS = 64  # for one writev; IOV_MAX is 1024 nearly everywhere, 16 at least


class Selector(Protocol):
    """What a FrameWriter needs of the reactor."""

    def add_writer(self, fd: int, callback: Callable[[], object]) -> None: ...

    def remove_writer(self, fd: int) -> None: ...


def header(size: int) -> bytes:
    """What announces a frame of ``size`` bytes."""
    if size <= _LARGEST_SHORT:
        return _SHORT.pack(size)
    return _SHORT.pack(-1) + _LONG.pack(size)


class Decoder:
    """Bytes in, in pieces of any size; whole frames out."""

    def __init__(self, most: int = MAX_FRAME) -> None:
        """``most``: bytes that a frame may have."""
        self.most = most
        self._pieces: list[bytes | memoryview] = []
        self._have = 0
        self._need = 4  # nothing can be done with less

    def feed(self, data: bytes) -> list[memoryview]:
        """The frames that ``data`` completes.  Raises WireError for an absurd length."""
        self._pieces.append(data)
        self._have += len(data)
        if self._have < self._need:
            return []
        # A long frame is joined once, when all of it is there: the cost stays linear.
        buffer = memoryview(b"".join(self._pieces) if len(self._pieces) > 1 else data)
        frames: list[memoryview] = []
        start, end = 0, len(buffer)
        while True:
            body, self._need = _measure(buffer, start, end, self.most)
            if end - start < self._need:
                break
            frames.append(buffer[start + body : start + self._need])
            start += self._need
        # A copy of the rest, so that a small piece does not keep a large buffer alive.
        self._pieces = [bytes(buffer[start:])] if start < end else []
        self._have = end - start
        return frames


def _measure(buffer: memoryview, start: int, end: int, most: int) -> tuple[int, int]:
    """Where the body of the frame at ``start`` begins, and how long the frame is with its
    header; as far as that is known, else what must be there to know more."""
    if end - start < 4:
        return 4, 4
    (size,) = _SHORT.unpack_from(buffer, start)
    body = 4
    if size == -1:
        body = 12
        if end - start < body:
            return body, body
        (size,) = _LONG.unpack_from(buffer, start + 4)
    if not 0 <= size <= most:
        raise WireError(f"a frame cannot have {size} bytes: the other end is not a taskrun Pipe")
    return body, body + size


class FrameReader:
    """Reads frames from a descriptor that does not block.

    ``at_end``: the other end is gone.  ``drained``: the last read found nothing.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.at_end = False
        self.drained = False
        self._decoder = Decoder()

    def read(self) -> list[memoryview]:
        """The frames that one read completes.  Raises WireError for what is no frame."""
        try:
            data = os.read(self.fd, READ_SIZE)
            self.at_end = not data
        except BlockingIOError:
            data = b""
        except ConnectionError:
            data, self.at_end = b"", True
        self.drained = not data
        return self._decoder.feed(data) if data else []


class FrameWriter:
    """Writes frames to a descriptor that does not block; what does not fit waits.

    Nobody is told when the other end is gone: that is seen where its process is watched.
    """

    def __init__(self, fd: int, selector: Selector) -> None:
        self.fd = fd
        self.broken = False
        self._selector = selector
        self._buffers: deque[memoryview] = deque()

    @property
    def pending(self) -> int:
        """How many bytes wait."""
        return sum(len(buffer) for buffer in self._buffers)

    def send(self, payload: bytes | memoryview) -> None:
        """Send one frame, now or as soon as there is room."""
        if self.broken:
            return
        waits = bool(self._buffers)
        if len(payload) <= _JOINED:
            self._buffers.append(memoryview(header(len(payload)) + payload))
        else:
            self._buffers.append(memoryview(header(len(payload))))
            self._buffers.append(memoryview(payload))
        if not waits:
            self._write()
            if self._buffers:
                self._selector.add_writer(self.fd, self._on_writable)

    def close(self) -> None:
        """Forget what waits; the descriptor itself is not closed."""
        self.broken = True
        if self._buffers:
            self._buffers.clear()
            self._selector.remove_writer(self.fd)

    def _on_writable(self) -> None:
        self._write()
        if not self._buffers:
            self._selector.remove_writer(self.fd)

    def _write(self) -> None:
        buffers = self._buffers
        while buffers:
            try:
                written = os.writev(self.fd, [buffers[i] for i in range(_few(buffers))])
            except BlockingIOError:
                return
            except ConnectionError:
                self.broken = True
                buffers.clear()
                return
            while written:
                first = buffers.popleft()
                if written < len(first):
                    buffers.appendleft(first[written:])
                    return
                written -= len(first)
            while buffers and not buffers[0]:
                buffers.popleft()


def _few(buffers: deque[memoryview]) -> int:
    return min(len(buffers), _MAX_BUFFERS)


def send_frame(fd: int, payload: bytes | memoryview, written: list[int] | None = None) -> None:
    """Write one whole frame to a descriptor that blocks.

    What a signal handler raises meanwhile is raised when all is written: after a part of a
    frame, nothing could be sent any more.  ``written`` gets how many bytes were, and stays
    empty where that was none.
    """
    start = header(len(payload))
    total = len(start) + len(payload)
    counts: list[int] = [] if written is None else written
    raised: BaseException | None = None
    while True:
        try:
            while (done := sum(counts)) < total:
                parts = (start[done:], payload)
                if done >= len(start):
                    parts = (b"", memoryview(payload)[done - len(start) :])
                # In one step, into which no handler comes: none of what was written is missed.
                counts.extend(map(os.writev, (fd,), (parts,)))
            break
        except BaseException as error:
            # What the system says has a number, and what a handler raises has none.
            if not counts or (isinstance(error, OSError) and error.errno is not None):
                raise
            raised = error
    if raised is not None:
        try:
            raise raised
        finally:
            raised = None  # else it would be in a cycle with its own traceback
