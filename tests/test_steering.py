"""Looking at a live run from another terminal, and steering it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import Ended, Running, Runs, started, wait_until

from taskrun.cli import steer
from taskrun.cli.main import main

pytestmark = pytest.mark.timeout(120)

needs_gevent = pytest.mark.skipif(
    not importlib.util.find_spec("gevent"), reason="gevent is not installed"
)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


TASKS = """
@task
def work(n=each(range(6))):
    mark(f"begun{n}")
    while not os.path.exists("go on"): time.sleep(0.01)
    return n

@task
def total(all=result(work, errors="skip")): return sum(all)
"""


@pytest.fixture
def live(runs: Runs) -> Running:
    """A run with two calls that go on, and others that wait."""
    running = runs.start_exec(TASKS, "-j2")
    running.await_file(runs.folder / "begun0")
    running.await_file(runs.folder / "begun1")
    return running


def ask(runs: Runs, live: Running, command: str, *words: str) -> Ended:
    return runs.run(command, f"unix:{socket_of(live)}", *words)


def socket_of(live: Running) -> Path:
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("TMPDIR") or "/tmp")
    names = [
        f"taskrun/run-{live.process.pid}.sock",
        f"taskrun-{os.getuid()}/run-{live.process.pid}.sock",
    ]
    found = [folder / name for name in names if (folder / name).exists()]
    assert found, f"no socket of {live.process.pid} in {folder}"
    return found[0]


def status(runs: Runs, live: Running) -> Any:
    return json.loads(ask(runs, live, "status", "--json").check().out)


def go_on(runs: Runs) -> None:
    (runs.folder / "go on").touch()


def test_status_says_how_far_each_task_is_and_what_runs_where(runs: Runs, live: Running) -> None:
    now = status(runs, live)
    assert now["pid"] == live.process.pid and now["slots"] == 2 and now["total"] == 7
    assert [(one["task"], one["running"], one["ready"]) for one in now["tasks"]] == [
        ("work", 2, 4), ("total", 0, 0)
    ]  # fmt: skip
    assert sorted(one["call"] for one in now["running"]) == ["work[0]", "work[1]"]
    shown = ask(runs, live, "status").check().out
    assert "0 of 7 calls ended" in shown and "work[0]" in shown
    go_on(runs)
    assert live.end().status == 0


def test_explain_says_why_a_task_has_no_calls_yet(runs: Runs) -> None:
    live = runs.start_exec(
        """
        @task
        def urls():
            mark("begun")
            while not os.path.exists("go on"): time.sleep(0.01)
            return [1]

        @task
        def fetch(url=each(urls)): ...
        """,
        "-j1",
    )
    live.await_file(runs.folder / "begun")
    for name in ("fetch", "fetch[0]"):
        assert (
            "fetch has no calls yet: it waits for the items of urls (1 open)"
            in ask(runs, live, "explain", name).check(2).err
        )
    (runs.folder / "go on").touch()
    live.end().check()


def test_explain_says_why_a_call_does_not_run(runs: Runs, live: Running) -> None:
    assert "waits for work (6 open)" in ask(runs, live, "explain", "total").check().out
    assert "waits for a slot" in ask(runs, live, "explain", "work[5]").check().out
    wrong = ask(runs, live, "explain", "wrok[5]")
    assert wrong.status == 2 and "did you mean 'work[" in wrong.err


LABELLED = """
@task(label="job {n}")
def long(n=each(range(2))):
    mark(f"begun{n}")
    part.submit(n).result()

@task
def total(all=result(long)): ...

@task(default=False)
def part(n):
    mark(f"part{n}")
    while not os.path.exists("go on"): time.sleep(0.01)
