"""What multiprocessing.Pool gets wrong, each a test: the ids are of github.com/python/cpython."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import itertools
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.pool import MaybeEncodingError
from pathlib import Path
from typing import Any

import pytest
from harness import Runs, started
from waiting import until

from taskrun import places
from taskrun.errors import (
    ArgumentError,
    CallCancelled,
    CallTimeout,
    RemoteError,
    RunError,
    TaskExit,
    WorkerLost,
)
from taskrun.executor import Executor
from taskrun.pool import Pool

SECONDS = 20.0  # for what must come at all
METHODS = ["fork", "forkserver", "spawn"]
SOAK = bool(os.environ.get("TASKRUN_SOAK"))


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


# To what is tested with it, spawn is a slower forkserver: with TASKRUN_SOAK that, too.
@pytest.fixture(params=METHODS if SOAK else METHODS[:2])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with Pool(2, context=multiprocessing.get_context(request.param)) as made:
        yield made
    made.join()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


def forked(processes: int = 2, **options: Any) -> Pool:
    return Pool(processes, context=multiprocessing.get_context("fork"), **options)


def twice(x: int) -> int:
    return 2 * x


def works(pool: Pool) -> bool:
    return pool.map_async(twice, range(10), 1).get(SECONDS) == [2 * x for x in range(10)]


def kill_self(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(SECONDS)


# -- workers that die -----------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_workers_death_is_the_error_of_its_call(pool: Pool, number: int) -> None:
    # gh-66587, gh-82265, gh-96061, gh-76067
    with pytest.raises(WorkerLost, match=rf"kill_self.*{signal.Signals(number).name}"):
        pool.apply_async(kill_self, (number,)).get(SECONDS)
    assert works(pool)


def test_an_exiting_workers_calls_all_end(pool: Pool) -> None:
    # gh-66587
    results = [pool.apply_async(os._exit, (3,)) for _ in range(5)]
    others = pool.map_async(twice, range(100), 1)
    for result in results:
        with pytest.raises(WorkerLost, match="exited with status 3"):
            result.get(SECONDS)
    assert others.get(SECONDS) == [2 * x for x in range(100)]


def test_a_map_whose_worker_dies_ends_and_so_does_join() -> None:
    # gh-66587
    pool = forked()
    result = pool.map_async(kill_self, [signal.SIGKILL], 1)
    pool.close()
    pool.join()
    with pytest.raises(WorkerLost):
        result.get(SECONDS)


def test_idle_workers_may_be_killed(pool: Pool) -> None:
    # gh-96062: they hold the lock of the queue that they read
    for worker in pool._pool:
        os.kill(worker.pid, signal.SIGKILL)
    assert works(pool)


def test_idle_workers_may_be_killed_again_and_again_if_they_get_calls_done() -> None:
    with forked(1) as pool:
        for _ in range(20):
            pid = pool.apply(own_pid, (0,))
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: all(worker.pid != pid for worker in pool.workers()))
        assert works(pool)


# -- what cannot be pickled, or not unpickled -------------------------------------------


class Stubborn(Exception):
    """Pickles, but cannot be rebuilt."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a)

    def __reduce__(self) -> Any:
        return Stubborn, (1,)


def raise_stubborn() -> None:
    raise Stubborn(1, 2)


def raise_unpicklable() -> None:
    error = ValueError("with a lock")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    raise error


def fail_here(where: str) -> Any:
    raise ValueError(f"cannot be rebuilt, said {where}")


class Broken:
    """Cannot be unpickled."""

    def __reduce__(self) -> Any:
        return fail_here, ("pickle",)


def give_broken() -> Broken:
    return Broken()


def give_lambda() -> Any:
    return lambda: 42


def give_deep() -> Any:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    return deep


def test_an_exception_that_cannot_be_rebuilt_is_told(pool: Pool) -> None:
    # gh-79492, gh-103061
    with pytest.raises(RemoteError, match="Stubborn"):
        pool.apply_async(raise_stubborn).get(SECONDS)
    assert works(pool)


