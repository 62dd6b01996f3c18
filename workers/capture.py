"""What a call writes to fd 1 and 2, whoever writes it: Python, C code, a subprocess.

Both are Pipes that only the coordinator reads.  At the end of a call the worker writes a
mark into them, so that the coordinator knows whose the bytes before it are, but only where
the call may have written anything.  That is known for certain without a mark: what is in the
Pipe and what the coordinator has taken out of it (see ``Ledger.reading``) is as much as there
was behind the last mark.
"""

from __future__ import annotations

import array
import fcntl
import io
import os
import select
import struct
import sys
import termios
from typing import Any, Final

from taskrun.ledger import STREAMS, Ledger

_reconfigure = io.TextIOWrapper.reconfigure

# A mark: NUL, the worker's token, the call, its attempt, and whether that has ended or
# only waits.  Written at once and shorter than PIPE_BUF, so it stays in one piece.
_REST = struct.Struct("!QI?")
TOKEN_BYTES: Final = 16
MARK_BYTES: Final = 1 + TOKEN_BYTES + _REST.size
_owner, F_GETOWN = fcntl.fcntl, fcntl.F_GETOWN


def mark(token: bytes, call: int, attempt: int, ended: bool) -> bytes:
    """The mark behind what an attempt wrote."""
    return b"\0" + token + _REST.pack(call, attempt & 0xFFFFFFFF, ended)


def unpack_mark(data: bytes, start: int) -> tuple[int, int, bool]:
    """(call, attempt, ended) of the mark that begins at ``start``."""
    call, attempt, ended = _REST.unpack_from(data, start + 1 + TOKEN_BYTES)
    return call, attempt, ended


class Written:
    """How much was ever written into the two Pipes; asked after every call."""

    def __init__(self, ledger: Ledger, pipes: tuple[int, int]) -> None:
        self._ledger = ledger
        self._pipes = pipes
        self._count = array.array("i", [0])
        self._totals: list[int] = [0, 0]  # of each with the last mark, in bytes; below 0: not known
        self._words = [0, 0]  # of the ledger, when the coordinator has taken all that

    @property
    def is_taken(self) -> bool:
        """Whether the coordinator has taken as much as there is known to be.  Where both Pipes
        were empty before this is asked, nothing else was written."""
        return self._ledger.has_taken(self._words)

    def has_grown(self) -> bool:
        """Whether anything may have been written since this was asked last, but for marks: then
        one is to be written now."""
        totals = [self._total(stream, pipe) for stream, pipe in enumerate(self._pipes)]
        if totals == self._totals and min(totals) >= 0:
            return False
        self._totals = [total + MARK_BYTES if total >= 0 else total for total in totals]
        self._words = [2 * total for total in self._totals]
        return True

    def _total(self, stream: int, pipe: int) -> int:
        """All bytes so far; -1: that cannot be told, since the coordinator is reading."""
        before = self._ledger.taken(stream)
        fcntl.ioctl(pipe, termios.FIONREAD, self._count)
        if before & 1 or self._ledger.taken(stream) != before:
            return -1
        return (before >> 1) + self._count[0]


