"""Ctrl-C and SIGTERM at every stage of a run."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import SIGNALS, Ended, Running, Runs, started, until_it_is_full

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


BOTH = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)

STAGES = {
    "template": """
        if os.path.exists("once"):
            mark("begun")
            doze()
        open("once", "w").close()

        @task
        def work(n=each(range(3))): pass
        """,
    "sleeping": """
        @task
        def work(n=each(range(9))):
            mark("begun")
            doze()
        """,
    "computing": """
        @task
        def work(n=each(range(9))):
            mark("begun")
            while True: pass
        """,
    "tiny": """
        @task
        def work(n=each(range(100_000))):
            if n == 3000: mark("begun")
            if n > 3000: time.sleep(0.01)
        """,
    "deaf": """
        @task
        def work(n=each(range(9))):
            mark("begun")
            while True:
                try: time.sleep(300)
                except BaseException: pass
        """,
    "immune": """
        @task
        def work(n=each(range(9))):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            mark("begun")
            while True:
                try: time.sleep(300)
                except BaseException: pass
        """,
    "holding": """
        import re

        @task
        def work(n=each(range(9))):
            mark("begun")
            re.match(r"(a+)+$", "a" * 64 + "b")
        """,
    "shell": """
        @task
        def work(n=each(range(9))): sh("echo 1 > begun; sleep 300 & sleep 300")
        """,
    "deaf_shell": """
        @task
        def work(n=each(range(9))): sh("trap '' INT TERM; echo 1 > begun; sleep 300; sleep 300")
        """,
    "subprocess": """
        import subprocess

        @task
        def work(n=each(range(9))): subprocess.run("echo 1 > begun; sleep 300", shell=True)
        """,
    "patient": """
        @task
        def work():
            mark("begun")
            raise Retry("later", after=300)
        """,
    "waiting": """
        @task
        def child(n):
            mark("begun")
            doze()

        @task
        def work(n=each(range(2))): child.submit(n).result()
        """,
    "awaiting": """
        import asyncio

        @task
        async def work(n=each(range(2))):
            mark("begun")
            await asyncio.gather(asyncio.sleep(300), asyncio.sleep(300))
        """,
    "threads": """
        @task
        def work(n=each(range(2))):
            threads = [threading.Thread(target=time.sleep, args=(300,)) for _ in range(3)]
            for thread in threads: thread.start()
            mark("begun")
            for thread in threads: thread.join()
        """,
    "pool": """
        from concurrent.futures import ProcessPoolExecutor

        @task
        def work(n=each(range(2))):
            with ProcessPoolExecutor(2) as pool:
                pool.submit(pow, 2, 3).result()
                mark("begun")
                list(pool.map(time.sleep, [300] * 4))
        """,
}


def stop(running: Running, number: int) -> None:
    """As people do it: Ctrl-C goes to the foreground group, SIGTERM to the process."""
    running.signal(number, group=number == signal.SIGINT)


def check_stopped(ended: Ended, number: int, within: float = 12) -> None:
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    ended.check(SIGNALS[signal.Signals(number)])
    assert "\nTraceback" not in f"\n{ended.err}"
    assert "KeyboardInterrupt" not in ended.err
    assert f"stopped: {name}" in ended.err
    assert " in " in ended.err.splitlines()[-2], ended.err
    assert ended.seconds < within


# Whichever signal it is, one way leads from the coordinator to a call.
WITH_TERM = ("template", "sleeping", "tiny", "deaf", "shell", "waiting")


@pytest.mark.parametrize(
    ("stage", "number"),
    [(stage, signal.SIGINT) for stage in STAGES] + [(stage, signal.SIGTERM) for stage in WITH_TERM],
)
def test_the_first_signal_stops_the_run_in_order(runs: Runs, stage: str, number: int) -> None:
    running = runs.start_exec(STAGES[stage], "-j2")
    running.await_file(runs.folder / "begun")
    stop(running, number)
    check_stopped(running.end(), number)


@pytest.mark.parametrize(
    ("stage", "number"),
    [(stage, signal.SIGINT) for stage in ("deaf", "deaf_shell", "holding", "template")]
    + [("deaf", signal.SIGTERM)],
)
def test_the_second_signal_ends_it_at_once(runs: Runs, stage: str, number: int) -> None:
    running = runs.start_exec(STAGES[stage], "-j2")
    running.await_file(runs.folder / "begun")
    stop(running, number)
    running.await_line("stopping", err=True)
    stop(running, number)
    check_stopped(running.end(), number, within=6)


@BOTH
def test_a_signal_while_the_file_is_imported_is_quiet(runs: Runs, number: int) -> None:
    running = runs.start_exec(
        """
        mark("begun")
        doze()
        """
    )
    running.await_file(runs.folder / "begun")
    stop(running, number)
    ended = running.end()
    assert ended.status == SIGNALS[signal.Signals(number)]
    assert "Traceback" not in ended.err


@BOTH
def test_a_signal_while_taskrun_itself_is_imported_is_quiet(runs: Runs, number: int) -> None:
    runs.write("mark('begun')\ndoze()", "click.py")
    running = runs.start("-m", "taskrun", "--version", program=(sys.executable,))
    running.await_file(runs.folder / "begun")
    stop(running, number)
    ended = running.end()
    assert ended.status == SIGNALS[signal.Signals(number)]
    assert not ended.out + ended.err


@BOTH
def test_a_signal_that_a_run_was_started_to_ignore_is_ignored(runs: Runs, number: int) -> None:
    running = runs.start_exec(
        """
        @task
        def work():
            mark("begun")
            while not os.path.exists("go on"): time.sleep(0.01)
        """,
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
    )
    running.await_file(runs.folder / "begun")
    running.signal(number)
    (runs.folder / "go on").touch()
    assert running.end().status == 0


TEARDOWN = """
@task
def work(n=each(range(4))):
    mark("begun")
    doze()

