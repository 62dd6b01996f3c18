"""The descriptors of a worker on this machine, at the end of whoever started it."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from multiprocessing import Pipe
from typing import TYPE_CHECKING, Any

from taskrun.engines.capture import Emit, Outputs, Stream
from taskrun.ledger import Ledger, shared_file
from taskrun.reactor import Reactor
from taskrun.wire import FrameReader, FrameWriter
from taskrun.workers.settings import SLOTS, Birth

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


class Wires:
    """The descriptors of one worker on this machine: two Pipes, two outputs, a ledger.

    ``birth`` and ``handed_over`` are the worker's part of it.
    """

    def __init__(self, worker: int, reactor: Reactor, emit: Emit, lane: str) -> None:
        """Raises OSError where no more descriptors are to be had."""
        self._reactor = reactor
        self._listening = False
        token = os.urandom(8).hex().encode()  # no NUL in it, which begins a mark
        self.birth = Birth(worker, token, lane, SLOTS[lane])
        with _Opening() as opening:
            self._open(opening, token, emit)
            self.handed_over = opening.keep_own_ends()

    def _open(self, opening: _Opening, token: bytes, emit: Emit) -> None:
        self._calls, self._control = opening.pipe(), opening.pipe()
        outputs = opening.output(), opening.output()
        self.ledger = opening.ledger()
        streams = [Stream(fd, n, token, self.ledger, emit) for n, fd in enumerate(outputs)]
        self.outputs = Outputs((streams[0], streams[1]), self._reactor)
        for end in (self._calls, self._control):
            os.set_blocking(end.fileno(), False)
        self.reader = FrameReader(self._calls.fileno())
        self.control_reader = FrameReader(self._control.fileno())
        self._writer = FrameWriter(self._calls.fileno(), self._reactor)
        self._control_writer = FrameWriter(self._control.fileno(), self._reactor)
        self.send_calls, self.send_control = self._writer.send, self._control_writer.send

    def listen(self, on_calls: Callable[[], None], on_control: Callable[[], None]) -> None:
        """Begin to read the Pipes."""
        self._on_calls = on_calls
        self._reactor.add_reader(self._calls.fileno(), on_calls)
        self._reactor.add_reader(self._control.fileno(), on_control)
        self._listening = True

    def pause(self) -> None:
        """Read the call Pipe and the outputs no more for now: the worker has to wait."""
        self._reactor.remove_reader(self._calls.fileno())
        self.outputs.pause()

    def resume(self) -> None:
        """Read them again."""
        if self._listening:
            self._reactor.add_reader(self._calls.fileno(), self._on_calls)
        self.outputs.resume()

    def stop_listening(self) -> None:
        """Read the Pipes no more; what the outputs hold still comes."""
        self._listening = False
        for end in (self._calls, self._control):
            self._reactor.remove_reader(end.fileno())

    def close(self) -> None:
        """Close everything."""
        self.stop_listening()
        self._writer.close()
        self._control_writer.close()
        self._calls.close()
        self._control.close()
        self.outputs.close()
        self.ledger.close()

    def await_end(self, seconds: float) -> None:
        """Wait until the worker has let go of its call Pipe, but not for long."""
        poll = select.poll()
        poll.register(self._calls, 0)  # the other end's closing is told in any case
        poll.poll(seconds * 1000)


class _Opening:
    """Descriptors while they are being opened: all are closed if one cannot be had."""

    def __init__(self) -> None:
        self._own: list[Any] = []
        self._theirs: list[int] = []
        self._kept = False

    def pipe(self) -> Connection:
        own, theirs = Pipe()
        self._own.append(own.close)
        self._theirs.append(os.dup(theirs.fileno()))
        theirs.close()
        return own

    def output(self) -> int:
        own, theirs = os.pipe()
        self._own.append(lambda: os.close(own))
        self._theirs.append(theirs)
        return own

    def ledger(self) -> Ledger:
        fd = shared_file()
        self._theirs.append(fd)
        ledger = Ledger(fd)
        self._own.append(ledger.close)
        return ledger

    def keep_own_ends(self) -> list[int]:
        """All went well; gives the worker's ends."""
        self._kept = True
        return self._theirs

    def __enter__(self) -> _Opening:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            for close in self._own:
                close()
            for fd in self._theirs:
                os.close(fd)
