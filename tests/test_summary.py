"""The last word of a run."""

from __future__ import annotations

import re
import sys

import pytest
from watched import Call, Pages, attempt, end, error, run_of

from taskrun.model import Failure
from taskrun.reporting import text
from taskrun.reporting.summary import KEPT, KEPT_BYTES, Account, Failed, Summary, Tally, render
from taskrun.reporting.text import Captured, Paint

PLAIN = Paint(False)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def started(*tasks: str, tails: dict[int, Captured] | None = None) -> tuple[Summary, Pages, Clock]:
    pages, clock = Pages(), Clock()
    summary = Summary(pages.terminal, lambda call: (tails or {}).get(call.id, []), clock)
    summary.run_started(run_of(*tasks))
    return summary, pages, clock


def fan(summary: Summary, task: str, count: int, first: int) -> list[Call]:
    calls = [Call(first + i, f"{task}[{i}]") for i in range(count)]
    summary.calls_added(calls)
    return calls


# -- golden texts ---------------------------------------------------------------------


def test_a_run_of_one_task_that_went_well_takes_one_line() -> None:
    summary, pages, clock = started("square")
    for call in fan(summary, "square", 20_001, 0):
        end(summary, call, seconds=0.0001)
    clock.now += 1.32
    summary.run_ended(0, "")
    assert pages.err == "20,001 calls in 1.3 s: all ok\n"


def test_a_run_of_several_tasks_has_a_table() -> None:
    summary, pages, clock = started("urls", "fetch", "total", "unused")
    for task, count, seconds in [("urls", 1, 0.004), ("fetch", 20, 0.3), ("total", 1, 200)]:
        for call in fan(summary, task, count, 100 * count + len(task)):
            end(summary, call, seconds=seconds)
    clock.now += 210
    summary.run_ended(0, "")
    assert pages.err == (
        "\n"
        "urls   1 ok        4 ms\n"
        "fetch  20 ok      6.0 s\n"
        "total  1 ok   3 min 20 s\n"
        "\n"
        "slowest  total[0]  3 min 20 s\n"
        "\n"
        "22 calls in 3 min 30 s: all ok\n"
    )


def a_failed_run() -> tuple[Summary, Pages]:
    tails: dict[int, Captured] = {
        13: [("stdout", "reading\n"), ("stderr", "row 17 is odd\nreally\n")]
    }
    summary, pages, clock = started("urls", "fetch", "words", "total", tails=tails)
    (urls,) = fan(summary, "urls", 1, 1)
    end(summary, urls, seconds=0.1)
    fetch, words = fan(summary, "fetch", 6, 10), fan(summary, "words", 6, 20)
    (total,) = fan(summary, "total", 1, 30)
    summary.attempt_ended(attempt(fetch[3], "error", error(), again=1.0), "w1")
    end(summary, fetch[3], "failed", error(), number=2, seconds=8.1)
    end(summary, fetch[4], "failed", error(line=9), seconds=0.2)
    end(summary, fetch[5], "failed", error(line=9), seconds=0.2)
    for call in fetch[:3]:
        end(summary, call, seconds=0.05)
    for call in words[:3]:
        end(summary, call, seconds=0.7)
    for call, cause in zip([*words[3:], total], [fetch[3], *fetch[4:], fetch[3]], strict=True):
        call.state, call.cause = "skipped", cause
        summary.call_ended(call)
    clock.now += 12.5
    summary.run_ended(1, "")
    return summary, pages


def test_a_failed_run_ends_with_the_root_failure_and_the_verdict() -> None:
    _, pages = a_failed_run()
    assert pages.err == (
        "\n"
        "urls   1 ok                 0.1 s\n"
        "fetch  3 ok, 3 failed       9.8 s\n"
        "words  3 ok, 3 skipped      2.1 s\n"
        "total  1 skipped\n"
        "\n"
        "slowest  fetch[3] (attempt 2)  8.1 s\n"
        "         fetch[3]  1.2 s\n"
        "\n"
        "retried  fetch[3]  once\n"
        "\n"
        "words: 3 skipped, because fetch[3], fetch[4] and fetch[5] failed\n"
        "total: 1 skipped, because fetch[3] failed\n"
        "\n"
        "FAILED fetch[4] (0.2 s, w1)\n"
        "  Traceback (most recent call last):\n"
        '    File "tasks.py", line 9, in fetch\n'
        '      raise ValueError("bad row")\n'
        "  ValueError: bad row\n"
        "  and 1 more call of fetch failed the same way: fetch[5]\n"
        "\n"
        "FAILED fetch[3] (attempt 2, 8.1 s, w1)\n"
        "  Traceback (most recent call last):\n"
        '    File "tasks.py", line 7, in fetch\n'
        '      raise ValueError("bad row")\n'
        "  ValueError: bad row\n"
        "  output:\n"
        "    | reading\n"
        "    ! row 17 is odd\n"
        "    ! really\n"
        "\n"
        "14 calls in 12.5 s: 7 ok, 3 failed, 4 skipped\n"
    )


