"""A listener and those who dial it, on one reactor: for tests of ``taskrun.transport``."""

from __future__ import annotations

import os
import resource
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from time import monotonic
from typing import Any

from taskrun.errors import DialError
from taskrun.reactor import Reactor
from taskrun.transport import Listener, Peer, dial, listen

KEY = os.urandom(32).hex().encode()
DEADLINE = 20.0  # seconds; nothing here takes one


class Side:
    """One end of connections on a reactor, and all that happened there."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.frames: list[bytes] = []
        self.ends: list[str] = []
        self.failures: list[DialError] = []
        self.notices: list[str] = []
        self.on_frame: Callable[[Peer, bytes], object] = lambda peer, frame: None

    def take(self, peer: Peer) -> None:
        self.peers.append(peer)
        peer.listen(lambda frame: self.hear(peer, bytes(frame)), self.ends.append)

    def hear(self, peer: Peer, frame: bytes) -> None:
        self.frames.append(frame)
        self.on_frame(peer, frame)


class Meeting:
    """A listener and those who dial it, on one reactor."""

    def __init__(self, address: Any, **options: Any) -> None:
        self.reactor = Reactor()
        self.here = Side()
        self.there = Side()
        self.reports: list[str] = []
        self.listener: Listener = listen(
            address,
            KEY,
            self.reactor,
            lambda peer: self.here.take(peer),
            notice=self.here.notices.append,
            report=lambda: self.reports.append(traceback.format_exc()),
            **options,
        )
        self.address = self.listener.address

    def dial(self, **options: Any) -> None:
        self.dial_at(self.address, **options)

    def dial_at(
        self, address: Any, key: bytes = KEY, role: bytes = b"node", **options: Any
    ) -> None:
        dial(address, key, self.reactor, role, self.there.take, self.there.failures.append,
             **options)  # fmt: skip

    def until(self, predicate: Callable[[], object]) -> None:
        done = self.reactor.run_until(lambda: bool(predicate()), monotonic() + DEADLINE)
        assert done, (vars(self.here), vars(self.there))

    def meet(self) -> tuple[Peer, Peer]:
        """A connection: (the listening side's Peer, the dialling side's)."""
        before = len(self.here.peers), len(self.there.peers)
        self.dial()
        self.until(lambda: len(self.here.peers) > before[0] and len(self.there.peers) > before[1])
        return self.here.peers[-1], self.there.peers[-1]

    def close(self) -> None:
        for peer in self.here.peers + self.there.peers:
            peer.close()
        self.listener.close()
        self.reactor.close()

    def beside(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns or raises, in a thread, while the reactor runs."""
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append((work(), None))
            except Exception as error:
                outcome.append((None, error))
            self.reactor.post(lambda: None)

        threading.Thread(target=run, daemon=True).start()
        self.until(lambda: outcome)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value


def unix_path() -> str:
    return os.path.join(tempfile.mkdtemp(prefix="transport-"), "socket")


def fill_queue(path: str) -> list[socket.socket]:
    """Connections that wait at a Unix socket, so many that there is no room for one more."""
    made: list[socket.socket] = []
    while True:
        made.append(socket.socket(socket.AF_UNIX))
        made[-1].setblocking(False)
        if made[-1].connect_ex(path):
            made.pop().close()
            return made


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open no more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(socket.socket()) as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno(), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
