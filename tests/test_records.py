"""The job log and the events of ``--json``, as their documentation says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from watched import Call, Pages, attempt, end, error, run_of

from taskrun.errors import UsageError
from taskrun.model import Failure
from taskrun.reporting.records import CALLS_PER_EVENT, COLUMNS, Events, JobLog

DOCUMENT = (Path(__file__).parent.parent / "docs" / "events.md").read_text()


class Turn:
    """A reactor's ``soon``: what is asked for is done at :meth:`end`."""

    def __init__(self) -> None:
        self._asked: list[Callable[[], None]] = []

    def __call__(self, callback: Callable[[], None]) -> None:
        self._asked.append(callback)

    def end(self) -> None:
        asked, self._asked = self._asked, []
        for callback in asked:
            callback()


def silent(text: str) -> None:
    raise AssertionError(f"nothing was to be said: {text}")


def started(path: Path, *more: Any, **how: Any) -> JobLog:
    """The log of a run that has started."""
    log = JobLog(path, *more, **how)
    log.run_started(None)
    return log


def rows(path: Path) -> list[dict[str, str]]:
    header, *lines = [line.split("\t") for line in path.read_text().split("\n")[:-1]]
    assert tuple(header) == COLUMNS
    return [dict(zip(header, line, strict=True)) for line in lines]


# -- the job log ----------------------------------------------------------------------


def test_a_row_is_there_as_soon_as_its_attempt_ended(tmp_path: Path) -> None:
    log = started(tmp_path / "log", silent)
    call = Call(3, "fetch[3]")
    log.attempt_ended(attempt(call, "error", error(), again=1.0), "w1")
    assert rows(tmp_path / "log") == [
        {
            "seq": "1",
            "task": "fetch",
            "call": "fetch[3]",
            "attempt": "1",
            "worker": "w1",
            "start": "2023-11-14T22:13:20.250Z",
            "seconds": "1.200000",
            "outcome": "error",
            "message": "bad row",
        }
    ]
    log.attempt_ended(attempt(call, number=2), "w2")
    assert [row["outcome"] for row in rows(tmp_path / "log")] == ["error", "value"]


def test_a_message_stays_in_its_field(tmp_path: Path) -> None:
    log = started(tmp_path / "log", silent)
    nasty = 'tab\there\nline \\n C:\\new \x85 \u2028 \udcff "quoted" é'
    log.attempt_ended(attempt(Call(1, "a"), "error", error(nasty)), "")
    log.attempt_ended(attempt(Call(2, "b"), "error", error("x" * 1_000_000)), "")
    first, second = rows(tmp_path / "log")
    assert first["message"] == (
        'tab\\there\\nline \\\\n C:\\\\new \\x85 \\u2028 \\udcff "quoted" é'
    )  # fmt: skip
    assert second["message"] == "x" * 4000 + "..."


def test_an_attempt_whose_beginning_is_not_known_began_before_its_end(tmp_path: Path) -> None:
    log = started(tmp_path / "log", silent, now=lambda: 1_700_000_010.0)
    log.attempt_ended(attempt(Call(1, "a"), "lost", error(), began=-1.0, seconds=10.0), "w1")
    assert rows(tmp_path / "log")[0]["start"] == "2023-11-14T22:13:20.000Z"


def test_the_rows_of_one_turn_are_written_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = Turn()
    log = started(tmp_path / "log", silent, turn)
    written: list[int] = []
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (written.append(1), real_write(fd, data))[1])
    for number in range(100):
        log.attempt_ended(attempt(Call(number, f"a[{number}]")), "w1")
    assert written == []
    turn.end()
    assert len(written) == 1
    assert len(rows(tmp_path / "log")) == 100


