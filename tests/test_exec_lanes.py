"""Lanes, end to end: calls that wait share a worker, and keep all the promises."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Runs, started, wait_until

pytestmark = pytest.mark.timeout(120)

needs_gevent = pytest.mark.skipif(
    not importlib.util.find_spec("gevent"), reason="gevent is not installed"
)
LANES = ["thread", "async", pytest.param("green", marks=needs_gevent)]
every_lane = pytest.mark.parametrize("lane", LANES)

HEAD = """
import asyncio
"""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


def in_lane(source: str, lane: str) -> str:
    """``source`` with RUN, PAUSE and LANE in this lane's words."""
    words = ("async def", "await asyncio.sleep") if lane == "async" else ("def", "time.sleep")
    source = source.replace("RUN", words[0]).replace("PAUSE", words[1])
    return HEAD + source.replace("LANE", repr(lane))


@every_lane
def test_what_is_written_after_a_calls_end_is_the_workers(runs: Runs, lane: str) -> None:
    source = in_lane(
        """
import threading

def later():
    while not os.path.exists("ended"): time.sleep(0.01)
    print("late, but whole", flush=True)
    mark("written")

@task(lane=LANE)
RUN leaves():
    threading.Thread(target=later, daemon=True).start()

@task(after=[leaves])
def waits():
    mark("ended")
    while not os.path.exists("written"): time.sleep(0.01)
""",
        lane,
    )
    assert runs.exec(source, "-j1").check().out == "w1 | late, but whole\n"
    for name in ("ended", "written"):
        (runs.folder / name).unlink()
    events = runs.exec(source, "-j1", "--json").check().out
    assert '"id":null,"worker":"w1","stream":"stdout"' in events


@every_lane
def test_what_threads_print_is_of_the_call_they_work_for(runs: Runs, lane: str) -> None:
    source = in_lane(
        """
from concurrent.futures import ThreadPoolExecutor

everybodys = ThreadPoolExecutor(1)

def says(what): print(what, "of", current().call, flush=True)

@task(lane=LANE)
RUN works(n=each(range(3))):
    thread = threading.Thread(target=says, args=["a thread"])
    thread.start()
    done = everybodys.submit(says, "a shared pool")
    while thread.is_alive() or not done.done(): PAUSE(0.01)
    with open("met", "a") as file: file.write("x")
    while len(open("met").read()) < 3: PAUSE(0.01)
""",
        lane,
    )
    out = runs.exec(source, "-j1").check().out.splitlines()
    lines = [(f"works[{n}]", what) for n in range(3) for what in ("a shared pool", "a thread")]
    assert sorted(out) == [f"{call} | {what} of {call}" for call, what in lines]


THREADS = """
from concurrent.futures import ThreadPoolExecutor

everybodys = ThreadPoolExecutor(1)

@task(default=False)
def double(x): return 2 * x, os.getpid()

def asks(found, x):
    current().progress(x, 3)
    print("a line of a thread")
    found.append((current().call, double.submit(x)))

@task(lane="process")
def works(n=each(range(3))):
    found = []
    thread = threading.Thread(target=asks, args=(found, n))
    thread.start()
    thread.join()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(asks, [found] * 2, [n, n]))
    everybodys.submit(asks, found, n).result()
    assert [call for call, _ in found] == [current().call] * 4, found
    return [future.result() for _, future in as_completed_of(found)]

def as_completed_of(found):
    assert {future for _, future in found} == set(as_completed([one for _, one in found]))
    return found

@task(lane="process")
async def awaits():
    found = []
    for n in range(3):
        await asyncio.to_thread(asks, found, n)
    assert [call for call, _ in found] == ["awaits"] * 3, found
    return [await future for _, future in found]

@task
def total(one=result(works), other=result(awaits)):
    values = sum(([value for value, _ in some] for some in [*one, other]), [])
    assert values == [0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 0, 2, 4], values
"""