"""


def test_status_and_explain_show_the_label_and_the_name_and_why_a_call_runs(runs: Runs) -> None:
    live = runs.start_exec(LABELLED, "-j1", "long")
    live.await_file(runs.folder / "part0")
    assert "job 0 (long[0])" in ask(runs, live, "status").check().out
    for name in ("job 0", "long[0]"):
        said = ask(runs, live, "explain", name).check().out
        assert said.startswith("job 0 (long[0]) runs and waits for part#0 (running)"), said
        assert said.endswith(" (named on the command line)\n"), said
    said = ask(runs, live, "explain", "part#0").check().out
    assert "attempt 1 (submitted by job 0)" in said
    unknown = ask(runs, live, "explain", "job 7").check(2).err
    assert "no call 'job 7'" in unknown and "a label is known once its call has begun" in unknown
    go_on(runs)
    assert live.end().status == 0


def test_the_answers_are_objects_for_programs(runs: Runs) -> None:
    live = runs.start_exec(LABELLED, "-j1", "-k")
    live.await_file(runs.folder / "part0")

    def answer(*words: str) -> Any:
        return json.loads(ask(runs, live, *words, "--json").check().out)

    long0 = {"call": "long[0]", "label": "job 0", "task": "long", "state": "running", "attempt": 1}
    explained = answer("explain", "long[0]")
    assert explained.items() >= long0.items() and abs(explained["since"] - time.time()) < 60
    assert explained["why"] == "all tasks run"
    assert explained["failure"] is explained["cause"] is None
    assert explained["worker"] == "w1" and "waits for part#0" in explained["text"]
    [frame] = [one for one in answer("stack", "part#0")["frames"] if one["function"] == "part"]
    assert frame["file"] == str(runs.folder / "tasks.py") and frame["line"] > 0
    assert frame["source"].startswith(("mark(", "while not"))
    assert answer("tell", "part#0", "hello")["call"] == "part#0"
    assert [answer(do)["paused"] for do in ("pause", "unpause")] == [True, False]
    cancelled = answer("cancel", "total")
    assert (cancelled["call"], cancelled["state"]) == ("total", "cancelled")
    assert answer("explain", "total")["failure"]["kind"] == "cancelled"
    stopped = answer("cancel", "run")
    assert stopped == {"run": None, "text": "the run is being stopped"}
    assert live.end().status == 130


def test_stack_shows_where_a_running_call_is_without_stopping_it(runs: Runs, live: Running) -> None:
    said = ask(runs, live, "stack", "work[0]").check().out
    assert "in work" in said and "time.sleep(0.01)" in said
    assert "taskrun/workers" not in said and "<string>" not in said
    assert "is not running" in ask(runs, live, "stack", "total").err
    go_on(runs)
    assert live.end().status == 0


IN_A_LANE = """
def pause():
    mark(f"begun{current().call}")
    while not os.path.exists("go on"): time.sleep(0.01)

def odd(n): pause()

def even(n): pause()

@task(lane=LANE)
def work(n=each(range(4))): (odd if n % 2 else even)(n)
"""

AWAITING = """
import asyncio

async def steps():
    mark(f"begun{current().call}")
    while not os.path.exists("go on"):
        await asyncio.sleep(0.01)
        yield

async def odd(n):
    async for _ in steps(): pass

async def even(n):
    async with asyncio.timeout(60): await odd(n)

@task
async def work(n=each(range(4))): await (odd if n % 2 else even)(n)
"""


@pytest.mark.parametrize(
    ("lane", "source", "innermost"),
    [
        ("thread", IN_A_LANE, "in pause"),
        pytest.param("green", IN_A_LANE, "in pause", marks=needs_gevent),
        ("async", AWAITING, "in steps"),
    ],
)
def test_the_stack_of_a_call_among_many_is_its_own(
    runs: Runs, lane: str, source: str, innermost: str
) -> None:
    live = runs.start_exec(source.replace("LANE", repr(lane)), "-j2")
    for n in range(4):
        live.await_file(runs.folder / f"begunwork[{n}]")
    for n, inside in enumerate(("even", "odd")):
        said = ask(runs, live, "stack", f"work[{n}]").check().out
        assert "in work" in said and f"in {inside}" in said and innermost in said, said
        assert ("in even" in said) == (inside == "even"), said
        assert "workers/lanes" not in said and "run_forever" not in said, said
    go_on(runs)
    assert live.end().status == 0


def test_the_stack_of_a_coroutine_that_blocks_the_loop_is_where_it_blocks(runs: Runs) -> None:
    source = """
def blocking():
    mark("begun")
    while not os.path.exists("go on"): time.sleep(0.01)