def test_colour_changes_nothing_but_colour() -> None:
    summary, pages = a_failed_run()
    coloured = render(summary.account, Paint(True))
    assert coloured != pages.err
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == pages.err


def test_it_fits_80_columns() -> None:
    _, pages = a_failed_run()
    assert max(map(len, pages.err.splitlines())) <= 80


def test_a_run_without_calls_says_so() -> None:
    assert render(Account(), PLAIN) == "no calls\n"
    assert render(Account(reason="interrupted", status=130), PLAIN) == "no calls: interrupted\n"


def test_a_run_that_was_stopped_says_why_and_what_was_not_run() -> None:
    summary, pages, clock = started("a")
    calls = fan(summary, "a", 5, 0)
    end(summary, calls[0])
    end(summary, calls[1], "cancelled")
    clock.now += 1
    summary.run_ended(130, "interrupted")
    assert pages.err.endswith(
        "\n5 calls in 1.0 s: 1 ok, 1 cancelled, 3 not run\nstopped: interrupted\n"
    )  # fmt: skip


# -- folding --------------------------------------------------------------------------


def test_calls_that_failed_the_same_way_are_told_once() -> None:
    summary, pages, _ = started("fetch")
    for call in fan(summary, "fetch", 58, 0):
        end(summary, call, "failed", error())
    summary.run_ended(1, "")
    assert pages.err.count("Traceback") == 1
    assert (
        "  and 57 more calls of fetch failed the same way: "
        "fetch[1], fetch[2], fetch[3], fetch[4], ...\n"
    ) in pages.err


def test_calls_that_failed_in_the_same_place_keep_their_messages() -> None:
    summary, pages, _ = started("fetch")
    for call in fan(summary, "fetch", 3, 0):
        end(summary, call, "failed", error(f"bad row {call.id}"))
    summary.run_ended(1, "")
    assert (
        "  and 2 more calls of fetch failed likewise:\n"
        "    fetch[1]: ValueError: bad row 1\n"
        "    fetch[2]: ValueError: bad row 2\n"
    ) in pages.err


def test_lost_workers_are_told_once_as_well() -> None:
    summary, pages, _ = started("a")
    for call in fan(summary, "a", 3, 0):
        message = f"the worker that executed {call.title} (attempt 1) was killed by SIGKILL"
        end(summary, call, "failed", Failure("lost", "WorkerLost", message))
    summary.run_ended(1, "")
    assert pages.err.count("FAILED") == 1
    assert "    a[2]: WorkerLost: the worker that executed a[2]" in pages.err


def test_many_different_failures_are_told_in_a_line_each_but_the_last_ten() -> None:
    summary, pages, _ = started("fetch")
    for call in fan(summary, "fetch", 100, 0):
        end(summary, call, "failed", error(line=call.id))
    summary.run_ended(1, "")
    assert pages.err.count("Traceback") == 10
    assert len(re.findall(r"^FAILED fetch.*: ValueError: bad row$", pages.err, re.M)) == 20
    assert "and 70 more failures\n" in pages.err
    assert pages.err.rstrip().splitlines()[-7].startswith("FAILED fetch[0]")


def test_skips_are_folded_by_reason() -> None:
    summary, pages, _ = started("words")
    calls = fan(summary, "words", 60, 0)
    causes = [Call(100 + i, f"fetch[{i}]", "failed") for i in range(57)]
    for call, cause in zip(calls, causes, strict=False):
        call.state, call.cause = "skipped", cause
        summary.call_ended(call)
    for call in calls[57:]:
        end(summary, call, "skipped", Failure("skipped", "Skip", "nothing\nto do"), seconds=0)
    summary.run_ended(1, "")
    assert pages.err.splitlines()[1:3] == [
        "words: 57 skipped, because fetch[0], fetch[1], fetch[2], fetch[3] and others failed",
        "words: 3 skipped, because it says: nothing\\nto do",
    ]


def test_a_call_that_failed_because_of_another_is_not_a_failure_of_its_own() -> None:
    summary, pages, _ = started("total", "work")
    (total,) = fan(summary, "total", 1, 0)
    (work,) = fan(summary, "work", 1, 1)
    end(summary, work, "failed", error())
    total.state, total.cause, total.failure = "failed", work, error()
    summary.call_ended(total)
    summary.run_ended(1, "")
    assert "total: 1 failed, because work[0] failed\n" in pages.err
    assert pages.err.count("FAILED") == 1


