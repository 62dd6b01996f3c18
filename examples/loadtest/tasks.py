"""A load test: processes times coroutines against a server, and thousands of sockets at once.

``trial`` starts a server, has several processes load it at the same time, and then has them
hold all their sockets open at once.  It waits for them, and shows meanwhile how they get on.
"""

import asyncio
import ipaddress
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from taskrun import Future, each, limit, result, state, task

from clients import close_all, load, open_all, summed, talk
from descriptors import allow
from echoing import FD_SETSIZE, SERVERS
from figures import Held, Load

live = state.dict("live")  # process -> requests and errors so far; see it by taskrun state watch


class Trial(NamedTuple):
    """What came out for one server; nothing is held where HTTP is spoken."""

    server: str
    load: Load
    held: Held | None


@task
def targets(target: str = "", anywhere: bool = False) -> list[str]:
    """What to load: the three servers of this example, or one that is there already."""
    if not target:
        return list(SERVERS)
    check_target(target, anywhere)
    return [target]


@task(limits=[limit(1)])  # one server at a time has the machine for itself
def trial(
    server: str = each(targets),
    processes: int = 2,
    connections: int = 50,
    seconds: float = 3.0,
    sockets: int = 11_000,
) -> Trial:
    """Load a server with so many connections in each process, then hold ``sockets`` open."""
    check_load(processes, connections, seconds, sockets)
    with serving(server, sockets) as target:
        loaded, held = Load(), Held()
        parts = range(processes)
        calls = [keep_busy.submit(target, connections, seconds) for _ in parts]
        for part in watched(calls, server):
            loaded.add(part)
        if target.startswith("http"):
            return Trial(server, loaded, None)
        shares = [len(range(sockets)[part::processes]) for part in parts]
        calls = [hold.submit(target, share, processes) for share in shares]
        for part in watched(calls, server):
            held.add(part)
    return Trial(server, loaded, held)


@task(default=False, timeout=600)
def keep_busy(target: str, connections: int, seconds: float) -> Load:
    """One process of the load: its event loop has ``connections`` coroutines."""
    allow(connections)

    def tell(found: Load) -> None:
        live[os.getpid()] = (found.requests, found.errors.total())

    try:
        return asyncio.run(load(target, connections, seconds, tell))
    finally:
        live.pop(os.getpid(), None)


@task(default=False, timeout=600)
def hold(target: str, count: int, processes: int) -> Held:
    """One process of those that hold sockets: none goes on before all have theirs open."""
    allow(count)
    together = state.barrier(f"{target} is held", processes)
    held = Held()
    with asyncio.Runner() as loop:
        connections = loop.run(open_all(target, count, held))
        together.wait(timeout=300)
        loop.run(talk(connections, held))
        together.wait(timeout=300)
        loop.run(close_all(connections))
    return held


@task
def report(
    trials: list[Trial] = result(trial),
    processes: int = 2,
    connections: int = 50,
    sockets: int = 11_000,
) -> None:
    """The servers side by side."""
    at_once = f"; {sockets:,} sockets at once" if any(trial.held for trial in trials) else ""
    print(f"{processes} processes with {connections} connections each{at_once}")
    wide = max(len(trial.server) for trial in trials)
    titles = "".join(f"{title:>9}" for title in ("p50", "p90", "p99", "p99.9", "longest"))
    print(f"{'':{wide}}{'requests/s':>12}{titles}{'errors':>9}{'held at once':>14}")
    for server, loaded, held in trials:
        times = "".join(f"{milliseconds(loaded, p):>9}" for p in (50, 90, 99, 99.9, 100))
        holds = f"{held.right:,}" if held else "-"
        errors = loaded.errors.total()
        print(f"{server:{wide}}{loaded.rate:>12,.0f}{times}{errors:>9,}{holds:>14}")
    for server, loaded, held in trials:
        if loaded.errors:
            print(f"{server}, under load: {summed(loaded.errors)}")
        if held and held.errors:
            print(f"{server}, of {sockets:,} sockets: {summed(held.errors)}")
            if server == "select":
                print(f"(select() knows no descriptor from {FD_SETSIZE:,} on, whatever the limits)")


# -- plain functions ------------------------------------------------------------------


class NotThisMachine(ValueError):
    """The target is another machine, and nobody has said that this is all right."""


def check_target(target: str, anywhere: bool) -> None:
    """Raise unless ``target`` can be loaded, and is on this machine or ``anywhere`` is said."""
    parts = urlsplit(target)
    host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    if parts.scheme not in ("http", "https", "tcp") or not host or not port:
        raise ValueError(f"{target!r} is neither tcp://HOST:PORT nor a http:// or https:// URL")
    found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, port)}
    others = sorted(ip for ip in found if not ipaddress.ip_address(ip).is_loopback)
    if others and not anywhere:
        raise NotThisMachine(
            f"{host} is another machine ({', '.join(others)}), where a load test may be taken for "
            "an attack; if you may do that: -p anywhere=true"
        )


def check_load(processes: int, connections: int, seconds: float, sockets: int) -> None:
    """Raise where that is no load."""
    numbers = {
        "processes": (processes, 1),
        "connections": (connections, 1),
        "sockets": (sockets, 0),
    }
    for name, (number, least) in numbers.items():
        if number < least:
            raise ValueError(f"{name}={number}: there must be {least} at least; set -p {name}=...")
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"seconds={seconds}: it must be more than 0; set -p seconds=...")


@contextmanager
def serving(server: str, sockets: int) -> Iterator[str]:
    """Start one of the servers as a process of its own; gives where it is.

    It ends when its input does, so also when this process is killed.
    """
    if server not in SERVERS:
        yield server  # somebody else's, and there already
        return
    program = [sys.executable, str(Path(__file__).with_name("echoing.py")), server, str(sockets)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = process.stdout.readline().decode().strip()
        if not port:
            raise RuntimeError(f"the {server} server did not start; it has said why")
        yield f"tcp://127.0.0.1:{port}"
        process.communicate(timeout=10)  # closes its input


def watched(calls: list[Future], server: str) -> Iterator[Load | Held]:
    """The calls' values, when all have ended; meanwhile a line every second."""
    then, before = time.monotonic(), 0
    while pending := [call for call in calls if not call.done()]:
        try:
            pending[0].exception(timeout=1.0)
        except TimeoutError:
            counts = live.copy().values()
            now, requests = time.monotonic(), sum(count for count, _ in counts)
            if requests > before:
                rate = (requests - before) / (now - then)
                errors = sum(count for _, count in counts)
                print(f"{server:10} {rate:>8,.0f} requests/s {errors:>6,} errors")
            then, before = now, requests
    return (call.result() for call in calls)


def milliseconds(loaded: Load, percentile: float) -> str:
    return f"{1000 * loaded.latencies.at(percentile):.1f} ms" if loaded.requests else "-"
