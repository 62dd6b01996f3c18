"""An engine whose nodes are real processes, on this machine, reached over a real socket.

``grid`` is a fixture's worth of it: the coordinator's side is a `Workshop`, the nodes are
started as people start them, and between the two there may be a `Proxy` that breaks things.
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import Running, Runs, started
from workshop import CHORES, Workshop, task_file

from taskrun import messages as m
from taskrun import transport
from taskrun.engines.nodes import Nodes
from taskrun.engines.pool import PoolEngine
from taskrun.network.bundles import Bundle, make_bundle

KEY = b"0123456789abcdef0123456789abcdef"
LEASE = 1.5


WHERE = """
@task
def where(): return current().node, current().worker
"""


class Grid:
    """A coordinator without workers of its own, and its nodes."""

    def __init__(
        self,
        folder: Path,
        runs: Runs,
        source: str,
        lease: float,
        slots: int,
        patterns: tuple[str, ...],
    ) -> None:
        self.patterns = patterns
        self.folder = folder
        self.runs = runs
        self.key_file = folder / "key"
        self.key_file.write_bytes(KEY)
        self.key_file.chmod(0o600)
        self.lease = lease
        self.module, self.file = task_file(folder, CHORES + WHERE + textwrap.dedent(source))
        self.slots = slots
        self.proxies: list[Proxy] = []
        self._names = (f"lab{number}" for number in itertools.count(1))
        self.shop: Workshop
        self.open()

    def open(self, port: int = 0) -> None:
        """Start a coordinator."""
        self.nodes = Nodes(lease=self.lease, bundle=self.bundle)
        engine = PoolEngine(
            module=self.module, file=self.file, slots=self.slots, nodes=self.nodes, grace=0.5
        )
        self.shop = Workshop(engine, self.module)
        self.listener = transport.listen(
            ("127.0.0.1", port), KEY, self.shop.reactor, self.nodes.accept
        )
        self.address = f"127.0.0.1:{self.listener.address[1]}"

    def bundle(self) -> Bundle:
        """What nodes need."""
        return make_bundle(self.file, self.patterns)

    def node(self, jobs: int = 2, *words: str, address: str = "", wait: bool = True) -> Running:
        """Start a node, and wait until it has joined."""
        before = self.joined
        running = self.runs.start(
            "worker", address or self.address, "-j", str(jobs), "--name", next(self._names),
            "--authkey-file", str(self.key_file), *words,
            env={"XDG_CACHE_HOME": str(self.folder / "cache")}, cwd=self.folder,
        )  # fmt: skip
        if wait:
            self.shop.until(lambda: self.joined > before)
        return running

    @property
    def joined(self) -> int:
        """How many nodes have joined so far."""
        return sum("joined with" in notice for notice in self.shop.watcher.notices)

    def proxy(self) -> Proxy:
        """Something between a node and the coordinator."""
        self.proxies.append(Proxy(self.listener.address[1]))
        return self.proxies[-1]

    def lost(self, worker: int) -> m.WorkerLost:
        """How a worker was lost, as soon as it is."""
        self.shop.until(lambda: any(e.worker == worker for e in self.shop.all(m.WorkerLost)))
        found: m.WorkerLost = next(e for e in self.shop.all(m.WorkerLost) if e.worker == worker)
        return found

    def kill(self) -> None:
        """As ``kill -9`` of the coordinator, as far as nodes see it."""
        self.listener.close()
        for node in list(self.nodes.nodes.values()):
            assert node._peer is not None
            node._peer.close()
            node.close()
        self.nodes.nodes.clear()
        self.shop.engine._links.clear()  # type: ignore[attr-defined]

    def close(self) -> None:
        self.shop.close()
        self.listener.close()
        for proxy in self.proxies:
            proxy.close()


class Proxy:
    """Passes bytes on between nodes and the coordinator, until it is told not to."""

    def __init__(self, port: int) -> None:
        self.passed = 0  # bytes
        self._to = "127.0.0.1", port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()
        self._stalled = self._closed = self._refusing = False
        self._wake_reader, self._wake_writer = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stall(self) -> None:
        """Nothing arrives any more, on either side, and nobody is told."""
        self._tell("_stalled", True)

    def go_on(self) -> None:
        """What was stalled goes on."""
        self._tell("_stalled", False)

    def cut(self, *, refuse: bool = False) -> None:
        """Break all connections; with ``refuse`` new ones, too, until :meth:`mend`."""
        self._tell("_refusing", refuse)
        with self._lock:
            for one in list(self._pairs):
                one.close()
            self._pairs.clear()
        os.write(self._wake_writer, b"x")

    def mend(self) -> None:
        """Let new connections through."""
        self._tell("_refusing", False)

    def _tell(self, name: str, value: bool) -> None:
        setattr(self, name, value)
        os.write(self._wake_writer, b"x")

    def _run(self) -> None:
        while not self._closed:
            with self._lock:
                ends = [] if self._stalled else list(self._pairs)
            try:
                ready = select.select([self._wake_reader, self._listening, *ends], [], [], 5)[0]
            except (OSError, ValueError):
                continue  # one of them was closed just now
            for one in ready:
                self._serve(one)

    def _serve(self, one: Any) -> None:
        if one == self._wake_reader:
            os.read(self._wake_reader, 4096)
        elif one is self._listening:
            self._accept()
        else:
            self._pass_on(one)

    def _accept(self) -> None:
        connection, _ = self._listening.accept()
        try:
            if self._refusing:
                raise ConnectionRefusedError
            other = socket.create_connection(self._to)
        except OSError:
            connection.close()
            return
        with self._lock:
            self._pairs[connection], self._pairs[other] = other, connection

    def _pass_on(self, one: socket.socket) -> None:
        with self._lock:
            other = self._pairs.get(one)
        if other is None:
            return
        try:
            data = one.recv(65536)
            self.passed += len(data)
            if data:
                other.sendall(data)
                return
        except OSError:
            pass  # as good as the end
        with self._lock:
            self._pairs.pop(one, None)
            self._pairs.pop(other, None)
        one.close()
        other.close()

    def close(self) -> None:
        self._closed = True
        os.write(self._wake_writer, b"x")
        self._thread.join(10)
        for one in (self._listening, *self._pairs):
            one.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)


@contextmanager
def grid_in(
    folder: Path,
    source: str = "",
    *,
    lease: float = LEASE,
    slots: int = 0,
    patterns: tuple[str, ...] = (),
) -> Iterator[Grid]:
    """A Grid that is taken down in the end, with all that it started."""
    for runs in started(folder):
        grid = Grid(folder, runs, source, lease, slots, patterns)
        try:
            yield grid
        finally:
            grid.close()


STOP, GO = signal.SIGSTOP, signal.SIGCONT
