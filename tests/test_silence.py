"""When the ledgers of silent workers are looked at, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from taskrun.engines import silence
from taskrun.engines.silence import MOST, SILENT, Silence


class Clock:
    """Time, and a reactor's timers; ``turn`` goes to the next of them."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def monotonic(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Any:
        self.timers.append((when, callback))
        return object()

    def turn(self) -> None:
        [(self.now, callback)] = self.timers
        self.timers.clear()
        callback()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(silence, "monotonic", made.monotonic)
    return made


def made(clock: Clock, found: bool) -> tuple[Silence[str], list[str]]:
    looked: list[str] = []

    def look(worker: str) -> bool:
        looked.append(worker)
        return found

    reactor: Any = clock
    return Silence(reactor, look), looked


def test_a_worker_is_looked_at_once_when_it_has_been_silent(clock: Clock) -> None:
    quiet, looked = made(clock, found=True)
    quiet.broken("a")
    clock.now += SILENT / 2
    quiet.broken("b")
    clock.turn()
    assert looked == ["a"]
    clock.turn()
    assert looked == ["a", "b"]
    assert not clock.timers


def test_looks_in_vain_come_ever_later_up_to_a_bound(clock: Clock) -> None:
    quiet, looked = made(clock, found=False)
    pauses = []
    for _ in range(6):
        quiet.broken("a")
        began = clock.now
        clock.turn()
        pauses.append(clock.now - began)
    assert pauses == pytest.approx([SILENT, 2 * SILENT, 4 * SILENT, MOST, MOST, MOST])
    assert looked == ["a"] * 6


def test_a_look_that_finds_something_makes_the_next_one_soon_again(clock: Clock) -> None:
    answers = [False, False, True, True]
    reactor: Any = clock
    quiet: Silence[str] = Silence(reactor, lambda worker: answers.pop(0))
    for _ in range(3):
        quiet.broken("a")
        clock.turn()
    quiet.broken("a")
    began = clock.now
    clock.turn()
    assert clock.now - began == pytest.approx(SILENT)


def test_a_worker_that_is_gone_is_not_looked_at(clock: Clock) -> None:
    quiet, looked = made(clock, found=True)
    quiet.broken("a")
    quiet.broken("b")
    quiet.forget("a")
    clock.turn()
    assert looked == ["b"]
