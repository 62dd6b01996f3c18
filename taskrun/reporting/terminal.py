"""The terminal: the only place where a run writes to stdout and stderr.

Everybody hands over whole lines, under one lock, so no line is ever torn.  The progress
bar is the one thing that is not a line: it stands below all lines, is cleared before they
are written and drawn again after them, in the same write where both go to one terminal.

A reader that goes away (``taskrun exec | head``) is not an error of any call: the stream
is given up, ``broken`` says why, and the run can stop.

A reader that stays and reads nothing holds up the run, as it does any program.  From the
first signal on (:meth:`Terminal.hurry`) it has a short time, then it counts as gone.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, TypeAlias

from taskrun.reporting.text import Paint, encode

Target: TypeAlias = int | IO[Any] | None
CLEAR = b"\r\x1b[K"
SLICE = 0.1  # seconds between looks whether a signal has come
PATIENCE = 2.0  # seconds that a reader may read nothing, once there is a hurry


class Sink:
    """One stream: writes all it is given, whatever the descriptor is like.

    A target is a descriptor or a file; a file without a descriptor (a notebook's, a
    test's) is written through its own ``write``.  None, or a descriptor that is not
    open, takes everything and keeps nothing.
    """

    def __init__(self, target: Target) -> None:
        self.fd: int | None = None
        self._file: IO[Any] | None = None
        self._left = memoryview(b"")
        self._room = select.poll()
        self._hurries = False
        if target is None:
            return
        if not isinstance(target, int):
            target.flush()  # what was printed before us comes before us
        fd = target if isinstance(target, int) else _descriptor(target)
        if fd is None:
            self._file = target if not isinstance(target, int) else None
        elif _is_open(fd):
            self.fd = fd
            self._room.register(fd, select.POLLOUT)

    @property
    def is_terminal(self) -> bool:
        return self.fd is not None and os.isatty(self.fd)

    @property
    def is_utf8(self) -> bool:
        """Whether characters beyond ASCII can be shown, as far as Python knows."""
        encoding = getattr(self._file or sys.__stderr__, "encoding", None) or "ascii"
        return encoding.lower().replace("-", "") == "utf8"

    def write(self, data: bytes) -> None:
        """Write all of ``data``; raises OSError when that cannot be."""
        if self._file is not None:
            self._write_file(data)
        elif self.fd is not None:
            # An exception from a signal handler may come between two parts of a line;
            # what is left of it then goes first next time.
            self._left = memoryview(bytes(self._left) + data if self._left else data)
            while self._left:
                self._left = self._left[self._write_some(self.fd) :]

    def hurry(self) -> None:
        """Wait no longer than ``PATIENCE`` for a reader; a signal handler may say so."""
        self._hurries = True

    def give_up(self) -> None:
        """Take everything from now on, and keep nothing."""
        self.fd = self._file = None
        self._left = memoryview(b"")

    def _write_some(self, fd: int) -> int:
        try:
            if self._hurries:
                return self._write_in_time(fd)
            # A write that can do a part of its work is ended by a signal, and one that can
            # do nothing would go on after it.
            return os.write(fd, self._left) if self._room.poll(SLICE * 1000) else 0
        except BlockingIOError:  # somebody made it non-blocking
            return 0

    def _write_in_time(self, fd: int) -> int:
        """Write in a thread, which can be left behind: nothing else ends for certain a write
        that has room for a part only.  A piece at a time: a reader that reads has time anew."""
        done: list[int | OSError] = []
        piece = self._left[: select.PIPE_BUF]

        def write() -> None:
            try:
                done.append(os.write(fd, piece))
            except OSError as error:
                done.append(error)

        if self._room.poll(PATIENCE * 1000):
            writer = threading.Thread(target=write, daemon=True)
            try:
                writer.start()
            except RuntimeError as error:  # no thread is to be had
                raise OSError(0, str(error)) from error
            writer.join(PATIENCE)
        if not done:
            raise OSError(0, "nobody reads it")
        if isinstance(done[0], OSError):
            raise done[0]
        return done[0]

    def _write_file(self, data: bytes) -> None:
        assert self._file is not None
        is_text = hasattr(self._file, "encoding")
        try:
            self._file.write(data.decode("utf-8", "replace") if is_text else data)
            self._file.flush()
        except ValueError as error:  # the file was closed
            raise OSError(0, str(error)) from error


@contextmanager
def reserved_stdout() -> Iterator[int]:
    """A descriptor of stdout that nobody else has; whatever anything in this process writes to
    fd 1 meanwhile goes to stderr.  -1 where there is no stdout."""
    if sys.stdout is None or not _is_open(1):
        yield -1
        return
    sys.stdout.flush()
    reserved = os.dup(1)
    if _is_open(2):
        os.dup2(2, 1)
    try:
        yield reserved
    finally:
        sys.stdout.flush()
        os.dup2(reserved, 1)
        os.close(reserved)


class Terminal:
    """stdout, stderr and the bar, behind one lock.

    ``broken`` is empty until a stream cannot be written any more, then it says why;
    ``on_broken`` is called once with the same text, under the lock: it should only post.
    """

    def __init__(
        self,
        stdout: Target = 1,
        stderr: Target = 2,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.lock = threading.RLock()
        self.broken = ""
        self.on_broken: Callable[[str], None] | None = None
        self._sinks = {"stdout": Sink(stdout), "stderr": Sink(stderr)}
        self._environ = environ
        self._bar = b""
        self._shared = _same_terminal(self._sinks["stdout"], self._sinks["stderr"])

    # -- what it can do ---------------------------------------------------------------

    def is_terminal(self, stream: str) -> bool:
        return self._sinks[stream].is_terminal

    @property
    def in_one_place(self) -> bool:
        """Whether stdout and stderr are the same file, terminal, or pipe."""
        one, other = (sink.fd for sink in self._sinks.values())
        return one is not None and other is not None and os.path.sameopenfile(one, other)

    @property
    def has_bar(self) -> bool:
        """Whether a progress bar can be shown: on stderr, as usual."""
        return self.is_terminal("stderr") and self._environ.get("TERM") != "dumb"

    @property
    def is_utf8(self) -> bool:
        return self._sinks["stderr"].is_utf8

    def paint(self, stream: str) -> Paint:
        plain = self._environ.get("NO_COLOR") or self._environ.get("TERM") == "dumb"
        return Paint(self.is_terminal(stream) and not plain)

    def width(self) -> int:
        """Columns of the terminal; elsewhere what COLUMNS says, or 80."""
        fd = self._sinks["stderr"].fd
        try:
            columns = os.get_terminal_size(fd).columns if fd is not None else 0
        except OSError:  # not a terminal
            columns = 0
        if columns > 0:
            return columns
        said = self._environ.get("COLUMNS", "")
        return int(said) if said.isdecimal() and int(said) > 0 else 80

    # -- writing ----------------------------------------------------------------------

    def write_lines(self, stream: str, lines: bytes | str) -> None:
        """Write whole lines to ``stdout`` or ``stderr``; a missing last newline is added."""
        data = encode(lines) if isinstance(lines, str) else lines
        if not data:
            return
        if not data.endswith(b"\n"):
            data += b"\n"
        with self.lock:
            over_bar = self._bar and (stream == "stderr" or self._shared)
            self._write(stream, CLEAR + data + self._bar if over_bar else data)

    def write(self, stream: str, data: bytes) -> None:
        """Write what another run has written there: not always whole lines, and no bar."""
        with self.lock:
            self._write(stream, data)

    def set_bar(self, text: str) -> None:
        """Show ``text``, one line narrower than the terminal, below all lines; ``""``: none."""
        bar = encode(text)
        with self.lock:
            if bar != self._bar:
                self._bar = bar
                self._write("stderr", CLEAR + bar)

    def hurry(self) -> None:
        """The run is to end: a reader that reads nothing does not keep it.  A signal handler
        may say so, also in the middle of a write."""
        for sink in self._sinks.values():
            sink.hurry()

    def _write(self, stream: str, data: bytes) -> None:
        sink = self._sinks[stream]
        try:
            sink.write(data)
        except OSError as error:
            sink.give_up()
            self._break(f"cannot write to {stream}: {error.strerror or error}")

    def _break(self, reason: str) -> None:
        if self.broken:
            return
        self.broken = reason
        if self.on_broken is not None:
            self.on_broken(reason)


def _descriptor(file: IO[Any]) -> int | None:
    try:
        return file.fileno()
    except (OSError, AttributeError, ValueError):  # io.UnsupportedOperation is an OSError
        return None


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _same_terminal(one: Sink, other: Sink) -> bool:
    if not (one.is_terminal and other.is_terminal):
        return False
    assert one.fd is not None and other.fd is not None
    return os.fstat(one.fd).st_rdev == os.fstat(other.fd).st_rdev
