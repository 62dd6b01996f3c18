"""Lines, whole and attributed, whatever comes in and wherever it goes."""

from __future__ import annotations

import os
import pty
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from watched import Call, Pages, Screen, attempt, end, error, read_until_closed

from taskrun.messages import SAY_BEGAN
from taskrun.model import Failure
from taskrun.observers import Observers
from taskrun.reporting import output as output_module
from taskrun.reporting import text
from taskrun.reporting.output import CUT, LONGEST_LINE, MODES, SPOOL, TAIL, Lines, make_output
from taskrun.reporting.terminal import Terminal


def show(mode: str, *writes: tuple[Call, str, bytes]) -> Pages:
    """What a mode shows of these writes, after which all calls end well."""
    pages = Pages()
    output = make_output(mode, pages.terminal)
    for call, stream, data in writes:
        output.output(call, stream, data)
    for call in {call.id: call for call, _, _ in writes}.values():
        output.output_ended(call)
        end(output, call)
    return pages


# -- cutting into lines ---------------------------------------------------------------


def test_a_partial_line_waits_for_its_end() -> None:
    lines = Lines()
    assert lines.feed(b"one\ntw") == b"one\n"
    assert lines.feed(b"") == b""
    assert lines.feed(b"o\nthree") == b"two\n"
    assert lines.end() == b"three\n"
    assert lines.end() == b""


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (b"10%\r50%\r100%\n", b"100%\n"),
        (b"\r 10%\r 50%\r\n", b" 50%\n"),
        (b"windows\r\nlines\r\n", b"windows\nlines\n"),
        (b"a\rb\nplain\nc\rd\n", b"b\nplain\nd\n"),
        (b"\r\n", b"\n"),
        (b"no end\rof it", b"of it\n"),
    ],
)
def test_a_line_reads_as_a_terminal_shows_it(written: bytes, shown: bytes) -> None:
    lines = Lines()
    assert lines.feed(written) + lines.end() == shown
    one_by_one = Lines()
    pieces = [one_by_one.feed(bytes([byte])) for byte in written]
    assert b"".join(pieces) + one_by_one.end() == shown


def test_a_progress_bar_without_a_newline_takes_no_memory() -> None:
    lines = Lines()
    for number in range(10_000):
        assert lines.feed(b"\r%6d of many" % number) == b""
    assert len(lines._rest) < 100
    assert lines.end() == b"  9999 of many\n"


def test_an_endless_line_is_cut_into_pieces_that_say_so() -> None:
    lines = Lines()
    chunk = "é".encode() * 500_001
    shown = b"".join(lines.feed(chunk) for _ in range(40)) + lines.end()
    pieces = shown.split(CUT)
    assert len(pieces) == 3
    assert b"".join(pieces) == chunk * 40 + b"\n"
    assert all(len(piece.decode()) * 2 <= LONGEST_LINE + 1 for piece in pieces)


# -- line mode ------------------------------------------------------------------------


def test_each_line_comes_after_the_name_of_its_call() -> None:
    fetch, total = Call(3, "fetch[3]"), Call(4, "total")
    pages = show(
        "line",
        (fetch, "stdout", b"one\ntwo\nthr"),
        (total, "stderr", b"warning\n"),
        (fetch, "stdout", b"ee"),
    )
    assert pages.out == "fetch[3] | one\nfetch[3] | two\nfetch[3] | three\n"
    assert pages.err == "total | warning\n"


def test_a_label_is_the_name_and_cannot_break_a_line() -> None:
    call = Call(1, "fetch[1]", label="http://host/\nx\x1b[2J")
    assert show("line", (call, "stdout", b"hi\n")).out == "http://host/\\nx\\x1b[2J | hi\n"


