"""The named objects, for clients of the standard library, which may be killed."""

from __future__ import annotations

import copy
import copyreg
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.managers import (
    AcquirerProxy,
    DictProxy,
    EventProxy,
    ListProxy,
    RemoteError,
    SyncManager,
)
from typing import Any

import pytest
import tblib.pickling_support
from state_support import FORK, Live, live, own_runtime

__all__ = ["live", "own_runtime"]
pytestmark = pytest.mark.timeout(90)


class Run(SyncManager):
    """As somebody without taskrun writes it."""


Run.register("state_barrier")
Run.register("state_counter")
Run.register("state_dict", proxytype=DictProxy)
Run.register("state_event", proxytype=EventProxy)
Run.register("state_list", proxytype=ListProxy)
Run.register("state_lock", proxytype=AcquirerProxy)
Run.register("state_queue")
Run.register("state_semaphore", proxytype=AcquirerProxy)
Run.register("state_set")


def stock(live: Live) -> Any:
    run = Run(live.service.address, authkey=live.service.authkey)
    run.connect()
    return run


def stock_process(live: Live, function: Callable[[Any], object]) -> Any:
    child = FORK.Process(target=lambda: function(stock(live)), daemon=True)
    child.start()
    return child


def kill(child: Any) -> None:
    os.kill(child.pid, signal.SIGKILL)
    child.join(20)


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def waiting(live: Live, name: str) -> Any:
    """How many wait for a lock, semaphore, barrier, event, or an item of a queue."""
    found: Any = live.service.store.objects.get(name)
    return 0 if found is None else len(found._getters if name == "q" else found._waits)


def test_all_kinds_are_reached_by_name(live: Live) -> None:
    ours, run = live.connect(), stock(live)
    ours.dict("d")["a"] = {1}
    assert run.state_dict("d").copy() == {"a": {1}}
    run.state_list("l").extend([3, 1])
    assert ours.list("l") == [3, 1]
    assert run.state_set("s").add("x") is True and run.state_set("s").add("x") is False
    assert run.state_counter("n").add(2) == 2 == ours.counter("n").get()
    run.state_queue("q", 1).put([1])
    with pytest.raises(queue.Full):
        run.state_queue("q", 1).put_nowait(2)
    assert ours.queue("q").get(timeout=20) == [1]
    run.state_event("e").set()
    assert ours.event("e").wait(20) and run.state_event("e").wait(20)


def test_a_deep_copy_of_a_proxy_is_plain_and_a_list_can_be_repeated(live: Live) -> None:
    run = stock(live)
    pages, items, seen = run.state_dict("d"), run.state_list("l"), run.state_set("s")
    pages["a"] = [1]
    items.extend([1, 2])
    seen.add("x")
    assert [copy.deepcopy(one) for one in (pages, items)] == [{"a": [1]}, [1, 2]]
    assert copy.deepcopy(seen) == {"x"}
    assert items * 2 == 2 * items == [1, 2, 1, 2]


def test_what_is_changed_by_an_operator_stays_the_shared_object(live: Live) -> None:
    ours, run = live.connect(), stock(live)
    items, pages = run.state_list("l"), run.state_dict("d")
    items += [1]
    items *= 3
    assert ours.list("l") == [1, 1, 1]
    # From Python 3.14 on, DictProxy does so for |= and |.
    pages._callmethod("__ior__", ({"a": 1},))
    assert ours.dict("d") == {"a": 1}
    assert pages._callmethod("__or__", ({"b": 2},)) == {"a": 1, "b": 2}


def test_a_queue_is_full_whoever_says_how_much_it_takes(live: Live) -> None:
    stock(live).state_queue("q", maxsize=1).put("a")
    assert stock(live).state_queue("q").full()
    live.connect().queue("q").get()
    assert not stock(live).state_queue("q", 1).full()


