"""A Manager server in a thread of the test, and clients in processes that can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import managers
from typing import Any

import pytest

from taskrun.manager import SyncManager
from taskrun.manager.protocol import Frames, answer_to, framed
from taskrun.manager.server import Server
from taskrun.reactor import Reactor

KEY = b"the key of the tests"
SECONDS = 60  # for one test


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """No test waits for ever."""

    def too_late(number: int, frame: Any) -> None:
        raise TimeoutError(f"the test took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Running:
    """A server, its reactor, and the thread that runs it."""

    def __init__(self, address: Any = None, registry: Any = None, **options: Any) -> None:
        self.reactor = Reactor()
        self.reports: list[str] = []
        self.server = Server(
            SyncManager._registry if registry is None else registry,
            address,
            options.pop("authkey", KEY),
            self.reactor,
            report=self._report,
            **options,
        )
        self.address = self.server.address
        self._stopping = False
        self.server.start()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _report(self) -> None:
        import traceback

        self.reports.append(traceback.format_exc())

    def _run(self) -> None:
        self.reactor.run_until(lambda: self._stopping)
        self.server.close()
        self.reactor.close()

    def stop(self) -> None:
        self._stopping = True
        self.reactor.post(lambda: None)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def client(self, kind: Any = managers.SyncManager, address: Any = None) -> Any:
        """A connected manager; unless said, the standard library's."""
        manager = kind(address=self.address if address is None else address, authkey=KEY)
        manager.connect()
        return manager

    def dial(self) -> socket.socket:
        """A bare connection."""
        family = socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET
        found = socket.socket(family)
        found.settimeout(20)
        found.connect(self.address)
        return found


@contextlib.contextmanager
def running(address: Any = None, **options: Any) -> Iterator[Running]:
    """A server for the time of a ``with``; nothing unexpected may happen in it."""
    found = Running(address, **options)
    try:
        yield found
    finally:
        found.stop()
    assert found.reports == []


def receive(connection: socket.socket, frames: Frames) -> bytes:
    """The next payload.  Raises EOFError."""
    while (payload := frames.pop()) is None:
        data = connection.recv(65536)
        if not data:
            raise EOFError
        frames.feed(data)
    return payload


def greet(connection: socket.socket, key: bytes = KEY) -> Frames:
    """The client's side of the handshake, on a bare connection."""
    frames = Frames(1 << 30)
    challenge = receive(connection, frames)
    connection.sendall(framed(answer_to(key, challenge.removeprefix(b"#CHALLENGE#"))))
    assert receive(connection, frames) == b"#WELCOME#"
    connection.sendall(framed(b"#CHALLENGE#" + bytes(20)))
    receive(connection, frames)
    connection.sendall(framed(b"#WELCOME#"))
    return frames


def is_closed(connection: socket.socket) -> bool:
    """Waits for the other side to close; what it says before does not matter."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def length(size: int) -> bytes:
    return struct.pack("!i", size)


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    """Until ``condition`` holds; for what happens in another process."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


_PRELUDE = f"""
import sys, os, time
from multiprocessing import managers, process
process.current_process().authkey = {KEY!r}
address = eval(sys.argv[1])
manager = managers.SyncManager(address=address, authkey={KEY!r})
manager.connect()
def proxy(kind, ident):
    return getattr(managers, kind)(managers.Token(kind, address, ident), "pickle")
def say(text):
    print(text, flush=True)
"""


class Client:
    """A standard-library client in a process without taskrun."""

    def __init__(self, address: Any, code: str, python: str = sys.executable) -> None:
        self.process = subprocess.Popen(
            [python, "-I", "-S", "-c", _PRELUDE + code, repr(address)],
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> str:
        """The next line that it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
