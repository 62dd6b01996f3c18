"""Operations on shared dicts: taskrun's Manager server beside the standard library's.

    python benchmarks/manager_ops.py [--clients 1 8 64] [--seconds 2] [--rounds 3] [--tcp]

The same unmodified standard-library clients, one process each, set and get keys of one
shared dict: for a while against one server, then against the other, and so on.  Printed
for each number of clients: operations a second, microseconds of the server's CPU for each,
and what ours is as a multiple of theirs.  Last, how long a client takes to connect.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing import managers
from typing import Any

from taskrun.manager import SyncManager

KEY = b"a key for a benchmark, no secret"
TICK = os.sysconf("SC_CLK_TCK")


def server_cpu(pid: int) -> float:
    """Seconds of CPU that a process has used, also in threads that have ended."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def client(proxy: Any, begin: Any, seconds: float, results: Any) -> None:
    """Sets and gets for so long; how many it did."""
    name = f"key {os.getpid()}"
    proxy[name] = 0
    begin.wait()
    done = 0
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for _ in range(10):
            proxy[name] = done
            proxy[name]
        done += 20
    results.put(done)


def measure(kind: type[managers.SyncManager], clients: int, seconds: float, tcp: bool) -> Any:
    """(operations a second, seconds of server CPU for each)."""
    context = multiprocessing.get_context("fork")
    manager = kind(address=("127.0.0.1", 0) if tcp else None, authkey=KEY)
    manager.start()
    multiprocessing.current_process().authkey = KEY
    stock = managers.SyncManager(address=manager.address, authkey=KEY)
    stock.connect()
    shared = stock.dict()
    begin, results = context.Barrier(clients + 1), context.SimpleQueue()
    processes = [
        context.Process(target=client, args=(shared, begin, seconds, results))
        for _ in range(clients)
    ]
    for process in processes:
        process.start()
    begin.wait(timeout=120)
    pid = manager._process.pid
    used, began = server_cpu(pid), time.perf_counter()
    done = sum(results.get() for _ in processes)
    took, used = time.perf_counter() - began, server_cpu(pid) - used
    for process in processes:
        process.join()
    del shared
    manager.shutdown()
    return done / took, used / done


def connect_times(kind: type[managers.SyncManager]) -> list[float]:
    """Seconds that a standard client takes to connect over TCP."""
    manager = kind(address=("127.0.0.1", 0), authkey=KEY)
    manager.start()
    took = []
    for _ in range(20):
        stock = managers.SyncManager(address=manager.address, authkey=KEY)
        began = time.perf_counter()
        stock.connect()
        took.append(time.perf_counter() - began)
    manager.shutdown()
    return took


def at_once(number: int = 64) -> float:
    """Seconds until so many clients, who connect at the same instant, are all connected."""
    context = multiprocessing.get_context("fork")
    manager = SyncManager(address=("127.0.0.1", 0), authkey=KEY)
    manager.start()
    begin, results = context.Barrier(number + 1), context.SimpleQueue()

    def connect() -> None:
        stock = managers.SyncManager(address=manager.address, authkey=KEY)
        begin.wait()
        began = time.perf_counter()
        stock.connect()
        results.put((began, time.perf_counter()))

    processes = [context.Process(target=connect) for _ in range(number)]
    for process in processes:
        process.start()
    begin.wait(timeout=120)
    times = [results.get() for _ in processes]
    for process in processes:
        process.join()
    manager.shutdown()
    return max(end for _, end in times) - min(began for began, _ in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tcp", action="store_true")
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    print("clients    ours op/s  theirs op/s        x   ours us/op theirs us/op        x")
    for clients in options.clients:
        rounds = [
            [measure(kind, clients, options.seconds, options.tcp)
             for kind in (SyncManager, managers.SyncManager)]
            for _ in range(options.rounds)
        ]  # fmt: skip
        rate, theirs = (statistics.median(found[i][0] for found in rounds) for i in (0, 1))
        cpu, their_cpu = (statistics.median(found[i][1] * 1e6 for found in rounds) for i in (0, 1))
        print(
            f"{clients:7} {rate:12,.0f} {theirs:12,.0f} {rate / theirs:8.2f}"
            f" {cpu:12.1f} {their_cpu:12.1f} {cpu / their_cpu:8.2f}"
        )
    for name, kind in (("ours", SyncManager), ("theirs", managers.SyncManager)):
        took = connect_times(kind)
        print(f"connecting over TCP, {name}: median {statistics.median(took) * 1e3:.2f} ms,"
              f" longest {max(took) * 1e3:.2f} ms")  # fmt: skip
    print(f"64 clients connecting at once: all within {at_once():.3f} s")


if __name__ == "__main__":
    main()
