"""What taskrun.Executor has beside what the standard library's tests ask for."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool, _RemoteTraceback
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

from taskrun import Executor
from taskrun.errors import ArgumentError, WorkerLost

SECONDS = 20.0


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def executor() -> Iterator[Executor]:
    with Executor(2, multiprocessing.get_context("fork")) as made:
        yield made


def square(x: int) -> int:
    return x * x


def touch_and_sleep(path: Path) -> None:
    path.touch()
    time.sleep(SECONDS)


def test_a_future_is_cancelled_while_its_call_runs(executor: Executor, tmp_path: Path) -> None:
    future = executor.submit(touch_and_sleep, tmp_path / "began")
    end = time.monotonic() + SECONDS
    while not (tmp_path / "began").exists():
        assert time.monotonic() < end
        time.sleep(0.005)
    assert future.cancel() and future.cancelled()
    assert executor.submit(square, 3).result(SECONDS) == 9


def wait_for(path: Path) -> None:
    path.with_suffix(".begun").touch()
    end = time.monotonic() + SECONDS
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.001)


def test_a_future_says_whether_its_call_runs(executor: Executor, tmp_path: Path) -> None:
    futures = [executor.submit(wait_for, tmp_path / str(n % 2)) for n in range(100)]
    end = time.monotonic() + SECONDS
    while len(os.listdir(tmp_path)) < 2 or not futures[1].running():
        assert time.monotonic() < end
    assert [future.running() for future in futures] == [True] * 2 + [False] * 98
    assert "state=running" in repr(futures[0]) and "state=pending" in repr(futures[2])
    (tmp_path / "0").touch()
    while futures[0].running():
        assert time.monotonic() < end
    assert futures[0].done() and "state=finished" in repr(futures[0])  # nothing in between
    (tmp_path / "1").touch()
    for future in futures:
        future.result(SECONDS)
    assert not any(future.running() for future in futures)
    assert futures[99].cancel() is False


def test_a_workers_death_is_the_error_of_its_call_only(executor: Executor) -> None:
    future = executor.submit(os._exit, 3)
    with pytest.raises(WorkerLost, match=r"_exit.*status 3") as caught:
        future.result(SECONDS)
    assert isinstance(caught.value, BrokenProcessPool)
    assert list(executor.map(square, range(10))) == [x * x for x in range(10)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_calls_sys_exit_ends_neither_the_executor_nor_other_callbacks(
    executor: Executor,
) -> None:
    called = threading.Event()
    future = executor.submit(time.sleep, 0.2)
    future.add_done_callback(lambda done: sys.exit(3))
    future.add_done_callback(lambda done: called.set())
    assert called.wait(SECONDS)
    assert executor.submit(square, 3).result(SECONDS) == 9


def test_a_future_with_a_callback_goes_with_the_last_who_holds_it(
    executor: Executor, tmp_path: Path
) -> None:
    gc.disable()
    try:
        future = executor.submit(wait_for, tmp_path / "go")
        future.add_done_callback(lambda done: None)
        gone = weakref.ref(future)
        (tmp_path / "go").touch()
        future.result(SECONDS)
        del future
        end = time.monotonic() + SECONDS
        while gone() is not None:  # whoever told of its end may hold it a moment longer
            assert time.monotonic() < end
            time.sleep(0.005)
    finally:
        gc.enable()


def test_a_failing_initializer_breaks_the_executor() -> None:
    context = multiprocessing.get_context("fork")
    with Executor(2, context, initializer=int, initargs=("x",)) as executor:
        with pytest.raises(BrokenExecutor, match="ValueError"):
            executor.submit(square, 1).result(SECONDS)
        with pytest.raises(BrokenExecutor, match="ValueError"):
            executor.submit(square, 1)


def test_it_runs_calls_for_asyncio(executor: Executor) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(executor, square, x) for x in range(20)))

    assert asyncio.run(main()) == [x * x for x in range(20)]


def test_map_reads_no_further_ahead_than_its_buffer(executor: Executor) -> None:
    numbers = count()
    results = executor.map(square, numbers, buffersize=3)
    assert list(islice(results, 4)) == [0, 1, 4, 9]
    assert next(numbers) <= 9


def test_the_interpreter_waits_for_calls_at_its_end(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "from taskrun import Executor\n"
        "def work():\n"
        "    time.sleep(0.3)\n"
        "    print('apple')\n"
        "if __name__ == '__main__':\n"
        "    executor = Executor(2)\n"
        "    executor.submit(work)\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.stdout, done.stderr) == ("apple\n", "")


def test_who_asks_for_an_executor_of_the_standard_library_has_one(executor: Executor) -> None:
    assert isinstance(executor, ProcessPoolExecutor)
    assert executor._max_workers == 2


class Beyond(BaseException):
    """What ``except Exception`` does not catch."""


def leave(how: type[BaseException]) -> None:
    raise how("out")


@pytest.mark.parametrize("how", [KeyboardInterrupt, GeneratorExit, Beyond, SystemExit])
def test_whatever_a_call_raises_its_future_raises(
    executor: Executor, how: type[BaseException]
) -> None:
    error = executor.submit(leave, how).exception(SECONDS)
    assert isinstance(error, how)
    assert isinstance(error.__cause__, _RemoteTraceback)
    assert executor.submit(square, 3).result(SECONDS) == 9


class Unreadable:
    def __reduce__(self) -> Any:
        return int, ("no number",)


def test_an_argument_that_cannot_be_unpickled_says_in_its_cause_where(executor: Executor) -> None:
    error = executor.submit(square, Unreadable()).exception(SECONDS)
    assert isinstance(error, ArgumentError)
    assert isinstance(error.__cause__, _RemoteTraceback)
    assert "ValueError: invalid literal" in error.__cause__.tb


INTERRUPTED = """
import sys, time
from taskrun import Executor

