"""The event that may be used in the middle of its own use, and sets that others add to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakSet

import pytest
from interrupting import at_each_step

from taskrun.flag import Flag
from taskrun.weakly import living

SECONDS = 10.0


def test_a_flag_wakes_all_who_wait_for_it() -> None:
    flag = Flag()
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(flag.wait(SECONDS)), daemon=True)
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    assert not flag.is_set()
    flag.set()
    for thread in threads:
        thread.join(SECONDS)
    assert found == [True] * 5


def test_a_wait_is_over_when_its_time_is() -> None:
    flag = Flag()
    assert not flag.wait(0.001) and not flag.wait(0) and not flag.wait(-1.0)
    flag.set()
    assert flag.wait(0) and flag.wait()
    flag.clear()
    assert not flag.wait(0)


def test_who_waits_is_woken_though_the_flag_is_cleared_at_once() -> None:
    flag = Flag()
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(flag.wait(SECONDS)), daemon=True)
    thread.start()
    while thread.is_alive():
        flag.set()
        flag.clear()
    assert found == [True]


@pytest.mark.parametrize(
    "interruption",
    [Flag.set, Flag.clear, lambda flag: flag.wait(0.0001)],
    ids=["set", "clear", "wait"],
)
@pytest.mark.parametrize(
    "action", [Flag.set, Flag.clear, lambda flag: flag.wait(0.0001)], ids=["set", "clear", "wait"]
)
def test_a_flag_may_be_used_in_the_middle_of_its_own_use(
    action: Callable[[Flag], object], interruption: Callable[[Flag], object]
) -> None:
    flag = Flag()
    assert at_each_step(lambda: action(flag), lambda: interruption(flag)) > 1


class Thing:
    """It can be referred to weakly."""


def test_a_set_is_walked_through_while_others_add_to_it() -> None:
    there, other = [Thing() for _ in range(5)], Thing()
    found: WeakSet[Thing] = WeakSet(there)

    def look() -> None:
        found.discard(other)
        assert set(living(found)) >= set(there)

    assert at_each_step(look, lambda: found.add(other)) > 5
