"""Shared state beside Redis: the same operations, from as many client processes.

    python benchmarks/state_ops.py [--clients 8] [--seconds 2] [--rounds 3]

Single operations: ``counter.add`` beside INCR, and a set and a get of a dict's key beside
SET and GET, one after the other.  Bulk: 10,000 items written and read in one round trip,
beside redis-py's pipeline.  Both over Unix sockets.  Needs redis-server (Debian's package,
or REDIS_SERVER) and redis (PyPI); without them it says so, and measures taskrun alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from taskrun.reactor import Reactor
from taskrun.state.connecting import Connected
from taskrun.state.service import Service

FORK = multiprocessing.get_context("fork")
ITEMS = 10_000

Operations = dict[str, Callable[[int], object]]
Connect = Callable[[], Operations]


# -- the two sides --------------------------------------------------------------------


@contextmanager
def taskruns() -> Iterator[Connect]:
    """A store in a process of its own; what connects a client to it."""
    ours, theirs = FORK.Pipe()

    def serve() -> None:
        reactor = Reactor()
        service = Service(reactor, is_running=lambda call, attempt: True, notice=print)
        service.start()
        theirs.send((service.address, service.authkey))
        over = threading.Event()
        reactor.add_reader(theirs.fileno(), over.set)
        reactor.run_until(over.is_set)
        service.close()

    process = FORK.Process(target=serve)
    process.start()
    address, key = ours.recv()

    def connect() -> Operations:
        state = Connected(address, key)
        d, c, items = state.dict("d"), state.counter("c"), state.list("l")
        name = f"key {os.getpid()}"
        bulk = {f"{name} {number}": number for number in range(ITEMS)}
        return {
            "add": lambda number: c.add(1),
            "set": lambda number: d.__setitem__(name, number),
            "get": lambda number: d.get(name),
            "bulk write": lambda number: d.update(bulk),
            "bulk read": lambda number: d.get_many(bulk),
            "bulk append": lambda number: (items.clear(), items.extend(range(ITEMS))),
            "bulk slice": lambda number: items[:],
        }

    yield connect
    ours.send(None)
    process.join()


@contextmanager
def rediss() -> Iterator[Connect]:
    """The same with a Redis server."""
    import redis

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "redis.sock")
        command = [redis_server() or "", "--port", "0", "--unixsocket", path, "--save", ""]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.01)

        def connect() -> Operations:
            client = redis.Redis(unix_socket_path=path)
            name = f"key {os.getpid()}"
            bulk = {f"{name} {number}": number for number in range(ITEMS)}
            return {
                "add": lambda number: client.incr("c"),
                "set": lambda number: client.set(name, number),
                "get": lambda number: client.get(name),
                "bulk write": lambda number: pipelined(client, "set", bulk.items()),
                "bulk read": lambda number: pipelined(client, "get", ((key,) for key in bulk)),
                "bulk append": lambda number: (
                    client.delete("l"),
                    pipelined(client, "rpush", (("l", item) for item in range(ITEMS))),
                ),
                "bulk slice": lambda number: pipelined(
                    client, "lindex", (("l", item) for item in range(ITEMS))
                ),
            }

        yield connect
        server.terminate()
        server.wait(20)


def pipelined(client: Any, command: str, arguments: Any) -> None:
    pipeline = client.pipeline(transaction=False)
    for one in arguments:
        getattr(pipeline, command)(*one)
    pipeline.execute()


def redis_server() -> str | None:
    return os.environ.get("REDIS_SERVER") or shutil.which("redis-server")


def missing() -> str | None:
    """Why there is nothing to compare with."""
    if redis_server() is None:
        return "there is no redis-server here (apt install redis-server)"
    if importlib.util.find_spec("redis") is None:
        return "redis-py is not installed (pip install redis)"
    return None


# -- measuring ------------------------------------------------------------------------


def rate(connect: Connect, operation: str, clients: int, seconds: float) -> float:
    """Operations a second, of all clients together."""
    begin, results = FORK.Barrier(clients + 1), FORK.SimpleQueue()

    def run() -> None:
        operations = connect()
        for one in ("set", "bulk write", "bulk append"):  # there is something to read
            operations[one](0)
        do = operations[operation]
        do(0)
        begin.wait()
        done, deadline = 0, time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            for _ in range(1 if operation.startswith("bulk") else 20):
                do(done)
                done += 1
        results.put(done)

    processes = [FORK.Process(target=run) for _ in range(clients)]
    for process in processes:
        process.start()
    begin.wait(60)
    began = time.perf_counter()
    done = sum(results.get() for _ in processes)
    took = time.perf_counter() - began
    for process in processes:
        process.join()
    return done / took * (ITEMS if operation.startswith("bulk") else 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    reason = missing()
    if reason:
        print(f"not compared with Redis: {reason}")
    sides = [taskruns] if reason else [taskruns, rediss]
    print("operation    clients     taskrun/s      redis/s        x   target")
    reached = True
    for operation in ("add", "set", "get", "bulk write", "bulk read", "bulk append", "bulk slice"):
        bulk = operation.startswith("bulk")
        clients = 1 if bulk else options.clients
        found: list[list[float]] = [[] for _ in sides]
        for _ in range(options.rounds):
            for side, rates in zip(sides, found, strict=True):
                with side() as connect:
                    rates.append(rate(connect, operation, clients, options.seconds))
        ours, *theirs = map(statistics.median, found)
        target = 1.0 if bulk else 1.5
        compared = f"{theirs[0]:12,.0f} {ours / theirs[0]:8.2f} {target:8}" if theirs else ""
        reached = reached and (not theirs or ours / theirs[0] >= target)
        print(f"{operation:12} {clients:7} {ours:13,.0f} {compared}", flush=True)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
