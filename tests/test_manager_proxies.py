"""The manager classes and their proxies, where the standard library's go wrong."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import managers
from pathlib import Path
from typing import Any

import pytest
from interrupting import broken_off_at
from manager_support import KEY, Client, deadline, running, wait_for

from taskrun.manager import SyncManager

__all__ = ["deadline"]

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def manager() -> Iterator[Any]:
    with SyncManager(authkey=KEY, ctx=FORK) as found:
        assert multiprocessing.current_process().authkey != KEY
        yield found


def in_child(function: Any, *args: Any) -> Any:
    """What a forked process makes of it."""
    reader, writer = FORK.Pipe(duplex=False)

    def run() -> None:
        writer.send(function(*args))

    process = FORK.Process(target=run)
    process.start()
    assert reader.poll(20), "the child said nothing"
    found = reader.recv()
    process.join(10)
    return found


def test_it_is_a_manager_of_the_standard_library(manager: Any) -> None:
    assert isinstance(manager, managers.SyncManager)
    assert isinstance(manager.dict(), managers.DictProxy)
    assert manager.shutdown.still_active()


def test_a_set_and_a_counter_are_shared_too(manager: Any) -> None:
    names, count = manager.set(["a"]), manager.Counter()
    assert [names.add("a"), names.add("b"), sorted(names)] == [False, True, ["a", "b"]]
    assert [count.add(), count.add(2), count.get()] == [1, 3, 3]


def test_a_pickled_proxy_knows_its_managers_key(manager: Any) -> None:
    shared = manager.list([1, 2])
    assert pickle.loads(pickle.dumps(shared))[:] == [1, 2]
    assert in_child(lambda data: pickle.loads(data)[:], pickle.dumps(shared)) == [1, 2]


def test_a_nested_proxy_knows_its_managers_key(manager: Any) -> None:
    outer = manager.dict(inner=manager.list([1]))
    assert outer["inner"][:] == [1]
    assert in_child(lambda: outer["inner"][:]) == [1]


def test_a_dict_can_be_iterated_in_another_process(manager: Any) -> None:
    shared = manager.dict(a=1, b=2)
    assert in_child(list, shared) == ["a", "b"]
    assert in_child(lambda data: list(pickle.loads(data)), pickle.dumps(shared)) == ["a", "b"]


def test_a_proxy_may_be_used_on_both_sides_of_os_fork(manager: Any) -> None:
    shared = manager.dict(parent=0, child=0)
    assert shared["parent"] == 0
    pid = os.fork()
    who = "parent" if pid else "child"
    try:
        for number in range(300):
            shared[who] = number
            assert shared[who] == number
    except BaseException:
        if not pid:
            os._exit(1)
        raise
    if not pid:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert shared.copy() == {"parent": 299, "child": 299}


def test_an_interrupted_call_does_not_leave_its_reply_to_the_next(manager: Any) -> None:
    queue, shared = manager.Queue(), manager.dict(a=1)
    shared["a"]

    def interrupt(number: int, frame: Any) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        killer = subprocess.Popen(
            [sys.executable, "-c", f"import os, time; time.sleep(.3); os.kill({os.getpid()}, 10)"]
        )
        with pytest.raises(InterruptedError):
            queue.get()
        killer.wait(10)
    finally:
        signal.signal(signal.SIGUSR1, before)
    queue.put("a reply")
    assert shared["a"] == 1


@pytest.mark.parametrize("size", [1, 1_000_000])
def test_a_call_may_be_interrupted_at_any_step(manager: Any, size: int) -> None:
    shared, other = manager.dict(), manager.list(range(5))
    value = b"x" * size
    steps = 0
    while broken_off_at(steps, lambda: shared.update(a=value)):
        assert other[3] == 3 and other[1:3] == [1, 2]
        steps += 1
    assert steps > 20


def test_an_argument_that_cannot_be_pickled_leaves_the_connection_its_locks(manager: Any) -> None:
    lock, shared = manager.RLock(), manager.list()
    lock.acquire()
    with pytest.raises(TypeError, match="pickle"):
        shared.append(threading.Lock())
    lock.release()  # it belongs to the connection


def test_standard_clients_read_the_proxies_that_ours_have_stored() -> None:
    with running() as server:
        outer = server.client(SyncManager).dict()
        outer["inner"] = server.client(SyncManager).list([1, 2])
        code = f"""
outer = proxy("DictProxy", {outer._token.id!r})
say(outer["inner"][:])
say(type(outer["inner"]).__module__)
"""
        with Client(server.address, code) as client:
            assert client.hear() == "[1, 2]"
            assert client.hear() == "multiprocessing.managers"


def test_our_client_works_with_the_standard_librarys_server() -> None:
    class Standard(managers.SyncManager):
        pass

    with Standard(authkey=KEY, ctx=FORK) as theirs:
        ours = SyncManager(address=theirs.address, authkey=KEY)
        ours.connect()
        shared = ours.dict(a=1)
        with ours.Lock():
            shared["b"] = 2
        assert list(shared) == ["a", "b"]


def discard_in_a_cycle(value: Any) -> None:
    cycle: list[Any] = [value]
    cycle.append(cycle)


@pytest.mark.parametrize("kind", [managers.SyncManager, SyncManager])
def test_a_proxy_that_the_servers_own_loop_collects_does_not_stop_it(kind: Any) -> None:
    with running() as server:
        client = server.client(kind)
        kept = client.list()
        gc.disable()
        try:
            discard_in_a_cycle(client.dict())
            assert len(server.server.objects.counted()) == 2
            server.reactor.post(gc.collect)
            wait_for(lambda: len(server.server.objects.counted()) == 1)
        finally:
            gc.enable()
        kept.append(1)
        assert kept[:] == [1]


@pytest.mark.parametrize("kind", [managers.SyncManager, SyncManager])
def test_a_proxy_that_a_clients_thread_collects_amid_its_work_does_not_stop_the_server(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def collect(size: int) -> str:
        threads.append(threading.current_thread().name)
        gc.collect()
        return os.urandom(size).hex()

    with running() as server:
        client = server.client(kind)
        gc.disable()
        try:
            discard_in_a_cycle(client.dict())
            # In here the thread holds what the loop needs to count references.
            monkeypatch.setattr("taskrun.manager.objects.secrets.token_hex", collect)
            kept = client.list([Path("somewhere")])
            assert threads == ["manager client"]
            wait_for(lambda: len(server.server.objects.counted()) == 1)
        finally:
            gc.enable()
        assert kept[:] == [Path("somewhere")]


def test_get_server_serves_until_its_stop_event_is_set() -> None:
    code = f"""
import threading
from taskrun.manager import SyncManager
server = SyncManager(authkey={KEY!r}).get_server()
print(server.address, flush=True)
threading.Timer(0.5, server.stop_event.set).start()
server.serve_forever()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        address = process.stdout.readline().strip()
        managers.SyncManager(address=address, authkey=KEY).connect()
        assert process.wait(20) == 0
    assert not os.path.exists(address)