@task
async def work(): blocking()
"""
    live = runs.start_exec(source, "-j2")
    live.await_file(runs.folder / "begun")
    said = ask(runs, live, "stack", "work").check().out
    assert "in work" in said and "in blocking" in said and "run_forever" not in said, said
    go_on(runs)
    assert live.end().status == 0


def test_cancel_ends_a_running_call_and_a_queued_one(runs: Runs, live: Running) -> None:
    ask(runs, live, "cancel", "work[0]").check()
    ask(runs, live, "cancel", "work[5]").check()
    go_on(runs)
    ended = live.end()
    assert "work   4 ok, 2 cancelled" in ended.err
    assert "taskrun cancel: work[5]" in ended.err


def test_a_run_whose_call_was_cancelled_and_is_needed_exits_with_1(runs: Runs) -> None:
    live = runs.start_exec(
        """
        @task
        def build():
            mark("begun")
            doze()

        @task
        def deploy(r=result(build)): ...
        """,
        "--json",
    )
    live.await_file(runs.folder / "begun")
    ask(runs, live, "cancel", "build").check()
    ended = live.end()
    assert ended.status == ended.events[-1]["status"] == 1
    assert ended.states == {"build": "cancelled", "deploy": "cancelled"}


def in_a_script(runs: Runs, source: str = TASKS.replace(', errors="skip"', "")) -> Running:
    """A run by ``taskrun.run``, which prints what that raises, and whose first call has begun."""
    runs.write(source)
    live = runs.start(
        "-c",
        "import taskrun, taskrun.errors\n"
        "try: taskrun.run('tasks.py', 'total', jobs=2)\n"
        "except taskrun.errors.RunFailed as error: print(error)\n",
        program=(sys.executable,),
    )
    live.await_file(runs.folder / "begun0")
    return live


def test_a_library_run_whose_call_was_cancelled_says_so(runs: Runs) -> None:
    live = in_a_script(runs)
    ask(runs, live, "cancel", "work[0]").check()
    go_on(runs)
    said = "work[0] was cancelled: CallCancelled: work[0] was cancelled: taskrun cancel"
    assert live.end().check().out.splitlines()[-1] == said


def test_cancel_run_stops_it_as_ctrl_c_does(runs: Runs, live: Running) -> None:
    ask(runs, live, "cancel", "run").check()
    ended = live.end()
    assert ended.status == 130 and "stopped: taskrun cancel" in ended.err


def test_cancel_run_a_second_time_ends_it_at_once(runs: Runs) -> None:
    live = runs.start_exec(
        """
        @task(always=True)
        def teardown():
            mark("begun")
            doze()
        """
    )
    live.await_file(runs.folder / "begun")
    ask(runs, live, "cancel", "run").check()
    live.await_line("stopping: taskrun cancel", err=True)
    ask(runs, live, "cancel", "run")
    assert live.end().status == 130


def test_a_library_run_that_is_cancelled_from_outside_raises_no_keyboard_interrupt(
    runs: Runs,
) -> None:
    live = in_a_script(runs)
    ask(runs, live, "cancel", "run").check()
    assert live.end().check().out.splitlines()[-1] == "the run was stopped: taskrun cancel"


def test_a_library_run_that_is_cancelled_while_its_workers_end_says_so(runs: Runs) -> None:
    live = in_a_script(
        runs,
        """
        def make():
            yield 1
            mark("begun0")
            doze()

        @task
        def total(x=per_worker(make)): ...
        """,
    )
    ask(runs, live, "cancel", "run")
    assert live.end().check().out.splitlines()[-1] == "the run was stopped: taskrun cancel"


def test_a_paused_run_starts_nothing_until_it_is_unpaused(runs: Runs, live: Running) -> None:
    ask(runs, live, "pause").check()
    assert "the run is paused" in ask(runs, live, "explain", "work[4]").check().out
    go_on(runs)
    wait_until(lambda: status(runs, live)["done"] == 2)
    now = status(runs, live)
    assert now["paused"] and now["running"] == []
    assert not (runs.folder / "begun2").exists()
    ask(runs, live, "unpause").check()
    assert live.end().status == 0


def test_the_address_may_be_left_out_where_there_is_one_run(
    runs: Runs, socket_folder: Path
) -> None:
    alone = {"XDG_RUNTIME_DIR": str(socket_folder)}
    running = runs.start_exec(TASKS, "-j2", env=alone)
    running.await_file(runs.folder / "begun0")
    assert runs.run("status", env=alone).status == 0
    assert runs.run("status", "a", "b", env=alone).status == 2
    named = runs.run("status", "r1", env=alone).check(2)
    assert "there is no run 'r1' here: this is one run, and no server" in named.err
    go_on(runs)
    running.end()
    gone = runs.run("status", env=alone)
    assert gone.status == 2 and "no run of yours is alive" in gone.err


def test_a_run_at_the_path_of_a_socket_says_so(runs: Runs, socket_folder: Path) -> None:
    address = f"unix:{socket_folder}/run"
    running = runs.start_exec(TASKS, "-j2", "--listen", address)
    assert running.await_line("listening on", err=True).split()[-1] == address
    runs.run("status", address).check()
    go_on(runs)
    assert running.end().status == 0


def test_of_several_runs_status_shows_the_addresses(runs: Runs, socket_folder: Path) -> None:
    alone = {"XDG_RUNTIME_DIR": str(socket_folder)}
    both = [runs.start_exec(TASKS, "-j1", env=alone) for _ in range(2)]
    sockets = [f"{socket_folder}/taskrun/run-{running.process.pid}.sock" for running in both]
    wait_until(lambda: all(os.path.exists(path) for path in sockets))
    shown = runs.run("status", env=alone).check().out
    found = json.loads(runs.run("status", "--json", env=alone).check().out)
    assert all(f"unix:{path}" in shown for path in sockets)
    assert {now["pid"] for now in found} == {running.process.pid for running in both}
    assert "several runs of yours" in runs.run("explain", "total", env=alone).check(2).err
    go_on(runs)
    for running in both:
        assert running.end().status == 0


def test_whoever_has_another_key_is_refused(runs: Runs, live: Running) -> None:
    other = runs.folder / "key"
    other.write_text("0123456789abcdef0123")
    other.chmod(0o600)
    refused = ask(runs, live, "status", "--authkey-file", str(other))
    assert refused.status == 2 and "Traceback" not in refused.err
    assert "0123456789abcdef" not in refused.err


def test_a_request_that_means_nothing_is_refused_and_the_run_goes_on(
    runs: Runs, live: Running
) -> None:
    from taskrun.authkey import authkey
    from taskrun.transport import dial_blocking

    with dial_blocking(str(socket_of(live)), authkey(), b"steer") as wire:
        for garbage in (
            b"",
            b"\xff\xfe",
            b"[]",
            b'{"do": "fly"}',
            b'{"do": 3}',
            b'{"do": "cancel"}',
        ):
            wire.send(garbage)
            assert "error" in json.loads(bytes(wire.recv(10)))
    go_on(runs)
    assert live.end().status == 0


def test_watching_ends_with_the_run(runs: Runs, live: Running) -> None:
    watching = runs.start("status", f"unix:{socket_of(live)}", "--watch")
    watching.await_line("calls ended")
    go_on(runs)
    live.end()
    assert watching.end().status == 0


def test_watching_a_run_that_is_stopped_says_that_it_does_not_answer(
    runs: Runs, live: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show = steer._show

    def show_and_stop(*words: Any) -> int:
        live.signal(signal.SIGSTOP)
        run = psutil.Process(live.process.pid)
        wait_until(lambda: run.status() == psutil.STATUS_STOPPED)
        monkeypatch.setattr(steer, "ANSWER_SECONDS", 0.1)
        return show(*words)

    monkeypatch.setattr(steer, "_show", show_and_stop)
    try:
        assert main(["status", f"unix:{socket_of(live)}", "--watch"]) == 3
    finally:
        live.signal(signal.SIGCONT)
    said = capsys.readouterr()
    assert "0 of 7 calls ended" in said.out and "has not answered in 0.1 s" in said.err
    go_on(runs)
    assert live.end().status == 0
