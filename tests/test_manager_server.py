"""The Manager server among clients who die, lie, and send what they should not."""

from __future__ import annotations

import copyreg
import operator
import os
import pickle
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from multiprocessing import AuthenticationError, connection, managers, process
from pathlib import Path
from typing import Any

import psutil
import pytest
from manager_support import (
    KEY,
    SECONDS,
    Client,
    Running,
    deadline,
    greet,
    is_closed,
    length,
    receive,
    running,
    wait_for,
)

from taskrun.manager import SyncManager, blocking
from taskrun.manager.blocking import Waiter
from taskrun.manager.objects import Entry
from taskrun.manager.protocol import Frames, answer_to, framed, header

__all__ = ["deadline"]  # a fixture, used by all

TCP = ("127.0.0.1", 0)
EACH = pytest.mark.parametrize("address", [None, TCP], ids=["unix", "tcp"])


class RaisesWhenLoaded:
    def __reduce__(self) -> Any:
        return operator.truediv, (1, 0)


class LeavesATrace:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def works(server: Running) -> bool:
    """Whether somebody new is served."""
    shared = server.client().dict(a=1)
    shared["b"] = 2
    return bool(shared.copy() == {"a": 1, "b": 2})


# -- who serves whom ------------------------------------------------------------------


def test_idle_clients_and_plain_objects_need_no_threads() -> None:
    with running() as server, ExitStack() as stack:
        before = threading.active_count()
        for _ in range(100):
            greet(stack.enter_context(server.dial()))
        shared = server.client().dict()
        shared["a"] = [1, "b", (2.5, None), {"c": {3}}]
        assert shared["a"] == [1, "b", (2.5, None), {"c": {3}}]
        assert shared.pop("a", None) and list(shared) == []
        assert threading.active_count() == before


@pytest.mark.parametrize("kind", ["Queue", "Lock", "RLock", "Semaphore", "Condition", "Event"])
def test_a_blocking_type_gets_its_connection_a_thread(kind: str) -> None:
    with running() as server:
        before = threading.active_count()
        shared = getattr(server.client(), kind)()
        assert threading.active_count() == before
        getattr(shared, {"Queue": "qsize", "Event": "is_set"}.get(kind, "acquire"))()
        assert threading.active_count() == before + 1
        del shared
        wait_for(lambda: threading.active_count() == before)


def test_an_object_that_holds_values_of_users_classes_is_served_by_threads() -> None:
    with running() as server:
        before = threading.active_count()
        shared = server.client().list([1])
        shared.append(Path("somewhere"))  # its comparison is code of its own
        assert threading.active_count() == before + 1
        assert shared.index(Path("somewhere")) == 1


def test_a_large_value_goes_both_ways_while_others_are_served() -> None:
    value = bytes(200_000_000)
    with running() as server:
        big, small = server.client().dict(), server.client().dict(a=1)
        done = threading.Event()
        slowest = 0.0

        def watch() -> None:
            nonlocal slowest
            while not done.is_set():
                began = time.perf_counter()
                assert small["a"] == 1
                slowest = max(slowest, time.perf_counter() - began)

        thread = threading.Thread(target=watch)
        thread.start()
        big["value"] = value
        same = big["value"] == value
        done.set()
        thread.join(20)
        assert same
        assert slowest < 5  # seconds: everybody is in this one process here


def test_names_are_secret_and_never_used_again() -> None:
    with running() as server:
        manager = server.client()
        names = set()
        for _ in range(50):
            names.add(manager.list()._token.id)
        assert len(names) == 50
        assert {len(name) for name in names} == {32}


def test_one_object_registered_twice_is_one_object() -> None:
    class Manager(SyncManager):
        pass

    shared: list[int] = []
    Manager.register("get_list", lambda: shared)

    class Stock(managers.BaseManager):
        pass

    Stock.register("get_list")
    with running(registry=Manager._registry) as server:
        manager = Stock(address=server.address, authkey=KEY)
        manager.connect()
        one, two = manager.get_list(), manager.get_list()  # type: ignore[attr-defined]
        one.append(1)
        assert two.pop() == 1
        assert manager._number_of_objects() == 1  # type: ignore[attr-defined]


