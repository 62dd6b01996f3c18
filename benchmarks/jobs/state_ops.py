"""Shared state, or Redis: the same operation by client processes; prints operations a second.

    state_ops.py taskrun|redis OPERATION CLIENTS

Single operations: ``counter.add`` or INCR, and a set or a get of a dict's key or SET and
GET, one after the other.  Bulk: 10,000 items written or read in one round trip, or by
redis-py's pipeline; their rate is that of items.  Both over Unix sockets.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
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
SECONDS = 2.0

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
            "bulk_write": lambda number: d.update(bulk),
            "bulk_read": lambda number: d.get_many(bulk),
            "bulk_append": lambda number: (items.clear(), items.extend(range(ITEMS))),
            "bulk_slice": lambda number: items[:],
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
                "bulk_write": lambda number: pipelined(client, "set", bulk.items()),
                "bulk_read": lambda number: pipelined(client, "get", ((key,) for key in bulk)),
                "bulk_append": lambda number: (
                    client.delete("l"),
                    pipelined(client, "rpush", (("l", item) for item in range(ITEMS))),
                ),
                "bulk_slice": lambda number: pipelined(
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


# -- measuring ------------------------------------------------------------------------


def rate(connect: Connect, operation: str, clients: int) -> float:
    """Operations a second, of all clients together."""
    begin, results = FORK.Barrier(clients + 1), FORK.SimpleQueue()

    def run() -> None:
        operations = connect()
        for one in ("set", "bulk_write", "bulk_append"):  # there is something to read
            operations[one](0)
        do = operations[operation]
        do(0)
        begin.wait()
        done, deadline = 0, time.perf_counter() + SECONDS
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


if __name__ == "__main__":
    side, what, number = sys.argv[1:]
    with taskruns() if side == "taskrun" else rediss() as connect:
        print(rate(connect, what, int(number)))
