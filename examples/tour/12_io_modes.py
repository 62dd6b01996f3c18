"""Four ways to ask ten slow servers for an answer: blocking, non-blocking, multiplexed and
asynchronous. Blocking asks one after the other; the others wait for all at once, the first
of them by trying again and again, which burns a core. Use blocking code until you wait for
many, then multiplex by ``selectors`` or, far easier to read, write coroutines.
"""

import asyncio
import selectors
import socket
import socketserver
import time
from collections.abc import Callable, Iterator

from taskrun import each, limit, result, task

ASKED = 10
DELAY = 0.05  # seconds until the answer comes

Address = tuple[str, int]


class Slow(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        time.sleep(DELAY)
        self.request.sendall(b"42")


class Server(socketserver.ThreadingTCPServer):
    request_queue_size = ASKED  # connections that may wait to be accepted


@task(lane="thread", timeout=30)  # a lane of its own, so that it takes no time from the others
def server() -> Iterator[Address]:
    """Yield the address, then serve as many connections as there will be."""
    with Server(("127.0.0.1", 0), Slow) as slow:
        yield slow.server_address
        for _ in range(ASKED * len(WAYS)):
            slow.handle_request()


# -- the four ways --------------------------------------------------------------------


def blocking(address: Address) -> list[bytes]:
    """Each ``recv`` waits; nobody else is asked meanwhile."""
    answers = []
    for _ in range(ASKED):
        with socket.create_connection(address) as connection:
            answers.append(connection.recv(100))
    return answers


def non_blocking(address: Address) -> list[bytes]:
    """``recv`` never waits: it raises where nothing is there yet, and is tried again."""
    waiting = connect(address)
    answers = []
    while waiting:
        for connection in list(waiting):
            try:
                answers.append(connection.recv(100))
            except BlockingIOError:
                continue
            waiting.remove(connection)
            connection.close()
    return answers


def multiplexed(address: Address) -> list[bytes]:
    """One wait for all: the operating system says which of them can be read."""
    answers = []
    with selectors.DefaultSelector() as selector:
        for connection in connect(address):
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                with selector.unregister(key.fileobj).fileobj as ready:
                    answers.append(ready.recv(100))
    return answers


def asynchronous(address: Address) -> list[bytes]:
    """Reads like blocking code; the event loop multiplexes behind every ``await``."""

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection(*address)
        answer = await reader.read(100)
        writer.close()
        return answer

    async def ask_all() -> list[bytes]:
        return await asyncio.gather(*[ask() for _ in range(ASKED)])

    return asyncio.run(ask_all())


def connect(address: Address) -> list[socket.socket]:
    connections = [socket.create_connection(address) for _ in range(ASKED)]
    for connection in connections:
        connection.setblocking(False)
    return connections


# -- side by side ---------------------------------------------------------------------

WAYS: dict[str, Callable[[Address], list[bytes]]] = {
    way.__name__: way for way in (blocking, non_blocking, multiplexed, asynchronous)
}


@task(limits=[limit(1)], timeout=30)  # one at a time: they are timed
def measure(way: str = each(WAYS), address: Address = each(server)) -> tuple[float, float]:
    """How long it takes, and how much of that this thread computes."""
    began, computing = time.monotonic(), time.thread_time()
    assert WAYS[way](address) == [b"42"] * ASKED
    return time.monotonic() - began, time.thread_time() - computing


@task
def report(times: list[tuple[float, float]] = result(measure)) -> None:
    """The times side by side."""
    print(f"{ASKED} answers that take {1000 * DELAY:.0f} ms each")
    for way, (seconds, computing) in zip(WAYS, times, strict=True):
        print(
            f"{way:13} {1000 * seconds:4.0f} ms, of these {1000 * computing:3.0f} ms of computing"
        )
