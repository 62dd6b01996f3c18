"""What taskrun.Pool has beside what the standard library's tests ask for."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import multiprocessing.pool
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import until

from taskrun import Pool
from taskrun.errors import CallCancelled, CallTimeout, WorkerLost

SECONDS = 20.0


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(2, context=multiprocessing.get_context("fork")) as made:
        yield made
    made.join()


def square(x: int) -> int:
    return x * x


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def get(self) -> int:
        return self.count


def test_lambdas_closures_partials_and_bound_methods_are_called_as_they_are(pool: Pool) -> None:
    step = 1
    assert pool.apply(lambda x: x + step, (1,)) == 2
    step = 5
    assert pool.apply(lambda x: x + step, (1,)) == 6
    assert pool.apply(partial(pow, 2), (5,)) == 32
    counter = Counter()
    assert pool.apply(counter.get) == 0
    counter.count = 7
    assert pool.apply(counter.get) == 7
    assert list(pool.imap(lambda x: -x, [1, 2])) == [-1, -2]
    assert pool.starmap(lambda x, y: x - y, [(3, 1), (1, 3)]) == [2, -2]
    assert list(pool.imap(str.upper, ["a"])) == ["A"]


class Part:
    """Counts in a process how often it was unpickled there."""

    unpickled = 0

    def __reduce__(self) -> Any:
        return unpickle_part, ()

    def count(self) -> int:
        return Part.unpickled


def unpickle_part() -> Part:
    Part.unpickled += 1
    return Part()


def test_a_closure_that_is_called_again_stays_in_the_worker() -> None:
    with Pool(1) as pool:
        part = Part()
        assert [pool.apply(lambda: part.count()) for _ in range(5)] == [1, 2, 2, 2, 2]


def test_closures_that_are_called_once_stay_nowhere() -> None:
    own = psutil.Process()
    with Pool(1) as pool:
        worker = psutil.Process(pool.apply(os.getpid))

        def call(size: int) -> None:
            part = os.urandom(size)
            assert pool.apply(lambda: len(part)) == size
            assert pool.map(lambda number: len(part) + number, [0, 1]) == [size, size + 1]

        call(400_000)
        before = own.memory_info().rss, worker.memory_info().rss
        for _ in range(100):
            call(400_000)
        most = 40_000_000  # half of what they all had captured
        assert own.memory_info().rss - before[0] < most
        assert worker.memory_info().rss - before[1] < most


@pytest.mark.parametrize("size", [400_000, 1_000_000])
def test_of_closures_that_many_calls_had_only_the_last_stay(size: int) -> None:
    own = psutil.Process()
    with Pool(1) as pool:
        worker = psutil.Process(pool.apply(os.getpid))

        def call() -> None:
            part = os.urandom(size)
            assert list(pool.imap(lambda number: len(part) + number, [0, 1])) == [size, size + 1]

        call()
        before = own.memory_info().rss, worker.memory_info().rss
        for _ in range(250):
            call()
        most = 70_000_000  # of 100 MB, or 250
        assert own.memory_info().rss - before[0] < most
        assert worker.memory_info().rss - before[1] < most


def test_closures_that_were_forgotten_are_called_all_the_same(pool: Pool) -> None:
    def adds(step: int) -> Any:
        return lambda number: number + step

    def slowly(number: int) -> int:
        time.sleep(0.001)
        return number + first

    first = 1000
    slow = pool.imap(slowly, range(500))  # under way all the time
    for _ in range(3):
        for step in range(100):  # more than are remembered
            assert pool.map(adds(step), [1, 2]) == [1 + step, 2 + step]
            assert next(pool.imap(adds(step), [3])) == 3 + step
    assert list(slow) == [number + first for number in range(500)]


def test_a_closure_has_its_name_in_messages() -> None:
    with Pool(1) as pool:

        def leave() -> None:
            os._exit(part)

        for part in (3, 4, 4, 4):
            with pytest.raises(WorkerLost, match=rf"leave.*status {part}"):
                pool.apply_async(leave).get(SECONDS)


def test_a_queued_call_is_cancelled_at_once(pool: Pool) -> None:
    blockers = [pool.apply_async(time.sleep, (SECONDS,)) for _ in range(2)]
    queued = [pool.apply_async(square, (number,)) for number in range(5000)]
    for result in queued:
        assert result.cancel()
    for result in queued:
        with pytest.raises(CallCancelled):
            result.get(SECONDS)
    for result in blockers:
        result.cancel()
    assert pool.apply(square, (3,)) == 9


def test_a_map_is_cancelled(pool: Pool) -> None:
    result = pool.map_async(time.sleep, [SECONDS] * 100, 1)
    result.cancel()
    with pytest.raises(CallCancelled):
        result.get(SECONDS)


def test_a_map_that_was_cancelled_while_it_waited_costs_no_other_when_the_pool_is_terminated(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    # More than the workers' part of them: the others wait in front of what is cancelled.
    first = pool.map_async(time.sleep, [SECONDS] * 2000, chunksize=1)
    cancelled = pool.map_async(square, range(50), chunksize=1)
    last = pool.apply_async(square, (3,))
    cancelled.cancel()
    with pytest.raises(CallCancelled, match="it was asked for"):
        cancelled.get(SECONDS)
    pool.terminate()
    pool.join()
    for result in (first, last):
        assert result.ready()
        with pytest.raises(CallCancelled, match="terminated"):
            result.get(0)
    assert not shown and capfd.readouterr().err == ""


def test_an_outcome_says_where_and_how_long(pool: Pool) -> None:
    result = pool.apply_async(os.getpid)
    pid = result.get(SECONDS)
    outcome = result.outcome
    assert outcome is not None
    assert outcome.pid == pid and outcome.attempts == 1 and outcome.seconds >= 0
    assert pid in [worker.pid for worker in pool.workers()]
    assert all(worker.is_alive() for worker in pool.workers())


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_a_worker_can_be_ended_and_waited_for(pool: Pool, how: str) -> None:
    worker = pool._pool[0]
    worker.join(0.01)
    assert worker.is_alive()
    getattr(worker, how)()
    worker.join(SECONDS)
    assert not worker.is_alive()
    getattr(worker, how)()  # it is gone already
    assert pool.map_async(square, range(4)).get(SECONDS) == [0, 1, 4, 9]


def test_progress_is_shown(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    assert pool.map(square, range(40), 10, progress=True) == [x * x for x in range(40)]
    end = time.monotonic() + SECONDS
    shown = ""
    while "40/40" not in shown and time.monotonic() < end:
        time.sleep(0.01)
        shown += capsys.readouterr().err
    assert "40/40" in shown


def test_many_threads_may_use_one_pool(pool: Pool) -> None:
    wrong: list[Any] = []

    def use() -> None:
        for number in range(60):
            callback = (lambda value: None) if number % 2 else None
            result = pool.apply_async(square, (number,), callback=callback)
            got = result.get(SECONDS), pool.apply(square, (number,)), list(pool.imap(abs, [1, 2]))
            if got != (number * number, number * number, [1, 2]):
                wrong.append(got)

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    use()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert not wrong


def test_a_signal_handler_that_raises_in_get_leaves_the_pool_whole(pool: Pool) -> None:
    def raises(number: int, frame: object) -> None:
        raise LookupError("by a signal")

    before = signal.signal(signal.SIGALRM, raises)
    try:
        for delay in (0.0005, 0.001, 0.003, 0.01, 0.02) * 4:
            signal.setitimer(signal.ITIMER_REAL, delay)
            with pytest.raises(LookupError):
                while True:
                    pool.apply(square, (3,))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert pool.map(square, range(100), 1) == [x * x for x in range(100)]


def test_get_gives_up_after_its_timeout_and_can_be_asked_again(pool: Pool) -> None:
    result = pool.apply_async(time.sleep, (0.3,))
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(0.05)
    assert not result.ready()
    assert result.get(SECONDS) is None and result.successful()


def test_large_arguments_and_results_come_through(pool: Pool) -> None:
    data = os.urandom(3_000_000)
    assert pool.apply(bytes.upper, (data,)) == data.upper()
    assert [len(one) for one in pool.map(bytes, [2_000_000] * 4)] == [2_000_000] * 4


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_print_where_the_parent_does(method: str, tmp_path: Path) -> None:
    code = (
        "import multiprocessing, os\n"
        "from taskrun import Pool\n"
        "if __name__ == '__main__':\n"
        "    print('before', flush=True)\n"
        f"    with Pool(1, context=multiprocessing.get_context({method!r})) as pool:\n"
        "        pool.map(print, ['one', 'two'])\n"
        "        pool.apply(os.write, (2, b'to stderr'))\n"
        "    print('after')\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.stdout, done.stderr) == ("before\none\ntwo\nafter\n", "to stderr")


def test_a_spawning_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "from taskrun import Pool\n"
        "pool = Pool(1, context=multiprocessing.get_context('spawn'))\n"
        "print(pool.apply(abs, (-1,)))\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert "freeze_support" in done.stderr and done.returncode == 1


def test_nothing_is_left_open() -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    def use() -> None:
        for method in ("fork", "spawn"):
            with Pool(2, context=multiprocessing.get_context(method)) as pool:
                pool.map(square, range(10))
            pool.join()

    use()
    before, threads = opened(), threading.active_count()
    use()
    assert opened() == before and threading.active_count() == threads


def test_a_result_that_is_to_be_pickled_says_that_it_cannot(pool: Pool) -> None:
    for result in (pool.map_async(square, [3]), pool.imap(square, [3])):
        with pytest.raises(NotImplementedError, match="results of a pool cannot be passed"):
            pool.apply(repr, (result,))


FRESH = """\
import multiprocessing
from taskrun import Pool
def square(x):
    return x * x
