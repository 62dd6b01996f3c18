"""Own workers, for real: what they do, how they end, and that nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from workshop import Workshop, task_file

from taskrun import errors
from taskrun import messages as m
from taskrun.engines.pool import PoolEngine

pytestmark = pytest.mark.timeout(120)

CHORES = """
import ctypes, os, signal, subprocess, sys, threading, time

@task
def add(x, y): return x + y

@task
def same(x): return x

@task
def pid(): return os.getpid()

@task
def size(x): return len(x)

@task
def zeros(x): return bytes(x)

@task
def nap(x):
    time.sleep(x)
    return x

@task
def end_by(x): os.kill(os.getpid(), x); time.sleep(60)

@task
def leave(x): os._exit(x)

@task
def crash(): ctypes.string_at(0)

@task
def shout(x): print(x); print(x, file=sys.stderr); return x

@task
def shout_and_die(x): print(x, flush=True); os.kill(os.getpid(), signal.SIGKILL)

@task
def touch_and_wait(x):
    open(x, "w").close()
    time.sleep(60)
"""

Make = Callable[..., Workshop]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    shops: list[Workshop] = []

    def make_shop(source: str = "", **options: Any) -> Workshop:
        module, file = task_file(tmp_path, CHORES + textwrap.dedent(source))
        shops.append(Workshop(PoolEngine(module=module, file=file, **options), module))
        return shops[-1]

    yield make_shop
    for shop in shops:
        shop.close()


@pytest.fixture
def shop(make: Make) -> Workshop:
    return make()


def gone(*pids: int, seconds: float = 5.0) -> bool:
    """Whether these processes end in time."""
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.005)


# -- plain work -----------------------------------------------------------------------


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_calls_are_executed_and_their_values_come_back(make: Make, start_method: str) -> None:
    shop = make(start_method=start_method)
    first, second = shop.workers(2)
    assert shop.do(first, "add", 2, 3) == 5
    assert shop.do(second, "add", [1], [2]) == [1, 2]
    assert shop.do(first, "pid") == shop.pid(first) != shop.pid(second)


def test_many_calls_in_a_frame_end_in_order_in_few_events(shop: Workshop) -> None:
    (worker,) = shop.workers()
    calls = [shop.make("same", number) for number in range(1000)]
    shop.assign(worker, *calls)
    assert [shop.value(call) for call in calls] == list(range(1000))
    assert [key for key, _ in shop.reports] == [call.id for call in calls]
    assert len(shop.all(m.Finished)) < 200


def test_a_value_that_is_larger_than_the_ledger_travels_like_any_other(shop: Workshop) -> None:
    (worker,) = shop.workers()
    before, large = shop.make("same", 1), shop.make("zeros", 5_000_000)
    after = shop.make("same", 2)
    shop.assign(worker, before, large, after)
    assert shop.value(large) == bytes(5_000_000)
    assert (shop.value(before), shop.value(after)) == (1, 2)


def test_a_worker_has_no_stdin_and_its_own_session(make: Make) -> None:
    shop = make(
        """
        @task
        def look(): return sys.stdin.read(), os.getsid(0), signal.getsignal(signal.SIGTERM)
        """
    )
    (worker,) = shop.workers()
    assert shop.do(worker, "look") == ("", shop.pid(worker), signal.SIG_DFL)


def test_a_file_in_the_folder_does_not_stand_in_for_a_module_of_ours(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("taskrun", "random", "pickle", "socket", "select", "sessions"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    monkeypatch.chdir(tmp_path)
    shop = make()
    (worker,) = shop.workers()
    assert shop.do(worker, "add", 1, 1) == 2


def test_a_task_file_that_starts_threads_gets_fresh_workers(make: Make) -> None:
    shop = make(
        """
        threading.Thread(target=threading.Event().wait, daemon=True).start()

        @task
        def threads(): return len(sys._current_frames())
        """
    )
    (worker,) = shop.workers()
    assert shop.do(worker, "threads") == 3  # main, control, and the file's own


def test_gpu_numbers_are_told_to_libraries_for_the_call_only(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shop = make(
        """
        @task
        def variables():
            names = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
            return [os.environ.get(name) for name in names], current().resources
        """
    )
    (worker,) = shop.workers()
    units = {"gpu": [0, 3], "cpu": 4}
    assert shop.do(worker, "variables", units=units) == (["0,3", "4"], units)
    assert shop.do(worker, "variables") == ([None, "1"], {})


def test_progress_reaches_the_observer(make: Make) -> None:
    shop = make(
        """
        @task
        def steps():
            current().progress(1, 3)
            current().progress(3, 3)
        """
    )
    (worker,) = shop.workers()
    call = shop.start(worker, "steps")
    shop.report(call)
    assert shop.watcher.progress[-1] == (call, 3, 3)


def test_a_task_file_that_fails_in_the_workers_is_said_once_and_is_the_calls_outcome(
    make: Make, tmp_path: Path
) -> None:
    shop = make("raise OSError('no such device')")
    first, second = shop.workers(2)
    for worker in (first, second):
        error = shop.error(shop.start(worker, "add", 1, 2))
        assert isinstance(error, errors.LoadError)
        assert "no such device" in str(error)
    (notice,) = shop.watcher.notices
    assert "OSError: no such device" in notice


# -- how workers end ------------------------------------------------------------------

DEATHS = [
    ("end_by", (signal.SIGKILL,), "killed by SIGKILL"),
    ("end_by", (signal.SIGTERM,), "killed by SIGTERM"),
    ("leave", (3,), "exited with status 3"),
    ("leave", (0,), "exited with status 0 in the middle of the call"),
    ("crash", (), "killed by SIGSEGV"),
]


@pytest.mark.parametrize(("name", "args", "reason"), DEATHS)
def test_a_worker_that_dies_names_the_reason_and_the_call_it_was_in(
    shop: Workshop, name: str, args: tuple[int, ...], reason: str
) -> None:
    (worker,) = shop.workers()
    before, deadly, after = shop.make("same", 1), shop.make(name, *args), shop.make("same", 2)
    shop.assign(worker, before, deadly, after)
    lost = shop.await_event(m.WorkerLost)
    assert (lost.worker, lost.reason, lost.executing) == (worker, reason, (deadly.id, 1))
    assert shop.value(before) == 1
    assert (after.id, 1) not in shop.reports
    (again,) = shop.workers()
    assert shop.do(again, "same", 2) == 2


def test_an_idle_worker_that_is_killed_was_in_no_call(shop: Workshop) -> None:
    (worker,) = shop.workers()
    shop.do(worker, "same", 1)
    os.kill(shop.pid(worker), signal.SIGKILL)
    lost = shop.await_event(m.WorkerLost)
    assert (lost.executing, lost.last_output) == (None, "")


def test_a_worker_killed_while_it_receives_50_mb_had_not_begun(shop: Workshop) -> None:
    (worker,) = shop.workers()
    os.kill(shop.pid(worker), signal.SIGSTOP)
    shop.start(worker, "size", bytes(50_000_000))
    shop.reactor.run_once(0)  # as much is written as there is room for
    os.kill(shop.pid(worker), signal.SIGKILL)
    assert shop.await_event(m.WorkerLost).executing is None


def test_a_worker_killed_while_it_sends_50_mb_had_not_ended(shop: Workshop) -> None:
    (worker,) = shop.workers()
    call = shop.start(worker, "zeros", 50_000_000)
    shop.reactor.run_once(0)
    worker_process = psutil.Process(shop.pid(worker))
    deadline = time.monotonic() + 20
    while worker_process.status() != psutil.STATUS_SLEEPING or worker_process.memory_info().rss < (
        50_000_000
    ):  # it sleeps in write(), since nobody reads
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.05)
    os.kill(worker_process.pid, signal.SIGKILL)
    lost = shop.await_event(m.WorkerLost)
    assert lost.executing == (call.id, 1)
    assert (call.id, 1) not in shop.reports


@pytest.mark.parametrize("position", [0, 1, 50, 137, 299])
def test_exactly_what_ended_before_a_death_among_tiny_calls_has_ended(
    shop: Workshop, position: int
) -> None:
    (worker,) = shop.workers()
    calls = [shop.make("same", number) for number in range(300)]
    calls[position] = shop.make("end_by", signal.SIGKILL)
    shop.assign(worker, *calls)
    lost = shop.await_event(m.WorkerLost)
    assert lost.executing == (calls[position].id, 1)
    assert list(shop.reports) == [(call.id, 1) for call in calls[:position]]


def test_a_kill_from_outside_at_any_moment_costs_one_call_at_most(shop: Workshop) -> None:
    for round in range(20):
        (worker,) = shop.workers()
        calls = [shop.make("same", number) for number in range(2000)]
        before = len(shop.reports)
        shop.assign(worker, *calls)
        shop.reactor.run_once(0)
        time.sleep(0.0005 * round)
        os.kill(shop.pid(worker), signal.SIGKILL)
        lost = shop.await_event(m.WorkerLost, round + 1)
        ended = list(shop.reports)[before:]
        assert ended == [(call.id, 1) for call in calls[: len(ended)]]
        next_one = (calls[len(ended)].id, 1) if len(ended) < len(calls) else None
        assert lost.executing in (None, next_one)


def test_the_last_output_of_a_lost_worker_is_the_calls_own(shop: Workshop) -> None:
    (worker,) = shop.workers()
    shop.do(worker, "shout", "from before")
    call = shop.start(worker, "shout_and_die", "famous last words " * 200)
    lost = shop.await_event(m.WorkerLost)
    assert lost.last_output.endswith("famous last words \n")
    assert len(lost.last_output) == 2048
    assert shop.written(call).count(b"famous") == 200
    assert call in shop.watcher.ended


def test_a_worker_that_sends_garbage_is_killed_and_nobody_else_is_hurt(make: Make) -> None:
    shop = make(
        """
        import stat

        @task
        def garble():
            for fd in map(int, os.listdir("/proc/self/fd")):
                try:
                    is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
                except OSError:
                    continue
                if is_socket:
                    os.write(fd, b"\\xff" * 64)
            time.sleep(60)
        """
    )
    bad, good = shop.workers(2)
    call = shop.start(bad, "garble")
    lost = shop.await_event(m.WorkerLost)
    assert (lost.worker, lost.executing) == (bad, (call.id, 1))
    assert "could not be read" in lost.reason
    assert shop.do(good, "add", 1, 2) == 3


def test_a_task_that_closes_every_descriptor_costs_its_worker_only(make: Make) -> None:
    shop = make(
        """
        @task
        def close_all(): os.closerange(3, 4096)
        """
    )
    bad, good = shop.workers(2)
    call = shop.start(bad, "close_all")
    lost = shop.await_event(m.WorkerLost)
    assert (lost.worker, lost.executing) == (bad, (call.id, 1))
    assert "a call closed file descriptors that are its worker's own" in lost.last_output
    assert shop.do(good, "add", 1, 2) == 3


def test_workers_that_cannot_start_end_the_run_instead_of_looping(make: Make) -> None:
    shop = make(environment={"PYTHONHOME": "/nowhere"}, start_method="spawn")

    def again(event: m.Event) -> None:
        if isinstance(event, m.WorkerLost):
            shop.engine.perform(m.StartWorkers(1))

    shop.on_event = again
    shop.engine.perform(m.StartWorkers(1))
    assert "before they can take a call" in shop.await_event(m.GiveUp).reason


def test_a_template_that_dies_takes_its_workers_along_and_is_replaced(make: Make) -> None:
    shop = make()
    (worker,) = shop.workers()
    call = shop.start(worker, "nap", 60)
    template = psutil.Process(shop.pid(worker)).parent()
    assert template is not None
    shop.until(lambda: shop.engine._links[worker].executing)  # type: ignore[attr-defined]
    template.kill()
    lost = shop.await_event(m.WorkerLost)
    assert lost.executing == (call.id, 1)
    assert "killed by SIGKILL" in lost.reason
    assert gone(shop.pid(worker))
    (again,) = shop.workers()
    assert shop.do(again, "add", 1, 2) == 3


def test_a_call_that_cannot_be_sent_ends_alone(shop: Workshop) -> None:
    (worker,) = shop.workers()
    bad = shop.make("same", 1, index=lambda: None)
    good = shop.make("same", 2)
    shop.assign(worker, bad, good)
    assert shop.value(good) == 2
    assert "cannot be pickled" in str(shop.error(bad))


# -- outcomes -------------------------------------------------------------------------

AWKWARD = """
import threading

