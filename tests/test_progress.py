"""How far a run is, drawn and said."""

from __future__ import annotations

import os
import pty
import termios
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from watched import Call, Pages, Screen, attempt, end, read_until_closed

from taskrun.reporting.output import make_output
from taskrun.reporting.progress import Progress, Snapshot, render_bar, render_line
from taskrun.reporting.terminal import Terminal

HALF = Snapshot(4000, 10000, 2, 8, 1200.0, ("train[2] 40% 12 s", "fetch[17] 3 s"))


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tty() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    yield master, slave
    os.close(master)


def add(progress: Progress, count: int, first: int = 0) -> list[Call]:
    calls = [Call(first + i, f"fetch[{first + i}]") for i in range(count)]
    progress.calls_added(calls)
    return calls


def finish(progress: Progress, calls: list[Call], state: str = "ok") -> None:
    for call in calls:
        end(progress, call, state)


# -- rendering ------------------------------------------------------------------------


def test_a_line_says_how_far_how_fast_and_how_long_still() -> None:
    assert render_line(HALF) == "[ 40%] 4000/10000 done, 8 running, 2 failed, 1200/s, 5 s left"


def test_a_line_says_only_what_is_known() -> None:
    assert render_line(Snapshot(0, 7)) == "[  0%] 0/7 done"
    assert render_line(Snapshot(0, 0)) == "[  0%] 0/0 done"


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (40, " 40%|#####2       | 4000/10000, 2 failed"),
        (80, " 40%|#########6              | 4000/10000, 8 running, 2 failed, 1200/s, 5 s left"),
        (
            200,
            " 40%|################                        | 4000/10000, 8 running, 2 failed, "
            "1200/s, 5 s left | train[2] 40% 12 s, fetch[17] 3 s",
        ),
    ],
)
def test_a_bar_shows_what_there_is_room_for(width: int, expected: str) -> None:
    assert render_bar(HALF, width, ascii=True) == expected


@pytest.mark.timeout(10)  # what tqdm makes of a width below 0 has no end
@pytest.mark.parametrize("width", range(-3, 40))
def test_a_bar_is_never_wider_than_its_room_and_where_that_is_too_small_there_is_none(
    width: int,
) -> None:
    drawn = render_bar(HALF, width, ascii=True)
    assert len(drawn) <= max(width, 0)
    assert bool(drawn) == (width >= 10)