def test_an_exception_that_cannot_be_pickled_is_told(pool: Pool) -> None:
    with pytest.raises((RemoteError, ValueError), match="with a lock"):
        pool.apply_async(raise_unpicklable).get(SECONDS)
    assert works(pool)


def test_a_result_that_cannot_be_rebuilt_is_that_calls_error(pool: Pool) -> None:
    # gh-79492
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        pool.apply_async(give_broken).get(SECONDS)
    assert works(pool)


def test_an_argument_that_cannot_be_rebuilt_is_that_calls_error(pool: Pool) -> None:
    with pytest.raises(ArgumentError, match="cannot be rebuilt"):
        pool.apply_async(twice, (Broken(),)).get(SECONDS)
    assert works(pool)


def test_a_function_that_is_unknown_in_the_worker_is_an_error() -> None:
    with forked() as pool:
        exec("def made_later(): pass", globals())
        function = globals()["made_later"]
        function.__module__ = __name__
        try:
            with pytest.raises(Exception, match="made_later"):
                pool.apply_async(function).get(SECONDS)
        finally:
            del globals()["made_later"]
        assert works(pool)


taken: list[int] = []


def take_all_descriptors() -> None:
    few = len(os.listdir("/dev/fd")) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_without_descriptors_says_so_and_does_what_needs_none(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_complained", True)  # that its large result goes another way
    with Pool(1, context=multiprocessing.get_context(method)) as pool:
        with pytest.raises(OSError, match="Too many open files: '/dev/null'"):
            pool.apply(take_all_descriptors)
        first = pool.workers()
        assert pool.apply(str, (5,)) == "5"
        assert pool.apply(bytes, (1_000_000,)) == bytes(1_000_000)
        with pytest.raises(RemoteError, match="Stubborn"):
            pool.apply(raise_stubborn)
        assert [worker.pid for worker in pool.workers()] == [worker.pid for worker in first]


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_for_which_there_is_no_thread_leaves_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_unless_ours(thread: threading.Thread) -> None:
        if thread.name == "taskrun-pool":
            raise RuntimeError("can't start new thread")
        start(thread)

    def children() -> set[int]:
        own = os.getpid()
        return {int(pid) for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split()}

    with Pool(1, context=multiprocessing.get_context(method)):
        pass  # what multiprocessing has for itself
    before = children()
    monkeypatch.setattr(threading.Thread, "start", start_unless_ours)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Pool(2, context=multiprocessing.get_context(method))
    until(lambda: children() <= before)


WITHOUT_DESCRIPTORS = """
import os, resource
from multiprocessing import get_context
from taskrun import Pool
context = get_context("fork")
gate = context.Event()
def wait():
    gate.wait()
with Pool(1, context=context) as pool:
    pool.apply_async(wait)
    data = bytes(1_000_000)
    first = pool.map_async(len, [data])
    few, most = len(os.listdir("/dev/fd")) + 20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
    try:
        while True:
            os.open(os.devnull, os.O_RDONLY)
    except OSError:
        pass
    again = pool.map_async(len, [data, bytes(2_000_000)])
    gate.set()
    print(first.get() + again.get())
"""


def test_a_process_without_descriptors_has_large_arguments_travel(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_DESCRIPTORS]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.stdout, done.stderr) == ("[1000000, 1000000, 2000000]\n", "")


@pytest.mark.parametrize("give", [give_lambda, give_deep])
def test_a_result_that_cannot_be_pickled_is_an_error(
    pool: Pool, give: Callable[[], object]
) -> None:
    with pytest.raises(MaybeEncodingError):
        pool.apply_async(give).get(SECONDS)
    assert works(pool)


def leave(how: type[BaseException]) -> None:
    raise how(3)