@pytest.mark.parametrize("how", ["-j1", "-j3", "--inline"])
def test_threads_of_a_call_that_has_its_process_for_itself_are_the_calls(
    runs: Runs, how: str
) -> None:
    done = runs.exec(HEAD + THREADS, how).check()
    counts = Counter(done.out.splitlines())
    lines = [f"works[{n}] | a line of a thread" for n in range(3)]
    if how == "-j3":
        expected = {**dict.fromkeys(lines, 4), "awaits | a line of a thread": 3}
        assert counts == expected
    assert counts.total() == 15
    assert re.search(r"^double +15 ok", done.err, re.M)


WAITS = """
@task(default=False)
def child(x):
    time.sleep(x)
    return x

def waits(x, seconds=None):
    try: return child.submit(x).result(seconds)
    except TimeoutError: return "late"

def all_of(xs): return {one.result() for one in as_completed([child.submit(x) for x in xs])}

MOST = [(all_of, (0.4, 0.1)), (waits, 0.6), (waits, 0.2), (waits, 2, 0.1), (waits, 0.3, 9)]
FOUND = [{0.4, 0.1}, 0.6, 0.2, "late", 0.3]
"""
BY_THREADS = """
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(9) as pool:
        found = [one.result() for one in [pool.submit(*one) for one in MOST]]
    assert found == FOUND, found
"""
HOW_THEY_WAIT = {
    "thread": "@task(lane='thread')\ndef parent(n=each(range(3))):" + BY_THREADS,
    "green": "@task(lane='green')\ndef parent(n=each(range(3))):" + BY_THREADS,
    "async": """
@task
async def parent(n=each(range(3))):
    async def awaits(x): return await child.submit(x)
    threads = [asyncio.to_thread(*one) for one in MOST]
    found = await asyncio.gather(awaits(0.5), *threads, awaits(0.25))
    assert found == [0.5, *FOUND, 0.25], found
""",
}


@every_lane
def test_several_threads_of_a_call_wait_for_calls_at_once(runs: Runs, lane: str) -> None:
    done = runs.exec(HEAD + WAITS + HOW_THEY_WAIT[lane], "-j9")
    assert done.status == 0, done.err


AWAITED = """
@task(default=False)
def child(name):
    mark(name)
    while not os.path.exists("over"): time.sleep(0.01)
    return name

async def begun(name):
    await asyncio.sleep(0.01)  # so has the task that awaits it
    while not os.path.exists(name): await asyncio.sleep(0.01)

@task(lane=LANE, timeout=60)
async def parent():
    async def gives_up(future, name):
        waits = asyncio.create_task(asyncio.wait_for(future, 60))
        await begun(name)
        waits.cancel()
        await asyncio.wait([waits])

    async def awaits(future): return await future

    left, group = child.submit("left"), child.submit("group")
    shielded, shared, passed = [child.submit(name) for name in ("shielded", "shared", "passed")]
    other = asyncio.create_task(awaits(shared))
    taker = same.submit(passed)
    await gives_up(left, "left")
    await gives_up(asyncio.shield(shielded), "shielded")
    await gives_up(shared, "shared")
    await gives_up(passed, "passed")
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(awaits(group))
            await begun("group")
            raise ValueError
    except* ValueError: pass
    cancelled = await asyncio.gather(left, group, return_exceptions=True)
    assert [type(error).__name__ for error in cancelled] == ["CallCancelled"] * 2, cancelled
    mark("over")
    assert await asyncio.gather(shielded, other, taker) == ["shielded", "shared", "passed"]

@task(default=False)
def same(x): return x
"""


@pytest.mark.parametrize("lane", ["async", "process"])
def test_a_submitted_call_is_cancelled_with_all_that_awaits_it(runs: Runs, lane: str) -> None:
    done = runs.exec(in_lane(AWAITED, lane), "-j9")
    assert done.status == 0, done.err
    assert re.search(r"^child +3 ok, 2 cancelled", done.err, re.M)