def test_a_lock_is_one_for_both_kinds_of_clients(live: Live) -> None:
    ours, run = live.connect().lock("l"), stock(live)
    lock = run.state_lock("l")
    with lock:
        assert lock.acquire() and ours.locked()  # its holder may come again
        lock.release()
        assert not ours.acquire(blocking=False)
    with ours:
        assert not lock.acquire(False) and not lock.acquire(True, 0.05)
        with pytest.raises(RuntimeError, match="held by somebody else"):
            lock.release()
    assert lock.acquire(True, 20)
    lock.release()


def test_two_threads_of_a_client_are_two_holders(live: Live) -> None:
    run = stock(live)
    got: list[bool] = []
    with run.state_lock("l"):
        thread = threading.Thread(target=lambda: got.append(run.state_lock("l").acquire(False)))
        thread.start()
        thread.join(20)
    assert got == [False]


def test_a_semaphore_has_its_permits_for_both_kinds_of_clients(live: Live) -> None:
    ours, permits = live.connect().semaphore("s", 2), stock(live).state_semaphore("s", 2)
    assert permits.acquire() and ours.acquire()
    assert not permits.acquire(False) and not permits.acquire(True, 0.05)
    ours.release()
    with pytest.raises(RuntimeError, match="not held here"):
        ours.release()
    assert permits.acquire(True, 20)
    permits.release()
    permits.release()
    assert live.connect().value("s")["free"] == 2


def test_a_barrier_is_for_both_kinds_of_clients(live: Live) -> None:
    places: list[int] = []
    barrier = stock(live).state_barrier("b", 2)
    thread = threading.Thread(target=lambda: places.append(barrier.wait(20)))
    thread.start()
    wait_until(lambda: waiting(live, "b") == 1)
    assert live.connect().barrier("b", 2).wait(20) == 1
    thread.join(20)
    assert places == [0] and barrier.n_waiting() == 0
    with pytest.raises(TimeoutError):
        barrier.wait(0.05)