class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")

class Stubborn(Exception):
    def __reduce__(self): raise TypeError("I stay here")

@task
def odd(): raise Odd(1, 2)

@task
def stubborn(): raise Stubborn("no way")

@task
def quit_it(x): sys.exit(x)

@task
def interrupt(): raise KeyboardInterrupt

@task
def sink(): return sink()

@task
def hog(): raise MemoryError("no room")

@task
def lock(): return {"guard": threading.Lock()}

@task
def generate(x): yield from range(x)

@task
async def later(x):
    import asyncio
    await asyncio.sleep(0)
    return x * 2

@task
async def trickle(x):
    for item in range(x): yield item

class Fragile:
    def __reduce__(self): return (explode, ())

def explode(): raise ValueError("it does not survive the journey")
"""


@pytest.mark.parametrize(
    ("name", "args", "type_name", "words"),
    [
        ("odd", (), "chores.Odd", "1 and 2"),
        ("stubborn", (), "chores.Stubborn", "no way"),
        ("quit_it", (2,), "TaskExit", "sys.exit(2)"),
        ("interrupt", (), "TaskExit", "KeyboardInterrupt"),
        ("sink", (), "RecursionError", "recursion"),
        ("hog", (), "MemoryError", "no room"),
        ("lock", (), "ResultError", "lock returned what cannot travel"),
    ],
)
def test_whatever_a_task_raises_is_an_outcome_with_a_name(
    make: Make, name: str, args: tuple[Any, ...], type_name: str, words: str
) -> None:
    shop = make(AWKWARD)
    (worker,) = shop.workers()
    report = shop.report(shop.start(worker, name, *args))
    failure, _ = report.payload
    assert report.kind == "error"
    assert failure.type_name == type_name
    assert words in failure.message
    assert "workers/" not in failure.traceback
    assert shop.do(worker, "add", 1, 2) == 3


def test_generators_and_coroutines_are_run_to_their_end(make: Make) -> None:
    shop = make(AWKWARD)
    (worker,) = shop.workers()
    assert shop.do(worker, "generate", 3) == [0, 1, 2]
    assert [shop.do(worker, "later", number) for number in (1, 2)] == [2, 4]
    assert shop.do(worker, "trickle", 3) == [0, 1, 2]


# -- output ---------------------------------------------------------------------------

LOUD = """
import ctypes

