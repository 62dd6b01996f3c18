"""Handles and what they name: the same outside a run and over a connection."""

from __future__ import annotations

import asyncio
import gc
import math
import pickle
import queue
import threading
import warnings
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from state_support import Live, interrupted_by, live, own_runtime

from taskrun import state
from taskrun.context import an_import
from taskrun.errors import StateError
from taskrun.state.copies import LostChange

__all__ = ["live", "own_runtime"]
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["here", "connected"])
def made(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What makes handles: of this process's own objects, or of another's."""
    if request.param == "here":
        state.reset()
        yield state
    else:
        live: Live = request.getfixturevalue("live")
        yield live.connect()


# -- dict -----------------------------------------------------------------------------


def test_a_dict_has_the_whole_interface_of_a_mapping(made: Any) -> None:
    d = made.dict("d")
    assert isinstance(d, MutableMapping)
    d["a"] = 1
    d.update({"b": [2]}, c=None)
    assert (d["a"], d["b"], d.get("c", 9), d.get("x", 9)) == (1, [2], None, 9)
    assert list(d) == ["a", "b", "c"] and len(d) == 3 and "b" in d and "x" not in d
    assert dict(d.items()) == {"a": 1, "b": [2], "c": None} == d
    assert list(d.values()) == [1, [2], None] and [2] in d.values()
    assert ("a", 1) in d.items() and d.keys() == {"a", "b", "c"}
    assert d.pop("a") == 1 and d.pop("a", 5) == 5 and d.popitem() == ("c", None)
    assert d.setdefault("b", 0) == [2] and d.setdefault("n", 0) == 0
    del d["n"]
    for wrong in (lambda: d["n"], lambda: d.pop("n"), lambda: d.__delitem__("n")):
        with pytest.raises(KeyError, match="n"):
            wrong()
    d |= {"z": 26}
    assert d | {"y": 25} == {"b": [2], "z": 26, "y": 25}
    d.clear()
    assert not d and d == {}
    with pytest.raises(KeyError, match="is empty"):
        d.popitem()


def test_bulk_operations_of_a_dict(made: Any) -> None:
    d = made.dict("d")
    d.update({number: str(number) for number in range(2500)})
    assert d.get_many([1, 2, 9999]) == {1: "1", 2: "2"}
    assert list(d) == list(range(2500))
    assert list(d.items())[-1] == (2499, "2499")
    assert d.delete_many([1, 1, 2, 9999]) == 2
    d.replace({"only": 1})
    assert d == {"only": 1}
    other = made.dict("other")
    other["key"] = 2
    d.update(other, more=3)
    assert sorted(d.values()) == [1, 2, 3]
    d.replace(other)
    assert list(d.values()) == [2]


def test_an_iteration_sees_a_dict_as_it_was(made: Any) -> None:
    d = made.dict("d")
    d.update(dict.fromkeys(range(2500), 0))
    keys = iter(d)
    first = next(keys)
    d.clear()
    assert [first, *keys] == list(range(2500))


def test_a_copy_of_a_large_dict_is_of_one_moment(made: Any) -> None:
    d = made.dict("d")
    d.update(dict.fromkeys(range(2500), "before"))
    items = iter(d.items())
    first = next(items)
    d.update(dict.fromkeys(range(2500), "after"))
    del d[2400]
    assert dict([first, *items]) == dict.fromkeys(range(2500), "before")


def test_keys_are_plain_values_of_any_depth(made: Any) -> None:
    d = made.dict("d")
    for key in ("s", b"b", 1, 2.5, None, ("x", (1, frozenset({2}))), date(2024, 2, 29)):
        d[key] = key
        assert d[key] == key
    d[True] = "as in any dict"
    assert d[1] == "as in any dict"


def test_numbers_of_numpy_are_keys_as_pythons_are(made: Any) -> None:
    numpy = pytest.importorskip("numpy")
    d, s = made.dict("d"), made.set("s")
    d[numpy.int64(1)] = "one"
    d.update({(numpy.int32(2), numpy.float32(0.5)): "pair", numpy.str_("s"): "text"})
    assert d[1] == "one" and d[2, 0.5] == "pair" and d["s"] == "text"
    assert numpy.int8(1) in d and d.get_many([numpy.uint16(1)]) == {1: "one"}
    assert {type(key) for key in d} == {int, tuple, str}
    assert d.update_at(numpy.int64(1), str.upper) == "ONE" == d[1]
    assert s.add(numpy.int64(7)) and not s.add(7) and numpy.int64(7) in s
    with pytest.raises(TypeError, match="datetime64 cannot be a key"):
        d[numpy.datetime64("2024-02-29")] = 1


def test_what_cannot_be_a_key_is_refused_with_a_reason(made: Any) -> None:
    with pytest.raises(TypeError, match="PosixPath cannot be a key of shared state"):
        made.dict("d")[Path("x")] = 1
    with pytest.raises(TypeError, match="list cannot be a key"):
        made.set("s").add([1])


def test_a_nan_is_no_key(made: Any) -> None:
    d, s, nan = made.dict("d"), made.set("s"), float("nan")
    for key in (nan, complex(nan, 1), ("x", (nan,)), frozenset([nan]), Decimal("nan")):
        for wrong in (lambda key: d.update({key: 1}), d.get, s.add, s.discard):
            with pytest.raises(ValueError, match="NaN equals nothing"):
                wrong(key)
    assert len(d) == len(s) == 0


def test_update_at_reads_computes_and_sets_in_one_step(made: Any) -> None:
    d = made.dict("d")
    assert d.update_at("n", lambda n: n + 1, 0) == 1
    assert d.update_at("n", lambda n: n + 1, 0) == 2
    with pytest.raises(KeyError, match="missing"):
        d.update_at("missing", lambda n: n)


def test_update_at_computes_again_where_the_value_has_changed(made: Any) -> None:
    d = made.dict("d")
    d["n"] = 0
    seen = []

    def meanwhile(n: int) -> int:
        seen.append(n)
        if len(seen) == 1:
            d["n"] = 0  # equal, and yet another one
        return n + 1

    assert d.update_at("n", meanwhile) == 1
    assert seen == [0, 0]


def test_a_lost_change_of_a_nested_value_is_told(made: Any) -> None:
    d = made.dict("d")
    d["k"] = [1]
    with pytest.warns(LostChange, match=r"state\.dict\('d'\)\['k'\] was changed and not written"):
        d["k"].append(2)
        gc.collect()
    assert d["k"] == [1]


def test_a_nested_value_that_is_written_back_is_no_lost_change(made: Any) -> None:
    d = made.dict("d")
    d["k"] = {"x": {1}}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        value = d["k"]
        value["y"] = 2
        d["k"] = value
        assert type(pickle.loads(pickle.dumps(value))) is dict
        d.update_at("k", lambda value: {**value, "z": 3})
        scratch = dict(d["k"])
        scratch.clear()
        del value
        gc.collect()
    assert not told and d["k"] == {"x": {1}, "y": 2, "z": 3}


def test_a_nested_value_that_is_written_back_as_another_one_is_no_lost_change(made: Any) -> None:
    d, items = made.dict("d"), made.list("l")
    d["k"] = []
    items.append([])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for where, key in ((d, "k"), (items, 0)):
            value = where[key]
            value.append(1)
            where[key] = list(value)
            del value
            gc.collect()
    assert not told and d["k"] == items[0] == [1]
    type(d["k"])().append(1)  # comes from nowhere
    with pytest.warns(LostChange):
        d["k"].append(2)
        gc.collect()


# -- list, set, counter ---------------------------------------------------------------


def test_a_list_has_the_whole_interface_of_a_sequence(made: Any) -> None:
    items = made.list("l")
    assert isinstance(items, MutableSequence)
    items.extend(range(5))
    items.append({"k": 1})
    items.insert(0, "first")
    items += ["last"]
    plain = ["first", 0, 1, 2, 3, 4, {"k": 1}, "last"]
    assert items == plain and list(items) == plain and items.copy() == plain
    assert list(reversed(items)) == plain[::-1] and len(items) == 8
    assert (items[0], items[-1], items[1:4], items[::3]) == ("first", "last", [0, 1, 2], plain[::3])
    assert plain + items == items * 2 == 2 * items == plain * 2
    assert {"k": 1} in items and items.index(3) == 4 and items.count(3) == 1
    items[0] = "changed"
    items[-2:] = [1.5]
    del items[1]
    del items[1:3]
    items.remove(4)
    assert items == ["changed", 3, 1.5] and items.pop() == 1.5 and items.pop(0) == "changed"
    items.extend([2, 1])
    items.sort()
    assert items == [1, 2, 3]
    items.sort(key=lambda item: -item)
    items.reverse()
    assert items == [1, 2, 3]
    items.clear()
    for wrong in (lambda: items[0], items.pop):
        with pytest.raises(IndexError):
            wrong()
    with pytest.raises(ValueError, match="not in list"):
        items.remove(1)


def test_a_set_says_what_was_new(made: Any) -> None:
    s = made.set("s")
    assert isinstance(s, MutableSet)
    assert s.add("a") and not s.add("a")
    assert s.add_many(["a", "b", "c", "b"]) == ["b", "c"]
    assert s == {"a", "b", "c"} and len(s) == 3 and "b" in s
    assert s & {"a", "x"} == {"a"} and s | {"x"} == {"a", "b", "c", "x"} and s - {"a"} == {"b", "c"}
    assert s <= {"a", "b", "c", "d"} and s >= {"a"} and s.isdisjoint({"x"})
    assert s.discard("a") and not s.discard("a")
    with pytest.raises(KeyError):
        s.remove("a")
    s |= {"d"}
    s &= {"b", "d"}
    s -= {"b"}
    s ^= ["x", "d", "x"]
    assert s == {"x"}
    s ^= s
    assert s == set()
    s ^= {"d"}
    assert s == {"d"} and s.pop() == "d"
    with pytest.raises(KeyError, match="empty"):
        s.pop()


def test_a_symmetric_difference_is_one_step(made: Any) -> None:
    def toggles() -> None:
        s = made.set("s")
        for _ in range(50):
            s ^= range(100)

    for started in [in_thread(toggles) for _ in range(2)]:
        assert joined(started) is None
    assert made.set("s") == set()


def test_a_counter_adds_and_says_what_it_has_become(made: Any) -> None:
    c = made.counter("c")
    assert (c.add(), c.add(4), c.add(-2.5), c.get(), c.set(7), c.get()) == (1, 5, 2.5, 2.5, 2.5, 7)
    with pytest.raises(TypeError, match="takes numbers, not str"):
        c.add("x")


# -- names ----------------------------------------------------------------------------


def test_one_name_is_one_object(made: Any) -> None:
    made.dict("d")["k"] = 1
    assert made.dict("d") == {"k": 1}
    assert made.dict("d") == made.dict("d") != made.dict("e")
    assert len({made.dict("d"), made.dict("d"), made.list("d")}) == 2


def test_one_name_for_two_kinds_is_an_error_that_names_both(made: Any) -> None:
    made.dict("x")["k"] = 1
    with pytest.raises(StateError, match="'x' is a dict of this state, so it cannot be a list"):
        made.list("x").append(1)


def test_other_options_for_one_name_are_an_error(made: Any) -> None:
    made.semaphore("x", 2).acquire()
    with pytest.raises(StateError, match="was made with 2, and is now asked for with 3"):
        made.semaphore("x", 3).acquire()
    assert made.semaphore("x").acquire()
    with pytest.raises(StateError, match="say how many parties"):
        made.barrier("b").n_waiting()


def test_options_may_be_said_by_their_names(made: Any) -> None:
    made.queue("q", maxsize=1).put("a")
    assert made.queue(name="q").full()
    made.semaphore("s", permits=1).acquire()
    assert made.semaphore("s").locked()
    assert made.barrier("b", parties=1).wait(timeout=20) == 0


def test_a_handle_is_shown_with_what_is_in_it(made: Any) -> None:
    d, lock = made.dict("seen"), made.lock("l")
    d.update(a=1, b=2, c=3)
    assert repr(d) == "<state dict 'seen', 3 items>"
    assert repr(made.counter("n")) == "<state counter 'n', 0>"
    assert repr(lock) == "<state lock 'l', free>"
    with lock:
        assert repr(lock) == "<state lock 'l', locked>"
    assert repr(made.list("seen")) == "<state list 'seen', StateError>"


def test_a_handle_travels_as_its_name() -> None:
    state.reset()
    for handle in (state.dict("d"), state.queue("q", 3), state.barrier("b", 2)):
        copy = pickle.loads(pickle.dumps(handle))
        assert copy == handle and copy._options == handle._options


def test_a_handle_of_a_connection_does_not_travel(live: Live) -> None:
    with pytest.raises(TypeError, match="belongs to a connection of this process"):
        pickle.dumps(live.connect().dict("d"))


def test_state_cannot_be_used_while_a_task_file_is_imported() -> None:
    handle = state.dict("d")
    with an_import():
        assert "StateError" in repr(handle)
        with pytest.raises(StateError, match="use state inside a task"):
            handle["k"] = 1


# -- waiting --------------------------------------------------------------------------


def in_thread(function: Any) -> tuple[threading.Thread, list[Any]]:
    """Start ``function`` in a thread; what it returns, or raises, is put on the list."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def joined(started: tuple[threading.Thread, list[Any]]) -> Any:
    started[0].join(20)
    assert not started[0].is_alive(), "it still waits"
    return started[1][0]


def test_a_queue_is_first_in_first_out(made: Any) -> None:
    q = made.queue("q", 2)
    q.put({"n": 1})
    q.put_nowait(2)
    assert q.full() and q.qsize() == 2 and made.queue("q").full()
    with pytest.raises(queue.Full):
        q.put_nowait(3)
    with pytest.raises(queue.Full, match="stayed full"):
        q.put(3, timeout=0.01)
    with pytest.raises(queue.Full):
        q.put_many([3])
    waits = in_thread(lambda: q.put(3))
    assert [q.get(timeout=20) for _ in range(3)] == [{"n": 1}, 2, 3]
    joined(waits)
    with pytest.raises(queue.Empty):
        q.get_nowait()
    with pytest.raises(queue.Empty, match="in time"):
        q.get(timeout=0.01)
    assert q.empty()


def test_getters_are_served_in_order(made: Any) -> None:
    q = made.queue("q")
    waits = []
    for number in range(3):
        waits.append(in_thread(q.get))
        wait_for_waiting(made, "q", number + 1)
    q.put_many("abc")
    assert [joined(one) for one in waits] == ["a", "b", "c"]


def test_put_many_may_put_in_what_getters_wait_for(made: Any) -> None:
    q = made.queue("q", 1)
    waits = []
    for number in range(2):
        waits.append(in_thread(q.get))
        wait_for_waiting(made, "q", number + 1)
    with pytest.raises(queue.Full):
        q.put_many("abcd")
    q.put_many("abc")
    assert [joined(one) for one in waits] == ["a", "b"] and q.full() and q.get() == "c"


def wait_for_waiting(made: Any, name: str, count: int) -> None:
    """Wait until so many wait in a queue."""
    objects = _store_of(made).objects
    wait_until(lambda: name in objects and len(objects[name]._getters) == count)


def wait_until(holds: Any) -> None:
    for _ in range(4000):
        if holds():
            return
        threading.Event().wait(0.005)
    raise AssertionError("that does not happen")


def _store_of(made: Any) -> Any:
    if made is state:
        from taskrun.state.local import own_client

        return own_client().store
    return _LIVE[0].service.store


_LIVE: list[Live] = []


@pytest.fixture(autouse=True)
def remembered(request: pytest.FixtureRequest) -> Iterator[None]:
    if "connected" in request.node.name or "live" in request.fixturenames:
        _LIVE[:] = [request.getfixturevalue("live")]
    yield
    _LIVE.clear()


def test_a_wait_may_be_longer_than_the_system_can_count(made: Any) -> None:
    q = made.queue("q")
    waits = in_thread(lambda: q.get(timeout=40 * 86_400))
    wait_for_waiting(made, "q", 1)
    q.put("came")
    assert joined(waits) == "came"


def test_a_lock_has_one_holder_who_may_come_again(made: Any) -> None:
    lock = made.lock("l")
    with lock, lock:
        assert joined(in_thread(lambda: lock.acquire(blocking=False))) is False
        assert joined(in_thread(lambda: lock.acquire(timeout=0.01))) is False
        assert isinstance(joined(in_thread(lock.release)), RuntimeError)
        waits = in_thread(lambda: lock.acquire() and lock.release() is None)
    assert joined(waits) is True
    assert not lock.locked()
    with pytest.raises(RuntimeError, match="which is not held"):
        lock.release()


def test_a_lock_that_was_left_held_is_given_to_no_later_thread_or_coroutine(made: Any) -> None:
    left, also_left = made.lock("l"), made.lock("m")
    assert joined(in_thread(left.acquire)) is True

    async def in_tasks() -> list[bool]:
        async def tries() -> bool:
            return bool(also_left.acquire(blocking=False))

        return [await asyncio.create_task(tries()) for _ in range(20)]

    assert asyncio.run(in_tasks()) == [True] + [False] * 19
    for _ in range(20):
        assert joined(in_thread(lambda: left.acquire(blocking=False))) is False


def test_a_semaphore_has_so_many_permits(made: Any) -> None:
    s = made.semaphore("s", 2)
    with s, s:
        assert s.locked() and not s.acquire(blocking=False)
        waits = in_thread(s.acquire)
    assert joined(waits) is True
    s.release()
    with pytest.raises(RuntimeError, match="not held here"):
        s.release()


def test_an_event_wakes_all_who_wait(made: Any) -> None:
    e = made.event("e")
    assert not e.is_set() and not e.wait(timeout=0.01)
    waits = [in_thread(e.wait) for _ in range(3)]
    e.set()
    assert [joined(one) for one in waits] == [True] * 3
    assert e.wait() and e.is_set()
    e.clear()
    assert not e.is_set()


def test_a_barrier_lets_all_go_at_once(made: Any) -> None:
    b = made.barrier("b", 3)
    with pytest.raises(TimeoutError):
        b.wait(timeout=0.01)
    for _ in range(2):
        waits = [in_thread(b.wait) for _ in range(3)]
        assert sorted(joined(one) for one in waits) == [0, 1, 2]
    assert b.n_waiting() == 0


def when_parked(made: Any, name: str, waits: str, then: threading.Event) -> None:
    """Set ``then`` when somebody waits in the object of that name."""

    objects = _store_of(made).objects

    def watches() -> None:
        wait_until(lambda: name in objects and len(getattr(objects[name], waits)))
        then.set()

    threading.Thread(target=watches, daemon=True).start()


@pytest.mark.parametrize(
    ("before", "what", "waits"),
    [
        (lambda m: m.lock("x").acquire(), lambda m: m.lock("x").__enter__(), "_waits"),
        (lambda m: m.lock("x").acquire(), lambda m: m.lock("x").acquire(timeout=50), "_waits"),
        (lambda m: m.semaphore("x", 1).acquire(), lambda m: m.semaphore("x").__enter__(), "_waits"),
        (lambda m: None, lambda m: m.event("x").wait(), "_waits"),
        (lambda m: None, lambda m: m.barrier("x", 2).wait(), "_waits"),
        (lambda m: None, lambda m: m.queue("x").get(), "_getters"),
        (lambda m: m.queue("x", 1).put(1), lambda m: m.queue("x").put(2), "_putters"),
    ],
    ids=["with lock", "lock", "with semaphore", "event", "barrier", "get", "put"],
)
def test_a_timeout_error_of_a_signal_handler_that_ends_a_wait_is_the_users(
    made: Any, before: Any, what: Any, waits: str
) -> None:
    joined(in_thread(lambda: before(made)))
    mine = TimeoutError("my time is up")
    with pytest.raises(TimeoutError, match="my time is up"), interrupted_by(mine) as now:
        when_parked(made, "x", waits, now)
        what(made)
    hosted = _store_of(made).objects["x"]
    wait_until(lambda: len(getattr(hosted, waits)) == 0)


# -- coroutines -----------------------------------------------------------------------


def test_every_wait_has_a_twin_for_coroutines(made: Any) -> None:
    q, e, lock = made.queue("q", 1), made.event("e"), made.lock("l")
    order = []

    async def takes() -> None:
        order.append(await q.get_async())
        async with lock:
            order.append("locked")
        await e.wait_async()
        order.append(await q.get_async())

    async def gives() -> None:
        async with lock:
            await q.put_async("one")
            await asyncio.sleep(0.02)
            order.append("unlocking")
        e.set()
        await q.put_async("two")

    async def both() -> None:
        await asyncio.gather(takes(), gives())
        with pytest.raises(queue.Empty):
            await q.get_async(timeout=0.01)
        assert not await made.event("never").wait_async(timeout=0.01)

    asyncio.run(both())
    assert order == ["one", "unlocking", "locked", "two"]


def test_the_blocking_form_on_an_event_loop_names_its_twin(made: Any) -> None:
    async def wrong() -> None:
        for wait, twin in (
            (made.queue("q").get, "get_async"),
            (made.lock("l").acquire, "async with"),
            (made.event("e").wait, "wait_async"),
            (made.barrier("b", 2).wait, "wait_async"),
        ):
            with pytest.raises(RuntimeError, match=f"would block the event loop.*{twin}"):
                wait()
        with pytest.raises(RuntimeError, match="async for"):
            next(made.dict("d").watch())

    asyncio.run(wrong())


def test_a_cancelled_coroutine_takes_nothing(made: Any) -> None:
    q = made.queue("q")

    async def cancelled() -> None:
        waits = asyncio.create_task(q.get_async())
        await asyncio.sleep(0.02)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        q.put("kept")
        assert await q.get_async(timeout=20) == "kept"

    asyncio.run(cancelled())


def test_a_list_that_is_multiplied_in_place_stays_the_shared_one(made: Any) -> None:
    items = same = made.list("l")
    items.extend("ab")
    items *= 2
    assert items is same and made.list("l")[:] == ["a", "b", "a", "b"]
    items *= 0
    assert made.list("l")[:] == []


# -- watching -------------------------------------------------------------------------


def test_watch_yields_changes_as_they_happen(made: Any) -> None:
    d, c = made.dict("d"), made.counter("c")
    with d.watch() as changes:
        d["k"] = [1]
        c.add(1)
        del d["k"]
        d.clear()
        assert [next(changes)[1:] for _ in range(3)] == [
            ("set", "k", [1]), ("deleted", "k", None), ("cleared", None, None),
        ]  # fmt: skip
    with made.list("l").watch() as changes:
        made.list("l").extend("ab")
        made.list("l").insert(0, "c")
        assert [next(changes)[1:] for _ in range(3)] == [
            ("set", 0, "a"), ("set", 1, "b"), ("changed", 0, None),
        ]  # fmt: skip


def test_watch_is_an_async_iterator_too(made: Any) -> None:
    s = made.set("s")

    async def watches() -> list[Any]:
        found = []
        adds = asyncio.get_running_loop().call_later(0.05, lambda: s.add_many("ab"))
        async for change in s.watch():
            found.append(change.key)
            if len(found) == 2:
                break
        del adds
        return found

    assert asyncio.run(asyncio.wait_for(watches(), 20)) == ["a", "b"]


def test_close_ends_a_watch_in_whichever_thread_it_waits(made: Any) -> None:
    changes = made.dict("d").watch()
    seen: list[Any] = []
    came = threading.Event()

    def watches() -> None:
        for change in changes:
            seen.append(change.key)
            came.set()

    thread = threading.Thread(target=watches)
    thread.start()
    made.dict("d")["k"] = 1
    assert came.wait(20)
    changes.close()
    thread.join(20)
    assert not thread.is_alive() and seen == ["k"]
    assert list(changes) == []
    made.dict("d").watch().close()  # before anybody waits


def test_who_watches_too_slowly_is_told_what_was_missed(made: Any) -> None:
    d = made.dict("d")
    with d.watch() as changes:
        for number in range(60):
            d.update(dict.fromkeys(range(number * 1000, number * 1000 + 1000), "x" * 200))
        seen = missed = 0
        while seen + missed < 60_000:
            change = next(changes)
            if change.action == "missed":
                missed += change.value
            else:
                seen += 1
    assert missed and seen + missed == 60_000


# -- what others do meanwhile, and what is passed by mistake --------------------------


class Text(str):
    """A str of a class that the coordinator does not know."""


class Number(int):
    """The same of an int."""


def test_what_cannot_be_a_key_cannot_be_looked_up_either(made: Any) -> None:
    d, s, wrong = made.dict("d"), made.set("s"), Path("x")
    for look in (
        lambda: d[wrong],
        lambda: d.get(wrong),
        lambda: wrong in d,
        lambda: d.pop(wrong, None),
        lambda: d.__delitem__(wrong),
        lambda: d.get_many([wrong]),
        lambda: d.delete_many([wrong]),
        lambda: wrong in s,
        lambda: s.discard(wrong),
        lambda: s.discard_many([wrong]),
        lambda: s.__iand__({wrong}),
    ):
        with pytest.raises(TypeError, match="cannot be a key"):
            look()
    assert len(d) == len(s) == 0  # and the connection is as it was


def test_subclasses_of_numbers_and_strings_are_what_they_extend(made: Any) -> None:
    made.dict(Text("d"))["a"] = Text("kept")
    assert made.dict("d")["a"] == "kept"
    assert made.counter("c").add(Number(2)) == 2 and made.counter("c").add(True) == 3
    items = made.list("l")
    items.extend(range(5))
    assert items[Number(1) :] == [1, 2, 3, 4] and items[Number(1)] == 1
    with pytest.raises(TypeError):
        items[1.5:]


def test_sort_loses_nothing_that_came_meanwhile(made: Any) -> None:
    items = made.list("l")
    items.extend([3, 1])
    late = [2, 5]

    def key(value: int) -> int:
        if late:
            items.append(late.pop())
        return value

    items.sort(key=key)
    assert items == [1, 2, 3, 5]


def test_remove_does_not_take_what_was_put_in_that_place_meanwhile(made: Any) -> None:
    items = made.list("l")
    items.extend(["a", "b"])

    class OnceEqual:
        def __eq__(self, other: object) -> bool:
            if other == "a":
                items[0] = "other"
            return other == "a"

        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match="not in list"):
        items.remove(OnceEqual())
    assert items == ["other", "b"]