@pytest.mark.parametrize("lane", ["async", "process"])
def test_what_an_attempt_awaited_at_its_end_is_taken_over_by_the_next(
    runs: Runs, lane: str
) -> None:
    source = """
@task(default=False)
def child(name):
    with open(name, "a") as file: file.write("x")
    while not os.path.exists("over"): time.sleep(0.01)

@task(lane=LANE, timeout=3, retries=1)
async def is_late():
    if current().attempt == 2: mark("over")
    await child.submit("first")

@task(lane=LANE, retries=1)
async def fails():
    left = asyncio.create_task(awaits(child.submit("second")))
    while not os.path.exists("second"): await asyncio.sleep(0.01)
    if current().attempt == 1: raise ValueError
    while not os.path.exists("over"): await asyncio.sleep(0.01)
    await left

async def awaits(future): return await future
"""
    runs.exec(in_lane(source, lane), "-j9").check()
    assert [(runs.folder / name).read_text() for name in ("first", "second")] == ["x", "x"]


def test_outcomes_that_come_while_they_are_asked_for_are_found(runs: Runs) -> None:
    source = """
@task(default=False)
def same(x): return x

@task(lane="thread")
def asks():
    futures = [same.submit(number) for number in range(20_000)]
    found = [future.result() for future in as_completed(futures)]
    assert sorted(found) == list(range(20_000)), len(found)
"""
    for _ in range(3):
        runs.exec(source, "-j2", "--output", "quiet").check()


@pytest.mark.parametrize("how", ["-j1", "--inline"])
def test_a_thread_that_outlives_its_call_belongs_to_no_other(runs: Runs, how: str) -> None:
    source = """
@task(default=False)
def child(): ...

def later():
    while not os.path.exists("ended"): time.sleep(0.01)
    try: child.submit()
    except RuntimeError as error: print(error, flush=True)
    print("call", repr(current().call), flush=True)
    mark("said")

@task
def leaves(): threading.Thread(target=later, daemon=True).start()

@task(after=[leaves])
def other():
    mark("ended")
    while not os.path.exists("said"): time.sleep(0.01)
"""
    out = runs.exec(source, how).check().out.replace("other | ", "").splitlines()
    assert out[0].startswith("submit() works inside a call only, while it lasts")
    assert out[1:] == ["call ''"]


def test_a_thread_of_a_process_is_told_where_calls_are_waited_for(runs: Runs) -> None:
    source = """
@task(default=False)
def child(): ...

def waits(): child.submit().result()

@task
def parent():
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool: pool.submit(waits).result()
"""
    done = runs.exec(source, "-j2")
    assert done.status == 1
    assert "a call is waited for in the thread that the task runs in" in done.err


@needs_gevent
def test_what_greenlets_print_is_of_the_call_that_spawned_them(runs: Runs) -> None:
    source = """
@task(lane="green")
def works(n=each(range(3))):
    import gevent
    gevent.spawn(lambda: gevent.spawn(lambda: print("of", current().call)).join()).join()
"""
    out = runs.exec(source, "-j1").check().out.splitlines()
    assert sorted(out) == [f"works[{n}] | of works[{n}]" for n in range(3)]


BACKGROUND = {
    "async": "asyncio.create_task(ticks(name))",
    "green": "gevent.spawn(ticks, name)",
}