@pytest.mark.parametrize("mode", ["line", "group"])
def test_what_belongs_to_no_call_is_the_workers(mode: str) -> None:
    pages = Pages()
    output = make_output(mode, pages.terminal)
    output.output(None, "stderr", b"by", "w1")
    output.output(None, "stderr", b"on its", "lab/w2")
    output.output(None, "stderr", b"e\n", "w1")
    output.output(None, "stderr", b" own")
    output.output(None, "stderr", b" way\n", "lab/w2")
    output.run_ended(0, "")
    assert pages.err == "w1 | bye\nlab/w2 | on its way\nworker |  own\n"


@pytest.mark.parametrize("mode", ["line", "group", "raw"])
def test_bytes_that_are_not_text_pass_unchanged(mode: str) -> None:
    pages = show(mode, (Call(1, "a"), "stdout", b"\xff\x00\xfe ok\n"))
    assert pages.out.encode("utf-8", "surrogateescape").endswith(b"\xff\x00\xfe ok\n")


@pytest.mark.parametrize("mode", ["line", "raw", "group"])
def test_eight_streams_in_random_chunks_leave_no_line_torn_lost_or_misattributed(
    mode: str,
) -> None:
    chance = random.Random(7)
    calls = [Call(i, f"fetch[{i}]") for i in range(8)]
    written = {
        call.id: [f"{call.id}:{n}:" + "x" * int(chance.expovariate(0.02)) for n in range(400)]
        for call in calls
    }
    streams = {id: "\n".join(lines).encode() for id, lines in written.items()}
    pages = Pages()
    output = make_output(mode, pages.terminal)
    while streams:
        id = chance.choice(list(streams))
        size = int(chance.expovariate(0.01)) + 1
        output.output(calls[id], "stdout", streams[id][:size])
        streams[id] = streams[id][size:]
        if not streams[id]:
            del streams[id]
            output.output_ended(calls[id])
            end(output, calls[id])
    shown = defaultdict(list)
    for line in pages.out.splitlines():
        tag, bar, rest = line.partition(" | ")
        if mode != "line":
            rest = line
        if not line.startswith("---"):
            shown[int(rest.partition(":")[0])].append(rest)
            assert not bar or tag == f"fetch[{rest.partition(':')[0]}]"
    assert shown == written


# -- the other modes ------------------------------------------------------------------


def test_what_a_call_writes_waits_for_its_label_but_not_longer_than_for_its_end() -> None:
    pages = Pages()
    output = make_output("line", pages.terminal)
    called, never = Call(0, "greet[0]", began=None), Call(1, "greet[1]", began=None)
    for call in (called, never):
        call.recipe.flags = SAY_BEGAN
        output.output(call, "stdout", b"hello\n")
    assert pages.out == ""
    called.label, called.began = "greet Ann", 1.0
    output.call_began(called, 1, "w1", 0.0)
    output.output(called, "stdout", b"again\n")
    assert pages.out == "greet Ann | hello\ngreet Ann | again\n"
    end(output, never)
    assert pages.out.endswith("again\ngreet[1] | hello\n")


def test_group_shows_a_block_per_call_in_the_order_of_their_ends() -> None:
    pages = Pages()
    output = make_output("group", pages.terminal)
    first, second, silent = Call(1, "a[0]"), Call(2, "a[1]"), Call(3, "a[2]")
    output.output(first, "stdout", b"one\n")
    output.output(second, "stdout", b"two\n")
    output.output(first, "stdout", b"uno")
    assert pages.out == ""
    end(output, second, seconds=0.5)
    end(output, silent)
    end(output, first, seconds=75)
    assert pages.out == (
        "--- a[1] ok (0.5 s)\ntwo\n"
        "--- a[0] ok (1 min 15 s)\none\nuno\n"
    )  # fmt: skip


def test_group_keeps_the_order_of_both_streams() -> None:
    read, write = os.pipe()
    output = make_output("group", Terminal(write, os.dup(write), {}))
    call = Call(1, "a")
    for number in range(4):
        output.output(call, "stderr" if number % 2 else "stdout", b"%d\n" % number)
    end(output, call)
    assert os.read(read, 1000) == b"--- a ok (1.2 s)\n0\n1\n2\n3\n"


