"""``taskrun map``, end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import TASKRUN, Runs, environment, started

pytestmark = pytest.mark.timeout(120)

FUNCTIONS = """
def square(x: int): return x * x

def slow_first(x: int):
    time.sleep(0.2 if x == 0 else 0)
    return x

def fail_odd(x: int):
    if x % 2: raise ValueError(f"odd {x}")
    return x

def shout(text):
    print("heard", text)
    return text.upper()

def odd_values(name):
    return {"none": None, "list": [1], "lines": "a\\nb", "bytes": b"x", "type": int}[name]

def nest(n: int): return [square_task.submit(i) for i in range(n)]

@task
def square_task(x): return x * x

def die(x):
    if x == "2": os._exit(3)
    return x
"""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    for runs in started(tmp_path):
        runs.write(FUNCTIONS, "f.py")
        yield runs


def numbers(count: int) -> bytes:
    return "".join(f"{n}\n" for n in range(count)).encode()


def test_arguments_and_lines_are_mapped(runs: Runs) -> None:
    ended = runs.run("map", "f.py:square", "1", "2", "3").check()
    assert sorted(ended.out.split()) == ["1", "4", "9"]
    ended = runs.run("map", "f.py:square", "--", "-3").check()
    assert ended.out == "9\n"
    ended = runs.run("map", "f.py:square", input=numbers(100)).check()
    assert sorted(map(int, ended.out.split())) == [n * n for n in range(100)]
    assert runs.run("map", "f.py:shout", input=b"no newline").check().out.count("NO NEWLINE") == 1
    assert runs.run("map", "f.py:square", stdin=subprocess.DEVNULL).check().out == ""


def test_a_function_is_the_modules_own_with_what_cannot_travel_and_what_it_has_kept(
    runs: Runs,
) -> None:
    source = """
        LOCK, SEEN = threading.Lock(), []

        def count(x):
            with LOCK:
                SEEN.append(x)
                return len(SEEN)

        def again(x: int): return x and again(x - 1)
        """
    runs.write(source, "g.py")
    ended = runs.run("map", "g.py:count", "-j1", "--keep-order", "a", "b", "c").check()
    assert ended.out == "1\n2\n3\n"
    assert runs.run("map", "g.py:count", "--inline", "a", "b").check().out == "1\n2\n"
    assert runs.run("map", "g.py:again", "3").check().out == "0\n"


def test_results_keep_the_order_where_that_is_asked(runs: Runs) -> None:
    ended = runs.run("map", "f.py:slow_first", "--keep-order", "-j2", input=numbers(500)).check()
    assert ended.out.split() == [str(n) for n in range(500)]


def test_a_line_that_fails_costs_its_own_result(runs: Runs) -> None:
    ended = runs.run("map", "f.py:fail_odd", "-k", "--keep-order", input=numbers(10)).check(1)
    assert ended.out.split() == ["0", "2", "4", "6", "8"]
    assert "5 failed" in ended.err
    ended = runs.run("map", "f.py:fail_odd", "-j1", input=numbers(100_000), deadline=20).check(1)
    assert "odd 1" in ended.err
    ended = runs.run("map", "f.py:die", "-k", "--keep-order", input=numbers(5)).check(1)
    assert ended.out.split() == ["0", "1", "3", "4"]
    assert "exited with status 3" in ended.err


@pytest.mark.parametrize("how", [["-j1"], ["--inline"]])
def test_a_line_that_does_not_convert_is_a_call_that_fails(runs: Runs, how: list[str]) -> None:
    lines = b"1\n2\nx\n4\n"
    ended = runs.run("map", "f.py:square", "--keep-order", *how, input=lines).check(1)
    assert ended.out.split() == ["1", "4"]
    ended = runs.run("map", "f.py:square", "-k", "--keep-order", *how, input=lines).check(1)
    assert ended.out.split() == ["1", "4", "16"]
    assert "FAILED square(x)" in ended.err and "4 calls in" in ended.err
    assert "ArgumentError: line 3 of stdin: square: x='x' does not fit; expected int" in ended.err
    ended = runs.run("map", "f.py:square", "-k", "--json", *how, input=lines).check(1)
    assert ended.events[-1]["status"] == 1
    assert ended.events[-1]["counts"] == {"ok": 3, "failed": 1, "skipped": 0, "cancelled": 0}


def test_an_argument_of_the_command_line_that_does_not_convert_runs_nothing(runs: Runs) -> None:
    ended = runs.run("map", "f.py:square", "1", "x").check(2)
    assert ended.out == ""
    assert "'x' does not fit" in ended.err


def test_a_failure_says_for_which_argument(runs: Runs) -> None:
    labelled = """
        @task(label="number {x}")
        def odd(x: int): raise ValueError("odd")

        def name(x): raise ValueError("no")
        """
    ended = runs.run("map", "f.py:fail_odd", "5").check(1)
    assert "FAILED fail_odd(5)" in ended.err
    runs.write(labelled, "g.py")
    assert "FAILED number 5" in runs.run("map", "g.py:odd", "5").check(1).err
    ended = runs.run("map", "g.py:name", "a\nb" + "x" * 1000).check(1)
    assert "FAILED name(a\\nbxxxxxxxxxx...xxxxxxxxxxxxxx)" in ended.err


@pytest.mark.parametrize("how", [["-j2"], ["-j1"], ["--keep-order"], ["--inline"]])
def test_endless_input_and_a_reader_that_wants_three_lines(runs: Runs, how: list[str]) -> None:
    command = f"yes 7 | {TASKRUN} map f.py:square {' '.join(how)} 2>err | head -3"
    done = subprocess.run(
        command, shell=True, cwd=runs.folder, env=environment(), stdout=subprocess.PIPE, timeout=30
    )
    assert done.stdout == b"49\n49\n49\n"
    assert "Traceback" not in (runs.folder / "err").read_text()


def test_lines_that_cannot_be_read_any_more_are_a_failure_and_not_the_end(runs: Runs) -> None:
    stdin, other_end = os.openpty()  # reading the one is an error when the other is closed
    tty.setraw(other_end)
    running = runs.start("map", "f.py:square", stdin=stdin)
    os.close(stdin)
    os.write(other_end, b"3\n")
    running.await_line("9")
    os.close(other_end)
    ended = running.end().check(1)
    assert ended.out == "9\n"
    assert "stdin cannot be read after line 1: Input/output error" in ended.err


def test_results_come_while_stdin_is_open(runs: Runs) -> None:
    running = runs.start("map", "f.py:square", stdin=subprocess.PIPE)
    assert running.process.stdin is not None
    for number in (3, 5):
        running.process.stdin.write(f"{number}\n".encode())
        running.process.stdin.flush()
        running.await_line(str(number * number))
    running.process.stdin.close()
    assert running.end().check().out == "9\n25\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", [["-j2"], ["--inline"]])
def test_ctrl_c_while_stdin_is_silent(runs: Runs, number: int, how: list[str]) -> None:
    running = runs.start("map", "f.py:square", *how, stdin=subprocess.PIPE)
    assert running.process.stdin is not None
    running.process.stdin.write(b"3\n")
    running.process.stdin.flush()
    running.await_line("9")
    running.signal(number)
    ended = running.end().check(130 if number == signal.SIGINT else 143)
    assert "Traceback" not in ended.err
    assert "1 call in" in ended.err


def test_a_hundred_thousand_lines_in_flat_memory(runs: Runs) -> None:
    most = []
    for count in (20_000, 100_000):
        (runs.folder / "in").write_bytes(numbers(count))
        with open(runs.folder / "in", "rb") as lines, open(runs.folder / "out", "wb") as out:
            running = runs.start("map", "f.py:square", "-j2", stdin=lines, stdout=out)
            process, peak = psutil.Process(running.process.pid), 0
            while running.process.poll() is None:
                try:
                    peak = max(peak, process.memory_info().rss)
                except psutil.Error:
                    break
                time.sleep(0.01)
            running.end(60).check()
        assert len((runs.folder / "out").read_bytes().split()) == count
        most.append(peak)
    assert most[1] - most[0] < 80_000 * 500, f"{most[1] - most[0]:,} bytes more"


def test_values_are_shown_as_text(runs: Runs) -> None:
    names = ["none", "list", "lines", "bytes", "type"]
    ended = runs.run("map", "f.py:odd_values", "--keep-order", *names).check()
    assert ended.out.splitlines() == ["[1]", "a", "b", "b'x'", "<class 'int'>"]
    assert runs.run("map", "f.py:nest", "4").check().out == "[0, 1, 4, 9]\n"


def test_with_json_there_are_events_only(runs: Runs) -> None:
    ended = runs.run("map", "f.py:shout", "--json", "--keep-order", "a", "b").check()
    results = [event for event in ended.events if event["event"] == "result"]
    assert [(event["id"], event["value"]) for event in results] == [(0, "A"), (1, "B")]
    assert json.loads(ended.out.splitlines()[-1])["counts"]["ok"] == 2


def test_bytes_that_are_no_text_arrive_as_they_were(runs: Runs) -> None:
    runs.write("def size(name): return os.fsencode(name).hex()\n", "g.py")
    ended = runs.run("map", "g.py:size", "--keep-order", input=b"\xff\n\xc3\xa9\r\n\n").check()
    assert ended.out.split() == ["ff", "c3a90d"]
    assert os.fsencode(ended.out)


@pytest.mark.parametrize("how", ["--output=line", "--output=group", "--output=raw", "--inline"])
def test_what_calls_print_does_not_get_between_the_results(runs: Runs, how: str) -> None:
    runs.write(f"print('imported')\n{FUNCTIONS}", "g.py")
    ended = runs.run("map", "g.py:shout", "a", "b", "--keep-order", how).check()
    assert ended.out == "A\nB\n"
    assert "heard a" in ended.err and "heard b" in ended.err and "imported" in ended.err