@pytest.mark.parametrize("lane", ["async", pytest.param("green", marks=needs_gevent)])
def test_what_a_call_leaves_behind_ends_with_it(runs: Runs, lane: str) -> None:
    source = in_lane(
        f"""
if LANE == "green": import gevent

RUN ticks(name):
    count = state.counter(name)
    while True:
        count.add(1)
        PAUSE(0.01)

def start(name): {BACKGROUND[lane]}

def make(): start("everybody's")

@task(lane=LANE)
RUN leaves(shared=per_worker(make)):
    start("its own")
    while state.counter("its own").get() < 4: PAUSE(0.01)

@task(lane=LANE, after=[leaves])
RUN after():
    before = [state.counter(name).get() for name in ("its own", "everybody's")]
    while state.counter("everybody's").get() < before[1] + 4: PAUSE(0.01)
    print("goes on:", state.counter("its own").get() - before[0])
""",
        lane,
    )
    assert runs.exec(source, "-j1", "--output", "raw").check().out == "goes on: 0\n"


# -- all together ---------------------------------------------------------------------


@needs_gevent
def test_one_file_uses_all_lanes_and_items_go_on_as_they_come(runs: Runs) -> None:
    source = """
import asyncio

@task
def numbers():
    for number in range(4):
        yield number
        time.sleep(0.4)
    mark("all are there")

@task
async def waits(n=each(numbers)):
    await asyncio.sleep(0.01)
    if n == 0: mark("first", str(os.path.exists("all are there")))
    await sh_async("echo through sh")
    return n * 10

@task(lane="thread")
def threaded(n=each(waits)): return n + 1

@task(lane="green")
def greened(n=each(threaded)):
    time.sleep(0.01)
    return n + 1, current().worker

@task
def total(found=result(greened)): print([n for n, _ in found], len({w for _, w in found}))
"""
    ended = runs.exec(source, "-j2", "--output", "raw").check()
    assert "[2, 12, 22, 32] 1" in ended.out
    assert (runs.folder / "first").read_text() == "False"
    assert ended.out.count("through sh\n") == 4


@every_lane
def test_calls_submit_others_of_every_lane_and_wait_for_them(runs: Runs, lane: str) -> None:
    wait = "await asyncio.gather(*futures)" if lane == "async" else "[f.result() for f in futures]"
    source = in_lane(
        f"""
@task
def square(n): return n * n

@task
async def double(n): return 2 * n

@task(lane="thread", default=False)
def negative(n): return -n

@task(lane=LANE)
RUN parent(n=each(range(20))):
    futures = [one.submit(n) for one in (square, double, negative)]
    return sum({wait})

@task
def total(found=result(parent)): print("total", sum(found))
""",
        lane,
    )
    ended = runs.exec(source, "-j2", "--output", "raw").check()
    assert f"total {sum(n * n + n for n in range(20))}" in ended.out


@every_lane
def test_state_is_shared_and_what_a_call_holds_is_its_own(runs: Runs, lane: str) -> None:
    locked = "async with" if lane == "async" else "with"
    get = "await queue.get_async()" if lane == "async" else "queue.get()"
    source = in_lane(
        f"""
count, inside, queue = state.counter("count"), state.counter("inside"), state.queue("queue")

@task(lane=LANE)
RUN add(n=each(range(100))):
    count.add(1)
    {locked} state.lock("one at a time"):
        assert inside.add(1) == 1
        PAUSE(0.001)
        inside.add(-1)

@task(lane=LANE)
RUN take(n=each(range(20))): return {get}

@task
def put():
    time.sleep(0.3)
    for n in range(20): queue.put(n)

@task
def total(added=result(add), taken=result(take)): print("found", count.get(), sum(taken))
""",
        lane,
    )
    assert "found 100 190" in runs.exec(source, "-j2", "--output", "raw").check().out


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc/self/fd")
@every_lane
def test_calls_that_use_state_share_few_connections(runs: Runs, lane: str) -> None:
    source = in_lane(
        """
count, found = state.counter("count"), state.dict("found")

@task(lane=LANE)
RUN add(n=each(range(2000))):
    PAUSE(0.05)
    count.add(1)
    found[n] = n * n
    return len(os.listdir("/proc/self/fd")) if n % 50 == 0 else 0

@task
def total(files=result(add)):
    print("found", count.get(), sum(found.values()), max(files) < 40, max(files))
""",
        lane,
    )
    ended = runs.exec(source, "-j2", "--output", "raw").check()
    assert f"found 2000 {sum(n * n for n in range(2000))} True" in ended.out, ended.out