def work(seconds):
    print("began", flush=True)
    time.sleep(seconds)

if __name__ == "__main__":
    executor = Executor(2)
    {use}
"""


@pytest.mark.parametrize(
    "use",
    [
        "executor.submit(work, 60).result()",
        "list(executor.map(work, [60] * 4))",
        "with executor: executor.submit(work, 60).result()",
        "with executor: list(executor.map(work, [60] * 4))",
        "with executor: executor.submit(work, 60); time.sleep(60)",
    ],
)
def test_after_ctrl_c_nobody_waits_for_calls_that_run(use: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED.format(use=use))
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "began\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == -signal.SIGINT


def test_a_map_that_is_given_up_ends_its_calls(executor: Executor, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        list(executor.map(touch_and_sleep, [tmp_path / "a", tmp_path / "b"], timeout=0.2))
    assert executor.submit(square, 3).result(SECONDS) == 9
    assert time.monotonic() - began < SECONDS / 2


@pytest.mark.parametrize(("most", "kind"), [(0, ValueError), ("two", TypeError)])
def test_a_parameter_that_is_refused_is_called_by_its_name(
    most: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="max_tasks_per_child must be"):
        Executor(1, max_tasks_per_child=most)


@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_the_workers_can_be_ended_with_the_calls_they_are_in(
    executor: Executor, how: str, tmp_path: Path
) -> None:
    futures = [executor.submit(touch_and_sleep, tmp_path / str(number)) for number in range(5)]
    end = time.monotonic() + SECONDS
    while not (tmp_path / "1").exists():
        assert time.monotonic() < end
        time.sleep(0.005)
    getattr(executor, how)()
    for future in futures:
        assert isinstance(future.exception(SECONDS / 4), BrokenProcessPool)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 3)


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_who_ends_the_processes_ends_all_calls(how: str) -> None:
    with Executor(2, multiprocessing.get_context("fork")) as executor:
        futures = [executor.submit(time.sleep, SECONDS) for _ in range(5)]
        processes = executor._processes
        assert len(processes) == 2
        assert all(process.is_alive() for process in processes.values())
        for pid, process in processes.items():
            assert process.pid == pid
            getattr(process, how)()
        for process in processes.values():
            process.join(SECONDS)
            assert not process.is_alive()
        for future in futures:
            assert isinstance(future.exception(SECONDS / 4), BrokenProcessPool)


def submit_and_leave(path: Path, error: type[BaseException] | None) -> None:
    Executor(1).submit(touch_late, path)
    if error is not None:
        raise error


def touch_late(path: Path) -> None:
    wait_for(path.with_suffix(".go"))
    path.touch()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_the_end_of_a_child_of_multiprocessing_waits_for_calls(method: str, tmp_path: Path) -> None:
    path = tmp_path / "late"
    context: Any = multiprocessing.get_context(method)
    child = context.Process(target=submit_and_leave, args=(path, None))
    child.start()
    end = time.monotonic() + SECONDS
    while not path.with_suffix(".begun").exists():
        assert time.monotonic() < end
        time.sleep(0.005)
    path.with_suffix(".go").touch()
    child.join(SECONDS)
    assert child.exitcode == 0 and path.exists()


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="multiprocessing tells nobody how its target ended"
)
def test_the_end_of_a_child_that_was_interrupted_waits_for_nothing(tmp_path: Path) -> None:
    context: Any = multiprocessing.get_context("fork")
    child = context.Process(target=submit_and_leave, args=(tmp_path / "late", KeyboardInterrupt))
    child.start()
    child.join(SECONDS / 2)
    assert child.exitcode == 1


def test_of_many_that_wait_all_are_done_when_the_workers_are_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    executor = Executor(1, multiprocessing.get_context("fork"))
    futures = [executor.submit(time.sleep, SECONDS) for _ in range(1500)]
    assert futures[-2].cancel() and futures[-3].cancel()
    assert not wait(futures[-3:-1], SECONDS).not_done  # they have been told
    began = time.monotonic()
    executor.terminate_workers()
    assert not wait(futures, SECONDS).not_done
    assert time.monotonic() - began < SECONDS / 4
    assert [future.cancelled() for future in futures[-4:]] == [False, True, True, False]
    assert isinstance(futures[-1].exception(), BrokenProcessPool)
    assert not caplog.records  # of futures that are told twice


def test_a_forked_child_cannot_submit(executor: Executor) -> None:
    assert executor.submit(square, 3).result(SECONDS) == 9
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            executor.submit(square, 3)
        except RuntimeError as error:
            status = 0 if "forked" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert executor.submit(square, 4).result(SECONDS) == 16