libc = ctypes.CDLL(None)
with_the_gil = ctypes.PyDLL(None)

@task
def everyone(x):
    print("python", x)
    print("error", x, file=sys.stderr)
    sys.stdout.write(f"no newline {x}")
    sys.stdout.flush()
    libc.write(1, b" c level", 8)
    subprocess.run(["echo", f" subprocess {x}"])

@task
def flood(x):
    line = "x" * 99 + "\\n"
    for _ in range(x): sys.stdout.write(line)

@task
def flood_with_the_gil(x):
    block = b"y" * 65536
    for _ in range(x): with_the_gil.write(1, block, 65536)

@task
def replace(): sys.stdout = open(os.devnull, "w")

@task
def close_object(): sys.stdout.close(); sys.stderr.close()

@task
def detach(): sys.stdout.detach()

@task
def close_descriptors(): os.close(1); os.close(2)

@task
def redirect(): os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

@task
def unblock():
    os.set_blocking(1, False)
    sys.stdout.write("z" * 3_000_000) if 0 else None

@task
def nul(x): os.write(1, b"\\0" * x)

@task
def live(x):
    print("before the file")
    while not os.path.exists(x): time.sleep(0.01)
"""


def test_output_of_python_c_and_subprocesses_is_the_calls(make: Make) -> None:
    shop = make(LOUD)
    (worker,) = shop.workers()
    calls = [shop.make("everyone", number) for number in range(20)]
    shop.assign(worker, *calls)
    for number, call in enumerate(calls):
        assert shop.report(call).wrote
        assert shop.written(call).decode() == (
            f"python {number}\nno newline {number} c level subprocess {number}\n"
        )
        assert shop.written(call, "stderr").decode() == f"error {number}\n"
    assert shop.watcher.ended == calls
    assert not shop.written(None)


def test_output_is_told_before_the_end_of_its_call(shop: Workshop) -> None:
    (worker,) = shop.workers()
    calls = [shop.make("shout", number) for number in range(50)]
    ids = {call.id: call for call in calls}

    def check(event: m.Event) -> None:
        if isinstance(event, m.Finished):
            for report in event.reports:
                call = ids[report[0]]
                assert shop.written(call) == shop.written(call, "stderr")
                assert shop.written(call) and call in shop.watcher.ended

    shop.on_event = check
    shop.assign(worker, *calls)
    for call in calls:
        shop.report(call)


def test_calls_that_write_nothing_cost_no_marks(shop: Workshop) -> None:
    (worker,) = shop.workers()
    shop.do(worker, "shout", "something")
    calls = [shop.make("same", number) for number in range(500)]
    shop.assign(worker, *calls)
    assert sum(shop.report(call).wrote for call in calls) < 50


def test_output_is_shown_while_its_call_runs(make: Make, tmp_path: Path) -> None:
    shop = make(LOUD)
    (worker,) = shop.workers()
    calls = [shop.make("shout", 1), shop.make("live", str(tmp_path / "go on"))]
    shop.assign(worker, *calls)
    shop.until(lambda: shop.written(calls[1]) == b"before the file\n")
    (tmp_path / "go on").touch()
    shop.report(calls[1])


def test_a_hundred_megabytes_stream_through_in_little_memory(make: Make) -> None:
    shop = make(LOUD)
    (worker,) = shop.workers()
    shop.watcher.keep = False
    shop.do(worker, "flood", 10)
    before = psutil.Process().memory_info().rss
    most = 0

    def measure(call: Any, stream: str, data: bytes) -> None:
        nonlocal most
        shop.watcher.size += len(data)
        most = max(most, psutil.Process().memory_info().rss)

    shop.watcher.size = 0
    shop.watcher.output = measure  # type: ignore[method-assign]
    shop.report(shop.start(worker, "flood", 1_000_000))
    assert shop.watcher.size == 100_000_000
    assert most - before < 20_000_000


def test_a_noisy_worker_does_not_keep_another_waiting(make: Make) -> None:
    shop = make(LOUD)
    noisy, quiet = shop.workers(2)
    shop.watcher.keep = False
    call = shop.start(noisy, "flood", 500_000)
    shop.until(lambda: shop.watcher.size > 1_000_000)
    for number in range(20):
        assert shop.do(quiet, "same", number) == number
    assert (call.id, 1) not in shop.reports
    shop.report(call)


def test_c_code_that_prints_while_it_holds_the_interpreter_is_read(make: Make) -> None:
    shop = make(LOUD)
    (worker,) = shop.workers()
    call = shop.start(worker, "flood_with_the_gil", 100)
    shop.report(call)
    assert shop.written(call) == b"y" * 6_553_600


@pytest.mark.parametrize(
    "name", ["replace", "close_object", "detach", "close_descriptors", "redirect", "unblock"]
)
def test_what_a_task_does_to_its_stdout_ends_with_the_call(make: Make, name: str) -> None:
    shop = make(LOUD)
    (worker,) = shop.workers()
    spoiler, call = shop.make(name), shop.make("everyone", 1)
    shop.assign(worker, spoiler, call)
    shop.report(call)
    assert shop.report(spoiler).kind == "value"
    assert shop.written(call).decode() == "python 1\nno newline 1 c level subprocess 1\n"
    assert shop.written(call, "stderr") == b"error 1\n"


@pytest.mark.parametrize("count", [1, 2, 17, 5000])
def test_bytes_that_look_like_the_beginning_of_a_mark_are_output(make: Make, count: int) -> None:
    shop = make(LOUD)
    (worker,) = shop.workers()
    call = shop.start(worker, "nul", count)
    shop.report(call)
    assert shop.written(call) == b"\0" * count


def test_eight_workers_print_at_once_and_every_line_is_whole_and_attributed(make: Make) -> None:
    shop = make(
        """
        @task
        def lines(x):
            for number in range(10_000): print(f"call {x} line {number}")
        """
    )
    workers = shop.workers(8)
    calls = [shop.start(worker, "lines", number) for number, worker in enumerate(workers)]
    for number, call in enumerate(calls):
        shop.report(call)
        expected = "".join(f"call {number} line {line}\n" for line in range(10_000))
        assert shop.written(call).decode() == expected


def test_what_a_thread_writes_between_calls_belongs_to_nobody(make: Make) -> None:
    shop = make(
        """
        @task
        def haunt(): threading.Timer(0.1, os.write, [1, b"boo"]).start()
        """
    )
    (worker,) = shop.workers()
    call = shop.start(worker, "haunt")
    shop.report(call)
    shop.until(lambda: shop.written(None) == b"boo")
    assert shop.do(worker, "same", 1) == 1
    assert not shop.written(call)


# -- give-back and interrupts ---------------------------------------------------------


def test_calls_that_have_not_begun_are_given_back_while_one_runs(
    shop: Workshop, tmp_path: Path
) -> None:
    (worker,) = shop.workers()
    long = shop.make("touch_and_wait", str(tmp_path / "begun"))
    queued = [shop.make("same", number) for number in range(5)]
    shop.assign(worker, long, *queued[:3])
    shop.reactor.run_once(0)
    await_file(tmp_path / "begun")
    shop.assign(worker, *queued[3:])  # stays in the Pipe, which the main thread does not read
    shop.engine.perform(m.Reclaim(worker, 4))
    event = shop.await_event(m.GaveBack)
    assert event.calls == [(call.id, 1) for call in reversed(queued[1:])]
    began = shop.await_event(m.Began)
    assert (began.call, began.attempt, began.label) == (long.id, 1, None)
    shop.engine.perform(m.Reclaim(worker, 0))
    assert shop.await_event(m.GaveBack, 2).calls == []
    assert len(shop.all(m.Began)) == 1
    os.kill(shop.pid(worker), signal.SIGKILL)
    assert shop.await_event(m.WorkerLost).executing == (long.id, 1)


def test_an_idle_worker_answers_too(shop: Workshop) -> None:
    (worker,) = shop.workers()
    shop.engine.perform(m.Reclaim(worker, 3))
    assert shop.await_event(m.GaveBack).calls == []


def test_what_ended_before_a_long_call_is_known_while_that_runs(make: Make) -> None:
    shop = make(
        """
        @task
        def hold_everything(x): ctypes.PyDLL(None).usleep(x)
        """
    )
    (worker,) = shop.workers()
    quick = [shop.make("same", number) for number in range(10)]
    # In C code that lets no other thread run: the worker itself can tell nothing.
    shop.assign(worker, *quick, long := shop.make("hold_everything", 900_000))
    start = time.monotonic()
    assert [shop.value(call) for call in quick] == list(range(10))
    assert time.monotonic() - start < 0.5
    shop.report(long)


def test_began_is_told_at_once_where_the_recipe_wants_it(make: Make) -> None:
    shop = make(
        """
        @task(label="nap of {x} s")
        def doze(x, y=0): time.sleep(x)
        """
    )
    (worker,) = shop.workers()
    call = shop.start(worker, "doze", 0.2, flags=m.SAY_BEGAN)
    began = shop.await_event(m.Began)
    assert (began.call, began.label) == (call.id, "nap of 0.2 s")
    assert (call.id, 1) not in shop.reports
    shop.report(call)


def interrupt(shop: Workshop, worker: int, call: Any) -> None:
    shop.engine.perform(m.Interrupt(worker, call.id, call.attempt, "cancelled"))


def cancelled(shop: Workshop, call: Any) -> bool:
    report = shop.report(call)
    return report.kind == "error" and report.payload[0].kind == "cancelled"


INTERRUPTIBLE = """
@task
def spin(x):
    open(x, "w").close()
    while True: pass