@every_lane
def test_calls_that_wait_keep_no_others_from_using_state(runs: Runs, lane: str) -> None:
    get = "await queue.get_async()" if lane == "async" else "queue.get()"
    source = in_lane(
        f"""
queue, big = state.queue("queue"), state.dict("big")

@task(lane=LANE)
RUN take(n=each(range(30))): return {get}

@task(lane=LANE)
RUN put(n=each([0])):
    big.update((n, n) for n in range(2500))  # more than one page
    pages = iter(big)
    for n in range(30):
        next(pages)
        queue.put(n)
    return sum(big) == sum(pages) + sum(range(30))

@task
def total(taken=result(take), same=result(put)): print("found", sum(taken), same)
""",
        lane,
    )
    assert "found 435 [True]" in runs.exec(source, "-j2", "--output", "raw").check().out


@every_lane
def test_so_many_workers_as_lane_jobs_says(runs: Runs, lane: str) -> None:
    source = in_lane(
        """
@task(lane=LANE)
RUN warm_up(n=each(range(60))): PAUSE(1)  # until all workers are there

@task(lane=LANE, after=[warm_up])
RUN who(n=each(range(60))):
    PAUSE(0.5)
    return os.getpid()

@task
def total(pids=result(who)): print("workers", len(set(pids)))
""",
        lane,
    )
    words = "-j1", "--output", "raw"
    if lane == "thread":
        variables = {"TASKRUN_LANE_JOBS": f"{lane}=2"}
        assert "workers 2\n" in runs.exec(source, *words, env=variables).check().out
    else:
        assert "workers 2\n" in runs.exec(source, *words, "--lane-jobs", f"{lane}=2").check().out
    assert "workers 1\n" in runs.exec(source.replace("PAUSE(1)", "PAUSE(0.1)"), *words).check().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("asinc=2", "there is no lane 'asinc'; did you mean async?"),
        ("async", "--lane-jobs takes LANE=N, such as async=2, not 'async'"),
        ("async=0", "--lane-jobs takes LANE=N"),
        ("process=2", "how many processes there are is said by -j"),
    ],
)
def test_lane_jobs_that_cannot_be_are_refused(runs: Runs, text: str, says: str) -> None:
    assert says in runs.exec("@task\ndef x(): 1\n", "--lane-jobs", text).check(2).err


@every_lane
def test_inline_runs_the_calls_of_a_lane_one_after_the_other(runs: Runs, lane: str) -> None:
    source = in_lane("@task(lane=LANE)\nRUN pid(n=each(range(3))): print(n, os.getpid())\n", lane)
    ended = runs.exec(source, "--inline", "--output", "raw").check()
    said = [line.split() for line in ended.out.splitlines()]
    assert [n for n, _ in said] == ["0", "1", "2"] and len({pid for _, pid in said}) == 1


# -- ends -----------------------------------------------------------------------------


@every_lane
def test_a_timeout_ends_the_calls_that_take_too_long_and_no_others(runs: Runs, lane: str) -> None:
    source = in_lane(
        """
@task(lane=LANE, timeout=1)
RUN naps(n=each([0.1, 60, 0.2, 60])):
    PAUSE(n)

@task(lane=LANE, timeout=1, retries=1)
RUN second_time(n=each(range(3))):
    PAUSE(60 if current().attempt == 1 else 0)
""",
        lane,
    )
    ended = runs.json(source, "-j2", "-k").check(1)
    assert ended.seconds < 15
    assert [ended.states[f"naps[{n}]"] for n in range(4)] == ["ok", "failed", "ok", "failed"]
    assert ended.failure("naps[1]")["kind"] == "timeout"
    assert {ended.states[f"second_time[{n}]"] for n in range(3)} == {"ok"}