# -- errors ---------------------------------------------------------------------------


@EACH
def test_what_is_wrong_with_a_request_is_told_and_the_connection_goes_on(address: Any) -> None:
    with running(address) as server:
        shared = server.client().dict()
        for method, args in [("nothing", ()), ("__class__", ()), ("__reduce__", ())]:
            with pytest.raises(managers.RemoteError, match="not exposed"):
                shared._callmethod(method, args)
        with pytest.raises(TypeError):
            shared._callmethod("pop", ())
        with pytest.raises(KeyError, match="absent"):
            shared["absent"]
        with pytest.raises(TypeError):
            shared[[]] = 1
        shared["a"] = 1
        assert str(shared) == "{'a': 1}"


def test_bytes_that_are_no_request_are_told_so_and_the_connection_goes_on() -> None:
    with running() as server, server.dial() as bare:
        frames = greet(bare)
        bare.sendall(framed(pickle.dumps((None, "accept_connection", ("me",), {}))))
        assert pickle.loads(receive(bare, frames)) == ("#RETURN", None)
        for nonsense in (b"", b"nonsense", pickle.dumps(7), pickle.dumps(([], {}, 1, 2))):
            bare.sendall(framed(nonsense))
            assert pickle.loads(receive(bare, frames))[0] == "#TRACEBACK"


def test_a_value_that_raises_while_it_is_loaded_is_told_and_the_connection_goes_on() -> None:
    with running() as server:
        shared = server.client().dict()
        with pytest.raises(managers.RemoteError, match="ZeroDivisionError"):
            shared["a"] = RaisesWhenLoaded()
        shared["a"] = 1
        assert shared["a"] == 1