@task
def tidy(x):
    open(x, "w").close()
    try:
        time.sleep(60)
    finally:
        print("tidied up")

@task
def swallow(x):
    open(x, "w").close()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

@task
def immune(x):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    swallow(x)

@task
def subprocesses(x):
    children = [subprocess.Popen(["sleep", "300"]),
                subprocess.Popen(["bash", "-c", "trap '' TERM; sleep 300 & wait; sleep 300"])]
    time.sleep(0.2)
    with open(x + ".part", "w") as file: file.write(" ".join(str(c.pid) for c in children))
    os.rename(x + ".part", x)
    time.sleep(60)

@task
async def dream(x):
    import asyncio
    try:
        open(x, "w").close()
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        print("woken")
        raise
"""


@pytest.mark.parametrize("name", ["touch_and_wait", "spin", "tidy", "dream"])
def test_a_running_call_is_interrupted_and_the_worker_lives(
    make: Make, tmp_path: Path, name: str
) -> None:
    shop = make(INTERRUPTIBLE)
    (worker,) = shop.workers()
    call, after = shop.make(name, str(tmp_path / "begun")), shop.make("same", 7)
    shop.assign(worker, call, after)
    shop.reactor.run_once(0)
    await_file(tmp_path / "begun")
    interrupt(shop, worker, call)
    assert cancelled(shop, call)
    assert shop.value(after) == 7
    assert shop.do(worker, "pid") == shop.pid(worker)
    said = {"tidy": b"tidied up\n", "dream": b"woken\n"}.get(name, b"")
    assert shop.written(call) == said


def test_an_interrupt_ends_the_subprocesses_of_the_call(make: Make, tmp_path: Path) -> None:
    shop = make(INTERRUPTIBLE)
    (worker,) = shop.workers()
    call = shop.start(worker, "subprocesses", str(tmp_path / "begun"))
    shop.reactor.run_once(0)
    await_file(tmp_path / "begun")
    pids = [int(pid) for pid in (tmp_path / "begun").read_text().split()]
    below = psutil.Process(shop.pid(worker)).children(recursive=True)
    interrupt(shop, worker, call)
    assert cancelled(shop, call)
    assert gone(*pids, *[process.pid for process in below])
    assert shop.do(worker, "pid") == shop.pid(worker)


@pytest.mark.parametrize(("name", "by"), [("swallow", "SIGTERM"), ("immune", "SIGKILL")])
def test_a_call_that_does_not_heed_the_interrupt_is_ended_with_its_worker(
    make: Make, tmp_path: Path, name: str, by: str
) -> None:
    shop = make(INTERRUPTIBLE, grace=0.2)
    (worker,) = shop.workers()
    call = shop.start(worker, name, str(tmp_path / "begun"))
    shop.reactor.run_once(0)
    await_file(tmp_path / "begun")
    interrupt(shop, worker, call)
    lost = shop.await_event(m.WorkerLost)
    assert (lost.reason, lost.executing) == (f"killed by {by}", (call.id, 1))


def test_a_call_that_waits_in_the_queue_is_cancelled_and_the_running_one_is_not(
    shop: Workshop, tmp_path: Path
) -> None:
    (worker,) = shop.workers()
    running = shop.make("nap", 1)
    queued = [shop.make("same", number) for number in range(3)]
    shop.assign(worker, running, *queued)
    shop.reactor.run_once(0)
    interrupt(shop, worker, queued[1])
    assert cancelled(shop, queued[1])
    assert (running.id, 1) not in shop.reports
    assert shop.value(running) == 1
    assert [shop.value(queued[0]), shop.value(queued[2])] == [0, 2]


def test_a_call_is_cancelled_even_if_the_interrupt_overtakes_it(shop: Workshop) -> None:
    (worker,) = shop.workers()
    for number in range(50):
        call = shop.start(worker, "nap", 20)
        interrupt(shop, worker, call)  # on another Pipe, at the same time
        assert cancelled(shop, call), number


def test_interrupts_hit_the_call_they_are_meant_for_and_no_other(shop: Workshop) -> None:
    (worker,) = shop.workers()
    calls = [shop.make("nap", 0.0005) for _ in range(400)]
    shop.assign(worker, *calls)
    for call in calls[::3]:
        interrupt(shop, worker, call)
        shop.reactor.run_once(0.001)
    for number, call in enumerate(calls):
        if number % 3:
            assert shop.value(call) == 0.0005
        else:
            assert shop.report(call).kind == "value" or cancelled(shop, call)
    assert shop.do(worker, "pid") == shop.pid(worker)


def test_an_interrupt_of_a_call_that_has_ended_does_nothing(shop: Workshop) -> None:
    (worker,) = shop.workers()
    call = shop.start(worker, "same", 1)
    assert shop.value(call) == 1
    interrupt(shop, worker, call)
    assert shop.do(worker, "same", 2) == 2


def test_one_can_ask_where_a_worker_is(shop: Workshop, tmp_path: Path) -> None:
    (worker,) = shop.workers()
    shop.start(worker, "touch_and_wait", str(tmp_path / "begun"))
    shop.reactor.run_once(0)
    await_file(tmp_path / "begun")
    texts: list[str] = []
    assert isinstance(shop.engine, PoolEngine)
    shop.engine.stack(worker, texts.append)
    shop.until(lambda: texts)
    assert "in touch_and_wait" in texts[0]
    assert "execute.py" not in texts[0]


# -- forks, threads, per_worker -------------------------------------------------------

FORKING = """
@task
def fork_and_return(x):
    pid = os.fork()
    if pid == 0:
        print("the child returns")
        return "child"
    os.waitpid(pid, 0)
    return "parent"