def test_group_does_not_keep_much_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages()
    output = make_output("group", pages.terminal)
    call = Call(1, "a")
    chunk = b"".join(b"%07d\n" % n for n in range(8192))
    for number in range(160):
        output.output(call, "stderr" if number % 7 == 0 else "stdout", chunk)
        assert sum(len(block) for _, block in output._live[1].spool._blocks) <= SPOOL
    end(output, call)
    assert len(pages.out) + len(pages.err) == 160 * len(chunk) + 2 * len("--- a ok (1.2 s)\n")


def test_group_shows_output_early_and_with_its_name_where_there_is_no_room_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(file: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_module, "_write_all", full)
    pages = Pages()
    output = make_output("group", pages.terminal)
    call = Call(1, "a")
    chunk = b"x" * 99_999 + b"\n"
    for _ in range(30):
        output.output(call, "stdout", chunk)
    end(output, call)
    assert pages.out == f"a | {chunk.decode()}" * 30
    assert pages.err == (
        "taskrun: output of a cannot wait for its end: No space left on device\n"
    )  # fmt: skip


def test_raw_shows_whole_lines_and_nothing_else() -> None:
    a, b = Call(1, "a"), Call(2, "b")
    pages = show("raw", (a, "stdout", b"1\r2\nA"), (b, "stdout", b"B\n"), (a, "stdout", b"A"))
    assert pages.out == "1\r2\nB\nAA\n"


def test_quiet_shows_failures_with_what_they_wrote() -> None:
    pages = Pages()
    output = make_output("quiet", pages.terminal)
    good, bad = Call(1, "a[1]"), Call(2, "a[2]")
    output.output(good, "stdout", b"fine\n")
    output.output(bad, "stdout", b"reading\n")
    output.output(bad, "stderr", b"oh no")
    output.attempt_ended(attempt(bad, "error", error(), again=1.0), "w1")
    end(output, good)
    end(output, bad, "failed", error(), number=2)
    assert pages.out == ""
    assert pages.err == (
        "FAILED a[2] (attempt 2, 1.2 s, w1)\n"
        "  Traceback (most recent call last):\n"
        '    File "tasks.py", line 7, in fetch\n'
        '      raise ValueError("bad row")\n'
        "  ValueError: bad row\n"
        "  output:\n"
        "    | reading\n"
        "    ! oh no\n"
    )


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(KeyError):
        make_output("loud", Pages().terminal)


# -- failures -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(MODES))
def test_a_failure_is_shown_when_it_happens(mode: str) -> None:
    pages = Pages()
    end(make_output(mode, pages.terminal), Call(3, "fetch[3]"), "failed", error(), number=2)
    assert pages.err.startswith("FAILED fetch[3] (attempt 2, 1.2 s, w1)\n  Traceback (most")
    assert pages.err.endswith("\n  ValueError: bad row\n")


def test_the_same_traceback_is_shown_once() -> None:
    pages = Pages()
    output = make_output("line", pages.terminal)
    for number in range(3):
        end(output, Call(number, f"fetch[{number}]"), "failed", error(f"bad row {number}"))
    end(output, Call(4, "fetch[4]"), "failed", error(line=8))
    lines = pages.err.splitlines()
    assert lines[5:7] == [
        "FAILED fetch[1] (1.2 s, w1): ValueError: bad row 1, as fetch[0]",
        "FAILED fetch[2] (1.2 s, w1): ValueError: bad row 2, as fetch[0]",
    ]
    assert pages.err.count("Traceback") == 2


def test_a_tolerated_failure_says_so() -> None:
    pages = Pages()
    end(make_output("line", pages.terminal), Call(1, "a", tolerated=True), "failed", error())
    assert pages.err.startswith("FAILED a (tolerated, 1.2 s, w1)\n")


def test_a_call_that_failed_because_of_another_says_which() -> None:
    pages = Pages()
    child = Call(2, "work#12", state="failed", failure=error())
    call = Call(1, "total", state="failed", failure=error(), cause=child)
    make_output("line", pages.terminal).call_ended(call)
    assert pages.err == "FAILED total: work#12 failed\n"