def main():
    with Pool(2, context=multiprocessing.get_context("spawn")) as pool:
        print(pool.map(square, range(4)))
"""


@pytest.mark.parametrize("way", ["-c", "-", "package"])
def test_functions_of_a_main_module_that_fresh_workers_cannot_import_go_along(
    tmp_path: Path, way: str
) -> None:
    script = FRESH + "main()\n"
    command, told = [way], ""
    if way == "-c":
        command += [script]
    elif way == "-":
        told = script
    else:
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "__main__.py").write_text(script)
        command = ["-m", "package"]
    done = subprocess.run(
        [sys.executable, *command], input=told, cwd=tmp_path, capture_output=True, text=True,
        timeout=SECONDS * 2, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("[0, 1, 4, 9]\n", "")


AGAIN = """
from multiprocessing import get_context
from types import FunctionType
from taskrun import Pool

def h(x, version=1):
    return version

pool, place, code, others = Pool(1, context=get_context("fork")), id(h), h.__code__, []
del h
for _ in range(10_000):
    h = FunctionType(code, globals(), "h", (2,))
    if id(h) == place:  # of the one that is there no more
        break
    others.append(h)
print(pool.apply(h, (0,)))
pool.terminate()
"""


def test_a_function_that_was_defined_again_since_a_fork_is_called_as_it_is_now(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", AGAIN]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_a_script_without_a_main_guard_is_told_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FRESH + "main()\n")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True,
        timeout=SECONDS * 2, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and not done.stdout
    assert "if __name__ == '__main__':" in done.stderr


def hold_the_gil() -> None:
    re.match("(a+)+$", "a" * 60 + "b")


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("stuck", [hold_the_gil, stop_itself])
def test_a_timeout_ends_a_call_whose_worker_cannot_answer(pool: Pool, stuck: Any) -> None:
    with pytest.raises(CallTimeout):
        pool.apply_async(stuck, timeout=0.2).get(SECONDS)
    assert pool.map_async(square, range(4)).get(SECONDS) == [0, 1, 4, 9]


@pytest.mark.parametrize("size", [0, -1])
def test_a_chunksize_below_one_is_refused_by_every_method(pool: Pool, size: int) -> None:
    for method in (pool.map, pool.starmap, pool.map_async, pool.imap, pool.imap_unordered):
        with pytest.raises(ValueError, match=f"Chunksize must be 1\\+, not {size}"):
            method(square, [1, 2], chunksize=size)


def test_who_asks_for_a_pool_of_the_standard_library_has_one(pool: Pool) -> None:
    assert isinstance(pool, multiprocessing.pool.Pool)
    assert isinstance(pool.apply_async(square, (2,)), multiprocessing.pool.AsyncResult)
    assert isinstance(pool.map_async(square, [2]), multiprocessing.pool.MapResult)
    assert isinstance(pool.imap(square, [2]), multiprocessing.pool.IMapIterator)
    assert list(pool.imap(square, [1, 2], chunksize=None)) == [1, 4]


def wait_for(path: str) -> None:
    until(lambda: os.path.exists(path))


def test_how_many_calls_are_left_is_where_programs_look_for_it(pool: Pool, tmp_path: Path) -> None:
    assert not pool._cache and not pool._taskqueue.qsize() and pool._taskqueue.empty()
    go = str(tmp_path / "go")
    held = [pool.apply_async(wait_for, (go,)) for _ in range(5)]
    many = pool.map_async(wait_for, [go] * 6, chunksize=2)
    each = pool.imap_unordered(square, range(7))
    assert (many._number_left, many._chunksize, each._index) == (3, 2, 0)
    assert pool._taskqueue.qsize() >= 6 and not pool._taskqueue.empty()
    assert len(pool._cache) >= 8
    Path(go).touch()
    until(lambda: not pool._cache)
    assert all(result.ready() for result in held)
    assert (many._number_left, each._index) == (0, 7)
    assert pool.map_async(square, [])._number_left == 0
    pool.terminate()
    assert not pool._cache and pool._taskqueue.empty()


def test_calls_are_left_until_their_callbacks_have_returned(pool: Pool) -> None:
    seen: list[int] = []
    go = threading.Event()

    def call_back(value: int) -> None:
        assert go.wait(SECONDS)
        seen.append(value)
        assert not pool._cache  # one may look there in a callback, too

    result = pool.apply_async(square, (2,), callback=call_back)
    threading.Timer(0.05, go.set).start()
    until(lambda: not pool._cache)
    assert seen == [4] and result.get(SECONDS) == 4


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"timeout": "a"}, TypeError, "timeout= of a pool's call must be a number of seconds"),
        ({"timeout": 0}, ValueError, "must be more than 0"),
        ({"timeout": float("inf")}, ValueError, "and finite, not inf; leave it out for no limit"),
        ({"retries": -1}, ValueError, "retries= of a pool's call must be 0 or more, not -1"),
        ({"retries": 1.5}, TypeError, "must be a whole number, not 1.5; leave it out for none"),
    ],
)
def test_a_timeout_or_retries_that_cannot_be_meant_are_refused_where_they_are_given(
    pool: Pool, options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    for call in (pool.map, pool.map_async, pool.imap, pool.imap_unordered):
        with pytest.raises(kind, match=re.escape(said)):
            call(square, [1], **options)
    for call in (pool.apply, pool.apply_async):
        with pytest.raises(kind, match=re.escape(said)):
            call(square, (1,), **options)
    assert pool.apply(square, (3,), timeout=SECONDS, retries=1) == 9


def not_today() -> None:
    raise RuntimeError("not today")


@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
def test_an_imap_of_a_pool_that_is_broken_is_not_empty_but_an_error(method: str) -> None:
    with Pool(1, not_today, context=multiprocessing.get_context("fork")) as pool:
        with pytest.raises(RuntimeError, match="not today"):
            pool.apply(square, (1,))
        pool._loop.finished.wait(SECONDS)
        with pytest.raises(RuntimeError, match="not today"):
            list(getattr(pool, method)(square, range(3)))


@pytest.mark.parametrize("method", ["apply_async", "map_async"])
@pytest.mark.parametrize(
    ("argument", "said"), [(1, "not today"), (threading.Lock(), "pickle")], ids=["plain", "lock"]
)
def test_calls_of_a_pool_that_is_broken_call_back(method: str, argument: Any, said: str) -> None:
    with Pool(1, not_today, context=multiprocessing.get_context("fork")) as pool:
        with pytest.raises(RuntimeError, match="not today"):
            pool.apply(square, (1,))
        assert pool._loop.finished.wait(SECONDS)
        told: list[tuple[object, int]] = []  # and in which thread

        def tell(error: object) -> None:
            told.append((error, threading.get_ident()))

        make = getattr(pool, method)
        with pytest.raises(Exception, match=said) as raised:
            make(square, (argument,), error_callback=tell).get(SECONDS)
        assert told == [(raised.value, threading.get_ident())]
        with pytest.raises(Exception, match=said):
            make(square, (argument,), callback=tell).get(SECONDS)
        assert len(told) == 1


@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
def test_an_item_of_an_imap_that_cannot_be_pickled_costs_no_other(pool: Pool, method: str) -> None:
    def outcomes(pool: Any, chunksize: int = 1) -> list[Any]:
        items = [1, 2, threading.Lock(), 4, 5, 6]
        values = getattr(pool, method)(square, items, chunksize)
        found: list[Any] = []
        while True:
            try:
                found.append(values.next(SECONDS))
            except StopIteration:
                return found if method == "imap" else sorted(found, key=str)
            except Exception as error:
                found.append(str(error))

    with multiprocessing.get_context("fork").Pool(2) as standard:
        found = outcomes(pool)
        assert found == outcomes(standard)
    assert len(found) == 6
    assert {1, 4, 25, 36} < set(outcomes(pool, 2))


def test_an_imap_that_is_given_up_after_such_an_item_does_not_keep_itself(pool: Pool) -> None:
    gc.collect()
    gc.disable()
    try:
        values = pool.imap(square, chain([threading.Lock()], count()), buffersize=3)
        assert pool._driver.loop.wait(values, SECONDS)  # it is there, and nobody takes it
        del values
        pool.close()
        assert pool._loop.finished.wait(SECONDS)
    finally:
        gc.enable()


WARNED = """
import multiprocessing
import taskrun