@task
def fork_and_raise(x):
    pid = os.fork()
    if pid == 0: raise SystemExit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

@task
def outlive(x):
    pid = os.fork()
    if pid == 0:
        if x: os.setsid()
        time.sleep(300)
    return pid

@task
def through_multiprocessing(x):
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(abs, [-x, x])

@task
def endless_threads():
    for daemon in (True, False):
        threading.Thread(target=threading.Event().wait, daemon=daemon).start()
"""


def test_a_forked_child_that_returns_ends_and_reports_nothing(make: Make) -> None:
    shop = make(FORKING)
    (worker,) = shop.workers()
    call = shop.start(worker, "fork_and_return", 1)
    assert shop.value(call) == "parent"
    assert shop.written(call) == b"the child returns\n"
    assert shop.do(worker, "fork_and_raise", 1) == 7
    assert shop.do(worker, "through_multiprocessing", 3) == [3, 3]


@pytest.mark.parametrize("own_session", [False, True])
def test_a_forked_child_that_outlives_its_call_ends_with_the_engine(
    make: Make, own_session: bool
) -> None:
    shop = make(FORKING)
    (worker,) = shop.workers()
    child = shop.do(worker, "outlive", own_session)
    assert shop.do(worker, "add", 1, 2) == 3
    assert alive(child)
    shop.close()
    assert gone(child)


def test_a_forked_child_does_not_keep_the_end_of_its_worker_from_being_seen(make: Make) -> None:
    shop = make(FORKING)
    (worker,) = shop.workers()
    child = shop.do(worker, "outlive", True)
    call = shop.start(worker, "end_by", signal.SIGKILL)
    start = time.monotonic()
    assert shop.await_event(m.WorkerLost).executing == (call.id, 1)
    assert time.monotonic() - start < 2
    shop.close()
    assert gone(child)


def test_threads_that_never_end_do_not_keep_the_worker(make: Make) -> None:
    shop = make(FORKING)
    (worker,) = shop.workers()
    shop.do(worker, "endless_threads")
    start = time.monotonic()
    shop.close()
    assert gone(shop.pid(worker))
    assert time.monotonic() - start < 3


PER_WORKER = """
def connect():
    connection = []
    yield connection
    with open(os.environ["CHORES_LOG"], "a") as file: file.write(f"closed after {connection}\\n")

