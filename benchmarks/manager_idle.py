"""Eleven thousand idle clients on one thread; and then they all speak, in pieces.

    python benchmarks/manager_idle.py [--clients 11000] [--theirs 1000]

Measured: the server's threads and resident memory, for each idle client; the latency of one
active client without and with the idle ones beside it; then every client sends three
requests, each in three parts, and must get its three answers.  The standard library's
server is measured beside it with fewer clients: it has a thread for each.
"""

from __future__ import annotations

import argparse
import gc
import os
import pickle
import resource
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import managers
from typing import Any

from taskrun.manager import SyncManager
from taskrun.manager.protocol import answer_to

KEY = b"a key for a benchmark, no secret"


def framed(payload: bytes) -> bytes:
    return struct.pack("!i", len(payload)) + payload


def receive(connection: socket.socket) -> bytes:
    data = b""
    while len(data) < 4 or len(data) < 4 + struct.unpack_from("!i", data)[0]:
        piece = connection.recv(65536)
        if not piece:
            raise EOFError("the server closed the connection")
        data += piece
    return data[4:]


def connect(address: str) -> socket.socket:
    """A client that has said that it will make calls."""
    found = socket.socket(socket.AF_UNIX)
    found.settimeout(60)
    found.connect(address)
    found.sendall(framed(answer_to(KEY, receive(found).removeprefix(b"#CHALLENGE#"))))
    receive(found)
    found.sendall(framed(b"#CHALLENGE#" + bytes(20)))
    receive(found)
    found.sendall(framed(b"#WELCOME#"))
    found.sendall(framed(pickle.dumps((None, "accept_connection", ("idle",), {}), 4)))
    receive(found)
    return found


def raise_limit(descriptors: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = descriptors + 200
    if soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
    except (ValueError, PermissionError):
        raise SystemExit(
            f"{wanted} descriptors are needed, and {hard} allowed: raise it with"
            f" ulimit -Hn {wanted} as root, or in /etc/security/limits.conf"
        ) from None


def status(pid: int, name: str) -> int:
    """A number out of /proc/PID/status."""
    with open(f"/proc/{pid}/status") as file:
        (line,) = (line for line in file if line.startswith(name + ":"))
    return int(line.split()[1])


def latency(shared: Any, times: int = 3000) -> float:
    """Median seconds of one get."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        shared["a"]
        took.append(time.perf_counter() - began)
    return statistics.median(took)


@contextmanager
def served(kind: type[managers.SyncManager]) -> Iterator[Any]:
    manager = kind(authkey=KEY)
    manager.start()
    try:
        yield manager
    finally:
        manager.shutdown()


def speak(clients: list[socket.socket], ident: str) -> float:
    """Seconds for three requests of everybody, each in three parts."""
    request = framed(pickle.dumps((ident, "__getitem__", ("a",), {}), 4))
    parts = request[:3], request[3:20], request[20:]
    answer = pickle.dumps(("#RETURN", 1), 4)
    began = time.perf_counter()
    for _ in range(3):
        for part in parts:
            for client in clients:
                client.sendall(part)
        for client in clients:
            assert receive(client) == answer, "a wrong answer"
    return time.perf_counter() - began


def measure(name: str, kind: type[managers.SyncManager], number: int) -> None:
    with served(kind) as manager:
        pid = manager._process.pid
        stock = managers.SyncManager(address=manager.address, authkey=KEY)
        stock.connect()
        shared = stock.dict(a=1)
        alone = latency(shared)
        memory = status(pid, "VmRSS")
        began = time.perf_counter()
        clients = [connect(manager.address) for _ in range(number)]
        connecting = time.perf_counter() - began
        memory, threads = status(pid, "VmRSS") - memory, status(pid, "Threads")
        beside = latency(shared)
        print(
            f"{name}: {number:,} idle clients, connected in {connecting:.1f} s:"
            f" {threads:,} threads, {memory / number:.2f} KiB each"
        )
        print(
            f"{name}: one active client: {alone * 1e6:.0f} us alone, {beside * 1e6:.0f} us"
            f" beside them ({beside / alone - 1:+.0%})"
        )
        took = speak(clients, shared._token.id)
        print(f"{name}: {3 * number:,} requests in three parts: {took:.2f} s, none lost")
        for client in clients:
            client.close()
        del shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=11_000)
    parser.add_argument("--theirs", type=int, default=1_000)
    options = parser.parse_args()
    raise_limit(options.clients)
    gc.freeze()
    print(f"{os.cpu_count()} cores")
    measure("ours", SyncManager, options.clients)
    if options.theirs:
        measure("theirs", managers.SyncManager, options.theirs)


if __name__ == "__main__":
    main()