@task(always=True)
def teardown(all=result(work)):
    mark("teardown")
    time.sleep(0.5)
    print("taken down", {type(one).__name__ for one in all})
"""


@BOTH
def test_teardown_runs_after_a_signal(runs: Runs, number: int) -> None:
    running = runs.start_exec(TEARDOWN, "-j2", "--output=raw")
    running.await_file(runs.folder / "begun")
    stop(running, number)
    ended = running.end()
    check_stopped(ended, number)
    assert ended.out == "taken down {'CallCancelled'}\n"


@BOTH
def test_a_second_signal_ends_teardown_too(runs: Runs, number: int) -> None:
    running = runs.start_exec(TEARDOWN.replace("time.sleep(0.5)", "doze()"), "-j2")
    running.await_file(runs.folder / "begun")
    stop(running, number)
    running.await_file(runs.folder / "teardown")
    stop(running, number)
    check_stopped(running.end(), number)


@BOTH
def test_the_first_signal_lets_a_teardown_that_runs_already_end(runs: Runs, number: int) -> None:
    source = """
        @task
        def work(): pass

        @task(always=True)
        def teardown(x=result(work)):
            mark("begun")
            time.sleep(1)
            print("taken down")
        """
    running = runs.start_exec(source, "--output=raw")
    running.await_file(runs.folder / "begun")
    stop(running, number)
    ended = running.end()
    check_stopped(ended, number)
    assert ended.out == "taken down\n"


@BOTH
def test_a_signal_while_workers_finish_what_they_made(runs: Runs, number: int) -> None:
    source = """
        def client():
            yield 1
            mark("begun")
            doze()

        @task
        def work(c=per_worker(client)): print("done")
        """
    running = runs.start_exec(source, "--output=raw")
    running.await_file(runs.folder / "begun")
    stop(running, number)
    ended = running.end()
    assert ended.status in (0, SIGNALS[signal.Signals(number)])
    assert "Traceback" not in ended.err
    assert "1 call in" in ended.err
    assert ended.seconds < 12


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        (stage, signal.SIGINT)
        for stage in ("sleeping", "computing", "shell", "patient", "waiting", "tiny")
    ]
    + [("sleeping", signal.SIGTERM), ("shell", signal.SIGTERM)],
)
def test_signals_stop_an_inline_run(runs: Runs, stage: str, number: int) -> None:
    running = runs.start_exec(STAGES[stage], "--inline")
    running.await_file(runs.folder / "begun")
    stop(running, number)
    ended = running.end()
    assert ended.status in (SIGNALS[signal.Signals(number)], -number)
    assert "Traceback" not in ended.err
    assert ended.seconds < 12


def test_a_call_of_an_inline_run_may_take_ctrl_c_as_a_debugger_does(runs: Runs) -> None:
    source = """
        @task
        def debug():
            for prompt in range(2):
                try:
                    mark(f"prompt{prompt}")
                    doze()
                except KeyboardInterrupt: pass
            return "value"

        @task
        def show(x=result(debug)): print(x)
        """
    running = runs.start_exec(source, "--inline")
    for prompt in range(2):
        running.await_file(runs.folder / f"prompt{prompt}")
        running.signal(signal.SIGINT)
    assert running.end().check().out == "value\n"


@BOTH
def test_inline_teardown_runs_after_a_signal(runs: Runs, number: int) -> None:
    running = runs.start_exec(TEARDOWN, "--inline")
    running.await_file(runs.folder / "begun")
    stop(running, number)
    ended = running.end()
    check_stopped(ended, number)
    assert ended.out == "taken down {'CallCancelled'}\n"


SPEAKS = """
    @task
    def work(n=each(range(100))): print("x" * 1_000_000)
    """


@BOTH
@pytest.mark.parametrize("how", [("-j2",), ("-j2", "--json"), ("--inline",)], ids=" ".join)
def test_a_reader_that_reads_nothing_does_not_keep_a_run_from_ending(
    runs: Runs, number: int, how: tuple[str, ...]
) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb") as stdout:
        running = runs.start_exec(SPEAKS, *how, stdout=stdout)
        until_it_is_full(stdout)
        stop(running, number)
        check_stopped(running.end(10), number)


@BOTH
@pytest.mark.parametrize("how", [("-j2",), ("--inline",)], ids=" ".join)
def test_a_terminal_that_stands_still_does_not_keep_a_run_from_ending(
    runs: Runs, number: int, how: tuple[str, ...]
) -> None:
    main, other = pty.openpty()
    with open(main, "rb"), open(other, "wb") as terminal:
        running = runs.start_exec(SPEAKS, *how, stdout=terminal, stderr=terminal)
        until_it_is_full(terminal)
        stop(running, number)
        assert running.end(12).status == SIGNALS[signal.Signals(number)]


@BOTH
def test_who_reads_late_but_reads_gets_all_of_it_after_a_signal(runs: Runs, number: int) -> None:
    source = """
        @task
        def work():
            print("x" * 1_000_000)
            print("last", flush=True)
            doze()
        """
    reader, writer = os.pipe()
    with open(reader, "rb") as stdout:
        with open(writer, "wb") as other_end:
            running = runs.start_exec(source, "--output=raw", stdout=other_end)
            until_it_is_full(other_end)
            stop(running, number)
        assert len(stdout.read()) == 1_000_001 + len("last\n")
        check_stopped(running.end(10), number)


def test_ctrl_c_typed_at_a_terminal(runs: Runs) -> None:
    main, other = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with open(main, "r+b", buffering=0) as keyboard, open(other, "r+b", buffering=0) as terminal:
        running = runs.start_exec(
            STAGES["shell"],
            "-j2",
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            preexec_fn=take_terminal,
        )
        running.await_file(runs.folder / "begun")
        keyboard.write(b"\x03")
        ended = running.end()
        os.set_blocking(main, False)
        shown = keyboard.read(65536).decode()
    assert ended.status == 130
    assert "stopped: Ctrl-C" in shown
    assert "Traceback" not in shown
    assert "KeyboardInterrupt" not in shown


@pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN,
    reason="SIGHUP is ignored here, as nohup has it, and so it is by what is started",
)
def test_a_terminal_that_closes_ends_the_run(runs: Runs) -> None:
    running = runs.start_exec(STAGES["sleeping"], "-j2")
    running.await_file(runs.folder / "begun")
    running.signal(signal.SIGHUP)
    ended = running.end()
    assert ended.status in (129, -signal.SIGHUP)
    assert "Traceback" not in ended.err


def test_a_stopped_run_says_in_its_events_what_was_cancelled(runs: Runs) -> None:
    running = runs.start_exec(STAGES["sleeping"], "-j2", "--json")
    running.await_file(runs.folder / "begun")
    running.signal(signal.SIGTERM)
    ended = running.end().check(143)
    assert set(ended.states.values()) == {"cancelled"}
    assert len(ended.states) == 9
    kinds = [event["event"] for event in ended.events]
    assert "stopping" in kinds
    assert ended.events[-1]["status"] == 143