class TakesNoAttributes(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


class Strange:
    def lock(self) -> Any:
        return threading.Lock()

    def leave(self) -> None:
        raise SystemExit

    def fail(self) -> None:
        raise ValueError("by design")

    def fail_strangely(self) -> None:
        raise TakesNoAttributes("by design")


class StrangeManager(SyncManager):
    pass


StrangeManager.register("Strange", Strange)


def test_a_reply_that_cannot_be_pickled_is_told() -> None:
    with running(registry=StrangeManager._registry) as server:
        strange = server.client(StrangeManager).Strange()
        with pytest.raises(managers.RemoteError, match="Unserializable"):
            strange.lock()
        with pytest.raises(ValueError, match="by design") as caught:
            strange.fail()
        assert "in fail" in caught.value.__notes__[0]


def test_an_exception_that_takes_no_note_is_raised_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Where distributed was imported, tblib pickles all exceptions, and sets attributes then.
    monkeypatch.delitem(copyreg.dispatch_table, TakesNoAttributes, raising=False)
    with running(registry=StrangeManager._registry) as server:
        strange = server.client(StrangeManager).Strange()
        for _ in range(2):  # the connection goes on
            with pytest.raises(TakesNoAttributes, match="by design"):
                strange.fail_strangely()


@pytest.mark.parametrize(
    ("kind", "method", "args", "kwds"),
    [
        ("Queue", "put", (), {}),
        ("Queue", "put", (1, True, 5, True), {}),
        ("Queue", "put", (1,), {"blocking": True}),
        ("Queue", "get", (True, 5, True), {}),
        ("Queue", "get", (), {"item": 1}),
        ("Lock", "acquire", (True, 5, True), {}),
        ("Lock", "acquire", (True, None), {}),
        ("Semaphore", "acquire", (), {"block": True}),
        ("Event", "wait", (5, True), {}),
    ],
)
def test_arguments_that_a_method_does_not_take_are_a_type_error(
    kind: str, method: str, args: Any, kwds: Any
) -> None:
    with running() as server:
        shared = getattr(server.client(), kind)()
        with pytest.raises(TypeError):
            shared._callmethod(method, args, kwds)


def test_a_method_that_exits_ends_its_connection_only() -> None:
    with running(registry=StrangeManager._registry) as server:
        manager = server.client(StrangeManager)
        with pytest.raises(EOFError):
            manager.Strange().leave()
        assert works(server)


def test_shutdown_is_refused_by_a_server_that_is_not_the_clients() -> None:
    with running() as server:
        with (
            connection.Client(server.address, authkey=KEY) as conn,
            pytest.raises(managers.RemoteError, match="PermissionError"),
        ):
            managers.dispatch(conn, None, "shutdown")  # type: ignore[attr-defined]
        assert works(server)


# -- before the key is proved ---------------------------------------------------------


@EACH
def test_a_wrong_key_is_refused(address: Any) -> None:
    with running(address) as server:
        for key in (b"wrong", b""):
            for kind in (managers.SyncManager, SyncManager):
                with pytest.raises(AuthenticationError):
                    kind(address=server.address, authkey=key).connect()
        assert works(server)


def test_the_empty_key_is_taken_where_it_is_the_key() -> None:
    with running(authkey=b"") as server:
        managers.SyncManager(address=server.address, authkey=b"").connect()
        with pytest.raises(AuthenticationError):
            managers.SyncManager(address=server.address, authkey=b"a").connect()


LENGTHS = [length(257), length(-2), length(0x7FFFFFFF), header(1 << 31), length(-1) + bytes(8)]


@pytest.mark.parametrize("sent", LENGTHS)
def test_a_length_that_no_handshake_has_closes_the_connection(sent: bytes) -> None:
    with running() as server, server.dial() as bare:
        bare.sendall(sent)
        assert is_closed(bare)
        assert works(server)


def test_a_replayed_answer_opens_no_other_connection() -> None:
    with running() as server:
        with server.dial() as honest:
            frames = Frames(1000)
            challenge = receive(honest, frames).removeprefix(b"#CHALLENGE#")
            answer = framed(answer_to(KEY, challenge))
            honest.sendall(answer)
            assert receive(honest, frames) == b"#WELCOME#"
        with server.dial() as other:
            frames = Frames(1000)
            assert receive(other, frames) != b"#CHALLENGE#" + challenge
            other.sendall(answer)
            assert receive(other, frames) == b"#FAILURE#"
            assert is_closed(other)


def test_nothing_is_unpickled_before_the_key_is_proved(tmp_path: Path) -> None:
    bomb = pickle.dumps(LeavesATrace(tmp_path / "it was unpickled"))
    request = pickle.dumps((None, "create", ("dict",), {}))
    with running() as server:
        for payload in (bomb, request, framed(bomb)):
            with server.dial() as bare:
                bare.sendall(framed(payload))
                assert is_closed(bare)
        with server.dial() as bare:  # between the two halves of the handshake
            frames = greet_half(bare)
            bare.sendall(framed(bomb))
            with pytest.raises(EOFError):
                receive(bare, frames)
        assert list(tmp_path.iterdir()) == []
        assert len(server.server.objects.counted()) == 0


def greet_half(bare: socket.socket) -> Any:
    frames = Frames(1000)
    challenge = receive(bare, frames).removeprefix(b"#CHALLENGE#")
    bare.sendall(framed(answer_to(KEY, challenge)))
    assert receive(bare, frames) == b"#WELCOME#"
    return frames


def test_those_who_never_authenticate_bother_nobody_and_are_gone_at_the_deadline() -> None:
    with running(handshake_timeout=1.0) as server, ExitStack() as stack:
        active = server.client().dict(a=1)
        memory = psutil.Process().memory_info().rss
        began = time.monotonic()
        silent = [stack.enter_context(server.dial()) for _ in range(200)]
        while time.monotonic() - began < 0.8:
            assert active["a"] == 1
        assert works(server)
        assert all(map(is_closed, silent))
        assert time.monotonic() - began < 5
        assert psutil.Process().memory_info().rss - memory < 10_000_000


def test_more_than_may_be_in_the_handshake_make_room_for_the_honest() -> None:
    with running(most_greeting=4) as server, ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(server.dial())
        began = time.monotonic()
        assert works(server)
        assert time.monotonic() - began < 9  # sooner than at the deadline of the silent ones


def test_a_byte_every_half_second_does_not_move_the_deadline() -> None:
    with running(handshake_timeout=2.0) as server, server.dial() as bare:
        active = server.client().dict(a=1)
        began = time.monotonic()
        bare.settimeout(0.5)
        for byte in length(200) + bytes(16):
            try:
                bare.sendall(bytes([byte]))
                while bare.recv(1000):
                    pass
                break
            except TimeoutError:
                assert active["a"] == 1
            except OSError:
                break
        assert 1.9 < time.monotonic() - began < 5


def test_fuzzed_connections_leave_the_server_as_it_was() -> None:
    generator = random.Random(400)
    valid = framed(pickle.dumps((None, "number_of_objects", (), {})))
    with running(handshake_timeout=5.0) as server:
        active = server.client().dict(a=1)
        for number in range(400):
            with server.dial() as bare:
                try:
                    if number % 2:
                        greet(bare)
                    noise = bytearray(valid if number % 4 == 3 else b"")
                    noise += generator.randbytes(generator.randrange(1, 300))
                    for _ in range(generator.randrange(4)):
                        noise[generator.randrange(len(noise))] = generator.randrange(256)
                    bare.sendall(noise)
                except OSError:
                    pass  # it was closed on us, as it should be
        assert active["a"] == 1
        assert works(server)


# -- clients that die -----------------------------------------------------------------


@EACH
def test_a_client_killed_in_the_middle_of_a_request_is_forgotten(address: Any) -> None:
    code = """
shared = manager.dict()
shared["a"] = 1
conn = shared._tls.connection
os.write(conn.fileno(), b"\\0\\0\\1\\0half of it")
say("sent")
time.sleep(60)
"""
    with running(address) as server, Client(server.address, code) as client:
        assert client.hear() == "sent"
        assert len(server.server._peers) == 1
        client.kill()
        wait_for(lambda: not server.server._peers)
        assert works(server)


def test_over_tcp_the_references_of_a_killed_client_stay_as_in_the_standard_library() -> None:
    code = """
kept = [manager.dict(), manager.list()]
say(manager._number_of_objects())
time.sleep(60)
"""
    with running(TCP) as server, Client(server.address, code) as client:
        assert client.hear() == "2"
        mine = server.client().dict()
        client.kill()
        wait_for(lambda: len(server.server._peers) == 0)
        assert len(server.server.objects.counted()) == 3
        mine["a"] = 1


def test_the_references_of_a_killed_client_are_released() -> None:
    code = """
kept = [manager.dict(), manager.list(), manager.Queue()]
say(manager._number_of_objects())
time.sleep(60)
"""
    with running() as server, Client(server.address, code) as client:
        assert client.hear() == "3"
        mine = server.client().dict()
        client.kill()
        wait_for(lambda: len(server.server.objects.counted()) == 1)
        mine["a"] = 1


def test_a_dead_client_releases_rlock_and_condition_but_no_lock() -> None:
    with running() as server:
        manager = server.client()
        rlock, condition, lock = manager.RLock(), manager.Condition(), manager.Lock()
        code = f"""
held = [proxy("AcquirerProxy", {rlock._token.id!r}), proxy("ConditionProxy",
        {condition._token.id!r}), proxy("AcquirerProxy", {lock._token.id!r})]
for one in held + held[:1]:
    one.acquire()
say("held")
time.sleep(60)
"""
        with Client(server.address, code) as client:
            assert client.hear() == "held"
            for shared in (rlock, condition, lock):
                assert not shared.acquire(False)
            client.kill()
            assert rlock.acquire(True, 20)
            assert condition.acquire(True, 20)
            assert not lock.acquire(True, 0.2)
            lock.release()  # anybody may, as in the standard library


def test_an_item_for_a_dead_client_goes_back_to_the_front_of_the_queue() -> None:
    with running() as server:
        shared = server.client().Queue()
        code = f"""
shared = proxy("BaseProxy", {shared._token.id!r})
say("waiting")
shared._callmethod("get")
"""
        with Client(server.address, code) as client:
            assert client.hear() == "waiting"
            (entry,) = server.server.objects.counted()
            wait_for(lambda: entry.value.not_empty._waiters)
            client.kill()
            shared.put("first")
            shared.put("second")
            assert [shared.get(True, 20), shared.get(True, 20)] == ["first", "second"]


def test_a_thread_that_waits_for_a_dead_client_ends() -> None:
    with running() as server:
        manager = server.client()
        shared, event, lock = manager.Queue(), manager.Event(), manager.Lock()
        lock.acquire()
        code = f"""
import threading
def wait(ident, method, *args):
    proxy("BaseProxy", ident)._callmethod(method, args)
shared, event, lock = {[one._token.id for one in (shared, event, lock)]!r}
for arguments in ((shared, "get"), (event, "wait"), (lock, "acquire"), (lock, "acquire", True, -1)):
    threading.Thread(target=wait, args=arguments).start()
say("waiting")
"""
        with Client(server.address, code) as client:
            assert client.hear() == "waiting"
            wait_for(lambda: len(server.server._promoted) == 5)
            client.kill()
            wait_for(lambda: len(server.server._promoted) == 1)
        lock.release()
        assert lock.acquire(True, 20)  # the dead client has not got it


def test_a_set_and_clear_between_two_looks_at_its_client_ends_the_wait_for_an_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocking, "SLICE", 0.01)
    event = threading.Event()

    def look() -> bool:
        event.set()
        event.clear()
        return False

    assert Waiter(look)(Entry("1", "Event", event), "wait", event.wait, (5,), {}) is True
    assert not event._cond._waiters  # type: ignore[attr-defined]