def test_retries_and_lost_workers_take_a_line() -> None:
    pages = Pages()
    output = make_output("line", pages.terminal)
    call = Call(3, "fetch[3]", retries=3)
    refused = error("refused\nby the host", type_name="ConnectionError")
    lost = Failure(
        "lost",
        "WorkerLost",
        "the worker that executed fetch[3] (attempt 1) was killed by SIGKILL; "
        "its last output:\nhello",
    )
    asked = Failure("error", "Retry", "not there yet")
    output.attempt_ended(attempt(call, "lost", lost, again=0.0), "w2")
    output.attempt_ended(attempt(call, "error", refused, number=2, again=1.5), "w1")
    call.recipe.retries = None
    output.attempt_ended(attempt(call, "retry", asked, number=3, again=5.0), "w1")
    assert pages.err.splitlines() == [
        "fetch[3] lost its worker w2: killed by SIGKILL, retry 1 of 3 at once",
        "fetch[3] failed (ConnectionError: refused), retry 2 of 3 in 1.5 s",
        "fetch[3] asks for a retry (Retry: not there yet), retry in 5.0 s",
    ]


def test_a_cancelled_call_is_not_shown_as_a_failure() -> None:
    pages = Pages()
    end(make_output("line", pages.terminal), Call(1, "a"), "cancelled", error(kind="cancelled"))
    assert pages.err == ""


def test_what_taskrun_says_is_marked() -> None:
    pages = Pages()
    output = make_output("quiet", pages.terminal)
    output.notice("one\ntwo")
    output.stopping("interrupted")
    assert pages.err == "taskrun: one\ntaskrun: two\ntaskrun: stopping: interrupted\n"


def test_a_huge_message_is_cut_in_the_middle() -> None:
    pages = Pages()
    end(make_output("line", pages.terminal), Call(1, "a"), "failed", error("x" * 10_000_000))
    assert len(pages.err) < 50_000
    assert "characters left out" in pages.err


# -- tails ----------------------------------------------------------------------------


def test_the_last_64_kb_of_a_live_call_are_kept() -> None:
    output = make_output("raw", Pages().terminal)
    call = Call(1, "a")
    for number in range(20_000):
        output.output(call, "stdout" if number % 2 else "stderr", b"%09d\n" % number)
    tail = output.tail(call)
    kept = "".join(block for _, block in tail)
    assert TAIL - 10 <= len(kept) <= TAIL
    assert kept.endswith("000019998\n000019999\n")
    assert tail[-1][0] == "stdout"


def test_of_a_huge_chunk_the_last_whole_lines_are_kept() -> None:
    output = make_output("raw", Pages().terminal)
    call = Call(1, "a")
    output.output(call, "stdout", b"".join(b"%09d\n" % n for n in range(100_000)))
    (kept,) = [block for _, block in output.tail(call)]
    assert TAIL - 10 <= len(kept) <= TAIL
    assert all(len(line) == 9 for line in kept.splitlines())
    output.output(call, "stdout", b"x" * 100_000 + b"\n")
    assert output.tail(call) == [("stdout", "x" * (TAIL - 1) + "\n")]


def test_a_tail_is_dropped_when_its_call_ends_well_and_kept_a_while_when_not() -> None:
    output = make_output("quiet", Pages().terminal)
    good, bad = Call(1, "a"), Call(2, "b")
    for call in (good, bad):
        output.output(call, "stdout", b"hello\n")
    end(output, good)
    end(output, bad, "failed", error())
    assert output.tail(good) == []
    assert output.tail(bad) == [("stdout", "hello\n")]
    for number in range(100):
        other = Call(10 + number, "c")
        output.output(other, "stdout", b"hello\n")
        end(output, other, "failed", error())
    assert output.tail(bad) == []
    assert len(output._recent) <= 16
    assert not output._live
    assert not output._failing


# -- the terminal ---------------------------------------------------------------------


@pytest.fixture
def tty() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)