@task
def use(x, connection=per_worker(connect)):
    connection.append(x)
    return len(connection)
"""


@pytest.mark.parametrize("how", ["stop", "close"])
def test_what_per_worker_made_is_kept_and_finished_in_the_end(
    make: Make, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHORES_LOG", str(tmp_path / "log"))
    shop = make(PER_WORKER)
    (worker,) = shop.workers()
    assert [shop.do(worker, "use", number) for number in (5, 6)] == [1, 2]
    if how == "stop":
        shop.engine.perform(m.StopWorker(worker))
        shop.until(lambda: not alive(shop.pid(worker)))
        shop.until(lambda: not shop.engine._links)  # type: ignore[attr-defined]
        assert not shop.all(m.WorkerLost)
    else:
        shop.close()
    assert (tmp_path / "log").read_text() == "closed after [5, 6]\n"


# -- calls that make calls ------------------------------------------------------------

GROWING = """
@task
def grow(x):
    first = same.submit(x)
    second = add.submit(first, y=[first, 2])
    same.submit(x)
    return first.result() + second.result()

@task
def give(x): return {"future": same.submit(x), "plain": x}

@task
def patient(x):
    future = same.submit(x)
    try:
        return future.result(timeout=0.05)
    except TimeoutError:
        return "gave up"

@task
def fail_below():
    try:
        same.submit(1).result()
    except ValueError as error:
        return f"caught {error}"

@task
def drop(x): same.submit(x).cancel()

@task
async def gather(x):
    import asyncio
    return await asyncio.gather(*[same.submit(number) for number in range(x)])

@task
def wrong(): add.submit(1)

@task
def both(x):
    print("outer begins")
    value = shout.submit(x).result()
    print("outer ends")
    return value

@task
def deep(x): return 0 if not x else 1 + deep.submit(x - 1).result()

@task
async def adeep(x): return 0 if not x else 1 + await adeep.submit(x - 1)

