"""Stock clients of a Manager server, taskrun's or the standard library's; prints one figure.

    manager_ops.py taskrun|stdlib rate|cpu|connect|at_once CLIENTS

The same unmodified standard-library clients, one process each.  ``rate``: operations a
second while they set and get keys of one shared dict; ``cpu``: microseconds of the server's
CPU for each.  ``connect``: milliseconds for a client to connect over TCP; ``at_once``:
seconds until that many, who connect at the same instant, are all connected.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import managers
from typing import Any

from taskrun.manager import SyncManager

KEY = b"a key for a benchmark, no secret"
SECONDS = 2.0
TICK = os.sysconf("SC_CLK_TCK")
FORK = multiprocessing.get_context("fork")

Kind = type[managers.SyncManager]


def server_cpu(pid: int) -> float:
    """Seconds of CPU that a process has used, also in threads that have ended."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def client(proxy: Any, begin: Any, results: Any) -> None:
    """Sets and gets for so long; how many it did."""
    name = f"key {os.getpid()}"
    proxy[name] = 0
    begin.wait()
    done = 0
    deadline = time.perf_counter() + SECONDS
    while time.perf_counter() < deadline:
        for _ in range(10):
            proxy[name] = done
            assert proxy[name] == done
        done += 20
    results.put(done)


def operations(kind: Kind, clients: int) -> tuple[float, float]:
    """(operations a second, microseconds of server CPU for each)."""
    manager = kind(authkey=KEY)
    manager.start()
    multiprocessing.current_process().authkey = KEY
    stock = managers.SyncManager(address=manager.address, authkey=KEY)
    stock.connect()
    shared = stock.dict()
    begin, results = FORK.Barrier(clients + 1), FORK.SimpleQueue()
    processes = [FORK.Process(target=client, args=(shared, begin, results)) for _ in range(clients)]
    for process in processes:
        process.start()
    begin.wait(timeout=60)
    pid = manager._process.pid
    used, began = server_cpu(pid), time.perf_counter()
    done = sum(results.get() for _ in processes)
    took, used = time.perf_counter() - began, server_cpu(pid) - used
    for process in processes:
        process.join()
    del shared
    manager.shutdown()
    return done / took, used / done * 1e6


def connect(kind: Kind, clients: int) -> float:
    """Median milliseconds that a standard client takes to connect over TCP."""
    manager = kind(address=("127.0.0.1", 0), authkey=KEY)
    manager.start()
    took = []
    for _ in range(clients):
        stock = managers.SyncManager(address=manager.address, authkey=KEY)
        began = time.perf_counter()
        stock.connect()
        took.append(time.perf_counter() - began)
    manager.shutdown()
    return statistics.median(took) * 1e3


def at_once(kind: Kind, clients: int) -> float:
    """Seconds until so many clients, who connect at the same instant, are all connected."""
    manager = kind(address=("127.0.0.1", 0), authkey=KEY)
    manager.start()
    begin, results = FORK.Barrier(clients + 1), FORK.SimpleQueue()

    def one() -> None:
        stock = managers.SyncManager(address=manager.address, authkey=KEY)
        begin.wait()
        began = time.perf_counter()
        stock.connect()
        results.put((began, time.perf_counter()))

    processes = [FORK.Process(target=one) for _ in range(clients)]
    for process in processes:
        process.start()
    begin.wait(timeout=60)
    times = [results.get() for _ in processes]
    for process in processes:
        process.join()
    manager.shutdown()
    return max(end for _, end in times) - min(began for began, _ in times)


WHAT: dict[str, Callable[[Kind, int], float]] = {
    "rate": lambda kind, clients: operations(kind, clients)[0],
    "cpu": lambda kind, clients: operations(kind, clients)[1],
    "connect": connect,
    "at_once": at_once,
}

if __name__ == "__main__":
    side, what, number = sys.argv[1:]
    print(WHAT[what](SyncManager if side == "taskrun" else managers.SyncManager, int(number)))
