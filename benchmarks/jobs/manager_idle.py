"""A Manager server, taskrun's or the standard library's, with idle clients; prints one figure.

    manager_idle.py taskrun|stdlib memory|latency|speak CLIENTS

``memory``: KiB of the server's resident memory for each; taskrun's must have one thread.
``latency``: median microseconds of a get by one active client beside them.  ``speak``:
seconds until each has sent three requests, each in three parts, and got its three answers.
"""

from __future__ import annotations

import gc
import pickle
import resource
import socket
import statistics
import struct
import sys
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


def main(side: str, what: str, number: int) -> float:
    raise_limit(number)
    gc.freeze()
    with served(SyncManager if side == "taskrun" else managers.SyncManager) as manager:
        pid = manager._process.pid
        stock = managers.SyncManager(address=manager.address, authkey=KEY)
        stock.connect()
        shared = stock.dict(a=1)
        latency(shared, 100)  # all that it needs is there
        before = status(pid, "VmRSS")
        clients = [connect(manager.address) for _ in range(number)]
        if side == "taskrun":
            assert status(pid, "Threads") == 1, "more than one thread"
        if what == "memory":
            figure = (status(pid, "VmRSS") - before) / number
        elif what == "latency":
            figure = latency(shared) * 1e6
        else:
            figure = speak(clients, shared._token.id)
        for client in clients:
            client.close()
        del shared
    return figure


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