def test_a_log_that_exists_is_replaced_once_the_run_starts(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("old\n" * 1000)
    log = JobLog(tmp_path / "log", silent)
    assert (tmp_path / "log").read_text() == "old\n" * 1000
    log.run_started(None)
    log.run_ended(0, "")
    assert rows(tmp_path / "log") == []


@pytest.mark.parametrize("where", ["no/such/folder/log", "."])
def test_a_log_that_cannot_be_opened_is_a_usage_error(tmp_path: Path, where: str) -> None:
    with pytest.raises(UsageError, match="cannot write the job log"):
        JobLog(tmp_path / where, silent)


def test_a_log_that_cannot_take_its_first_line_is_given_up_and_the_run_goes_on() -> None:
    said: list[str] = []
    log = started(Path("/dev/full"), said.append)
    log.attempt_ended(attempt(Call(1, "a")), "w1")
    log.run_ended(0, "")
    assert len(said) == 1 and "No space left" in said[0]


def test_when_the_disk_is_full_the_log_ends_with_a_whole_row_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    turn = Turn()
    log = started(tmp_path / "log", said.append, turn)
    for number in range(3):
        log.attempt_ended(attempt(Call(number, f"a[{number}]")), "w1")
    real_write, room = os.write, 100

    def nearly_full(fd: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        written, room = real_write(fd, data[:room]), 0
        return written

    monkeypatch.setattr(os, "write", nearly_full)
    turn.end()
    log.attempt_ended(attempt(Call(9, "a[9]")), "w1")
    turn.end()
    log.run_ended(0, "")
    assert [row["call"] for row in rows(tmp_path / "log")] == ["a[0]"]
    assert said == [
        f"cannot write the job log {tmp_path / 'log'}: No space left on device; "
        "it ends here, the run goes on"
    ]


def test_a_log_is_valid_after_kill_9(tmp_path: Path) -> None:
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from watched import Call, attempt\n"
        "from taskrun.reporting.records import JobLog\n"
        "log = JobLog(sys.argv[1], print)\n"
        "log.run_started(None)\n"
        "for number in range(1000):\n"
        "    log.attempt_ended(attempt(Call(number, f'a[{number}]')), 'w1')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "log"), str(Path(__file__).parent)]
    assert subprocess.run(command, timeout=60).returncode == -9
    assert [row["seq"] for row in rows(tmp_path / "log")] == [str(n + 1) for n in range(1000)]


# -- events ---------------------------------------------------------------------------


def parse(pages: Pages) -> list[dict[str, Any]]:
    assert pages.err == ""
    lines = pages.out.splitlines()  # also at what only some readers take for the end of a line
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def a_whole_run(events: Events) -> None:
    """Every event there is, at least once."""
    child, call = Call(2, "work#0", parent=Call(1, "total")), Call(1, "total")
    events.run_started(run_of("total"))
    events.worker_changed("w1", "started, pid 31")
    events.calls_added([call, child])
    events.call_began(call, 1, "w1", 1_700_000_000.5)
    events.output(call, "stdout", b"one\ntwo")
    events.progressed(call, 40, float("inf"))
    events.notice("careful")
    events.stopping("interrupted")
    end(events, child, "failed", error())
    end(events, call)
    events.result(call, "112")
    events.run_ended(130, "interrupted")


def test_the_events_of_a_run_can_be_read_line_by_line() -> None:
    pages = Pages()
    a_whole_run(Events(pages.terminal, now=lambda: 1_700_000_001.0))
    events = parse(pages)
    assert [event["event"] for event in events] == [
        "run_started", "worker", "calls_added", "call_began", "output", "progress", "notice",
        "stopping", "attempt_ended", "call_ended", "output", "attempt_ended", "call_ended",
        "result", "run_ended",
    ]  # fmt: skip
    assert events[2]["calls"][1] == {"id": 2, "call": "work#0", "task": "work", "parent": 1}
    assert [event["text"] for event in events if event["event"] == "output"] == ["one\n", "two\n"]
    assert events[5] | {"done": 40, "total": None} == events[5]
    assert events[8]["failure"]["message"] == "bad row"
    assert events[-1]["counts"] == {"ok": 1, "failed": 1, "skipped": 0, "cancelled": 0}


def test_all_that_can_be_written_arrives_as_text() -> None:
    pages = Pages()
    events = Events(pages.terminal)
    call = Call(1, "a", label="bad \udcff name")
    for data in (b"\xff\x00\x1b[31m \xe2\x80", b"\xa8 \xc2\x85 caf\xc3\xa9\r\n"):
        events.output(call, "stdout", data)
    events.call_began(call, 1, "w1", 0.0)
    output, began = parse(pages)
    assert output["text"] == "\\xff\x00\x1b[31m \u2028 \x85 café\r\n"
    assert began["title"] == "bad \\udcff name"
    assert pages.out.count("\n") == len(pages.out.splitlines()) == 2


def test_a_very_long_line_comes_in_pieces() -> None:
    pages = Pages()
    events = Events(pages.terminal)
    line = b"x" * (17 * 1024 * 1024)
    events.output(Call(1, "a"), "stdout", line)
    events.output(Call(1, "a"), "stdout", b"\n")
    first, second = parse(pages)
    assert first["text"] + second["text"] == line.decode() + "\n"


def test_many_calls_are_added_by_the_thousand() -> None:
    pages = Pages()
    Events(pages.terminal).calls_added([Call(n, f"a[{n}]") for n in range(2500)])
    events = parse(pages)
    assert [len(event["calls"]) for event in events] == [CALLS_PER_EVENT, CALLS_PER_EVENT, 500]


def test_the_events_of_one_turn_are_written_in_one_piece() -> None:
    pages, turn = Pages(), Turn()
    events = Events(pages.terminal, turn)
    for number in range(10):
        end(events, Call(number, "a"))
    assert pages.out == ""
    turn.end()
    assert len(parse(pages)) == 20
    events.run_ended(0, "")
    assert len(parse(pages)) == 21


def test_output_that_belongs_to_no_call_has_no_id() -> None:
    pages = Pages()
    events = Events(pages.terminal)
    events.output(None, "stderr", b"bye")
    events.run_ended(0, "")
    assert parse(pages)[0]["id"] is None


def test_a_skip_gives_its_reason() -> None:
    pages = Pages()
    end(Events(pages.terminal), Call(1, "a"), "skipped", Failure("skipped", "Skip", "old"))
    assert [event["failure"]["message"] for event in parse(pages)] == ["old", "old"]


def test_only_a_failure_is_said_to_be_tolerated() -> None:
    pages = Pages()
    events = Events(pages.terminal)
    for number, state in enumerate(("ok", "failed", "skipped", "cancelled")):
        end(events, Call(number, "a", tolerated=True), state)
    told = {e["state"]: e["tolerated"] for e in parse(pages) if e["event"] == "call_ended"}
    assert told == {"ok": False, "failed": True, "skipped": False, "cancelled": False}


# -- the documentation ----------------------------------------------------------------


def documented() -> dict[str, tuple[set[str], dict[str, Any]]]:
    """Event -> (the fields of its table, its example)."""
    found = {}
    for section in DOCUMENT.split("\n### ")[1:]:
        name, _, body = section.partition("\n")
        fields = set(re.findall(r"^\| `(\w+)` \|", body.partition("```")[0], re.MULTILINE))
        (example,) = re.findall(r"```json\n(.*)\n```", body)
        found[name] = fields, json.loads(example)
    return found


def shape(value: Any) -> Any:
    """The fields of ``value``, and of the objects in it."""
    if isinstance(value, dict):
        return {
            key: shape(item) for key, item in value.items() if isinstance(item, dict | list)
        } | {key: None for key, item in value.items() if not isinstance(item, dict | list)}
    return [shape(value[0])] if isinstance(value, list) and value else None


def test_each_example_has_the_documented_fields() -> None:
    for name, (fields, example) in documented().items():
        assert example["event"] == name
        assert set(example) == fields | {"v", "event", "time"}


def test_each_event_has_the_documented_fields_and_no_event_is_undocumented() -> None:
    pages = Pages()
    a_whole_run(Events(pages.terminal))
    seen = {event["event"]: event for event in parse(pages) if event.get("failure", 1)}
    assert set(seen) == set(documented())
    for name, (fields, example) in documented().items():
        assert set(seen[name]) == fields | {"v", "event", "time"}
        for key, value in example.items():
            if isinstance(value, dict | list) and seen[name][key]:
                assert shape(seen[name][key]) == shape(value), (name, key)


def test_the_documented_columns_are_those_of_the_job_log() -> None:
    table = DOCUMENT.split("## The job log")[1]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == COLUMNS
    header, row = re.findall(r"```tsv\n(.*)\n(.*)\n```", table)[0]
    assert tuple(header.split("\t")) == COLUMNS
    assert len(row.split("\t")) == len(COLUMNS)
