"""What a program with nothing but Python 3.8 or later may do with a Manager server.

    python client.py ADDRESS

Uses everything that the standard library's SyncManager has, and at last ends the server.
"""

import faulthandler
import gc
import multiprocessing
import pickle
import queue
import sys
import threading
import time
from multiprocessing import connection, managers, process

KEY = b"between versions"


class Manager(managers.SyncManager):
    pass


Manager.register("Greeter")


def use_containers(manager):
    shared = manager.dict(a=1)
    shared.update(b=2)
    shared["c"] = {"deep": [1, (2, 3), {4}, None, 1.5, b"bytes", "\xe4"]}
    assert shared["c"] == {"deep": [1, (2, 3), {4}, None, 1.5, b"bytes", "\xe4"]}
    assert list(shared) == ["a", "b", "c"] and len(shared) == 3 and "b" in shared
    assert shared.pop("c") and shared.setdefault("a", 9) == 1
    assert sorted(shared.items()) == [("a", 1), ("b", 2)] and shared.copy() == {"a": 1, "b": 2}
    assert str(shared) == "{'a': 1, 'b': 2}"
    items = manager.list(range(5))
    items += [5]
    items[0] = 10
    assert items[:] == [10, 1, 2, 3, 4, 5] and items[1:3] == [1, 2] and items.pop() == 5
    items.sort()
    assert [*items] == [1, 2, 3, 4, 10] and items * 2 == [1, 2, 3, 4, 10] * 2
    try:
        shared["nobody"]
    except KeyError as error:
        assert error.args == ("nobody",)
    else:
        raise AssertionError


def use_values(manager):
    names = manager.Namespace(x=1)
    names.y = 2
    assert (names.x, names.y) == (1, 2) and not hasattr(names, "z")
    value = manager.Value("i", 3)
    value.value += 1
    assert value.value == 4
    array = manager.Array("i", [1, 2])
    array[0] = 7
    assert list(array) == [7, 2] and len(array) == 2


def use_queues(manager):
    for shared in (manager.Queue(2), manager.JoinableQueue(2)):
        shared.put("a")
        shared.put("b")
        assert shared.full()
        assert [shared.get(), shared.get(timeout=5)] == ["a", "b"]
        try:
            shared.get(timeout=0.01)
        except queue.Empty:
            pass
        else:
            raise AssertionError
        shared.task_done()
        shared.task_done()
        shared.join()


def use_locks(manager):
    for shared in (
        manager.Lock(),
        manager.RLock(),
        manager.Semaphore(1),
        manager.BoundedSemaphore(1),
        manager.Condition(),
    ):
        with shared:
            pass
        assert shared.acquire(True, 5)
        shared.release()
    event = manager.Event()
    threading.Timer(0.05, event.set).start()
    assert event.wait(20) and event.is_set()
    condition = manager.Condition()
    with condition:
        assert condition.wait(0.01) is False
        thread = threading.Thread(target=notify, args=(condition,))
        thread.start()
        assert condition.wait(20)
    thread.join()
    barrier = manager.Barrier(2)
    thread = threading.Thread(target=barrier.wait)
    thread.start()
    barrier.wait(20)
    thread.join()
    assert barrier.parties == 2 and barrier.n_waiting == 0 and not barrier.broken


def notify(condition):
    with condition:
        condition.notify()


def use_pool(manager):
    pool = manager.Pool(2)
    assert pool.map(abs, [-1, 2]) == [1, 2]
    assert pool.apply_async(abs, (-3,)).get(20) == 3
    assert list(pool.imap(abs, [-4])) == [4]
    pool.terminate()


def use_proxies(manager):
    inner = manager.list([1])
    outer = manager.dict(inner=inner)
    outer["inner"].append(2)
    assert inner[:] == [1, 2]
    del inner
    assert outer["inner"][:] == [1, 2]
    assert pickle.loads(pickle.dumps(outer))["inner"][:] == [1, 2]
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(outer,))
    child.start()
    child.join(20)
    assert child.exitcode == 0 and outer["child"] == 3
    greeter = manager.Greeter()
    assert greeter.greet("you") == "hello you"


def in_child(outer):
    outer["child"] = sum(outer["inner"])


def use_administration(manager):
    gc.collect()  # before 3.13 an exception from a proxy is in a cycle with it
    deadline = time.monotonic() + 20
    while manager._number_of_objects():  # the child's references, and its threads'
        assert time.monotonic() < deadline, manager._debug_info()
        time.sleep(0.01)
    kept = manager.list([1, 2])
    assert manager._number_of_objects() == 1
    assert "refcount=1" in manager._debug_info() and "[1, 2]" in manager._debug_info()
    assert len(kept) == 2


def main(address):
    faulthandler.dump_traceback_later(50, exit=True)
    process.current_process().authkey = KEY
    manager = Manager(address=address, authkey=KEY)
    manager.connect()
    for use in (
        use_containers,
        use_values,
        use_queues,
        use_locks,
        use_pool,
        use_proxies,
        use_administration,
    ):
        use(manager)
    with connection.Client(address, authkey=KEY) as conn:
        managers.dispatch(conn, None, "shutdown")
    print("all of it works")


if __name__ == "__main__":
    main(eval(sys.argv[1]))