@pytest.mark.parametrize("how", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_leaving_a_task_is_that_calls_error(pool: Pool, how: type[BaseException]) -> None:
    # PR 101081
    with pytest.raises(TaskExit, match="leave"):
        pool.apply_async(leave, (how,)).get(SECONDS)
    assert works(pool)


# -- initializers and callbacks -----------------------------------------------------------


def count_and_fail(path: Path) -> None:
    with open(path, "a") as file:
        file.write("x")
    raise LookupError("no such licence")


@pytest.mark.parametrize("method", METHODS)
def test_a_failing_initializer_is_everybodys_error(method: str, tmp_path: Path) -> None:
    # gh-87472: 343 workers in 8 seconds
    path = tmp_path / "count"
    context = multiprocessing.get_context(method)
    with Pool(2, count_and_fail, (path,), context=context) as pool:
        results = [pool.apply_async(twice, (1,)) for _ in range(5)]
        for result in results:
            with pytest.raises(LookupError, match="no such licence"):
                result.get(SECONDS)
    pool.join()
    assert len(path.read_text()) <= 2


def test_an_initializer_that_ends_the_process_is_everybodys_error() -> None:
    pool = forked(initializer=os._exit, initargs=(4,))
    with pool, pytest.raises(RunError, match="status 4"):
        pool.apply_async(twice, (1,)).get(SECONDS)


def test_a_raising_callback_is_reported_and_gets_error(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gh-83371
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    with pytest.raises(ZeroDivisionError):
        pool.apply_async(twice, (1,), callback=lambda value: 1 / 0).get(SECONDS)
    assert [args.exc_type for args in seen] == [ZeroDivisionError]
    with pytest.raises(SystemExit):
        pool.apply_async(twice, (1,), callback=lambda value: sys.exit(1)).get(SECONDS)
    assert works(pool)


def test_a_callback_may_use_the_pool(pool: Pool) -> None:
    got: list[Any] = []
    done = threading.Event()

    def nested(value: int) -> None:
        got.append(pool.apply(twice, (value,)))
        got.append(pool.apply_async(twice, (value,), callback=got.append).get(SECONDS))
        done.set()

    pool.apply_async(twice, (1,), callback=nested).get(SECONDS)
    assert done.wait(SECONDS) and got == [4, 4, 4]


def test_terminate_from_a_callback() -> None:
    # gh-87129
    pool = forked()
    others = [pool.apply_async(time.sleep, (SECONDS,)) for _ in range(2)]
    pool.apply_async(leave, (ValueError,), error_callback=lambda error: pool.terminate())
    for other in others:
        other.cancel()  # for the call to get its turn
    for other in others:
        with pytest.raises(CallCancelled):
            other.get(SECONDS)
    pool._driver.loop.finished.wait(SECONDS)
    pool.join()


# -- the end of a pool ----------------------------------------------------------------------


def test_terminate_ends_while_much_is_queued() -> None:
    # gh-73945, gh-78178, gh-96995
    for _ in range(5):
        pool = forked(3)
        result = pool.map_async(time.sleep, [SECONDS] * 10_000, 1)
        start = time.monotonic()
        pool.terminate()
        pool.join()
        assert time.monotonic() - start < 3
        with pytest.raises(CallCancelled):
            result.get(SECONDS)


def test_get_after_terminate_raises() -> None:
    pool = forked()
    result = pool.apply_async(time.sleep, (SECONDS,))
    waiter = threading.Thread(target=result.wait)
    waiter.start()
    pool.terminate()
    waiter.join(SECONDS)
    with pytest.raises(CallCancelled, match="terminated"):
        result.get(SECONDS)
    with pytest.raises(ValueError, match="not running"):
        pool.apply(twice, (1,))


def ignore_sigterm(path: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    path.touch()
    time.sleep(SECONDS)


def stop_self(path: Path) -> None:
    path.touch()
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("function", [ignore_sigterm, stop_self])
def test_terminate_ends_whatever_a_worker_does(
    function: Callable[[Path], None], tmp_path: Path
) -> None:
    pool = forked()
    pid = pool._pool[0].pid
    pool.apply_async(function, (tmp_path / "began",))
    until((tmp_path / "began").exists)
    start = time.monotonic()
    pool.terminate()
    pool.join()
    assert time.monotonic() - start < 5
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_an_unclosed_pool_is_collected() -> None:
    # gh-82682
    pool = forked()
    pids = [worker.pid for worker in pool._pool]
    reference = weakref.ref(pool)
    with pytest.warns(ResourceWarning):
        del pool
        gc.collect()
    assert reference() is None
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


SCRIPT = """
import sys, time, multiprocessing
from taskrun.executor import Executor
from taskrun.pool import Pool
def work(x): return x
if __name__ == "__main__":
    pool = Pool(2, context=multiprocessing.get_context({method!r}))
    pool.map(work, range(10))
    pool.apply_async(time.sleep, (60,))
    print(*(worker.pid for worker in pool._pool), flush=True)
    {last}
"""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("last", ["pass", "import os, signal; os.kill(os.getpid(), 9)"])
def test_nothing_is_left_of_an_unclosed_pool_at_exit(
    method: str, last: str, tmp_path: Path
) -> None:
    # gh-79605, gh-82682
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(method=method, last=last))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert not [line for line in done.stderr.splitlines() if "ResourceWarning" not in line]
    pids = done.stdout.split()
    assert len(pids) == 2
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


GONE_AT_ONCE = """
import multiprocessing, os, time, taskrun
from taskrun import sessions

home = os.getpid()

def outlive_it():
    while os.getppid() == home:
        time.sleep(0.001)

os.register_at_fork(after_in_child=outlive_it)
pool = taskrun.Pool(1, context=multiprocessing.get_context("fork"))
if {forks} and os.fork() == 0:  # it has all that this process had open
    template = pool._driver._engine._local._nursery.pid
    while not sessions.has_ended(template):
        time.sleep(0.001)
os._exit(0)
"""


@pytest.mark.parametrize("forks", [False, True])
def test_a_process_that_is_gone_before_its_pool_has_begun_leaves_nothing(
    runs: Runs, forks: bool
) -> None:
    assert runs.script(GONE_AT_ONCE.format(forks=forks)).status == 0


DAEMON = """
import multiprocessing, os, sys, taskrun
for fd in range({closed}):
    os.close(fd)
with taskrun.Pool(2, context=multiprocessing.get_context("fork")) as pool:
    assert pool.map(abs, [-1, -2]) == [1, 2]
"""


@pytest.mark.parametrize("closed", [2, 3])
def test_a_process_that_has_closed_its_standard_streams_can_have_a_pool(
    closed: int, tmp_path: Path
) -> None:
    # Those of files are asked where they are: then the number may be a pipe's.
    with open(tmp_path / "output", "wb") as file:
        subprocess.run(
            [sys.executable, "-c", DAEMON.format(closed=closed)],
            cwd=tmp_path, stdout=file, stderr=file, timeout=SECONDS, check=True,
        )  # fmt: skip


# -- imap -----------------------------------------------------------------------------------


def test_imap_does_not_eat_an_endless_iterator(pool: Pool) -> None:
    # gh-64192, gh-84291, gh-101586
    taken = itertools.count()
    results = pool.imap(twice, (next(taken) for _ in itertools.count()), buffersize=5)
    assert [next(results) for _ in range(3)] == [0, 2, 4]
    time.sleep(0.1)
    assert next(taken) <= 3 + 5 + 1


def test_a_blocked_generator_holds_up_nobody() -> None:
    pool = forked()
    release = threading.Event()

    def blocked() -> Iterator[int]:
        yield 1
        release.wait()

    results = pool.imap(twice, blocked())
    assert next(results) == 2
    assert works(pool)
    start = time.monotonic()
    pool.terminate()
    pool.join()
    assert time.monotonic() - start < 3
    release.set()


def test_join_without_iterating_ends() -> None:
    pool = forked()
    results = pool.imap(twice, range(5000))
    pool.close()
    pool.join()
    assert list(results) == [2 * x for x in range(5000)]


def test_an_exhausted_iterator_is_not_kept(pool: Pool) -> None:
    # gh-83712
    results = pool.imap(twice, range(3))
    assert list(results) == [0, 2, 4]
    reference = weakref.ref(results)
    del results
    until(lambda: gc.collect() is not None and reference() is None)


@pytest.mark.parametrize("kind", ["imap", "imap_unordered"])
@pytest.mark.parametrize("items", [itertools.count, lambda: iter(lambda: "x" * 1000, "")])
def test_an_iterator_with_a_buffersize_that_is_let_go_ends_its_feed(kind: str, items: Any) -> None:
    with forked() as pool:
        results = getattr(pool, kind)(twice, items(), buffersize=3)
        next(results)
        del results
        pool.close()
        until(pool._loop.finished.is_set)
        pool.join()


def test_an_iterator_without_a_buffersize_that_is_let_go_has_its_calls_executed(
    tmp_path: Path,
) -> None:
    with forked() as pool:
        pool.imap(Path.touch, [tmp_path / str(n) for n in range(3000)])  # more than at a time
        pool.close()
        pool.join()
    assert len(os.listdir(tmp_path)) == 3000


# -- maxtasksperchild, nesting, forks ---------------------------------------------------------


def own_pid(_: int) -> int:
    return os.getpid()


def test_maxtasksperchild_replaces_workers_and_never_hangs() -> None:
    # gh-91315, gh-82980, gh-93580
    pool = forked(maxtasksperchild=3)
    pids = pool.map(own_pid, range(60), 1)
    pool.close()
    pool.join()
    counts = [pids.count(pid) for pid in set(pids)]
    assert max(counts) <= 3 and sum(counts) == 60


def nested(depth: int) -> int:
    with forked(2) as pool:
        below = pool.map(nested, [depth - 1] * 2) if depth else [0]
    pool.join()
    return sum(below) + 1


def test_pools_can_be_nested() -> None:
    # daemonic processes are not allowed to have children
    with forked() as pool:
        assert pool.apply_async(nested, (1,)).get(SECONDS) == 3


def stdlib_nested(_: int) -> list[int]:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(twice, [1, 2])


def test_a_worker_may_have_a_pool_of_the_standard_library() -> None:
    with forked() as pool:
        assert pool.apply_async(stdlib_nested, (0,)).get(SECONDS) == [2, 4]


def test_a_forked_child_disturbs_nothing() -> None:
    # multiprocessing.util._exit_function ends its parent's workers there
    with forked() as pool:
        pool.map(twice, range(10))
        pid = os.fork()
        if not pid:
            status = 1
            try:
                try:
                    pool.apply(twice, (1,))
                except ValueError:
                    status = 0
                multiprocessing.util._exit_function()  # type: ignore[attr-defined]
                pool.terminate()
                del pool
                gc.collect()
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert works(pool)


def leave_grandchild() -> int:
    pid = os.fork()
    if not pid:
        os.setsid()
        time.sleep(SECONDS)
        os._exit(0)
    os._exit(5)


def test_a_grandchild_that_keeps_everything_open_holds_up_nobody(pool: Pool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerLost, match="status 5"):
        pool.apply_async(leave_grandchild).get(SECONDS)
    assert time.monotonic() - start < 5
    assert works(pool)


# -- what people ask for ------------------------------------------------------------------------


def test_a_running_call_can_be_cancelled(pool: Pool, tmp_path: Path) -> None:
    result = pool.apply_async(stop_at, (tmp_path / "began",))
    until((tmp_path / "began").exists)
    assert result.cancel()
    with pytest.raises(CallCancelled):
        result.get(SECONDS)
    assert works(pool) and not result.cancel()


def stop_at(path: Path) -> None:
    path.touch()
    time.sleep(SECONDS)


def test_a_call_has_a_timeout_and_retries(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(CallTimeout, match="sleep"):
        pool.apply_async(time.sleep, (SECONDS,), timeout=0.1).get(SECONDS)
    result = pool.apply_async(die_at_first, (tmp_path / "died",), retries=2)
    assert result.get(SECONDS) == "alive"
    assert result.outcome is not None and result.outcome.attempts == 2


def die_at_first(path: Path) -> str:
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def use_lock(lock: Any, queue: Any, value: Any) -> None:
    global shared
    shared = lock, queue, value


shared: Any = None


def count_up(number: int) -> None:
    lock, queue, value = shared
    with lock:
        value.value += number
    queue.put(number)


@pytest.mark.parametrize("method", METHODS)
def test_initargs_may_hold_locks_queues_and_values(method: str) -> None:
    context = multiprocessing.get_context(method)
    lock, queue, value = context.Lock(), context.SimpleQueue(), context.Value("i", 0)
    with Pool(2, use_lock, (lock, queue, value), context=context) as pool:
        pool.map(count_up, range(10))
        assert value.value == 45
        assert sorted(queue.get() for _ in range(10)) == list(range(10))


class Own:
    """Compares by its class, as ``except`` does."""


def give_own() -> Own:
    return Own()


def test_what_is_of_the_users_classes_stays_so(pool: Pool) -> None:
    assert type(pool.apply(give_own)) is Own
    assert pickle.loads(pickle.dumps(Own)) is Own


INTERRUPTED = """
import os, signal, threading, time
from taskrun.executor import Executor
from taskrun.pool import Pool
def work(x): time.sleep(60)
if __name__ == "__main__":
    start = time.monotonic()
    try:
        with Pool(2) as pool:
            pids = [worker.pid for worker in pool._pool]
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            pool.{wait}
    except KeyboardInterrupt:
        assert time.monotonic() - start < 5
        for pid in pids:
            assert not os.path.exists(f"/proc/{{pid}}")
        print("interrupted")
"""


@pytest.mark.parametrize("wait", ["map(work, [1, 2])", "apply_async(work, (1,)).wait()"])
def test_ctrl_c_reaches_the_main_thread_at_once(wait: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED.format(wait=wait))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


# -- threads in the parent ------------------------------------------------------------


BUSY = ["json.tool", "cProfile", "dbm.dumb", "colorsys"]


def be_busy(module: str, stop: threading.Event) -> None:
    """Hold the locks that a fork in the wrong moment leaves held for ever: of imports, of
    logging, of the standard streams, of the allocator."""
    while not stop.is_set():
        sys.modules.pop(module, None)
        importlib.import_module(module)
        logging.getLogger("busy").debug("%s", len(bytes(1_000_000)))
        sys.stderr.flush()


def import_and_log(number: int) -> int:
    for module in BUSY:
        importlib.import_module(module)
    logging.getLogger("busy").debug("%s", number)
    sys.stderr.flush()
    return number


@pytest.mark.filterwarnings("error")
def test_a_parent_with_threads_may_have_forked_pools_and_their_replacements() -> None:
    # gh-84559, gh-50970, gh-93580: no warning of 3.12's, no lock that stays held
    stop = threading.Event()
    threads = [threading.Thread(target=be_busy, args=(module, stop)) for module in BUSY]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            with forked() as pool:
                for _ in range(3):
                    numbers = pool.map_async(import_and_log, range(20), 1).get(SECONDS)
                    assert numbers == list(range(20))
                    os.kill(pool.workers()[0].pid, signal.SIGKILL)
    finally:
        stop.set()
        for thread in threads:
            thread.join(SECONDS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("most", [1, 2])
def test_an_executor_whose_workers_are_replaced_goes_on(method: str, most: int) -> None:
    # gh-115634: there the last call of a worker left the others without one
    context = multiprocessing.get_context(method)
    with Executor(1, mp_context=context, max_tasks_per_child=most) as executor:
        futures = [executor.submit(twice, number) for number in range(7)]
        assert [future.result(SECONDS) for future in futures] == [2 * x for x in range(7)]
        # It is idle now, and has a worker that may do no more.
        pids = [executor.submit(own_pid, number).result(SECONDS) for number in range(4)]
    assert max(map(pids.count, pids)) <= most


# -- where nobody may wait -------------------------------------------------------------


def test_join_in_a_callback_is_an_error(pool: Pool) -> None:
    raised: list[object] = []

    def join(value: object) -> None:
        pool.close()
        try:
            pool.join()
        except RuntimeError as error:
            raised.append(str(error))

    pool.apply_async(twice, (1,), callback=join).wait(SECONDS)
    assert raised == ["cannot join current thread"]
    pool.join()


class Collected:
    """Does something where the garbage collector finds it."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.itself = self
        self.action = action
        self.raised: list[BaseException] = []

    def __del__(self) -> None:
        try:
            self.action()
        except Exception as error:
            self.raised.append(error)


@pytest.mark.parametrize("guest", [True, False], ids=["guest", "thread"])
def test_what_is_collected_amid_the_pools_work_cannot_wait_for_it(guest: bool) -> None:
    pool, raised = forked(), []
    actions: list[Callable[[], object]] = [
        lambda: pool.apply(twice, (1,)),
        lambda: pool.map(twice, [1]),
        lambda: pool.apply_async(time.sleep, (0.1,)).get(SECONDS),
        lambda: next(pool.imap(twice, [1])),
    ]

    def collect() -> None:
        gc.collect()
        done.set()

    for action in actions:
        done = threading.Event()
        raised.append((found := Collected(action)).raised)
        del found
        result = pool.apply_async(time.sleep, (0.3,))
        threading.Timer(0.05, pool._driver.post, [collect]).start()
        if guest:
            result.get(SECONDS)
        assert done.wait(SECONDS)
        assert works(pool)
    assert ["in the middle of its own work" in str(errors[0]) for errors in raised] == [True] * 4
    for end in (pool.terminate, pool.join):
        done = threading.Event()
        raised.append((found := Collected(end)).raised)
        del found
        pool._driver.post(collect)
        pool._driver.loop.finished.wait(SECONDS) if end == pool.join else done.wait(SECONDS)
    pool.join()


def test_a_callback_that_hangs_does_not_keep_the_interpreter_from_its_end(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, threading\n"
        "from taskrun import Pool\n"
        "from taskrun.pooling import driver\n"
        "if __name__ == '__main__':\n"
        "    driver.END_SECONDS = 0.5\n"
        "    pool = Pool(1, context=multiprocessing.get_context('fork'))\n"
        "    began = threading.Event()\n"
        "    def hang(value):\n"
        "        began.set()\n"
        "        threading.Event().wait()\n"
        "    pool.apply_async(abs, (1,), callback=hang)\n"
        "    assert began.wait(20)\n"
    )
    subprocess.run([sys.executable, script], timeout=SECONDS, check=True)


def test_who_waits_in_a_forked_child_gives_up_in_time_and_disturbs_nothing() -> None:
    with forked() as pool:
        workers = len(pool._pool)
        result = pool.apply_async(time.sleep, (1.0,))
        values = pool.imap(time.sleep, [1.0])
        began = [pool.apply_async(twice, (1,)) for _ in range(2)]
        pid = os.fork()
        if not pid:
            status = 1
            try:
                for wait in (
                    lambda: result.get(0.02),
                    lambda: values.next(0.02),
                    lambda: result.get(),
                ):
                    with pytest.raises((multiprocessing.TimeoutError, ValueError)):
                        wait()
                result.wait(0.02)
                assert not result.ready() and len(pool._pool) == workers
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert [each.get(SECONDS) for each in (result, *began)] == [None, 2, 2]
        assert values.next(SECONDS) is None
        assert works(pool)
