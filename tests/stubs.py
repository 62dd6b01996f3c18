"""Nodes that are nothing but a connection each: they join, beat, and answer calls themselves.

    python tests/stubs.py HOST:PORT KEYFILE COUNT

They say all that a node says, so that a coordinator can be measured with a thousand of them;
a worker of theirs answers a call with its first argument.  Ends with its standard input.
"""

from __future__ import annotations

import itertools
import pickle
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic, time
from typing import Any

from taskrun import messages as m
from taskrun import transport
from taskrun.addresses import parse
from taskrun.errors import DialError
from taskrun.network import channels as ch
from taskrun.network.conversation import LEAVE, Conversation, Data
from taskrun.network.joining import Hello, Welcome, hello_frame, read_answer
from taskrun.reactor import Reactor
from taskrun.values import encode

ROLE = b"node"
AGAIN = 0.5  # seconds until one that was not let in tries again
BEATS = 6  # in a lease, as nodes have it
MOST_BEAT = 2.5  # seconds

Dial = Callable[[Callable[[Any], object], Callable[[DialError], object]], object]


class Stub:
    """One node with one worker at a time."""

    def __init__(self, reactor: Reactor, name: str, dial: Dial) -> None:
        self.joined = False
        self.peer: Any = None
        self.talk = Conversation(self.on_message)
        self._reactor = reactor
        self._name = name
        self._dial = dial
        self._generations: dict[int, int] = {}  # of each worker's frames
        self._connect()

    def _connect(self) -> None:
        self._dial(self._on_peer, lambda error: self._later(AGAIN, self._connect))

    def _later(self, seconds: float, callback: Callable[[], object]) -> None:
        self._reactor.call_at(monotonic() + seconds * random.uniform(0.8, 1.2), callback)

    def _on_peer(self, peer: Any) -> None:
        self.peer = peer
        peer.listen(self._on_answer, self._on_end)
        peer.send(hello_frame(Hello(ch.Offer(self._name, 1, {}), "", 0)))

    def _on_answer(self, frame: memoryview) -> None:
        answer = read_answer(frame)
        assert isinstance(answer, Welcome), answer
        self.joined = True
        self.peer.listen(self._on_frame, self._on_end)
        self.talk.attach(self.peer, 0)
        self._beat(min(MOST_BEAT, answer.lease / BEATS))

    def _on_end(self, reason: str) -> None:
        self.joined = False
        self.talk.detach()

    def _beat(self, pause: float) -> None:
        if self.joined:
            self.talk.beat(monotonic())
            self._later(pause, lambda: self._beat(pause))

    def _on_frame(self, frame: memoryview) -> None:
        if frame[0] == LEAVE:
            self.peer.close()
            self._on_end("told to leave")
        else:
            self.talk.take(frame)

    # -- what a node does -------------------------------------------------------------

    def on_message(self, key: int, channel: int, data: Data) -> None:
        """The coordinator says something."""
        if channel == ch.JOB:
            self.talk.send(ch.NODE, ch.PREPARED, b"/nowhere")
        elif channel == ch.START:
            for worker in pickle.loads(data)[0]:
                self._generations[worker] = 0
                self.say(worker, (m.READY, 1))
        elif channel == ch.CALLS:
            self.answer(ch.worker_of(key), pickle.loads(data))
        elif channel == ch.SIGNAL:
            self.end(ch.worker_of(key), "killed by a signal")

    def answer(self, worker: int, records: list[tuple[Any, ...]]) -> None:
        """A worker got these records."""
        for record in records:
            if record[0] == m.CALL:
                _, call, attempt, _, _, args, _ = record
                value = args[0] if args else encode(None)[0]
                self.say(worker, (m.ENDED, call, attempt, "value", value, None, time(), 0.0, False))
            elif record[0] == m.QUIT:
                self.end(worker, "exited with status 0")

    def say(self, worker: int, *records: tuple[Any, ...]) -> None:
        """As the frame of a worker's Pipe."""
        generation = self._generations[worker]
        self._generations[worker] += 1
        frame = generation.to_bytes(8, sys.byteorder) + pickle.dumps(list(records))
        self.talk.send(ch.of_worker(worker), ch.CALLS, frame)

    def end(self, worker: int, how: str) -> None:
        """A worker has ended."""
        if self._generations.pop(worker, None) is not None:
            self.talk.send(ch.of_worker(worker), ch.ENDED, pickle.dumps((how, 0, None, False)))


def dialler(address: str, key: bytes, reactor: Reactor) -> Dial:
    """How a stub reaches a coordinator."""
    return partial(transport.dial, parse(address), key, reactor, ROLE, timeout=30.0)


def main() -> None:
    address, key_file, count = sys.argv[1:]
    key = Path(key_file).read_bytes().strip()
    reactor = Reactor()
    dial = dialler(address, key, reactor)
    stubs: list[Stub] = []
    names = (f"stub{number}" for number in itertools.count())

    def begin() -> None:
        # As a machine would, a few at a time: whoever dials is also the one who answers.
        for _ in range(min(20, int(count) - len(stubs))):
            stubs.append(Stub(reactor, next(names), dial))
        if len(stubs) < int(count):
            reactor.call_at(monotonic() + 0.01, begin)

    begin()
    reactor.add_reader(0, lambda: sys.exit(0))
    reactor.run_until(lambda: False)


if __name__ == "__main__":
    main()
