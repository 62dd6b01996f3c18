"""How a status looks: lines for people, without a terminal."""

from __future__ import annotations

from typing import Any

from taskrun.cli.looks import fitted, lines
from taskrun.reporting import text


def status(**more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "file": "tasks.py", "pid": 1, "seconds": 2.0, "stopping": "", "paused": False, "eta": None,
        "rate": None, "done": 0, "total": 1, "tasks": [], "nodes": [], "running": [],
        "slots": 1, "slots_here": 1, "workers": [],
    }  # fmt: skip
    return {**made, **more}


def running(label: str) -> dict[str, Any]:
    return {"call": "fetch[0]", "label": label, "worker": "w1", "since": None, "attempt": 1,
            "waits": False}  # fmt: skip


def test_a_label_neither_breaks_the_table_nor_reaches_the_terminal_as_a_command() -> None:
    shown = list(lines(status(running=[running("a\nb\x1b[2J"), running("日本")])))
    assert not any(set(line) & set("\n\x1b") for line in shown)
    *_, head, first, second = shown
    columns = [text.columns(line[: line.index("w")]) for line in (head, first, second)]
    assert columns[0] == columns[1] == columns[2]


def test_a_node_is_shown_with_its_tags() -> None:
    node = {"node": "lab2", "slots": 2, "state": "here", "workers": [], "tags": ["big", "ssd"]}
    shown = "\n".join(lines(status(nodes=[node], slots=3)))
    assert "lab2 (big, ssd)  here" in shown


def test_a_node_of_one_lane_and_one_that_is_away_leave_this_machine_its_slots() -> None:
    node = {"slots": 2, "workers": [], "tags": []}
    lane = {**node, "node": "lab1", "state": "here", "lanes": ["thread"]}
    away = {**node, "node": "lab2", "state": "away", "lanes": []}
    shown = list(lines(status(nodes=[lane, away], slots=5, slots_here=3)))[-3:]
    assert [" ".join(line.split()) for line in shown] == [
        "local here 3 0 0", "lab1 (lane thread) here 2 0 0", "lab2 away 2 0 0",
    ]  # fmt: skip


def test_what_is_watched_fits_the_screen() -> None:
    assert fitted(["short", "long" * 9], 10, 24) == ["short", "longlonglo"]
    assert fitted(["日本日本"], 5, 24) == ["日本"]
    assert fitted(list("abcdef"), 80, 7) == list("abcdef")
    assert fitted(list("abcdef"), 80, 5) == ["a", "b", "c", "and 3 more lines"]