class EqualsEverything:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_a_nan_in_a_list_can_be_removed(made: Any) -> None:
    items = made.list("l")
    items.extend([math.nan, "a"])
    items.remove(EqualsEverything())
    assert items == ["a"]


def test_an_index_that_no_list_has_is_an_index_error(made: Any) -> None:
    items = made.list("l")
    items.append("a")
    for index in (1, 10**20, -(10**20)):
        for wrong in (items.pop, items.__delitem__, items.__getitem__):
            with pytest.raises(IndexError):
                wrong(index)
    assert items == ["a"]


def test_index_of_a_list_is_that_of_a_list(made: Any) -> None:
    items = made.list("l")
    items.extend("abcab")
    assert (items.index("b"), items.index("b", 2), items.index("c", -3)) == (1, 4, 2)
    with pytest.raises(ValueError, match="not in list"):
        items.index("c", 3)


class RaisesKeyError:
    """Raises it when it is unpickled."""

    def __reduce__(self) -> Any:
        return {}.__getitem__, ("inner",)


def test_a_value_that_cannot_be_loaded_is_not_taken_for_a_missing_one(made: Any) -> None:
    d = made.dict("d")
    d["k"] = RaisesKeyError()
    for take in (d.get, d.pop):
        with pytest.raises(KeyError, match="inner"):
            take("k", "default")


def test_an_iteration_goes_on_after_others_waits_in_its_thread(made: Any) -> None:
    d, q = made.dict("d"), made.queue("q")
    d.update(dict.fromkeys(range(2500), 0))
    q.put_many(range(2500))
    assert [q.get(timeout=20) for _ in d] == list(range(2500))