def test_a_client_that_dies_at_a_barrier_has_not_come() -> None:
    with running() as server:
        barrier = server.client().Barrier(2)
        code = f"""
shared = proxy("BaseProxy", {barrier._token.id!r})
say("waiting")
shared._callmethod("wait")
"""
        with Client(server.address, code) as client:
            assert client.hear() == "waiting"
            wait_for(lambda: barrier.n_waiting == 1)
            client.kill()
            wait_for(lambda: len(server.server._promoted) == 1)
        assert barrier.n_waiting == 0
        places: list[int] = []
        others = [threading.Thread(target=lambda: places.append(barrier.wait(20))) for _ in "ab"]
        for other in others:
            other.start()
        for other in others:
            other.join(20)
        assert sorted(places) == [0, 1]
        with pytest.raises(threading.BrokenBarrierError):
            barrier.wait(0.01)


# -- descriptors ----------------------------------------------------------------------


def few_descriptors() -> None:
    most = psutil.Process().num_fds() + 25  # beside those that a forked server has from us
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def test_without_descriptors_existing_clients_go_on_and_others_wait() -> None:
    manager = SyncManager(authkey=KEY)
    manager.start(few_descriptors)
    stock = managers.SyncManager(address=manager.address, authkey=KEY)
    stock.connect()
    shared = stock.dict()
    shared["a"] = 1
    admitted = []
    waiting = socket.socket(socket.AF_UNIX)
    try:
        for _ in range(60):
            bare = socket.socket(socket.AF_UNIX)
            bare.settimeout(2)
            bare.connect(manager.address)
            admitted.append(bare)
            try:
                greet(bare)
            except TimeoutError:
                break  # the server has none left, and lets us wait
        assert 10 < len(admitted) < 40
        for _ in range(200):
            shared["a"] += 1
        used = psutil.Process(manager._process.pid).cpu_times().user
        time.sleep(0.5)
        assert psutil.Process(manager._process.pid).cpu_times().user - used < 0.2
        for bare in admitted:
            bare.close()
        waiting.settimeout(20)
        waiting.connect(manager.address)
        greet(waiting)
        assert shared["a"] == 201
    finally:
        for bare in [*admitted, waiting]:
            bare.close()
        del shared
        manager.shutdown()