@task
def nested_sleep(x): return nap.submit(x).result()
"""


def deliver(shop: Workshop, worker: int, call: Any, values: dict[bytes, Any]) -> None:
    shop.engine.perform(m.Deliver(worker, values, call.id))


def test_submitted_calls_are_told_in_order_and_what_they_become_is_delivered(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "grow", 4)
    waiting = shop.await_event(m.Waiting)
    submitted = [one for event in shop.all(m.Submitted) for one in event.calls]
    (key1, recipe1, _, keys1), (key2, recipe2, _, keys2), (key3, recipe3, _, _) = submitted
    assert [recipe1.name, recipe2.name] == ["same", "add"]
    assert recipe1 is recipe3 and recipe1.names is None and recipe1.id != recipe2.id
    assert (keys1, keys2) == ((), (key1,))
    assert len({key1, key2, key3}) == 3
    assert (waiting.call, waiting.keys, waiting.any_of) == (call.id, (key1,), False)
    deliver(shop, worker, call, {key1: 40})
    assert shop.await_event(m.Waiting, 2).keys == (key2,)
    deliver(shop, worker, call, {key2: 2})
    assert shop.value(call) == 42


def test_the_same_submission_by_another_attempt_has_the_same_key(make: Make) -> None:
    shop = make(GROWING)
    first, second = shop.workers(2)
    keys = []
    for worker in (first, second):
        shop.start(worker, "patient", 3)
        shop.await_event(m.Resumed, len(keys) + 1)
        keys.append(shop.all(m.Submitted)[-1].calls[0][0])
    assert keys[0] == keys[1]


def test_a_submitted_call_is_executed_with_its_futures_filled_in(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "grow", 4)
    shop.await_event(m.Waiting)
    key1, recipe1, blob1, _ = shop.all(m.Submitted)[0].calls[0]
    _, recipe2, blob2, _ = [one for event in shop.all(m.Submitted) for one in event.calls][1]
    (other,) = shop.workers()
    from workshop import Call

    child = Call(5000, recipe1, (blob1, {}))
    shop.assign(other, child)
    assert shop.value(child) == 4
    joined = Call(5001, recipe2, (blob2, {key1: 4}))
    shop.assign(other, joined)
    assert "unsupported operand" in str(shop.error(joined))  # 4 + [4, 2], as it says
    os.kill(shop.pid(worker), signal.SIGKILL)
    assert shop.await_event(m.WorkerLost).executing == (call.id, 1)


def test_futures_in_a_value_are_held_and_not_waited_for(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    report = shop.report(shop.start(worker, "give", 3))
    key = shop.await_event(m.Submitted).calls[0][0]
    assert report.kind == "held"
    assert report.payload[1] == (key,)


def test_waiting_ends_when_the_time_is_up(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "patient", 3)
    assert shop.await_event(m.Resumed).call == call.id
    assert shop.value(call) == "gave up"


def test_a_failed_call_raises_where_its_future_is_asked(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "fail_below")
    (key,) = shop.await_event(m.Waiting).keys
    from taskrun.values import encode_failure

    deliver(shop, worker, call, {key: encode_failure(ValueError("it was no good"))})
    assert shop.value(call) == "caught it was no good"


def test_a_future_can_be_cancelled(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "drop", 1)
    shop.report(call)
    key = shop.await_event(m.Submitted).calls[0][0]
    assert shop.await_event(m.CancelChild) == m.CancelChild(call.id, 1, key)


def test_arguments_that_do_not_fit_are_refused_where_they_are_submitted(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    error = shop.error(shop.start(worker, "wrong"))
    assert isinstance(error, TypeError)
    assert "add.submit(): missing argument 'y'" in str(error)
    assert not shop.all(m.Submitted)


def test_calls_in_advance_are_given_back_when_one_waits(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    waiter = shop.make("both", 1)
    queued = [shop.make("same", number) for number in range(3)]
    shop.assign(worker, waiter, *queued)
    gave_back = shop.await_event(m.GaveBack)
    waiting = shop.await_event(m.Waiting)
    assert sorted(gave_back.calls) == [(call.id, 1) for call in queued]
    assert shop.events.index(gave_back) < shop.events.index(waiting)
    late = shop.start(worker, "same", 9)  # sent before the core knew of the wait
    assert shop.await_event(m.GaveBack, 2).calls == [(late.id, 1)]
    deliver(shop, worker, waiter, {waiting.keys[0]: 1})
    assert shop.value(waiter) == 1


def nested(shop: Workshop, worker: int) -> Callable[[m.Event], None]:
    """A core that lets the worker that waits run what it waits for."""
    from workshop import Call

    children: dict[bytes, Any] = {}
    parents: dict[int, tuple[Any, bytes]] = {}
    ids = iter(range(10_000, 20_000))

    def soon(command: m.Command) -> None:
        shop.reactor.call_soon(lambda: shop.engine.perform(command))

    def on_event(event: m.Event) -> None:
        if isinstance(event, m.Submitted):
            for key, recipe, blob, _ in event.calls:
                children[event.parent, key] = Call(next(ids), recipe, (blob, {}))  # type: ignore
        elif isinstance(event, m.Waiting):
            for key in event.keys:
                child = children.pop((event.call, key), None)  # type: ignore
                if child is not None:
                    parents[child.id] = (event.call, key)
                    soon(m.Assign(worker, [child], nested=True))
        elif isinstance(event, m.Finished):
            for id, _, kind, payload, *_ in event.reports:
                if id in parents:
                    assert kind == "value"
                    parent, key = parents[id]
                    soon(m.Deliver(worker, {key: payload}, parent))

    return on_event


def test_a_waiting_worker_executes_nested_calls_and_output_stays_apart(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    shop.on_event = nested(shop, worker)
    call = shop.start(worker, "both", 5)
    assert shop.value(call) == 5
    assert shop.written(call) == b"outer begins\nouter ends\n"
    (inner,) = [id for id, stream in shop.watcher.written if id and id >= 10_000][:1]
    assert shop.watcher.written[inner, "stdout"] == b"5\n"


@pytest.mark.parametrize(("name", "depth"), [("deep", 1), ("deep", 300), ("adeep", 50)])
def test_nested_calls_go_as_deep_as_they_want(make: Make, name: str, depth: int) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    shop.on_event = nested(shop, worker)
    assert shop.do(worker, name, depth) == depth


def test_a_nested_call_for_one_who_does_not_wait_any_more_is_given_back(shop: Workshop) -> None:
    (worker,) = shop.workers()
    call = shop.make("same", 1)
    shop.assign(worker, call, nested=True)
    assert shop.await_event(m.GaveBack).calls == [(call.id, 1)]


def test_a_waiting_call_is_interrupted(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "both", 5)
    shop.await_event(m.Waiting)
    interrupt(shop, worker, call)
    assert cancelled(shop, call)
    assert shop.do(worker, "same", 1) == 1


def test_a_call_below_a_nested_one_is_interrupted_when_that_has_ended(make: Make) -> None:
    shop = make(GROWING, grace=0.1)
    (worker,) = shop.workers()
    shop.on_event = nested(shop, worker)
    call = shop.start(worker, "nested_sleep", 0.5)
    shop.await_event(m.Waiting)
    link = shop.engine._links[worker]  # type: ignore[attr-defined]
    shop.until(lambda: link.executing and link.executing[0] >= 10_000)
    interrupt(shop, worker, call)
    assert cancelled(shop, call)
    inner = next(report for (id, _), report in shop.reports.items() if id >= 10_000)
    assert inner.payload == 0.5
    assert shop.do(worker, "same", 1) == 1


def test_an_async_task_awaits_many_futures_at_once(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "gather", 5)
    seen: set[bytes] = set()
    for number in range(5):
        waiting = shop.await_event(m.Waiting, number + 1)
        assert waiting.any_of and len(waiting.keys) == 5 - number
        key = waiting.keys[0]
        seen.add(key)
        deliver(shop, worker, call, {key: number})
    assert sorted(shop.value(call)) == list(range(5))
    assert len(seen) == 5


# -- nothing is left ------------------------------------------------------------------


def descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            pass  # the one that listed them
    return found


def test_closing_leaves_no_descriptor_and_no_process(make: Make) -> None:
    before = descriptors()
    shop = make(FORKING)
    workers = shop.workers(3)
    shop.do(workers[0], "outlive", True)
    shop.start(workers[1], "nap", 60)
    os.kill(shop.pid(workers[2]), signal.SIGKILL)
    shop.await_event(m.WorkerLost)
    below = psutil.Process().children(recursive=True)
    assert len(below) >= 4
    shop.close()
    assert gone(*[process.pid for process in below], seconds=1)
    assert descriptors() <= before


def test_killing_ends_what_runs_at_once(make: Make, tmp_path: Path) -> None:
    shop = make(INTERRUPTIBLE)
    (worker,) = shop.workers()
    call = shop.start(worker, "immune", str(tmp_path / "begun"))
    shop.reactor.run_once(0)
    await_file(tmp_path / "begun")
    shop.engine.kill()
    assert shop.await_event(m.WorkerLost).executing == (call.id, 1)


def test_closing_while_the_task_file_is_imported_does_not_wait_for_it(make: Make) -> None:
    shop = make("time.sleep(60)")
    shop.engine.perform(m.StartWorkers(2))
    shop.reactor.run_once(0)
    start = time.monotonic()
    shop.close()
    assert time.monotonic() - start < 3
    assert not psutil.Process().children()


COORDINATOR = """
import sys, time
sys.path[:0] = {path!r}
from workshop import Workshop
from taskrun.engines.pool import PoolEngine
if __name__ == "__main__":
    shop = Workshop(PoolEngine(module="chores", file={file!r}, start_method={method!r}), "chores")
    if {when!r} == "importing":
        shop.engine.perform(__import__("taskrun.messages").messages.StartWorkers(2))
        shop.until(lambda: False, 60)
    first, second = shop.workers(2)
    for own_session in (0, 1):
        shop.do(first, "outlive", own_session)
    call = shop.start(first, "subprocesses", {begun!r})
    shop.start(second, "spin", {begun!r} + "2")
    shop.until(lambda: False, 60)