@pytest.mark.parametrize(
    ("typeid", "option", "method"),
    [
        ("state_semaphore", 0, "acquire"),
        ("state_barrier", -1, "n_waiting"),
        ("state_queue", "many", "qsize"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    live: Live, typeid: str, option: object, method: str
) -> None:
    proxy = getattr(stock(live), typeid)("x", option)
    with pytest.raises((ValueError, TypeError), match="it takes"):
        proxy._callmethod(method)
    assert "x" not in live.service.store.objects


def test_other_options_for_one_name_are_an_error(live: Live) -> None:
    run = stock(live)
    assert run.state_semaphore("s", 2).acquire()
    with pytest.raises(Exception, match="was made with 2, and is now asked for with 3"):
        run.state_semaphore("s", 3).acquire()


WITHOUT_TASKRUN = """
import sys
from multiprocessing.managers import SyncManager
class Run(SyncManager):
    pass
for typeid in ("state_counter", "state_dict", "state_semaphore"):
    Run.register(typeid)
run = Run(sys.argv[1], authkey=bytes.fromhex(sys.argv[2]))
run.connect()
for made, method, args in (
    (run.state_counter("d"), "add", (1,)),
    (run.state_semaphore("s"), "acquire", (False,)),
    (run.state_semaphore("t", 3), "acquire", ()),
    (run.state_dict("d"), "__getitem__", ("b",)),
):
    try:
        made._callmethod(method, args)
    except Exception as error:
        print(type(error).__name__, error)
try:
    import taskrun
except ImportError:
    print("no taskrun")
"""


def test_a_client_without_taskrun_is_told_what_is_wrong_by_builtin_exceptions(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where dask has been imported: with its traceback, which nobody reads without tblib.
    monkeypatch.setitem(
        copyreg.dispatch_table, RuntimeError, tblib.pickling_support.pickle_exception
    )
    ours = live.connect()
    ours.dict("d")["a"] = 1
    ours.semaphore("t", 2).acquire()
    address, key = live.service.address, live.service.authkey.hex()
    command = [sys.executable, "-I", "-S", "-c", WITHOUT_TASKRUN, str(address), key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = done.stdout.splitlines()
    assert len(said) == 5, done.stderr
    assert "RuntimeError 'd' is a dict of this state" in said[0]
    assert "RuntimeError there is no semaphore 's' yet" in said[1]
    assert "RuntimeError the semaphore 't' was made with 2" in said[2]
    assert said[3:] == ["KeyError 'b'", "no taskrun"]


def test_a_name_that_is_none_is_told(live: Live) -> None:
    with pytest.raises(RemoteError, match="the name of a shared object is a str"):
        stock(live).state_lock(7)


# -- clients that die -----------------------------------------------------------------


def test_what_a_killed_client_held_is_free(live: Live) -> None:
    ready = FORK.Event()

    def holds(run: Any) -> None:
        held = run.state_lock("l"), run.state_semaphore("s", 1)
        for one in held:
            one.acquire()
        ready.set()
        time.sleep(60)

    child = stock_process(live, holds)
    assert ready.wait(20)
    ours = live.connect()
    assert not ours.lock("l").acquire(blocking=False)
    kill(child)
    assert ours.lock("l").acquire(timeout=20)
    assert ours.semaphore("s", 1).acquire(timeout=20)


def test_what_a_client_held_that_left_is_free(live: Live) -> None:
    child = stock_process(live, lambda run: run.state_lock("l").acquire())
    child.join(20)
    assert live.connect().lock("l").acquire(timeout=20)


def test_a_killed_client_that_waits_for_a_lock_never_gets_it(live: Live) -> None:
    ours = live.connect()
    ours.lock("l").acquire()
    child = stock_process(live, lambda run: run.state_lock("l").acquire())
    wait_until(lambda: waiting(live, "l") == 1)
    kill(child)
    wait_until(lambda: waiting(live, "l") == 0)
    ours.lock("l").release()
    assert not ours.lock("l").locked()


def test_a_killed_client_that_gets_a_lock_does_not_keep_it(live: Live) -> None:
    ours = live.connect()
    ours.lock("l").acquire()
    child = stock_process(live, lambda run: run.state_lock("l").acquire())
    wait_until(lambda: waiting(live, "l") == 1)
    kill(child)
    ours.lock("l").release()  # most likely it is given to the dead one
    assert ours.lock("l").acquire(timeout=20)


def test_a_killed_getter_takes_no_item_with_it(live: Live) -> None:
    q = live.connect().queue("q")
    child = stock_process(live, lambda run: run.state_queue("q").get())
    wait_until(lambda: waiting(live, "q") == 1)
    kill(child)
    q.put("item")
    assert q.get(timeout=20) == "item"


def test_a_killed_party_has_not_come_to_the_barrier(live: Live) -> None:
    ours = live.connect().barrier("b", 2)
    child = stock_process(live, lambda run: run.state_barrier("b", 2).wait())
    wait_until(lambda: waiting(live, "b") == 1)
    kill(child)
    wait_until(lambda: waiting(live, "b") == 0)
    with pytest.raises(TimeoutError):
        ours.wait(0.05)


def test_one_who_waits_long_keeps_his_place(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    # While it waits, its connection is looked after in slices; it stays in the line.
    monkeypatch.setattr("taskrun.manager.blocking.SLICE", 0.01)
    ours = live.connect()
    order: list[str] = []

    def take(client: Any, name: str) -> None:
        with client.state_lock("l") if name == "stock" else client.lock("l"):
            order.append(name)

    ours.lock("l").acquire()
    threads = []
    for number, (client, name) in enumerate([(stock(live), "stock"), (live.connect(), "ours")]):
        threads.append(threading.Thread(target=take, args=(client, name)))
        threads[-1].start()
        wait_until(lambda number=number: waiting(live, "l") == number + 1)
    time.sleep(0.1)  # many slices
    ours.lock("l").release()
    for thread in threads:
        thread.join(20)
    assert order == ["stock", "ours"]
