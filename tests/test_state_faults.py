"""What goes wrong around shared state: clients that die, values that are large, and many
clients at once.  ``TASKRUN_SOAK=1`` for the long forms."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import random
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state_support import FORK, Live, interrupted_by, live, own_runtime
from transport_support import fill_queue

from taskrun.errors import StateError, StateLost
from taskrun.manager.protocol import MANAGER, framed
from taskrun.state import remote
from taskrun.state.connecting import Connected
from taskrun.state.remote import Connection, _readable

__all__ = ["live", "own_runtime"]
SOAK = bool(os.environ.get("TASKRUN_SOAK"))
pytestmark = pytest.mark.timeout(300 if SOAK else 90)


def kill(child: Any) -> None:
    os.kill(child.pid, signal.SIGKILL)
    child.join(20)


def dial(live: Live, name: str) -> Connection:
    """A bare connection of a client, past the handshake."""
    service = live.service
    return Connection(
        service.address, service.authkey, ("client", name), (None, None, None), MANAGER
    )


def wait_until(holds: Any) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# -- clients that die -----------------------------------------------------------------


def test_the_lock_of_a_killed_client_is_free(live: Live) -> None:
    ready = FORK.Event()

    def holds(state: Connected) -> None:
        state.lock("l").acquire()
        state.semaphore("s", 1).acquire()
        ready.set()
        time.sleep(60)

    child = live.process(holds)
    assert ready.wait(20)
    state = live.connect()
    assert state.lock("l").acquire(blocking=False) is False
    kill(child)
    assert state.lock("l").acquire(timeout=20)
    assert state.semaphore("s", 1).acquire(timeout=20)


def test_a_killed_client_that_waits_for_a_lock_never_gets_it(live: Live) -> None:
    state = live.connect()
    state.lock("l").acquire()
    child = live.process(lambda other: other.lock("l").acquire())
    wait_until(lambda: state.value("l")["waiting"] == 1)
    kill(child)
    wait_until(lambda: state.value("l")["waiting"] == 0)
    state.lock("l").release()
    assert not state.lock("l").locked()


def test_a_client_killed_in_the_middle_of_a_request_is_forgotten(live: Live) -> None:
    state = live.connect()
    sent = FORK.Event()

    def half(other: Connected) -> None:
        other.counter("c").add(1)
        connection = other._client.connect()
        connection._socket.sendall(framed(pickle.dumps(("counter.add", "c", None, (1,))))[:-3])
        sent.set()
        time.sleep(60)

    child = live.process(half)
    assert sent.wait(20)
    others = len(live.service.sessions)
    kill(child)
    wait_until(lambda: len(live.service.sessions) < others)
    assert state.counter("c").add(1) == 2


def test_a_killed_getter_takes_no_item_with_it(live: Live) -> None:
    state = live.connect()
    q = state.queue("q")
    for _ in range(10):
        child = live.process(lambda other: other.queue("q").get())
        wait_until(lambda: len(live.service.store.objects) and _getters(live) == 1)
        os.kill(child.pid, signal.SIGSTOP)  # it cannot take what it is given
        q.put("item")
        kill(child)
        assert q.get(timeout=20) == "item"


def _getters(live: Live) -> int:
    queue: Any = live.service.store.objects.get("q")
    return 0 if queue is None else len(queue._getters)


def test_the_locks_of_an_attempt_are_free_when_it_has_ended(live: Live) -> None:
    live.running.add((7, 1))
    holder = dial(live, "w1")
    holder.send(("lock.acquire", "l", None, (("attempt", 7, 1), "a place", True)))
    assert holder.receive() == (0, True)
    state = live.connect()
    assert not state.lock("l").acquire(blocking=False)
    live.running.clear()
    live.reactor.post(lambda: live.service.attempt_ended(7, 1))
    assert state.lock("l").acquire(timeout=20)
    state.lock("l").release()
    holder.send(("lock.acquire", "l", None, (("attempt", 7, 1), "a place", True)))
    assert holder.receive()[1] == ("StateError", ("call 7, attempt 1 has ended: it gets no lease",))
    holder.close()


def is_taken(live: Live, kind: str) -> bool:
    """Whether ``x``, of that kind, cannot be acquired by others."""
    other = live.connect()
    one = other.lock("x") if kind == "lock" else other.semaphore("x", 1)
    return not one.acquire(timeout=0.05)


@pytest.mark.parametrize("kind", ["lock", "semaphore"])
def test_what_a_client_holds_lasts_until_it_is_closed_whichever_connections_end(
    live: Live, kind: str
) -> None:
    state = live.connect()
    held = state.lock("x") if kind == "lock" else state.semaphore("x", 1)
    begun: list[Any] = []

    async def acquires_and_gives_up_another_wait() -> None:
        await held.acquire_async()
        await asyncio.wait_for(state.event("never").wait_async(), 0.05)

    def in_a_thread_that_ends() -> None:
        state.dict("d").update(dict.fromkeys(range(2500), 0))
        keys = iter(state.dict("d"))
        begun.extend((keys, next(keys)))
        with pytest.raises(TimeoutError):
            asyncio.run(acquires_and_gives_up_another_wait())

    thread = threading.Thread(target=in_a_thread_that_ends)
    thread.start()
    thread.join(20)
    del thread
    wait_until(lambda: len(live.service.sessions) == 1)
    assert is_taken(live, kind)
    assert len(list(begun[0])) == 2499
    state.close()
    wait_until(lambda: not is_taken(live, kind))


def test_a_forked_child_of_a_client_holds_what_it_acquires_itself(live: Live) -> None:
    state, ready, over = live.connect(), FORK.Event(), FORK.Event()
    state.semaphore("x", 2).acquire()

    def acquires() -> None:
        state.semaphore("x").acquire()

        async def waits() -> None:
            await asyncio.wait_for(state.event("never").wait_async(), 0.05)

        with pytest.raises(TimeoutError):
            asyncio.run(waits())
        ready.set()
        over.wait(60)

    child = FORK.Process(target=acquires, daemon=True)
    child.start()
    assert ready.wait(20)
    assert live.service.store.execute(("semaphore.locked", "x", None, ()), None)[1]  # type: ignore[arg-type]
    kill(child)
    assert state.semaphore("x").acquire(timeout=20)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("kind", ["lock", "semaphore"])
def test_a_lock_that_did_not_reach_whoever_asked_for_it_is_free(
    live: Live, kind: str, waits: bool
) -> None:
    # As when acquire_async() is cancelled just then; its attempt goes on.
    live.running.add((7, 1))
    owner, place = ("attempt", 7, 1), "a place"
    options = (1,) if kind == "semaphore" else None
    state = live.connect()
    ours = state.lock("x") if kind == "lock" else state.semaphore("x", 1)
    if waits:
        ours.acquire()
    asks = dial(live, "w1")
    asks.send((f"{kind}.acquire", "x", options, (owner, place, True)))
    if waits:
        wait_until(lambda: state.value("x")["waiting"] == 1)
        ours.release()
    wait_until(lambda: ours.locked())
    asks.close()
    assert ours.acquire(timeout=20)


def test_a_lock_that_was_acknowledged_stays_with_its_attempt(live: Live) -> None:
    live.running.add((7, 1))
    asks = dial(live, "w1")
    asks.send(("lock.acquire", "x", None, (("attempt", 7, 1), "a place", True)))
    assert asks.receive() == (0, True)
    asks.send("acknowledge")
    before = len(live.service.sessions)
    asks.close()
    wait_until(lambda: len(live.service.sessions) < before)
    assert not live.connect().lock("x").acquire(blocking=False)


@pytest.mark.parametrize("at", ["connect", "sendall"])
def test_what_a_signal_handler_raises_in_an_operation_is_the_users(live: Live, at: str) -> None:
    state = live.connect()
    state.lock("l").acquire()
    if at == "connect":
        state._client._thread.connection.close()  # the next operation needs another one
    raised: list[BaseException] = []

    def interrupted(self: socket.socket, *args: object) -> None:
        raised.append(TimeoutError("my time is up"))
        raise raised[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, at, interrupted)
        with pytest.raises(TimeoutError, match="my time is up"):
            state.counter("c").add(1)
    assert len(raised) == 1 and state.counter("c").add(1) == 1
    assert not live.connect().lock("l").acquire(blocking=False)


def test_what_a_signal_handler_raises_before_the_answer_is_there_is_the_users(live: Live) -> None:
    state = live.connect()
    c = state.counter("c")
    c.add(1)
    mine = TimeoutError("my time is up")
    mutex = live.service.store.mutex  # the coordinator waits for it
    with mutex, pytest.raises(TimeoutError, match="my time is up"), interrupted_by(mine) as now:
        now.set()
        c.add(1)
    assert c.add(1) in (2, 3)


def test_an_operation_within_another_one_takes_no_reply_of_it(live: Live) -> None:
    # A finalizer or a signal handler that comes between a request and its reply.
    state = live.connect()
    c = state.counter("c")
    c.add(0)  # this thread has a connection
    receive = Connection.receive
    within: list[Any] = []

    def interrupted(self: Connection) -> Any:
        if not within:
            within.append("begun")
            within.append(c.add(100))
        return receive(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "receive", interrupted)
        outer = c.add(1)
    assert sorted((outer, within[1])) in ([1, 101], [100, 101])
    assert outer - within[1] in (1, -100)


def test_a_forked_child_uses_a_connection_of_its_own(live: Live) -> None:
    state = live.connect()
    state.counter("c").add(1)
    children = []
    for _ in range(4):

        def adds() -> None:
            for _ in range(50):
                state.counter("c").add(1)

        children.append(FORK.Process(target=adds))
        children[-1].start()
    for _ in range(50):
        state.counter("c").add(1)
    for child in children:
        child.join(20)
    assert state.counter("c").get() == 251


def test_who_waits_when_the_coordinator_goes_is_told(own_runtime: Any) -> None:
    live = Live()
    state = live.connect()
    errors: list[BaseException] = []

    def waits() -> None:
        try:
            state.queue("q").get()
        except StateLost as error:
            errors.append(error)

    thread = threading.Thread(target=waits)
    thread.start()
    wait_until(lambda: _getters(live) == 1)
    live.stop()
    thread.join(20)
    assert "is gone, and the shared state with it" in str(errors[0])
    with pytest.raises(StateLost, match="cannot be reached"):
        state.counter("c").add(1)


def test_an_answer_that_came_together_with_another_is_seen(live: Live) -> None:
    both = dial(live, "both")
    request = framed(pickle.dumps(("counter.add", "c", None, (1,))))
    both._socket.sendall(request + request)
    wait_until(lambda: live.service.store.execute(("counter.get", "c", None, ()), None)[1] == 2)  # type: ignore[arg-type]
    assert both.receive() == (0, 1)
    assert asyncio.run(asyncio.wait_for(_readable(both, None), 20))
    assert both.receive() == (0, 2)
    both.close()


def test_an_iterator_that_outlives_its_connection_says_nothing(live: Live) -> None:
    state = live.connect()
    state.dict("d").update(dict.fromkeys(range(2500), 0))
    keys = iter(state.dict("d"))
    next(keys)
    state.close()
    raised: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", raised.append)
        del keys
        gc.collect()
    assert not raised


# -- what clients send ----------------------------------------------------------------


def test_a_value_of_200_megabytes_goes_there_and_back(live: Live) -> None:
    state, other = live.connect(), live.connect()
    value = bytes(200_000_000)
    began = threading.Event()
    slowest = [0.0]

    def looks_meanwhile() -> None:
        began.set()
        while not done.is_set():
            before = time.monotonic()
            other.counter("c").add(1)
            slowest[0] = max(slowest[0], time.monotonic() - before)

    done = threading.Event()
    thread = threading.Thread(target=looks_meanwhile)
    thread.start()
    began.wait(20)
    state.dict("d")["k"] = [value]
    assert state.dict("d")["k"] == [value]
    done.set()
    thread.join(20)
    assert other.counter("c").get() > 0
    state.dict("d").clear()


def test_garbage_after_the_handshake_ends_that_client_only(live: Live) -> None:
    state = live.connect()
    state.counter("c").add(1)
    chance = random.Random(5)
    for number in range(60):
        wild = dial(live, "wild")
        sock = wild._socket
        try:
            if number % 3 == 0:
                sock.sendall(framed(chance.randbytes(chance.randrange(1, 60))))
            elif number % 3 == 1:
                sock.sendall(chance.randbytes(40))
            else:
                name = chance.choice(["dict.get", "no.such", "queue.get", 5, None])
                wild.send((name, chance.choice(["d", 7, None]), None, chance.choice([(), 3, (1,)])))
            sock.settimeout(0.02)
            sock.recv(1000)
        except (OSError, TimeoutError):
            pass
        wild.close()
    assert state.counter("c").add(1) == 2


def test_a_request_that_names_code_is_not_unpickled(live: Live) -> None:
    wild = dial(live, "wild")
    wild._send_bytes(pickle.dumps(("dict.set", "d", None, ("k", socket.gethostname))))
    refused = "the coordinator does not load _socket.gethostname of a request"
    assert wild.receive() == (1, ("StateError", (refused,)))
    wild.send(("queue.get", "q", None, (True,)))
    assert wild.receive() == (2, None)
    wild._send_bytes(pickle.dumps(socket.gethostname))
    with pytest.raises(StateLost):  # no request is due
        wild.receive()
    wild.close()


def test_a_value_is_never_unpickled_by_the_coordinator(live: Live) -> None:
    state = live.connect()
    state.dict("d")["k"] = Explosive()
    assert "d" in [name for name, _, _ in state.names()]
    with pytest.raises(ZeroDivisionError):
        state.dict("d")["k"]
    assert state.dict("d").pop("x", "fine") == "fine"


class Explosive:
    def __reduce__(self) -> Any:
        return divmod, (1, 0)


# -- many at once ---------------------------------------------------------------------


def test_who_comes_while_the_queue_is_full_waits_for_room(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, goes_on = threading.Event(), threading.Event()

    def be_busy() -> None:
        busy.set()
        goes_on.wait(20)

    def sleep(seconds: float) -> None:
        goes_on.set()
        time.sleep(seconds)

    live.reactor.post(be_busy)
    assert busy.wait(20)
    live.service._socket.listen(0)
    others = fill_queue(live.service.address)
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=sleep))
    assert live.connect().counter("n").add() == 1 and goes_on.is_set()
    for other in others:
        other.close()


@pytest.mark.timeout(300)
def test_update_at_from_eight_processes_loses_nothing(live: Live) -> None:
    times = 10_000

    def adds(state: Connected) -> None:
        d = state.dict("d")
        for _ in range(times):
            d.update_at("n", lambda n: n + 1, 0)

    children = [live.process(adds) for _ in range(8)]
    for child in children:
        child.join(280)
    assert live.connect().dict("d")["n"] == 8 * times


def test_of_all_who_try_one_gets_it(live: Live) -> None:
    def tries(state: Connected) -> None:
        new = sum(state.set("s").add(number) for number in range(200))
        state.counter("new").add(new)
        for number in range(200):
            mine = object().__hash__()
            state.counter("mine").add(state.dict("d").setdefault(number, mine) == mine)

    children = [live.process(tries) for _ in range(4)]
    for child in children:
        child.join(60)
    assert live.connect().counter("new").get() == 200


class Register:
    """What one key of a dict does, for :func:`linearizable`."""

    @staticmethod
    def apply(value: Any, operation: str, argument: Any) -> tuple[Any, Any]:
        """(the new value, what is returned)."""
        if operation == "get":
            return value, value
        if operation == "set":
            return argument, None
        if operation == "add":
            return (value or 0) + argument, (value or 0) + argument
        if operation == "setdefault":
            value = argument if value is None else value
            return value, value
        return None, value  # pop


def linearizable(history: list[tuple[float, float, str, Any, Any]]) -> bool:
    """Whether there is an order of (begin, end, operation, argument, result), which keeps
    that of those that did not overlap, in which one after the other gives these results."""
    seen: set[tuple[frozenset[int], Any]] = set()

    def search(done: frozenset[int], value: Any) -> bool:
        if len(done) == len(history):
            return True
        if (done, value) in seen:
            return False
        seen.add((done, value))
        left = [number for number in range(len(history)) if number not in done]
        first_end = min(history[number][1] for number in left)
        for number in left:
            begin, _, operation, argument, result = history[number]
            if begin <= first_end:
                after, returned = Register.apply(value, operation, argument)
                if returned == result and search(done | {number}, after):
                    return True
        return False

    return search(frozenset(), None)


def test_the_check_itself_knows_a_history_that_cannot_be() -> None:
    assert linearizable([(0, 1, "set", 1, None), (0.5, 3, "get", None, 1)])
    assert not linearizable([(0, 1, "set", 1, None), (2, 3, "get", None, None)])
    assert not linearizable([(0, 9, "add", 1, 1), (0, 9, "add", 1, 1)])


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["get", "set", "add", "setdefault", "pop"]), st.integers(1, 3)),
    min_size=1,
    max_size=6,
)


@pytest.fixture
def clients(live: Live) -> list[Connected]:
    return [live.connect() for _ in range(4)]


@settings(
    max_examples=400 if SOAK else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(scripts=st.lists(OPERATIONS, min_size=4, max_size=4))
def test_operations_on_one_key_are_linearizable(clients: Any, scripts: Any) -> None:
    clients[0].dict("d").clear()
    history: list[tuple[float, float, str, Any, Any]] = []
    together = threading.Barrier(4)

    def run(d: Any, script: Any) -> None:
        together.wait(20)
        for operation, argument in script:
            begin = time.monotonic()
            result = perform(d, operation, argument)
            history.append((begin, time.monotonic(), operation, argument, result))

    threads = [
        threading.Thread(target=run, args=(client.dict("d"), script))
        for client, script in zip(clients, scripts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(history) == sum(map(len, scripts))
    assert linearizable(history)


def perform(d: Any, operation: str, argument: int) -> Any:
    if operation == "get":
        return d.get("k")
    if operation == "set":
        d["k"] = argument
        return None
    if operation == "add":
        return d.update_at("k", lambda value: value + argument, 0)
    if operation == "setdefault":
        return d.setdefault("k", argument)
    return d.pop("k", None)


def test_a_connection_that_was_closed_says_so(live: Live) -> None:
    state = live.connect()
    state.lock("l").acquire()
    state.close()
    assert live.connect().lock("l").acquire(timeout=20)
    with pytest.raises(StateError, match="was closed"):
        state.counter("c").add(1)


def test_who_waits_on_a_connection_that_is_closed_is_told_so(live: Live) -> None:
    state, other = live.connect(), live.connect()
    errors: list[str] = []

    def waits() -> None:
        with pytest.raises(StateLost) as raised:
            state.queue("q").get()
        errors.append(str(raised.value))

    async def waits_too() -> None:
        with pytest.raises(StateLost) as raised:
            await asyncio.gather(state.event("e").wait_async(), closes())
        errors.append(str(raised.value))

    async def closes() -> None:
        while not waiting():
            await asyncio.sleep(0.005)
        state.close()

    def waiting() -> bool:
        names = {name: number for name, _, number in other.names()}
        return thread.is_alive() and names.get("e") == 1 and "q" in names

    thread = threading.Thread(target=waits)
    thread.start()
    asyncio.run(asyncio.wait_for(waits_too(), 20))
    thread.join(20)
    assert errors == ["this connection to shared state was closed"] * 2
    other.queue("q").put(1)
    assert other.queue("q").get(timeout=20) == 1