# -- proxies of our own ---------------------------------------------------------------


@pytest.fixture
def known_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard library's nested proxies take the key of their process."""
    monkeypatch.setitem(process.current_process()._config, "authkey", KEY)  # type: ignore[attr-defined]


def test_a_proxy_of_our_own_reached_by_another_address_is_not_dialled(
    monkeypatch: pytest.MonkeyPatch, known_key: None
) -> None:
    dialled = []
    dial = connection.SocketClient  # type: ignore[attr-defined]

    def noted(address: Any) -> Any:
        dialled.append(threading.current_thread().name)
        return dial(address)

    monkeypatch.setattr(connection, "SocketClient", noted)
    with running(TCP) as server:
        other = server.server.listen(("localhost", 0))
        unix = server.server.listen(None)
        wait_for(lambda: server.client(address=unix))
        inner = server.client(address=other).list([1])
        outer = server.client(address=unix).dict()
        outer["inner"] = inner
        assert outer["inner"][0] == 1
        assert "manager client" not in dialled


def test_a_nested_object_lives_as_long_as_somebody_can_reach_it(known_key: None) -> None:
    with running() as server:
        manager = server.client()
        inner, outer = manager.list([1]), manager.dict()
        ident = inner._token.id
        outer["inner"] = inner
        del inner
        assert manager._number_of_objects() == 1
        assert outer["inner"][0] == 1
        taken = outer.pop("inner")
        assert taken[0] == 1
        del taken
        outer["something"] = "else"
        wait_for(lambda: server.server.objects.find(ident) is None)