def on_terminal(tty: tuple[int, int], data: bytes, mode: str = "line", **environ: str) -> bytes:
    """What a task's ``data`` on stdout becomes on a terminal."""
    terminal = Terminal(tty[1], tty[1], {"TERM": "xterm", **environ})
    output = make_output(mode, terminal)
    output.output(Call(1, "a"), "stdout", data)
    return read_to_end(tty)


def read_to_end(tty: tuple[int, int]) -> bytes:
    """All that was written to a pty, which this closes."""
    os.close(tty[1])
    shown = b""
    while True:
        try:
            part = os.read(tty[0], 65536)
        except OSError:  # Linux says EIO at the end of a pty
            part = b""
        if not part:
            return shown
        shown += part


def test_colours_end_with_their_line(tty: tuple[int, int]) -> None:
    shown = on_terminal(tty, b"\x1b[31mred\nstill\n", NO_COLOR="1")
    assert shown == b"a | \x1b[31mred\x1b[0m\r\na | still\r\n"


def test_a_task_cannot_move_the_cursor(tty: tuple[int, int]) -> None:
    hostile = b"\x1b[2Aup\x1b[K \x1b]0;title\x07\x1bc\x0b\x0e\x1b[?1049hdo\b\xc2\x9b2Jne\n"
    assert on_terminal(tty, hostile, NO_COLOR="1") == b"a | up done\r\n"


def test_a_message_of_a_failure_cannot_either() -> None:
    assert (
        text.tame(b"  ValueError: one\rtwo\x1b[2J\n  three\b\n")
        == b"  ValueError: onetwo\n  three\n"
    )


def test_names_have_colours_on_a_terminal_unless_refused(tty: tuple[int, int]) -> None:
    shown = on_terminal(tty, b"hi\n")
    assert shown.startswith(b"\x1b[")
    assert shown.endswith(b" hi\r\n")


def test_bars_stand_below_each_other_on_a_terminal(tty: tuple[int, int]) -> None:
    terminal = Terminal(tty[1], tty[1], {"NO_COLOR": "1"})
    output = make_output("line", terminal)
    for name in ("fetch[10]", "a", "x" * 50):
        output.output(Call(len(name), name), "stdout", b"hi\n")
    assert read_to_end(tty).decode().splitlines() == [
        "fetch[10] | hi",
        "a         | hi",
        "x" * 18 + "..." + "x" * 19 + " | hi",
    ]


def test_a_task_has_one_colour_in_every_run() -> None:
    paint = text.Paint(True)
    assert paint.tag("fetch", "x") == paint.tag("fetch", "x") != paint.tag("words", "x")


def test_a_reader_that_goes_away_is_told_once_and_stops_nobody() -> None:
    read, write = os.pipe()
    terminal = Terminal(write, os.open(os.devnull, os.O_WRONLY), {})
    told: list[str] = []
    terminal.on_broken = told.append
    os.close(read)
    for _ in range(3):
        terminal.write_lines("stdout", "hello")
    terminal.write_lines("stderr", "hello")
    assert terminal.broken == "cannot write to stdout: Broken pipe"
    assert told == [terminal.broken]


def test_in_a_hurry_a_reader_that_reads_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("taskrun.reporting.terminal.PATIENCE", 0.1)
    read, write = os.pipe()
    terminal = Terminal(write, None, {})
    terminal.hurry()
    terminal.write_lines("stdout", "hello")
    assert os.read(read, 100) == b"hello\n" and not terminal.broken
    terminal.write_lines("stdout", b"x" * 1_000_000)
    assert terminal.broken == "cannot write to stdout: nobody reads it"
    os.close(read)


