"""What calls write, in a process that is not ours: each call's own, told as records.

What goes through ``sys.stdout`` and ``sys.stderr`` is known by its thread.  Where the process
executes one call at a time, and nothing else, fd 1 and 2 are caught as well, so that C code
and subprocesses are heard; elsewhere what they write goes where the engine's worker writes.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any, Final, Protocol

from taskrun.ledger import STREAMS
from taskrun.messages import OUTPUT

SOON: Final = 0.05  # seconds after which whole lines of a running call are told


class Teller(Protocol):
    """Where records go."""

    def tell(self, record: tuple[Any, ...]) -> None: ...


class Streams(AbstractContextManager[None]):
    """The output of the calls of one thread, while it is entered; the executor's Marks."""

    def __init__(self, teller: Teller, *, alone: bool) -> None:
        self._teller = teller
        self._alone = alone and threading.current_thread() is threading.main_thread()
        self._pieces: tuple[list[bytes], list[bytes]] = ([], [])
        self._attempt: tuple[int, int] | None = None
        self._told = 0.0
        self._wrote = False
        self._files: list[_File] = []

    def __enter__(self) -> None:
        if self._alone:
            self._files = [_File(fd) for fd in (1, 2)]
        _enter(self)

    def __exit__(self, *_: object) -> None:
        _leave()
        for file in self._files:
            file.close()
        self._files = []

    def began(self, call: int, attempt: int) -> None:
        """What is written from now on is this attempt's."""
        self._attempt = (call, attempt)
        self._wrote = False

    def write(self, stream: int, data: bytes) -> None:
        """Python wrote ``data`` to stdout (0) or stderr (1)."""
        self._pieces[stream].append(data)
        if b"\n" in data and self._attempt is not None and monotonic() - self._told > SOON:
            self._tell()

    def ended(self, call: int, attempt: int, *, ended: bool = True) -> bool:
        """See ``execute.Marks``."""
        self._attempt = (call, attempt)
        for stream, file in enumerate(self._files):
            _flush_original(stream)
            data = file.read()
            if data:
                self._pieces[stream].append(data)
        self._tell()
        self._attempt = None
        return self._wrote

    def _tell(self) -> None:
        assert self._attempt is not None
        for name, pieces in zip(STREAMS, self._pieces, strict=True):
            if pieces:
                data = b"".join(pieces)
                pieces.clear()
                self._wrote = True
                self._teller.tell((OUTPUT, *self._attempt, name, data))
        self._told = monotonic()


class _File:
    """Stands in for fd 1 or 2 while it is open; what was written to it can be read."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before = os.dup(fd)
        self._file = _unnamed_file()
        self._at = 0
        os.dup2(self._file, fd)

    def read(self) -> bytes:
        """What came since the last read."""
        size = os.fstat(self._file).st_size
        if size <= self._at:
            return b""
        data = os.pread(self._file, size - self._at, self._at)
        self._at += len(data)
        return data

    def close(self) -> None:
        os.dup2(self._before, self._fd)
        os.close(self._before)
        os.close(self._file)


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        made = os.memfd_create("taskrun-output", os.MFD_CLOEXEC)
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            made = os.dup(file.fileno())
    return made


# -- sys.stdout and sys.stderr --------------------------------------------------------

_lock = threading.Lock()
_active: dict[int, Streams] = {}
_originals: list[Any] = []


def _enter(streams: Streams) -> None:
    with _lock:
        if not _active:
            _originals[:] = [sys.stdout, sys.stderr]
            sys.stdout, sys.stderr = _Divided(0), _Divided(1)
        _active[threading.get_ident()] = streams


def _leave() -> None:
    with _lock:
        del _active[threading.get_ident()]
        if not _active:
            sys.stdout, sys.stderr = _originals


def _flush_original(stream: int) -> None:
    if _originals and _originals[stream] is not None:
        _originals[stream].flush()


def _streams() -> Streams | None:
    """Whose output this thread writes; a thread that a call has started, if it is clear."""
    found = _active.get(threading.get_ident())
    if found is None and len(_active) == 1:
        found = next(iter(_active.values()), None)
    return found


class _Divided(io.TextIOBase):
    """A stream that goes apart by thread."""

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self.buffer = _Bytes(stream)

    divided = True
    encoding = "utf-8"
    errors = "backslashreplace"
    line_buffering = True

    def write(self, text: str) -> int:
        self.buffer.write(text.encode("utf-8", "backslashreplace"))
        return len(text)

    def flush(self) -> None:
        _flush_original(self._stream)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream + 1

    def reconfigure(self, **options: Any) -> None:
        """Nothing: it stays UTF-8, in lines."""


class _Bytes(io.RawIOBase):
    def __init__(self, stream: int) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        taken = bytes(data)
        streams = _streams()
        if streams is not None:
            streams.write(self._stream, taken)
            return len(taken)
        original = _originals[self._stream]
        if original is not None:
            original.write(taken.decode("utf-8", "replace"))
        return len(taken)
