"""Workers that execute many calls at a time: the same promises as in a process of one's own."""

from __future__ import annotations

import importlib.util
import inspect
import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from workshop import Workshop, alive, cancelled, gone, interrupt, task_file

from taskrun import errors
from taskrun import messages as m
from taskrun.engines import pool
from taskrun.engines.pool import PoolEngine
from taskrun.model import Options, Task
from taskrun.values import decode
from taskrun.workers.lanes.control import LaneControl
from taskrun.workers.recipes import Known

pytestmark = pytest.mark.timeout(120)

GRACE = 0.5

LANES = [
    "thread",
    "async",
    pytest.param(
        "green",
        marks=pytest.mark.skipif(
            not importlib.util.find_spec("gevent"), reason="gevent is not installed"
        ),
    ),
]
every_lane = pytest.mark.parametrize("lane", LANES)

COMMON = """
import asyncio, contextlib, logging, os, subprocess, sys, threading, time
from taskrun import Retry, Skip, sh, sh_async, state

logging.basicConfig(format="log %(message)s", level=logging.INFO)
"""

# In each lane's words: `run def` is how a call is written, `pause` how it waits.
WORDS = {
    "process": {"run def": "def", "pause": "time.sleep", "sh": "sh", "get": ".result()"},
    "thread": {"run def": "def", "pause": "time.sleep", "sh": "sh", "get": ".result()"},
    "green": {"run def": "def", "pause": "time.sleep", "sh": "sh", "get": ".result()"},
    "async": {
        "run def": "async def",
        "pause": "await asyncio.sleep",
        "sh": "await sh_async",
        "get": "",
    },
}

TASKS = """
@task
RUN add(x, y): return x + y

@task
RUN nap(x):
    PAUSE(x)
    return x

@task
RUN touch_and_nap(x, y):
    open(x, "w").close()
    PAUSE(y)

@task
RUN fail(x):
    PAUSE(0.01)
    raise ValueError(x)

@task(retry_on=OSError)
RUN fail_otherwise(x): raise ValueError(x)

@task
RUN skip(): raise Skip("nothing to do")

@task
RUN again(): raise Retry("later", after=2.5)

@task
RUN leave(): sys.exit(3)

@task
RUN unpicklable(): return threading.Lock()

@task
RUN shout(x, y):
    print(f"out {x} ", end="")
    PAUSE(y)
    print(f"and {x}")
    print(f"err {x}", file=sys.stderr)
    logging.info("of %s", x)
    sys.stdout.buffer.write(b"bytes\\n")
    PAUSE(y)
    print("no newline", end="")

@task
RUN who(x):
    PAUSE(x)
    one = current()
    return one.call, one.attempt, one.worker, one.pid

@task
RUN progress():
    current().progress(1, 2)
    PAUSE(0.1)
    current().progress(2, 2)

@task
RUN through_shell(x): return (SH("echo {x}; echo oops >&2; sleep 0.1; echo end")).stdout

@task
RUN long_command(x):
    SH("echo $$ > {x}.part; mv {x}.part {x}; exec sleep 60")

@task
RUN by_subprocess(x):
    subprocess.run(["echo", x], check=True)
    os.write(2, b"written below\\n")

@task
RUN die(x):
    PAUSE(x)
    os.kill(os.getpid(), 9)

made = []
def make():
    time.sleep(0.05)
    made.append(1)
    yield len(made)
    print("finished", flush=True)

@task
RUN shared(x=per_worker(make)): return x

@task(label="nap of {x}", timeout=60)
RUN labelled(x): PAUSE(x)
"""

LATE = """
@task
def returns_late(x, y):
    time.sleep(y)
    print("late")
    open(x, "w").close()
"""


def in_lane(source: str, lane: str) -> str:
    words = WORDS[lane]
    source = source.replace("PAUSE", words["pause"]).replace("SH(", words["sh"] + "(")
    source = source.replace("RUN ", words["run def"] + " ").replace("@task\n", "@task()\n")
    return source.replace("@task(", f"@task(lane={lane!r}, ").replace(", )", ")")