def test_in_a_hurry_a_reader_that_reads_gets_everything_however_long_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("taskrun.reporting.terminal.PATIENCE", 1.0)
    read, write = os.pipe()
    terminal = Terminal(write, None, {})
    block = (b"x" * 99 + b"\n") * 4000
    received = bytearray()

    def consume() -> None:
        while len(received) < len(block):
            received.extend(os.read(read, 4096))
            time.sleep(0.02)  # so that it takes two seconds

    reader = threading.Thread(target=consume, daemon=True)
    reader.start()
    terminal.hurry()
    terminal.write_lines("stdout", block)
    assert not terminal.broken
    reader.join(20)
    assert bytes(received) == block


def test_in_a_hurry_where_no_thread_can_start_the_stream_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    read, write = os.pipe()
    terminal = Terminal(write, None, {})
    terminal.hurry()
    monkeypatch.setattr(threading.Thread, "start", start)
    terminal.write_lines("stdout", "hello")
    assert terminal.broken == "cannot write to stdout: can't start new thread"
    os.close(read)


def test_a_descriptor_that_was_closed_from_the_start_is_nowhere() -> None:
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    terminal = Terminal(write, None, {})
    terminal.write_lines("stdout", "hello")
    terminal.write_lines("stderr", "hello")
    assert not terminal.broken


def test_a_slow_reader_of_a_non_blocking_pipe_gets_everything() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    line = b"x" * 999_999 + b"\n"
    received = bytearray()

    def consume() -> None:
        while len(received) < 3 * len(line):
            received.extend(os.read(read, 10_000))

    reader = threading.Thread(target=consume, daemon=True)
    reader.start()
    terminal = Terminal(write, None, {})
    for _ in range(3):
        terminal.write_lines("stdout", line)
    reader.join(20)
    assert bytes(received) == line * 3


def test_a_write_that_a_signal_interrupts_is_taken_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, write = os.pipe()
    terminal = Terminal(write, None, {})
    real_write, calls = os.write, 0

    def interrupted(fd: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real_write(fd, data[:4])

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        terminal.write_lines("stdout", "first line")
    terminal.write_lines("stdout", "second")
    assert os.read(read, 100) == b"first line\nsecond\n"


def test_what_was_printed_before_comes_before(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as file:
        print("hello", file=file)
        Terminal(file, None, {}).write_lines("stdout", "world")
    assert (tmp_path / "out").read_text() == "hello\nworld\n"


def test_the_width_is_the_terminals_else_the_environments_else_80() -> None:
    assert Terminal(None, None, {}).width() == 80
    assert Terminal(None, None, {"COLUMNS": "123"}).width() == 123
    assert Terminal(None, None, {"COLUMNS": "wide"}).width() == 80


def test_lines_of_several_writers_stay_whole_on_a_real_terminal(tty: tuple[int, int]) -> None:
    screen = Screen()
    reader = threading.Thread(target=read_until_closed, args=(tty[0], screen), daemon=True)
    reader.start()
    output = make_output("line", Terminal(tty[1], tty[1], {"TERM": "xterm"}))
    calls = [Call(i, f"a[{i}]") for i in range(3)]
    for number in range(300):
        output.output(calls[number % 3], "stdout", b"line %d\npart" % number)
    output.run_ended(0, "")
    os.close(tty[1])
    reader.join(20)
    assert len(screen.lines) == 303
    assert screen.lines[-1] == "a[2] | part"


def test_an_output_that_raises_is_switched_off_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages, told = Pages(), []
    output = make_output("line", pages.terminal)

    class Listener(output_module.Observer):
        def notice(self, text: str) -> None:
            told.append(text)

    def broken(*args: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(pages.terminal, "write_lines", broken)
    observers = Observers([output, Listener()])
    for _ in range(3):
        observers.output(Call(1, "a"), "stdout", b"hi\n")
    assert told == ["LineOutput failed in output and is switched off: RuntimeError: no"]


def test_the_last_one_that_shows_notices_is_not_switched_off_unseen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Shows(output_module.Observer):
        def notice(self, text: str) -> None:
            raise RuntimeError("no")

    observers = Observers([Shows(), output_module.Observer()])
    observers.notice("something")
    told = "taskrun: Shows failed in notice and is switched off: RuntimeError: no\n"
    assert capsys.readouterr().err == told