@pytest.mark.parametrize("width", [1, 10, 20, 39, 79, 81, 500])
@pytest.mark.parametrize("total", [0, 1, 10**9])
def test_a_bar_is_never_wider_than_it_may_be(width: int, total: int) -> None:
    assert len(render_bar(Snapshot(total // 2, total, 1, 2, 3.0, ("x" * 60,)), width)) <= width


def test_nothing_that_is_not_done_is_shown_as_done() -> None:
    assert render_bar(Snapshot(9999, 10000), 80, ascii=True).startswith(" 99%|")


# -- off a terminal -------------------------------------------------------------------


def test_a_short_run_shows_no_milestones(clock: Clock) -> None:
    pages = Pages()
    progress = Progress(pages.terminal, clock)
    calls = add(progress, 100)
    for call in calls:
        clock.now += 0.015
        finish(progress, [call])
    assert pages.err == ""


def test_each_tenth_of_a_longer_run_is_said_once(clock: Clock) -> None:
    pages = Pages()
    progress = Progress(pages.terminal, clock)
    calls = add(progress, 100)
    for call in calls:
        clock.now += 0.3
        finish(progress, [call], "failed" if call.id == 3 else "ok")
    lines = pages.err.splitlines()
    assert lines[0] == "[ 10%] 10/100 done, 1 failed, 3.3/s, 27 s left"
    assert [line[:6] for line in lines] == [f"[ {n}0%]" for n in range(1, 10)]


def test_a_run_that_grows_all_the_time_says_little(clock: Clock) -> None:
    pages = Pages()
    progress = Progress(pages.terminal, clock)
    for number in range(36_000):
        call = add(progress, 1, number)
        clock.now += 0.1
        finish(progress, call)
        add(progress, 1, number + 100_000)
    assert 3 < len(pages.err.splitlines()) < 150


def test_no_time_is_asked_for_while_nothing_is_to_be_said(clock: Clock) -> None:
    asked = 0

    def now() -> float:
        nonlocal asked
        asked += 1
        return clock()

    progress = Progress(Pages().terminal, now)
    finish(progress, add(progress, 10_000))
    assert asked <= 12


def test_a_silent_run_gives_a_sign_of_life(clock: Clock) -> None:
    pages = Pages()
    progress = Progress(pages.terminal, clock)
    (call,) = add(progress, 1)
    progress.call_began(call, 1, "w1", clock.now)
    progress.progressed(call, 3, 4)
    for _ in range(13):
        clock.now += 5
        progress.tick()
    assert pages.err == "[  0%] 0/1 done, 1 running | fetch[0] 75% 1 min 0 s\n"


def test_after_the_end_nothing_is_drawn(clock: Clock) -> None:
    pages = Pages()
    progress = Progress(pages.terminal, clock)
    add(progress, 5)
    progress.run_ended(0, "")
    clock.now += 1000
    progress.tick()
    assert pages.err == ""


# -- counting -------------------------------------------------------------------------


def test_a_call_that_waits_for_its_retry_does_not_run(clock: Clock) -> None:
    progress = Progress(Pages().terminal, clock)
    (call,) = add(progress, 1)
    progress.call_began(call, 1, "w1", clock.now)
    assert progress.snapshot(clock.now).running == 1
    progress.attempt_ended(attempt(call, "error", again=5.0), "w1")
    assert progress.snapshot(clock.now).running == 0


def test_the_rate_is_that_of_the_last_half_minute(clock: Clock) -> None:
    progress = Progress(Pages().terminal, clock)
    calls = add(progress, 10_000)
    for second in range(100):
        per_second = 10 if second < 50 else 50
        done = progress.snapshot(clock.now).done
        finish(progress, calls[done : done + per_second])
        clock.now += 1
    rate = progress.snapshot(clock.now).rate
    assert rate is not None
    assert 49 < rate < 51


def test_the_rate_of_few_long_calls_is_that_of_the_whole_run(clock: Clock) -> None:
    progress = Progress(Pages().terminal, clock)
    calls = add(progress, 10)
    for call in calls[:2]:
        clock.now += 300
        progress.snapshot(clock.now)
        finish(progress, [call])
    clock.now += 200
    for _ in range(100):
        clock.now += 1
        rate = progress.snapshot(clock.now).rate
    assert rate == pytest.approx(2 / 900)


def test_somebody_who_knows_may_say_how_many_run(clock: Clock) -> None:
    progress = Progress(Pages().terminal, clock, running=lambda: 7)
    assert progress.snapshot(clock.now).running == 7


# -- on a terminal --------------------------------------------------------------------


def watch(tty: tuple[int, int]) -> tuple[Screen, threading.Thread]:
    screen = Screen()
    thread = threading.Thread(target=read_until_closed, args=(tty[0], screen), daemon=True)
    thread.start()
    return screen, thread


def test_bar_and_lines_do_not_tear_each_other(tty: tuple[int, int], clock: Clock) -> None:
    screen, thread = watch(tty)
    terminal = Terminal(tty[1], os.dup(tty[1]), {"TERM": "xterm"})
    output, progress = make_output("line", terminal), Progress(terminal, clock)
    calls = add(progress, 50)
    expected = []
    for number, call in enumerate(calls):
        for part in ("ab", f"c{number}\nde", f"f{number}\n"):
            clock.now += 0.05
            stream = "stderr" if number % 3 else "stdout"
            output.output(call, stream, part.encode())
            progress.tick()
        expected += [f"abc{number}", f"def{number}"]
        finish(progress, [call])
    progress.run_ended(0, "")
    os.close(tty[1])
    close(terminal)
    thread.join(20)
    assert [line.partition(" | ")[2] for line in screen.lines] == expected
    assert all(line.startswith("fetch[") for line in screen.lines)
    assert screen.bottom == ""


def close(terminal: Any) -> None:
    """Close the terminal's second descriptor, so that its reader comes to an end."""
    os.close(terminal._sinks["stderr"].fd)


def test_threads_that_write_while_the_bar_moves_tear_nothing(tty: tuple[int, int]) -> None:
    screen, reader = watch(tty)
    terminal = Terminal(tty[1], tty[1], {"TERM": "xterm", "NO_COLOR": "1"})
    stop = threading.Event()

    def draw() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            terminal.set_bar(f"{number} " * 10)
        terminal.set_bar("")

    def write(name: int) -> None:
        for number in range(200):
            terminal.write_lines("stdout" if name % 2 else "stderr", f"{name}:{number}:" + "x" * 50)

    drawer = threading.Thread(target=draw, daemon=True)
    writers = [threading.Thread(target=write, args=(name,), daemon=True) for name in range(4)]
    for thread in [drawer, *writers]:
        thread.start()
    for thread in writers:
        thread.join(20)
    stop.set()
    drawer.join(20)
    os.close(tty[1])
    reader.join(20)
    for name in range(4):
        mine = [line for line in screen.lines if line.startswith(f"{name}:")]
        assert mine == [f"{name}:{number}:" + "x" * 50 for number in range(200)]
    assert len(screen.lines) == 800


def test_the_bar_is_drawn_at_most_ten_times_a_second(tty: tuple[int, int], clock: Clock) -> None:
    screen, thread = watch(tty)
    terminal = Terminal(tty[1], tty[1], {"TERM": "xterm"})
    progress = Progress(terminal, clock)
    drawn: list[str] = []
    terminal.set_bar = drawn.append  # type: ignore[method-assign]
    calls = add(progress, 1000)
    for call in calls:
        finish(progress, [call])
        clock.now += 0.004
        progress.tick()
    os.close(tty[1])
    thread.join(20)
    assert 30 <= len(drawn) <= 41
    assert "1000/1000" not in screen.bottom


def test_a_dumb_terminal_gets_lines(tty: tuple[int, int], clock: Clock) -> None:
    terminal = Terminal(tty[1], tty[1], {"TERM": "dumb"})
    assert not terminal.has_bar
    assert Progress(terminal, clock).interval > 1
    os.close(tty[1])
