"""Shared state for tests: a service on a loop of its own, and processes that use it."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from taskrun.reactor import Reactor
from taskrun.state.connecting import Connected
from taskrun.state.service import Service

KEY = "the key of the tests, no secret"
FORK = multiprocessing.get_context("fork")


class Live:
    """A service that runs in a thread of the test, and its clients."""

    def __init__(self, **options: Any) -> None:
        self.notices: list[str] = []
        self.running: set[tuple[int, int]] = set()
        self._options = options
        self._stopping = False
        self._ready = threading.Event()
        self._posted = threading.Event()
        self._clients: list[Connected] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(20)

    def _run(self) -> None:
        self.reactor = Reactor()
        self.service = Service(
            self.reactor,
            is_running=lambda call, attempt: (call, attempt) in self.running,
            notice=self.notices.append,
            **self._options,
        )
        self.service.start()
        self._ready.set()
        self.reactor.run_until(lambda: self._stopping)
        self.service.close()
        assert self._posted.wait(20)
        self.reactor.close()

    def connect(self) -> Connected:
        made = Connected(self.service.address, self.service.authkey)
        self._clients.append(made)
        return made

    def process(self, function: Callable[..., Any], *args: Any) -> Any:
        """A child that calls ``function(connected, *args)``."""
        address, key = self.service.address, self.service.authkey

        def run() -> None:
            with Connected(address, key) as connected:
                function(connected, *args)

        child = FORK.Process(target=run, daemon=True)
        child.start()
        return child

    def _stop(self) -> None:
        self._stopping = True

    def stop(self) -> None:
        if self._thread.is_alive():
            self.reactor.post(self._stop)
            self._posted.set()
            self._thread.join(20)
            assert not self._thread.is_alive()

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.stop()


@contextmanager
def interrupted_by(error: BaseException) -> Iterator[threading.Event]:
    """Raise ``error`` in a signal handler of this thread, once what is given here is set."""
    me, now = threading.get_ident(), threading.Event()

    def handler(number: int, frame: Any) -> None:
        raise error

    def interrupts() -> None:
        if now.wait(20):
            signal.pthread_kill(me, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=interrupts, daemon=True)
    thread.start()
    try:
        yield now
        thread.join(20)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def own_runtime(socket_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sockets and keys of this test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(socket_folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("TASKRUN_AUTHKEY", "TASKRUN_AUTHKEY_FILE", "TASKRUN_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return socket_folder


@pytest.fixture
def live(own_runtime: Path) -> Iterator[Live]:
    made = Live()
    yield made
    made.close()