if __name__ == "__main__":
    for method in ("fork", "forkserver", "spawn"):
        with taskrun.Pool(1, context=multiprocessing.get_context(method)) as pool:
            pool.apply(abs, (-1,))
        pool.join()
"""


def test_nobody_is_warned_of_what_a_pool_leaves_open(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WARNED)
    command = [sys.executable, "-W", "default", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def parent_of_worker(seconds: float) -> tuple[int | None, str, bool]:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join(seconds)
    return parent.pid, parent.name, parent.is_alive()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_parent_of_a_worker_is_the_process_that_has_the_pool(method: str) -> None:
    with Pool(1, context=multiprocessing.get_context(method)) as pool:
        assert pool.apply(parent_of_worker, (0.0,)) == (os.getpid(), "MainProcess", True)


def start_method() -> str:
    return multiprocessing.get_start_method()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_has_the_pools_start_method_in_a_worker(method: str) -> None:
    with Pool(1, context=multiprocessing.get_context(method)) as pool:
        assert pool.apply(start_method) == method


def kinship() -> tuple[int, int, bool]:
    return os.getppid(), os.getsid(0), multiprocessing.current_process().daemon


def say_and_exit(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
    os._exit(3)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_what_the_documentation_says_to_be_different_is(
    method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with Pool(1, context=multiprocessing.get_context(method)) as pool:
        parent, session, daemon = pool.apply(kinship)
        (worker,) = pool.workers()
        assert parent not in (os.getpid(), os.getppid()) and not daemon
        assert session == worker.pid
        assert worker.pid not in [child.pid for child in multiprocessing.active_children()]
        with pytest.raises(WorkerLost) as lost:
            pool.apply(say_and_exit, ("last words",))
    assert "last words" in capfd.readouterr().err
    assert "last words" not in str(lost.value)


class Liar:
    """Has another length than it says."""

    def __init__(self, said: int, is_: int) -> None:
        self.said, self.is_ = said, is_

    def __len__(self) -> int:
        return self.said

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.is_))


@pytest.mark.parametrize(("said", "is_"), [(100, 7), (3, 40), (5, 0)])
def test_a_map_over_what_lies_about_its_length_gives_what_there_is(
    pool: Pool, said: int, is_: int
) -> None:
    found = pool.map_async(square, Liar(said, is_)).get(SECONDS)
    assert found == [x * x for x in range(is_)]
    assert pool.map_async(square, range(3)).get(SECONDS) == [0, 1, 4]


def test_the_standard_library_has_its_threads_where_this_pool_is_put_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multiprocessing.pool, "Pool", Pool)
    with multiprocessing.pool.ThreadPool(2) as threads:
        assert threads.map(lambda n: (n, os.getpid()), range(2)) == [
            (0, os.getpid()),
            (1, os.getpid()),
        ]