class Capture:
    """The worker's side of its two output Pipes."""

    def __init__(self, ledger: Ledger, token: bytes, pipes: tuple[int, int]) -> None:
        """``pipes``: their writing ends, which stay open here as private copies."""
        self._ledger = ledger
        self._token = token
        self._pipes = pipes
        for fd, pipe in enumerate(pipes, 1):
            os.dup2(pipe, fd)
        self._own = _claim(pipes)
        self._reconfigured = False
        self._streams = [
            self._watched(_text_stream(fd, name)) for fd, name in enumerate(STREAMS, 1)
        ]
        self._looks = [(stream.encoding, stream.errors) for stream in self._streams]
        self._flush_out, self._flush_err = (stream.flush for stream in self._streams)
        self._written = Written(ledger, pipes)
        self._readers = [fd for fd in map(_reading_end, pipes) if fd is not None]
        # Their readiness is asked for after every call, which costs less here than in a poll.
        self._poller = getattr(select, "epoll", select.poll)()
        for fd in self._readers:
            self._poller.register(fd, select.POLLIN)
        self._unread = self._poller.poll
        sys.stdout, sys.stderr = self._streams
        sys.__stdout__, sys.__stderr__ = self._streams  # type: ignore[misc]

    def ended(self, call: int, attempt: int, *, ended: bool = True) -> bool:
        """The attempt has ended (or waits): mark what it wrote; gives whether it may have.

        Undoes what it did to fd 1 and 2 and to sys.stdout and sys.stderr.
        """
        try:
            in_place = sys.stdout is self._streams[0] and sys.stderr is self._streams[1]
        except AttributeError:  # it was deleted
            in_place = False
        if not in_place or self._reconfigured:
            self._restore_streams()
        try:
            self._flush_out()
            self._flush_err()
        except (OSError, ValueError):
            self._look()
            self._recover_streams()
        self._look()
        if not self._unread(0) and self._readers and self._written.is_taken:
            return False
        if not self._written.has_grown():
            return False
        data = mark(self._token, call, attempt, ended)
        for pipe in self._pipes:
            _write_whole(pipe, data)
        return True

    def flush(self) -> None:
        """Write out what Python still holds back."""
        self._flush_out()
        self._flush_err()

    def close(self) -> None:
        """In a forked child: only fd 1 and 2 are its own."""
        for fd in (*self._pipes, *self._readers):
            os.close(fd)
        if hasattr(self._poller, "close"):
            self._poller.close()

    def _look(self) -> None:
        """After every call: a later one, however short, would write to what is there instead."""
        try:
            if _owner(1, F_GETOWN) == self._own == _owner(2, F_GETOWN):
                return
        except OSError:
            pass  # it was closed
        self._restore_descriptors()

    def _restore_descriptors(self) -> None:
        for fd, pipe in enumerate(self._pipes, 1):
            os.dup2(pipe, fd)

    def _restore_streams(self) -> None:
        for stream in (getattr(sys, name, None) for name in STREAMS):
            if stream is not None and stream not in self._streams:
                _flush_foreign(stream)
        self._renew_closed()
        if self._reconfigured:
            self._reconfigured = False
            for stream, (encoding, errors) in zip(self._streams, self._looks, strict=True):
                _reconfigure(
                    stream, encoding=encoding, errors=errors, newline="\n",
                    line_buffering=True, write_through=False,
                )  # fmt: skip

    def _recover_streams(self) -> None:
        """They could not be flushed: closed, detached, or made non-blocking."""
        self._renew_closed()
        for fd, stream in enumerate(self._streams, 1):
            os.set_blocking(fd, True)
            stream.flush()

    def _renew_closed(self) -> None:
        for number, name in enumerate(STREAMS):
            if not _is_fit(self._streams[number], number + 1):
                self._streams[number] = self._watched(_text_stream(number + 1, name))
        self._flush_out, self._flush_err = (stream.flush for stream in self._streams)
        sys.stdout, sys.stderr = self._streams

    def _watched(self, stream: Any) -> Any:
        """``stream``, which says when a call reconfigures it: looking costs more, every time."""

        def reconfigure(**changes: Any) -> None:
            self._reconfigured = True
            _reconfigure(stream, **changes)

        stream.reconfigure = reconfigure
        return stream


class Uncaptured(Capture):
    """Of a worker whose calls write where its parent process does."""

    def __init__(self, pipes: tuple[int, int]) -> None:
        for pipe in pipes:
            os.close(pipe)

    def ended(self, call: int, attempt: int, *, ended: bool = True) -> bool:
        """Nobody wants to know."""
        return False

    def flush(self) -> None:
        """Write out what Python still holds back."""
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                _flush_foreign(stream)

    def close(self) -> None:
        """Nothing is open."""


def expect_pipes() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` anew, for the Pipes that a worker will have there.

    A stream asks only when it is made whether it can be sought.  This interpreter's own were
    made for /dev/null, and fail in a Pipe: ``sys.stdout.reconfigure(encoding="utf-8")`` does.
    """
    held: list[int] = []
    try:
        held += os.pipe()
        for fd, name in enumerate(STREAMS, 1):
            held.append(os.dup(fd))
            os.dup2(held[1], fd)
            encoding = getattr(sys, name).encoding
            stream = open(fd, "w", 1, encoding, "backslashreplace", closefd=False)  # noqa: SIM115
            os.dup2(held[-1], fd)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    except OSError:
        pass  # too few descriptors: those that there are will do
    finally:
        for fd in held:
            os.close(fd)


def _reading_end(pipe: int) -> int | None:
    """The other end of a Pipe, to be polled and never read; None where it is not to be had."""
    try:
        return os.open(f"/proc/self/fd/{pipe}", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None


def _claim(pipes: tuple[int, int]) -> int:
    """Make the Pipes known as ours, as cheaply as it can be asked; gives what the answer is.

    A descriptor's owner is who would get a signal, if that were asked for.  Where a Pipe has
    none, nothing is known as ours, and put back after every call.
    """
    own = os.getpid()
    try:
        for pipe in pipes:
            _owner(pipe, fcntl.F_SETOWN, own)
    except OSError:
        return -1
    return own


def _text_stream(fd: int, name: str) -> Any:
    """The interpreter's own stream for ``fd`` as the template set it up, else a new one.

    What the task file kept of it, in a logging handler say, is then the same object.
    """
    stream = getattr(sys, f"__{name}__", None)
    if isinstance(stream, io.TextIOWrapper) and _is_fit(stream, fd) and stream.line_buffering:
        return stream
    return open(fd, "w", buffering=1, closefd=False, errors="backslashreplace")


def _is_fit(stream: Any, fd: int) -> bool:
    try:
        return bool(stream.fileno() == fd)
    except (OSError, ValueError):  # closed or detached
        return False


def _flush_foreign(stream: Any) -> None:
    try:
        stream.flush()
    except Exception:
        pass  # it is whatever the task put there; all that can be done was tried


def _write_whole(pipe: int, data: bytes) -> None:
    while True:
        try:
            os.write(pipe, data)  # all or nothing: it is shorter than PIPE_BUF
            return
        except BlockingIOError:  # the task, or a program it ran, made the Pipe non-blocking
            poll = select.poll()
            poll.register(pipe, select.POLLOUT)
            poll.poll()
