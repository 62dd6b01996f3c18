"""What a server counts as wanted of what a run says, on a clock of the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from taskrun.demand import NO_DEMAND
from taskrun.serving import control
from taskrun.serving.control import PATIENCE, Control


class Clock:
    """Time, and a reactor's timers."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: dict[Any, Callable[[], object]] = {}

    def call_at(self, when: float, callback: Callable[[], object]) -> Any:
        timer = Timer(when, self)
        self.timers[timer] = callback
        return timer

    def go_on(self, seconds: float) -> None:
        self.now += seconds
        for timer in [timer for timer in self.timers if timer.when <= self.now]:
            self.timers.pop(timer)()


class Timer:
    def __init__(self, when: float, clock: Clock) -> None:
        self.when = when
        self.clock = clock

    def cancel(self) -> None:
        self.clock.timers.pop(self, None)


class Said:
    """A run's Control, and what the run says."""

    def __init__(self, clock: Clock) -> None:
        self.changes: list[tuple[int | None, set[str]]] = []
        reactor: Any = clock
        self._control = Control(
            reactor, "", b"", lambda: None, lambda: self.changes.append(self.now), lambda lot: None
        )

    @property
    def now(self) -> tuple[int | None, set[str]]:
        return self._control.wants, set(self._control.lanes)

    def says(self, wants: int, *lanes: str) -> None:
        said = {"wants": wants, "lanes": lanes, "demand": NO_DEMAND, "back": {}}
        self._control._on_frame(memoryview(json.dumps(said).encode()))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(control, "monotonic", lambda: made.now)
    return made


def test_more_counts_at_once_and_less_when_it_has_been_less_for_a_while(clock: Clock) -> None:
    run = Said(clock)
    run.says(2)
    run.says(5)
    assert run.now == (5, set())
    run.says(3)
    clock.go_on(PATIENCE / 2)
    run.says(1)
    assert run.now == (5, set())
    clock.go_on(PATIENCE / 2)
    assert run.now == (1, set())
    run.says(0)
    run.says(1)  # after all
    clock.go_on(PATIENCE)
    assert run.now == (1, set())


def test_slots_and_lanes_grow_at_once_each_though_there_is_less_of_the_other(clock: Clock) -> None:
    run = Said(clock)
    run.says(1, "async")
    run.says(8)  # the calls that waited are done, and those that compute begin
    assert run.now == (8, {"async"})
    clock.go_on(PATIENCE)
    assert run.now == (8, set())
    run.says(1, "thread")
    assert run.now == (8, {"thread"})
    run.says(1, "async")
    assert run.now == (8, {"async", "thread"})
    clock.go_on(PATIENCE)
    assert run.now == (1, {"async"})


def test_what_has_not_changed_is_not_dealt_anew(clock: Clock) -> None:
    run = Said(clock)
    run.says(2)
    run.says(2)
    run.says(1)
    run.says(2)
    clock.go_on(PATIENCE)
    assert run.changes == [(None, set()), (2, set())]  # its demand comes first
