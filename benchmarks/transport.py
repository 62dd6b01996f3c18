"""How fast connections are: bulk, round trips and handshakes over a Unix socket, loopback and
TLS.  Both ends are in processes of their own; prints a line per figure.

    python benchmarks/transport.py [MEGABYTES]
    python benchmarks/transport.py --figure tls
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from time import perf_counter
from typing import Any

from taskrun.addresses import Tls, shown
from taskrun.reactor import Reactor
from taskrun.transport import Peer, dial_blocking, listen

KEY = os.urandom(32).hex().encode()
PIECE = bytes(1 << 20)
DEADLINE = 60.0  # seconds
SIZE = 300  # MiB


def serve(address: Any, key: bytes, ready: Any) -> None:
    """Count what comes; answer ``?`` by how many bytes there were, and ``*N`` by as many MiB."""
    reactor = Reactor()

    def on_peer(peer: Peer) -> None:
        counted = 0

        def on_frame(frame: memoryview) -> None:
            nonlocal counted
            counted += len(frame)
            if frame[:1] == b"?":
                peer.send(b"%d" % counted)
            elif frame[:1] == b"*":
                for _ in range(int(frame[1:])):
                    peer.send(PIECE)

        peer.listen(on_frame, lambda reason: None)

    ready.send(listen(address, key, reactor, on_peer).address)
    while True:
        reactor.run_once(None)


def bulk_out(address: Any, megabytes: int) -> float:
    """MB/s towards the listener."""
    with dial_blocking(address, KEY, b"client") as wire:
        began = perf_counter()
        for _ in range(megabytes):
            wire.send(PIECE)
        wire.send(b"?")
        wire.recv(DEADLINE)
        return megabytes * len(PIECE) / 1e6 / (perf_counter() - began)


def bulk_in(address: Any, megabytes: int) -> float:
    """MB/s from the listener."""
    with dial_blocking(address, KEY, b"client") as wire:
        began = perf_counter()
        wire.send(b"*%d" % megabytes)
        for _ in range(megabytes):
            wire.recv(DEADLINE)
        return megabytes * len(PIECE) / 1e6 / (perf_counter() - began)


def median(times: int, act: Callable[[], object]) -> float:
    """Of the seconds that ``act`` takes."""
    took = []
    for _ in range(times):
        began = perf_counter()
        act()
        took.append(perf_counter() - began)
    return statistics.median(took)


def round_trip(address: Any) -> float:
    """Seconds, the median, for a small frame there and back."""
    with dial_blocking(address, KEY, b"client") as wire:
        return median(2000, lambda: (wire.send(b"?"), wire.recv(DEADLINE)))


@contextmanager
def server(address: Any) -> Iterator[Any]:
    """Serve in another process; gives the address."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(address, KEY, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.kill()
        process.join()


def measure(address: Any, megabytes: int) -> None:
    with server(address) as found:
        connect = median(50, lambda: dial_blocking(found, KEY, b"x").close())
        print(
            f"{shown(found).partition(':')[0]:6} out {bulk_out(found, megabytes):7.0f} MB/s"
            f"   in {bulk_in(found, megabytes):7.0f} MB/s"
            f"   round trip {round_trip(found) * 1e6:5.0f} us"
            f"   connect {connect * 1e3:5.2f} ms",
            flush=True,
        )


def figure() -> float:
    """For ``make bench``: MB/s by TLS, of the slower direction."""
    with server(Tls("127.0.0.1", 0)) as found:
        return min(bulk_out(found, SIZE), bulk_in(found, SIZE))


if __name__ == "__main__":
    if sys.argv[1:] == ["--figure", "tls"]:
        print(figure())
        sys.exit()
    size = int(sys.argv[1]) if len(sys.argv) > 1 else SIZE
    folder = tempfile.mkdtemp()
    for one in (os.path.join(folder, "socket"), ("127.0.0.1", 0), Tls("127.0.0.1", 0)):
        measure(one, size)