# -- time -----------------------------------------------------------------------------


def test_a_standard_client_connects_over_tcp_without_waiting_for_acknowledgements() -> None:
    with running(TCP) as server:
        took = []
        for _ in range(15):
            began = time.perf_counter()
            server.client()
            took.append(time.perf_counter() - began)
        # The system waits for 0.04 s, every time; a machine that is busy, now and then.
        assert min(took) < 0.03


def test_many_clients_at_the_same_instant_are_all_answered() -> None:
    with running(TCP) as server:
        begin = threading.Barrier(64)
        connected = []

        def connect() -> None:
            begin.wait(20)
            server.client()
            connected.append(1)

        threads = [threading.Thread(target=connect) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(connected) == 64


def test_the_server_alone_does_not_import_multiprocessing() -> None:
    code = "import sys, taskrun.manager.server; print('multiprocessing' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert done.stdout.strip() == "False", done.stderr


class Slow(int):
    """A number that takes its time to be added to another."""

    asked, may_go_on = threading.Event(), threading.Event()

    def __radd__(self, other: Any) -> Any:
        self.asked.set()
        assert self.may_go_on.wait(SECONDS)
        return other + int(self)


def test_a_number_that_takes_long_to_be_added_keeps_nobody_else_waiting() -> None:
    with running() as server:
        counter = server.client(SyncManager).Counter()
        slowly = threading.Thread(target=lambda: counter.add(Slow(10)))
        slowly.start()
        assert Slow.asked.wait(SECONDS)
        try:
            assert counter.add(1) == 1
        finally:
            Slow.may_go_on.set()
            slowly.join(SECONDS)
        assert counter.get() == 11