LOST = """
SOME = 4999 if LANE != "thread" else 15

@task(lane=LANE, retries=1)
RUN often(n=each(range(SOME))):
    state.counter("begun").add(1)
    if current().attempt == 1: PAUSE(60)
    with open("ended", "a") as file: file.write(f"{n}\\n")

@task(lane=LANE)
RUN once(n=each(range(SOME))):
    state.counter("begun").add(1)
    PAUSE(60)

@task
def killer():
    import glob
    while state.counter("begun").get() < 2 * SOME or not os.path.exists("pid"): time.sleep(0.05)
    os.kill(int(open("pid").read()), signal.SIGKILL)

@task(lane=LANE, priority=1)
RUN pid():
    mark("pid.part", str(os.getpid()))
    os.rename("pid.part", "pid")
"""


@every_lane
def test_every_call_of_a_killed_worker_has_an_outcome_and_none_runs_twice(
    runs: Runs, lane: str
) -> None:
    source = in_lane(LOST, lane)
    many = 4999 if lane != "thread" else 15  # a worker has room for twice as many
    ended = runs.json(source, "-j1", "-k", deadline=60).check(1)
    calls = ended.calls  # made anew at each look
    states = Counter((name.partition("[")[0], event["state"]) for name, event in calls.items())
    lines = (runs.folder / "ended").read_text().split()
    assert states["often", "ok"] == many == len(set(lines)) == len(lines)
    assert states["once", "failed"] == many
    failures = [event["failure"] for name, event in calls.items() if name.startswith("once[")]
    assert {failure["kind"] for failure in failures} == {"lost"}


@every_lane
def test_ctrl_c_ends_thousands_of_calls_and_leaves_nothing(runs: Runs, lane: str) -> None:
    source = in_lane(
        """
@task(lane=LANE)
RUN nap(n=each(range(2000))):
    if n == 20: mark("begun")
    PAUSE(60)

@task(always=True, lane=LANE)
RUN clean(n=result(nap)): mark("cleaned")
""",
        lane,
    )
    running = runs.start_exec(source, "-j2", "--output", "raw")
    running.await_file(runs.folder / "begun")
    running.signal(signal.SIGINT)
    ended = running.end()
    assert ended.status == 130, ended.err
    assert (runs.folder / "cleaned").exists()


@every_lane
def test_nothing_is_left_when_the_coordinator_is_killed(runs: Runs, lane: str) -> None:
    source = in_lane(
        """
@task(lane=LANE)
RUN nap(n=each(range(20))):
    if n == 10: mark("begun")
    PAUSE(60)
""",
        lane,
    )
    running = runs.start_exec(source, "-j2")
    running.await_file(runs.folder / "begun")
    assert len(running.others()) >= 2
    running.signal(signal.SIGKILL)
    running.process.wait(10)
    running.assert_gone()


def test_a_thread_that_never_ends_holds_nobody_up(runs: Runs) -> None:
    ended = runs.json(
        """
        @task(lane="thread", timeout=0.5)
        def stuck():
            while True: time.sleep(0.1)

        @task(lane="thread", after=[])
        def others(n=each(range(100))):
            time.sleep(0.05)
            return os.getpid()
        """,
        "-k",
    ).check(1)
    assert ended.failure("stuck")["kind"] == "timeout"
    assert ended.states["others[99]"] == "ok"
    assert ended.seconds < 15


@every_lane
def test_a_generator_that_is_tried_again_delivers_each_item_once(runs: Runs, lane: str) -> None:
    source = in_lane(
        """
@task(lane=LANE, retries=1)
RUN numbers():
    for number in range(6):
        yield number
        PAUSE(0.1)
        if number == 3 and current().attempt == 1: raise OSError("again")

@task
def take(n=each(numbers)): print("took", n)
""",
        lane,
    )
    ended = runs.exec(source, "-j2", "--output", "raw").check()
    took = sorted(line for line in ended.out.splitlines() if line.startswith("took"))
    assert took == [f"took {n}" for n in range(6)]