def stop(shop: Workshop, worker: int) -> None:
    """Have a worker end, and see that it does."""
    shop.engine.perform(m.StopWorker(worker))
    shop.until(lambda: not alive(shop.pid(worker)), seconds=10)
    shop.until(lambda: f"w{worker}" in shop.watcher.gone)
    assert not shop.all(m.WorkerLost)


Open = Callable[..., tuple[Workshop, int]]


@pytest.fixture
def open_in(tmp_path: Path) -> Iterator[Open]:
    """A workshop with one worker of a lane, which knows TASKS and ``source``."""
    shops: list[Workshop] = []

    def open_shop(lane: str, source: str = "", **options: Any) -> tuple[Workshop, int]:
        text = COMMON + in_lane(TASKS + textwrap.dedent(source), lane)
        module, file = task_file(tmp_path, text)
        engine = PoolEngine(module=module, file=file, **{"grace": GRACE, **options})
        shops.append(Workshop(engine, module))
        (worker,) = shops[-1].workers(1, lane)
        return shops[-1], worker

    yield open_shop
    for shop in shops:
        shop.close()


# -- plain work -----------------------------------------------------------------------


@every_lane
def test_calls_that_wait_do_so_at_the_same_time(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    ready = shop.await_event(m.WorkerReady)
    assert (ready.lane, ready.slots >= 32) == (lane, True)
    started = time.monotonic()
    calls = [shop.make("nap", 0.5) for _ in range(30)]
    shop.assign(worker, *calls)
    assert [shop.value(call) for call in calls] == [0.5] * 30
    assert time.monotonic() - started < 5
    assert shop.report(calls[0]).seconds >= 0.5


@every_lane
def test_many_calls_end_once_each(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    calls = [shop.make("add", number, 1) for number in range(3000)]
    shop.assign(worker, *calls)
    assert [shop.value(call) for call in calls] == list(range(1, 3001))


@every_lane
def test_a_call_knows_who_it_is(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    calls = [shop.make("who", 0.05, index=place, attempt=2) for place in range(20)]
    shop.assign(worker, *calls)
    pid = shop.pid(worker)
    for place, call in enumerate(calls):
        assert shop.value(call) == (f"who[{place}]", 2, "w1", pid)


@every_lane
def test_a_call_ends_as_it_would_in_a_process_of_its_own(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    failed = shop.start(worker, "fail", "bad row")
    error = shop.error(failed)
    assert isinstance(error, ValueError) and str(error) == "bad row"
    failure, retryable = shop.report(failed).payload
    assert retryable
    frames = [line for line in failure.traceback.splitlines() if line.startswith("  File")]
    assert len(frames) == 1 and "in fail" in frames[0], failure.traceback
    assert shop.report(shop.start(worker, "fail_otherwise", 1)).payload[1] is False
    skipped = shop.report(shop.start(worker, "skip", names=()))
    assert (skipped.kind, skipped.payload) == ("skip", "nothing to do")
    again = shop.report(shop.start(worker, "again", names=()))
    assert (again.kind, again.payload[0]) == ("retry", 2.5)
    assert isinstance(shop.error(shop.start(worker, "leave", names=())), errors.TaskExit)
    assert isinstance(shop.error(shop.start(worker, "unpicklable", names=())), errors.ResultError)
    assert shop.do(worker, "add", 1, 2) == 3


@every_lane
def test_per_worker_makes_one_value_for_all_calls_and_finishes_it(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    calls = [shop.make("shared", names=()) for _ in range(20)]
    shop.assign(worker, *calls)
    assert {shop.value(call) for call in calls} == {1}
    stop(shop, worker)
    assert shop.written(None) == b"finished\n"


@every_lane
def test_a_label_and_a_timeout_have_the_begin_told(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    call = shop.start(worker, "labelled", 0.2, flags=m.SAY_BEGAN)
    began = shop.await_event(m.Began)
    assert (began.call, began.label) == (call.id, "nap of 0.2")
    assert shop.value(call) is None


@every_lane
def test_the_begin_of_a_long_call_is_told_although_nobody_asked(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    calls = [shop.make("nap", 2) for _ in range(3)]
    shop.assign(worker, *calls)
    shop.await_event(m.Began, 3)
    assert not shop.all(m.Finished)
    assert {shop.value(call) for call in calls} == {2}
    assert len(shop.all(m.Began)) == 3


@every_lane
def test_progress_is_told_of_the_right_call(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    calls = [shop.make("progress", names=()) for _ in range(5)]
    shop.assign(worker, *calls)
    for call in calls:
        shop.value(call)
    for call in calls:
        assert [told[1:] for told in shop.watcher.progress if told[0] is call] == [(1, 2), (2, 2)]


# -- output ---------------------------------------------------------------------------


@every_lane
def test_what_calls_print_at_the_same_time_is_each_ones_own(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    calls = [shop.make("shout", number, 0.05) for number in range(20)]
    shop.assign(worker, *calls)
    for number, call in enumerate(calls):
        shop.report(call)
        assert shop.written(call) == f"out {number} and {number}\nbytes\nno newline".encode()
        assert shop.written(call, "stderr") == f"err {number}\nlog of {number}\n".encode()
    assert shop.written(None) == shop.written(None, "stderr") == b""


@every_lane
def test_what_sh_shows_is_its_calls(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    calls = [shop.make("through_shell", f"word{number}") for number in range(8)]
    shop.assign(worker, *calls)
    for number, call in enumerate(calls):
        assert shop.value(call) == f"word{number}\nend\n"
        assert shop.written(call) == f"word{number}\nend\n".encode()
        assert shop.written(call, "stderr") == b"oops\n"


@every_lane
def test_what_is_written_below_python_is_the_workers(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    call = shop.start(worker, "by_subprocess", "hello")
    shop.value(call)
    shop.until(lambda: shop.written(None) and shop.written(None, "stderr"))
    assert (shop.written(None), shop.written(None, "stderr")) == (b"hello\n", b"written below\n")
    assert shop.written(call) == b""


@every_lane
def test_a_thousand_calls_that_print_at_once_tear_no_line(open_in: Open, lane: str) -> None:
    shop, worker = open_in(
        lane,
        """
        @task
        RUN chatter(x):
            for line in range(20):
                print(x, line, "x" * 50)
                PAUSE(0)
        """,
    )
    calls = [shop.make("chatter", number) for number in range(1000)]
    shop.assign(worker, *calls)
    for call in calls:
        shop.report(call)
    for number, call in enumerate(calls):
        lines = [f"{number} {line} {'x' * 50}\n" for line in range(20)]
        assert shop.written(call) == "".join(lines).encode()


# -- interrupts -----------------------------------------------------------------------


@every_lane
def test_an_interrupt_ends_one_call_and_no_other(open_in: Open, lane: str, tmp_path: Path) -> None:
    shop, worker = open_in(lane)
    others = [shop.start(worker, "nap", 1) for _ in range(5)]
    call = shop.start(worker, "touch_and_nap", str(tmp_path / "begun"), 60)
    shop.until((tmp_path / "begun").exists)
    started = time.monotonic()
    interrupt(shop, worker, call)
    assert cancelled(shop, call)
    assert time.monotonic() - started < GRACE
    assert [shop.value(other) for other in others] == [1] * 5
    if lane == "thread":
        assert shop.await_event(m.Retiring).worker == worker
    else:
        assert not shop.all(m.Retiring)
        assert shop.do(worker, "add", 1, 1) == 2


@every_lane
def test_an_interrupt_that_comes_with_its_call_ends_it(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    calls = [shop.make("nap", 60) for _ in range(20)]
    shop.assign(worker, *calls)
    for call in calls:
        interrupt(shop, worker, call)
    assert all(cancelled(shop, call) for call in calls)


@every_lane
def test_a_cancelled_call_ends_its_command(open_in: Open, lane: str, tmp_path: Path) -> None:
    shop, worker = open_in(lane)
    call = shop.start(worker, "long_command", str(tmp_path / "pid"))
    shop.until((tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text())
    interrupt(shop, worker, call)
    assert cancelled(shop, call)
    assert gone(pid)


SWALLOW = {
    "thread": "while True: time.sleep(0.05)",
    "async": """while True:
        with contextlib.suppress(asyncio.CancelledError): await asyncio.sleep(60)""",
    "green": """while True:
        with contextlib.suppress(BaseException): time.sleep(60)""",
}


@every_lane
def test_a_call_that_does_not_end_is_given_up_and_its_worker_with_it(
    open_in: Open, lane: str, tmp_path: Path
) -> None:
    source = f"@task\nRUN swallow(x):\n    open(x, 'w').close()\n    {SWALLOW[lane]}\n"
    shop, worker = open_in(lane, source)
    call = shop.start(worker, "swallow", str(tmp_path / "begun"))
    other = shop.start(worker, "nap", 2)
    shop.until((tmp_path / "begun").exists)
    interrupt(shop, worker, call)
    assert cancelled(shop, call)
    assert shop.await_event(m.Retiring).worker == worker
    late = shop.start(worker, "add", 1, 2)
    assert (late.id, 1) in shop.await_event(m.GaveBack).calls
    assert shop.value(other) == 2
    stop(shop, worker)


def test_a_thread_that_ends_late_reports_nothing(open_in: Open, tmp_path: Path) -> None:
    shop, worker = open_in("thread", LATE)
    call = shop.start(worker, "returns_late", str(tmp_path / "ended"), 0.5)
    interrupt(shop, worker, call)
    assert cancelled(shop, call)
    shop.until((tmp_path / "ended").exists)
    assert shop.do(shop.workers(1, "thread")[0], "add", 1, 2) == 3
    assert len(shop.reports) == 2  # each once: the workshop would have noticed
    assert shop.written(call) == b""


# -- a call that lets no other run ------------------------------------------------------


HOG = {
    "async": "time.sleep(x)",
    "green": "end = time.monotonic() + x\n    while time.monotonic() < end: sum(range(1000))",
}


@pytest.mark.parametrize("lane", LANES[1:])
def test_a_call_that_lets_no_other_run_is_named_once_with_its_stack(
    open_in: Open, lane: str
) -> None:
    shop, worker = open_in(lane, f"@task\nRUN hog(x):\n    {HOG[lane]}\n    return x\n")
    other = shop.start(worker, "nap", 0.1)
    call = shop.start(worker, "hog", 4.0, index=7)
    shop.until(lambda: shop.watcher.notices)
    assert not shop.reports.get((call.id, 1))
    (notice,) = shop.watcher.notices
    assert notice.startswith("hog[7] lets no other call of w1 run, for 1.")
    assert "in hog" in notice and "asyncio" not in notice and "gevent" not in notice, notice
    assert shop.value(call) == 4.0 and shop.value(other) == 0.1
    assert len(shop.watcher.notices) == 1


def test_a_coroutine_beside_the_call_that_blocks_is_attributed_to_it(open_in: Open) -> None:
    shop, worker = open_in(
        "async",
        """
        async def blocking(): time.sleep(3)

        @task
        async def gathers(): await asyncio.gather(asyncio.sleep(1), blocking())
        """,
    )
    shop.start(worker, "nap", 4)
    call = shop.start(worker, "gathers", names=(), index=3)
    shop.value(call)
    (notice,) = shop.watcher.notices
    assert notice.startswith("gathers[3] lets no other call") and "in blocking" in notice


def test_a_worker_of_many_calls_may_answer_just_while_it_is_asked_once_more() -> None:
    class Worker:
        """Its calls go on when what they owe is sent for the other thread's sake."""

        def __init__(self) -> None:
            self.outbox, self.posted, self.reports = self, [], 0

        def post(self, callback: Callable[[], None]) -> None:
            self.posted.append(callback)

        def flush(self) -> None:
            self.posted.pop()()

        def report(self, count: int | None) -> None:
            self.reports += 1

    worker: Any = Worker()
    control = LaneControl(worker, -1)
    for _ in range(3):
        control._report(None)
    assert worker.reports == 1 and len(worker.posted) == 1


@pytest.mark.parametrize("lane", LANES[1:])
def test_a_worker_that_cannot_even_be_interrupted_is_killed(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane, f"@task\nRUN hog(x):\n    {HOG[lane]}\n")
    others = [shop.start(worker, "nap", 60) for _ in range(3)]
    call = shop.start(worker, "hog", 60)
    shop.until(lambda: shop.watcher.notices)
    interrupt(shop, worker, call)
    lost = shop.await_event(m.WorkerLost)
    assert lost.executing is None
    assert "let no other run" in lost.reason
    assert len(shop.reports) == 0 and len(others) == 3
    assert gone(shop.pid(worker))


# -- ends -----------------------------------------------------------------------------


@every_lane
def test_a_worker_killed_with_thousands_of_calls_loses_those_and_no_ended_one(
    open_in: Open, lane: str
) -> None:
    shop, worker = open_in(lane)
    quick = [shop.make("add", number, 0) for number in range(500)]
    slow = [shop.make("nap", 60) for _ in range(5000 if lane != "thread" else 20)]
    shop.assign(worker, *quick, *slow)
    for call in quick:
        shop.report(call)
    os.kill(shop.pid(worker), signal.SIGKILL)
    lost = shop.await_event(m.WorkerLost)
    assert lost.worker == worker and lost.executing is None
    assert lost.reason == f"killed by SIGKILL, with {len(slow)} calls in it"
    assert len(shop.reports) == 500


@every_lane
def test_outcomes_told_just_before_a_kill_are_not_lost(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    for _ in range(5):
        calls = [shop.make("add", number, 0) for number in range(300)]
        killer = shop.make("die", 0)
        shop.assign(worker, *calls, killer)
        lost = shop.await_event(m.WorkerLost, len(shop.all(m.WorkerLost)) + 1)
        assert lost.executing is None
        known = sum((call.id, 1) in shop.reports for call in calls)
        assert known == 300 or lane == "thread", known
        (worker,) = shop.workers(1, lane)


@every_lane
def test_a_worker_ends_when_it_is_told_to_and_its_calls_have_ended(
    open_in: Open, lane: str
) -> None:
    shop, worker = open_in(lane)
    call = shop.start(worker, "nap", 0.5)
    stop(shop, worker)
    assert shop.value(call) == 0.5
    assert not shop.all(m.WorkerLost)


@every_lane
def test_an_idle_worker_uses_no_cpu(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane)
    shop.do(worker, "nap", 0.05)
    process = psutil.Process(shop.pid(worker))
    before = process.cpu_times(), process.num_ctx_switches()
    deadline = time.monotonic() + 2
    shop.until(lambda: time.monotonic() > deadline)
    after = process.cpu_times(), process.num_ctx_switches()
    assert after[0].user + after[0].system == before[0].user + before[0].system
    assert after[1].voluntary - before[1].voluntary <= 1


def test_a_task_is_known_whole_to_every_thread_whichever_looks_it_up_first() -> None:
    looking, go_on = threading.Event(), threading.Event()

    class Slow:
        def __call__(self, x: int) -> int:
            return x

        @property
        def __signature__(self) -> inspect.Signature:
            looking.set()
            assert go_on.wait(20)
            return inspect.signature(lambda x: x)

    slow = Task(Slow(), Options("slow"), {})
    home: Any = SimpleNamespace(find=lambda reference, blob: slow)
    known = Known((m.TASK, 1, "slow", b"", b"", ("x",), {}, 0), home)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(lambda: known.task)
        assert looking.wait(20)
        second = threads.submit(lambda: known.task and known.arguments((5,), lambda make: None))
        wait([second], 0.1)  # it is done at once where it does not wait for the first
        go_on.set()
        assert first.result(20) is slow and second.result(20) == ([5], {})


# -- generators -----------------------------------------------------------------------


COUNT = """
@task
RUN count(x, y):
    for number in range(x):
        yield number
        PAUSE(y)
"""


def streamed(shop: Workshop, call: Any) -> list[Any]:
    """All the items of a call, in order: those that came ahead, then the report's."""
    report = shop.report(call)
    items: list[Any] = []
    for event in shop.all(m.Yielded):
        if event.call == call.id:
            assert event.first == len(items)
            items += event.items
    return [decode(item) for item in items + (report.items or [])]


@pytest.mark.parametrize("lane", ["process", *LANES])
def test_items_come_while_the_generator_runs(open_in: Open, lane: str) -> None:
    shop, worker = open_in("thread" if lane == "process" else lane, COUNT)
    if lane == "process":
        (worker,) = shop.workers()
    call = shop.start(worker, "count", 3, 0.5, flags=m.WANT_ITEMS)
    first = shop.await_event(m.Yielded)
    assert (first.call, first.first, first.items) == (call.id, 0, [0])
    assert (call.id, 1) not in shop.reports
    assert shop.value(call) == [0, 1, 2]
    assert streamed(shop, call) == [0, 1, 2]


@every_lane
def test_an_item_that_follows_another_closely_does_not_wait_for_the_next(
    open_in: Open, lane: str
) -> None:
    shop, worker = open_in(
        lane,
        """
        @task
        RUN pair():
            yield "one"
            yield "two"
            PAUSE(30)
        """,
    )
    call = shop.start(worker, "pair", names=(), flags=m.WANT_ITEMS)
    shop.until(lambda: sum(len(event.items) for event in shop.all(m.Yielded)) == 2)
    interrupt(shop, worker, call)
    assert cancelled(shop, call)


@every_lane
def test_many_items_come_in_few_events(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane, COUNT.replace("    PAUSE(y)\n", "").replace(
        "number in range(x):", "number in range(x):  # no pause"))  # fmt: skip
    call = shop.start(worker, "count", 20_000, 0, flags=m.WANT_ITEMS | m.DROP_VALUE)
    assert streamed(shop, call) == list(range(20_000))
    assert shop.report(call).payload is None
    assert len(shop.all(m.Yielded)) < 200
    unwanted = shop.start(worker, "count", 3, 0)
    assert shop.value(unwanted) == [0, 1, 2] and shop.report(unwanted).items is None


@pytest.mark.parametrize("lane", ["process", *LANES])
def test_what_a_generator_yields_before_it_fails_comes_with_the_failure(
    open_in: Open, lane: str
) -> None:
    source = """
        @task
        RUN count(x):
            for number in range(x): yield number
            raise {}
        """
    shop, worker = open_in(
        "thread" if lane == "process" else lane,
        source.format("ValueError")
        + source.replace("count", "skips").format("Skip")
        + source.replace("count", "again").format("Retry"),
    )
    if lane == "process":
        (worker,) = shop.workers()
    for name in ("count", "skips", "again"):
        call = shop.start(worker, name, 3, names=("x",), flags=m.WANT_ITEMS)
        assert streamed(shop, call) == [0, 1, 2]


@every_lane
def test_an_item_that_cannot_travel_fails_its_generator(open_in: Open, lane: str) -> None:
    shop, worker = open_in(lane, "@task\nRUN locks():\n    yield threading.Lock()\n")
    error = shop.error(shop.start(worker, "locks", names=(), flags=m.WANT_ITEMS))
    assert isinstance(error, errors.ResultError)
    assert str(error).startswith("locks yielded what cannot travel")


# -- submitted calls ------------------------------------------------------------------


def test_what_is_submitted_in_a_coroutine_is_awaited(open_in: Open) -> None:
    shop, worker = open_in(
        "async",
        """
        @task
        async def sums(x):
            futures = [add.submit(number, 1) for number in range(x)]
            return sum(await asyncio.gather(*futures))
        """,
    )
    parents = [shop.start(worker, "sums", 3) for _ in range(10)]
    answer_waits(shop, worker)
    assert [shop.value(parent) for parent in parents] == [6 * 1] * 10


@pytest.mark.parametrize("lane", [LANES[0], LANES[2]])
def test_a_thread_or_greenlet_waits_for_what_it_submitted(open_in: Open, lane: str) -> None:
    shop, worker = open_in(
        lane,
        """
        @task
        def sums(x):
            futures = [add.submit(number, 1) for number in range(x)]
            return sum(future.result(timeout=20) for future in as_completed(futures))

        @task
        def impatient():
            try:
                add.submit(1, 2).result(timeout=0.2)
            except TimeoutError:
                return "time is up"
        """,
    )
    parents = [shop.start(worker, "sums", 3) for _ in range(10)]
    answer_waits(shop, worker)
    assert [shop.value(parent) for parent in parents] == [6] * 10
    shop.on_event = lambda event: None
    assert shop.do(worker, "impatient", names=()) == "time is up"


@pytest.mark.parametrize("lane", ["process", *LANES])
def test_what_is_submitted_is_known_while_the_call_goes_on(
    open_in: Open, lane: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pool, "LONG", 600.0)  # nobody asks
    shop, worker = open_in(
        lane,
        """
        @task
        RUN submits(x):
            for number in range(20):
                add.submit(number, 1)
            while not os.path.exists(x): PAUSE(0.01)
        """,
    )
    go_on = tmp_path / "go on"
    call = shop.start(worker, "submits", str(go_on))
    shop.until(lambda: sum(len(event.calls) for event in shop.all(m.Submitted)) == 20)
    assert not shop.reports
    go_on.touch()
    shop.value(call)


def answer_waits(shop: Workshop, worker: int) -> None:
    """Be the core: every awaited ``add`` gives its first argument plus one."""
    values: dict[tuple[int, bytes], Any] = {}

    def on_event(event: m.Event) -> None:
        if isinstance(event, m.Submitted):
            for key, _, blob, _ in event.calls:
                values[event.parent, key] = sum(__import__("pickle").loads(blob)[0])
        elif isinstance(event, m.Waiting):
            outcomes = {key: values[event.call, key] for key in event.keys}
            shop.reactor.call_soon(
                lambda: shop.engine.perform(m.Deliver(worker, outcomes, event.call))
            )

    shop.on_event = on_event


# -- green ----------------------------------------------------------------------------


@pytest.mark.parametrize("lane", [LANES[2]])
def test_a_green_worker_is_patched_before_the_task_file_is_imported(
    open_in: Open, lane: str
) -> None:
    shop, worker = open_in(
        lane,
        """
        import socket
        from greenlet import greenlet, getcurrent
        there = socket.socket.__module__, time.sleep.__module__

        @task
        def patched(): return there, threading.current_thread().name

        @task
        def switches():
            heard = []
            def one():
                print("in a plain greenlet of", current().call)
                heard.append(1)
                second.switch()
                heard.append(3)
            def two():
                heard.append(2)
                first.switch()
            first, second = greenlet(one), greenlet(two)
            first.switch()
            return heard
        """,
    )
    (modules, _) = shop.do(worker, "patched", names=())
    assert all(module.startswith("gevent") for module in modules)
    call = shop.start(worker, "switches", names=())
    assert shop.value(call) == [1, 2, 3]
    assert shop.written(call) == f"in a plain greenlet of switches[{call.id}]\n".encode()
