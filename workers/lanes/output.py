"""What calls that share a process write, attributed by the code that writes it.

``sys.stdout`` and ``sys.stderr`` ask which call runs, and send what it writes as records, in
whole lines.  What C code and subprocesses write to descriptors 1 and 2 is the worker's.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any, Final

from taskrun.ledger import STREAMS
from taskrun.messages import OUTPUT
from taskrun.workers import native
from taskrun.workers.lanes.calls import LaneRunning
from taskrun.workers.outbox import Port

LONGEST: Final = 64 * 1024  # bytes of a line that are kept until it ends

Found = Callable[[], LaneRunning | None]


class LaneOutput:
    """Both streams of a worker; ``lock`` is held while a call's lines are cut and told."""

    def __init__(self, port: Port, lock: Any, found: Found, pipes: tuple[int, int]) -> None:
        self._port = port
        self._lock = lock
        self._found = found
        self._pipes = pipes

    def install(self) -> None:
        """From now on this process's output is taken."""
        for fd, pipe in enumerate(self._pipes, 1):
            os.dup2(pipe, fd)
        before = [getattr(sys, name, None) for name in STREAMS]
        self._own = [_lines_to(fd) for fd in (1, 2)]
        streams = [CallStream(number, self) for number in (0, 1)]
        for name, stream in zip(STREAMS, streams, strict=True):
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        _redirect_logging(before, streams)

    def close(self) -> None:
        """In a forked child: descriptors 1 and 2 are all it has."""
        sys.stdout, sys.stderr = self._own
        for pipe in self._pipes:
            os.close(pipe)

    def write(self, stream: int, data: bytes) -> None:
        """Take what the code that calls this writes."""
        running = self._found()
        if running is None or running.done:
            own = self._own[stream]
            own.flush()
            own.buffer.write(data)
            own.flush()
            return
        writer = stream, native.get_ident()  # print() writes a line and its end apart
        with self._lock:
            rests = running.rests
            if rests is None:
                rests = running.rests = {}
            data = rests.pop(writer, b"") + data
            end = data.rfind(b"\n") + 1
            if end < len(data) and len(data) - end < LONGEST:
                rests[writer] = data[end:]
                data = data[:end]
            if data:
                self._tell(running, stream, data)
        if data:
            self._port.flush()

    def end(self, running: LaneRunning) -> None:
        """Tell the rests of lines that a call has not ended."""
        rests, running.rests = running.rests, None
        for (stream, _), rest in (rests or {}).items():
            self._tell(running, stream, rest)

    def _tell(self, running: LaneRunning, stream: int, data: bytes) -> None:
        self._port.tell((OUTPUT, running.call, running.attempt, STREAMS[stream], data))

    def flush_own(self) -> None:
        """Write out what Python still holds back."""
        for own in self._own:
            own.flush()


class CallStream(io.TextIOBase):
    """``sys.stdout`` or ``sys.stderr`` of whichever call writes."""

    encoding = "utf-8"
    errors = "backslashreplace"
    line_buffering = True

    def __init__(self, number: int, output: LaneOutput) -> None:
        self._number = number
        self._output = output
        self.buffer = CallBuffer(number, output)

    @property
    def name(self) -> str:
        return f"<{STREAMS[self._number]}>"

    mode = "w"

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if text:
            self._output.write(self._number, text.encode("utf-8", "backslashreplace"))
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """Where a subprocess may write; that is shown as the worker's."""
        return self._number + 1

    def isatty(self) -> bool:
        return False

    def flush(self) -> None:
        """Nothing: whole lines are not held back, and others are never shown."""

    def close(self) -> None:
        """Nothing: other calls write here, too."""

    def reconfigure(self, **options: Any) -> None:
        """Nothing: it stays UTF-8, in lines."""


class CallBuffer(io.RawIOBase):
    """The bytes below a :class:`CallStream`."""

    def __init__(self, number: int, output: LaneOutput) -> None:
        self._number = number
        self._output = output

    def write(self, data: Any) -> int:
        written = bytes(data)
        if written:
            self._output.write(self._number, written)
        return len(written)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number + 1

    def close(self) -> None:
        """Nothing: other calls write here, too."""


def _lines_to(fd: int) -> io.TextIOWrapper:
    return open(fd, "w", buffering=1, closefd=False, errors="backslashreplace")


def _redirect_logging(before: list[Any], streams: list[CallStream]) -> None:
    """Let handlers that the task file has made write where its calls now do."""
    logging = sys.modules.get("logging")
    for reference in list(logging._handlerList) if logging is not None else ():
        handler = reference()
        for old, new in zip(before, streams, strict=True):
            if old is not None and getattr(handler, "stream", None) is old:
                handler.setStream(new)