@every_lane
def test_an_async_generator_is_closed_as_part_of_its_call(runs: Runs, lane: str) -> None:
    source = in_lane(
        """
@task(lane=LANE)
RUN numbers():
    try:
        yield lambda: 1
        yield (n for n in [])
    finally:
        PAUSE(0.01)
        print("closed")

@task
def take(n=each(numbers)): pass
""",
        lane,
    )
    ended = runs.exec(source, "-j2")
    assert ended.status == 1
    assert "numbers | closed" in ended.out


# -- forked children ------------------------------------------------------------------


@every_lane
def test_a_child_that_a_call_forks_ends_with_the_calls_code(runs: Runs, lane: str) -> None:
    source = in_lane(
        """
@task(lane=LANE)
RUN forks():
    PAUSE(0.01)
    child = os.fork()
    if not child: raise SystemExit(7)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]: PAUSE(0.01)
    print("child", os.waitstatus_to_exitcode(ended[1]))
""",
        lane,
    )
    assert runs.exec(source, "-j1", "--output", "raw").check().out == "child 7\n"


@needs_gevent
def test_the_end_of_a_child_that_is_quick_is_seen_by_who_waits_for_it(runs: Runs) -> None:
    source = """
    import gevent.monkey

    @task(lane="green")
    def forks():
        slept = gevent.monkey.get_original("time", "sleep")
        os.register_at_fork(after_in_parent=lambda: slept(0.3))  # the child has ended by then
        child = os.fork()
        if not child: os._exit(7)
        print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert runs.exec(source, "-j1", "--output", "raw").check().out == "child 7\n"


LINGERS = {"async": "await asyncio.create_task(lingers())", "green": "lingers()"}


@pytest.mark.parametrize("lane", ["async", pytest.param("green", marks=needs_gevent)])
def test_no_other_call_goes_on_in_a_child_that_a_call_forks(runs: Runs, lane: str) -> None:
    source = in_lane(
        """
@task(lane=LANE)
RUN other(n=each(range(100))):
    if n == 99: mark("all")
    while not os.path.exists("forked"): PAUSE(0.01)
    PAUSE(0.05)
    with open("done", "a") as file: file.write("once ")

RUN lingers():
    child = os.fork()
    if not child:
        mark("forked")
        PAUSE(2)
    return child

@task(lane=LANE)
RUN forks():
    while not os.path.exists("all"): PAUSE(0.01)
    child = LINGERS
    if not child: return
    while not (ended := os.waitpid(child, os.WNOHANG))[0]: PAUSE(0.01)
    return os.waitstatus_to_exitcode(ended[1])