"""


@pytest.mark.parametrize(
    ("start_method", "when"),
    [("forkserver", "running"), ("spawn", "running"), ("forkserver", "importing")],
)
def test_a_coordinator_killed_with_9_leaves_no_process_behind(
    tmp_path: Path, start_method: str, when: str
) -> None:
    source = CHORES + FORKING + INTERRUPTIBLE
    if when == "importing":
        source += f"\nsubprocess.Popen(['sleep', '300'])\nopen({str(tmp_path / 'begun')!r}, 'w')"
        source += "\ntime.sleep(60)"
    _, file = task_file(tmp_path, source)
    script = tmp_path / "coordinator.py"
    script.write_text(
        COORDINATOR.format(
            path=[str(Path(__file__).parent)], file=file, method=start_method,
            begun=str(tmp_path / "begun"), when=when,
        )
    )  # fmt: skip
    coordinator = subprocess.Popen([sys.executable, str(script)])
    try:
        await_file(tmp_path / "begun")
        if when == "running":
            await_file(tmp_path / "begun2")
        below = psutil.Process(coordinator.pid).children(recursive=True)
        assert len(below) >= (8 if when == "running" else 2)
        coordinator.send_signal(signal.SIGKILL)
        assert gone(*[process.pid for process in below], seconds=2)
    finally:
        coordinator.kill()
        coordinator.wait(10)
