"""Managers and shared state over TLS, and several roles behind one address."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import AuthenticationError, managers
from time import monotonic
from typing import Any

import pytest

import taskrun  # registers the serializer "tls"
from taskrun.addresses import Tls
from taskrun.errors import DialError
from taskrun.manager import SyncManager
from taskrun.manager.server import Server
from taskrun.reactor import Reactor
from taskrun.transport import Peer, dial_blocking

assert taskrun
KEY = os.urandom(32).hex().encode()
DEADLINE = 20.0  # seconds


class Running:
    """A Manager server with one more role, and the thread that runs it."""

    def __init__(self, address: Any) -> None:
        self.reactor = Reactor()
        self.notices: list[str] = []
        self.nodes: list[Peer] = []
        self.server = Server(
            SyncManager._registry, None, KEY, self.reactor,
            notice=self.notices.append, roles={b"node": self._on_node},
        )  # fmt: skip
        self.server.start()
        self.address = self.server.open(address)
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _on_node(self, peer: Peer) -> None:
        self.nodes.append(peer)
        peer.listen(lambda frame: peer.send(b"got ", bytes(frame)), lambda reason: None)

    def _run(self) -> None:
        self.reactor.run_until(lambda: self._over)
        self.server.close()
        self.reactor.close()

    def stop(self) -> None:
        self._over = True
        self.reactor.post(lambda: None)
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()


@pytest.fixture(params=["plain", "tls"])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    found = Running(Tls("127.0.0.1", 0) if request.param == "tls" else ("127.0.0.1", 0))
    yield found
    found.stop()


def manager_for(running: Running, kind: Any, key: bytes = KEY) -> Any:
    serializer = "tls" if isinstance(running.address, Tls) else "pickle"
    made = kind(tuple(running.address), authkey=key, serializer=serializer)
    made.connect()
    return made


@pytest.mark.parametrize("kind", [managers.SyncManager, SyncManager])
def test_managers_and_their_proxies_work(running: Running, kind: Any) -> None:
    manager = manager_for(running, kind)
    shared, queue, lock = manager.dict(a=1), manager.Queue(), manager.Lock()
    shared["big"] = "x" * 3_000_000
    assert len(shared["big"]) == 3_000_000 and shared["a"] == 1
    queue.put([1, 2])
    assert queue.get(True, DEADLINE) == [1, 2]
    with lock:
        assert not lock.acquire(False)
    assert manager.list([3])[0] == 3
    for number in range(200):
        shared[number] = number
    assert len(shared.keys()) == 202


def test_a_thread_that_waits_for_a_client_sees_it_go(running: Running) -> None:
    manager = manager_for(running, managers.SyncManager)
    queue = manager.Queue()
    queue.put(1)
    assert queue.get() == 1  # from now on this connection has a thread
    (promoted,) = running.server._promoted
    assert not promoted._is_gone()
    queue._tls.connection.close()
    ended = monotonic() + DEADLINE
    while running.server._promoted and monotonic() < ended:
        threading.Event().wait(0.01)
    assert not running.server._promoted


def test_one_address_serves_managers_and_other_roles(running: Running) -> None:
    manager = manager_for(running, managers.SyncManager)
    with dial_blocking(running.address, KEY, b"node", DEADLINE) as node:
        node.send(b"hello")
        assert bytes(node.recv(DEADLINE)) == b"got hello"
        assert manager.dict(a=1)["a"] == 1
    assert [peer.hello for peer in running.nodes] == [b"node"]


def test_a_role_that_is_not_offered_is_refused_by_name(running: Running) -> None:
    with pytest.raises(DialError, match="has nothing for a stranger") as caught:
        dial_blocking(running.address, KEY, b"stranger", DEADLINE)
    assert not caught.value.retry
    assert "there is nothing here for a stranger" in running.notices[0]


@pytest.mark.parametrize("kind", [managers.SyncManager, SyncManager])
@pytest.mark.parametrize("key", [b"short", b"another key of sixteen bytes"])
def test_a_manager_with_another_key_is_refused(running: Running, kind: Any, key: bytes) -> None:
    with pytest.raises(AuthenticationError) as caught:
        manager_for(running, kind, key)
    assert key not in str(caught.value).encode()


def test_a_connection_is_not_used_in_a_child_nor_sent_to_another_process() -> None:
    running = Running(Tls("127.0.0.1", 0))
    shared = manager_for(running, managers.SyncManager).dict(a=1)
    assert shared["a"] == 1
    connection = shared._tls.connection
    with pytest.raises(TypeError, match="stays in its process"):
        connection.__reduce__()
    connection._pid += 1
    with pytest.raises(OSError, match="child process"):
        connection.send("x")
    running.stop()


def test_a_server_of_our_own_speaks_tls() -> None:
    with SyncManager(("127.0.0.1", 0), authkey=KEY, serializer="tls") as manager:
        shared = manager.dict(a=1)
        assert shared["a"] == 1 and sorted(iter(shared)) == ["a"]
        stock = managers.SyncManager(manager.address, authkey=KEY, serializer="tls")
        stock.connect()
        assert stock.list([1, 2])[1] == 2


def test_the_standard_librarys_server_says_that_it_cannot() -> None:
    manager = managers.SyncManager(("127.0.0.1", 0), authkey=KEY, serializer="tls")
    with pytest.raises(NotImplementedError, match=r"taskrun\.manager\.SyncManager"):
        manager.get_server()


@pytest.mark.parametrize("order", ["taskrun, multiprocessing.managers",
                                   "multiprocessing.managers, taskrun"])  # fmt: skip
def test_the_serializer_is_there_in_whatever_order_things_are_imported(order: str) -> None:
    code = f"""
import sys
import {order}
import multiprocessing.managers as managers
assert "tls" in managers.listener_client
assert type(managers.__loader__).__name__ == type(managers.__spec__.loader).__name__
assert "SourceFileLoader" in type(managers.__loader__).__name__
assert not [one for one in sys.meta_path if type(one).__module__ == "taskrun.hooks"]
assert "ssl" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd="/")