@task(after=[other])
def count(child=result(forks)): print("child", child, "others", open("done").read().count("once"))
""".replace("LINGERS", LINGERS[lane]),
        lane,
    )
    child = 1 if lane == "async" else 0  # it has no loop; but it has a hub of its own
    ended = runs.exec(source, "-j1", "--output", "raw").check()
    assert ended.out == f"child {child} others 100\n"


# -- green ----------------------------------------------------------------------------

GREEN = """
@task(lane="green")
def fetch(): time.sleep(0.01)
"""


def test_gevent_that_is_not_installed_is_an_error_that_names_the_extra(runs: Runs) -> None:
    (runs.folder / "site").mkdir()
    (runs.folder / "site" / "sitecustomize.py").write_text(
        "import sys; sys.modules['gevent'] = None\n"
    )
    without = {"PYTHONPATH": str(runs.folder / "site")}
    for words in ((), ("--dry-run",)):
        ended = runs.exec(GREEN, *words, env=without).check(2)
        assert "fetch is in lane 'green', which needs gevent" in ended.err
        assert "pip install 'taskrun[gevent]'" in ended.err
    runs.exec(GREEN, "--inline", env=without).check()
    submits = GREEN.replace("green", "green', default=False, name='fetch").replace('"', "'")
    ended = runs.exec(submits + "\n@task\ndef go(): fetch.submit()\n", env=without)
    assert ended.status == 1
    assert "pip install 'taskrun[gevent]'" in ended.err


def test_gevent_that_cannot_be_imported_is_an_error_that_says_why(runs: Runs) -> None:
    (runs.folder / "site" / "gevent").mkdir(parents=True)
    broken = runs.folder / "site" / "gevent" / "__init__.py"
    broken.write_text("raise ImportError('libev is not there')\n")
    ended = runs.exec(GREEN, env={"PYTHONPATH": str(runs.folder / "site")}).check(3)
    assert "needs gevent, which fails: ImportError: libev is not there" in ended.err


@needs_gevent
def test_a_task_file_that_patches_by_itself_is_refused(runs: Runs) -> None:
    ended = runs.exec("from gevent import monkey; monkey.patch_all()\n" + GREEN).check(2)
    assert "gevent.monkey has patched this process, which is the wrong one" in ended.err


@needs_gevent
def test_what_is_imported_before_gevent_can_patch_it_is_said(runs: Runs) -> None:
    (runs.folder / "site").mkdir()
    (runs.folder / "site" / "sitecustomize.py").write_text("import ssl\n")
    ended = runs.exec(GREEN, env={"PYTHONPATH": str(runs.folder / "site")})
    assert ended.status == 1
    assert "lane='green' cannot patch ssl: it was imported before" in ended.err


@needs_gevent
def test_plain_blocking_clients_switch_in_the_green_lane(runs: Runs) -> None:
    source = """
import http.server, threading, urllib.request

class Server(http.server.ThreadingHTTPServer): request_queue_size = 200

class Slow(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(0.5)
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers()
        self.wfile.write(b"ok")
    def log_message(self, *_): pass

@task(lane="green")
def all_at_once():
    import gevent
    server = Server(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    futures = [fetch.submit(f"http://127.0.0.1:{server.server_port}/") for _ in range(100)]
    started = time.monotonic()
    assert [f.result() for f in futures] == [b"ok"] * 100
    print("took", time.monotonic() - started)

@task(lane="green", default=False)
def fetch(url): return urllib.request.urlopen(url, timeout=20).read()
"""
    ended = runs.exec(source, "--output", "raw").check()
    assert float(ended.out.split()[1]) < 10


@needs_gevent
def test_what_blocks_and_is_of_no_call_is_told_once(runs: Runs) -> None:
    source = """
def spin():
    end = time.monotonic() + 3.5
    while time.monotonic() < end: pass

def make():
    import gevent
    gevent.spawn_later(0.05, spin)

@task(lane="green")
def waits(made=per_worker(make)): time.sleep(0.2)
"""
    ended = runs.exec(source).check()
    assert ended.err.count("a call lets no other call of w1 run") == 1


def test_a_blocked_event_loop_is_told_in_the_run(runs: Runs) -> None:
    running = runs.start_exec(
        "@task\nasync def blocks(): time.sleep(4)\n@task\nasync def other(): pass\n"
    )
    said = running.await_line("blocks lets no other call of w1 run", err=True)
    assert said.startswith("taskrun: ")
    running.await_line("time.sleep(4)", err=True, deadline=1)
    running.end().check()


def test_the_pid_of_a_killed_worker_is_gone(runs: Runs) -> None:
    running = runs.start_exec(
        "@task(lane='thread')\ndef nap():\n    mark('pid', str(os.getpid())); doze()\n"
    )
    pid = int(running.await_file(runs.folder / "pid"))
    os.kill(pid, signal.SIGKILL)
    ended = running.end().check(1)
    assert "killed by SIGKILL\n" in ended.err
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