# -- what counts as what --------------------------------------------------------------


def test_tolerated_failures_are_marked_and_never_the_root() -> None:
    summary, pages, _ = started("fetch")
    calls = fan(summary, "fetch", 3, 0)
    end(summary, calls[0], "failed", error())
    calls[1].tolerated = True
    end(summary, calls[1], "failed", error(line=8))
    end(summary, calls[2])
    summary.run_ended(1, "")
    assert pages.err.index("failed, tolerated: fetch[1]") < pages.err.index("FAILED fetch[0]")
    assert "1 ok, 1 failed, 1 failed (tolerated)" in pages.err


def test_a_failure_that_its_parent_catches_later_is_tolerated() -> None:
    summary, pages, _ = started("work")
    (work,) = fan(summary, "work", 1, 0)
    work.parent = Call(5, "total")
    end(summary, work, "failed", error())
    work.tolerated = True  # the parent ended well
    summary.run_ended(0, "")
    assert "failed, tolerated: work[0]" in pages.err
    assert "1 failed (tolerated)" in pages.err


def test_the_root_is_what_kept_most_calls_from_running() -> None:
    failures = [
        Failed("a", f"a[{i}]", error(line=i), skipped=n) for i, n in enumerate([0, 5, 5, 1])
    ]
    account = Account(tasks={"a": Tally(added=4, failed=4)}, failures=failures, status=1)
    order = re.findall(r"FAILED (\S+)", render(account, PLAIN))
    assert order == ["a[0]", "a[2]", "a[3]", "a[1]"]


def test_only_slow_calls_are_named_as_slow_and_only_five_of_them() -> None:
    summary, pages, _ = started("a")
    for call in fan(summary, "a", 100, 0):
        end(summary, call, seconds=call.id / 10)
    summary.run_ended(0, "")
    lines = pages.err.splitlines()[1:]
    assert lines[0] == "slowest  a[99]  9.9 s"
    assert lines[4:6] == ["         a[95]  9.5 s", ""]


def test_a_call_retried_twice_is_one_call_retried_twice() -> None:
    summary, pages, _ = started("a")
    for call in fan(summary, "a", 8, 0):
        for number in (1, 2) if call.id == 7 else (1,):
            summary.attempt_ended(attempt(call, "error", error(), number=number, again=1.0), "w")
        end(summary, call, number=3)
    summary.run_ended(0, "")
    retried = pages.err[pages.err.index("retried") :].splitlines()
    assert retried[:2] == ["retried  a[7]  twice", "         a[0]  once"]
    assert retried[5] == "         and 3 more calls"


def test_long_output_is_cut_to_its_last_lines() -> None:
    lines = "".join(f"line {n}\n" for n in range(1000))
    summary, pages, _ = started("a", tails={0: [("stdout", lines)]})
    end(summary, fan(summary, "a", 1, 0)[0], "failed", error())
    summary.run_ended(1, "")
    assert "  output, its last 30 lines:\n    | line 970\n" in pages.err
    assert pages.err.count("    | ") == 30


# -- memory ---------------------------------------------------------------------------


def test_memory_does_not_grow_with_calls_that_end_well() -> None:
    summary, _, _ = started("a")
    call = Call(0, "a")
    for number in range(20_000):
        call.id = number
        summary.calls_added([call])
        end(summary, call, seconds=2.0)
    held = [name for name, value in vars(summary).items() if hasattr(value, "__len__") and value]
    assert held == []
    assert len(summary.account.slowest) == 5


def test_memory_is_bounded_when_everything_fails_differently() -> None:
    tail: Captured = [("stdout", "x" * 65_000)]
    summary, pages, _ = started("a", tails=dict.fromkeys(range(KEPT * 3), tail))
    for call in fan(summary, "a", KEPT * 3, 0):
        end(summary, call, "failed", error(line=call.id))
    kept = sum(len(block) for failed in summary.account.failures for _, block in failed.captured)
    assert len(summary.account.failures) == KEPT
    assert kept <= KEPT_BYTES
    assert max(len(vars(summary)[name]) for name in ("_failed", "_by_call", "_undecided")) <= KEPT
    summary.run_ended(1, "")
    assert f"{KEPT * 3:,} failed" in pages.err
    assert sys.getsizeof(pages.err) < 100_000


# -- text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 ms"), (0.0123, "12 ms"), (0.0996, "0.1 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"),
     (125, "2 min 5 s"), (3599.6, "1 h 0 min"), (3780, "1 h 3 min"), (-1, "0 ms")],
)  # fmt: skip
def test_durations_read_like_durations(seconds: float, expected: str) -> None:
    assert text.duration(seconds) == expected
