"""The calls of a Pool that wait: how many of them travel together."""

from __future__ import annotations

from typing import Any

from taskrun.model import Recipe
from taskrun.pooling.inbox import BUNCH_ITEMS, Inbox

TINY, LONG = 1e-6, 0.02  # seconds


class _Owner:
    def items_ended(self, tokens: Any, values: Any, row: Any) -> None: ...

    def items_failed(self, tokens: Any, error: Any) -> None: ...

    def is_withdrawn(self, token: Any) -> bool:
        return False


def _sizes(*told: list[float]) -> list[int]:
    """Of the bunches that are made when workers have told so much, each time, of seconds."""
    inbox, recipe, owner = Inbox(bunches=True), Recipe(1, "double", b""), _Owner()
    for seconds in told:
        inbox.learn(recipe, seconds)
    for number in range(4 * BUNCH_ITEMS):
        inbox.entries.append((recipe, (number,), owner, number))
    return [len(bunch.items) for bunch in inbox.next_bunches(recipe, owner, 4, workers=1)]


def test_calls_of_unknown_length_travel_alone() -> None:
    assert _sizes() == [1] * 4


def test_tiny_calls_travel_together_though_one_of_them_had_to_wait_for_its_core() -> None:
    assert _sizes([TINY] * 99 + [LONG]) == [BUNCH_ITEMS] * 4
    assert _sizes([TINY] * 9, [LONG], [TINY] * 9) == [BUNCH_ITEMS] * 4


def test_where_every_tenth_is_long_few_travel_together() -> None:
    assert _sizes(([TINY] * 9 + [LONG]) * 10) == [1] * 4


def test_calls_that_become_long_soon_travel_alone() -> None:
    tiny, long = [[TINY] * 9] * 5, [[LONG]] * 3
    assert _sizes(*tiny, *long) == [1] * 4


class _Token:
    def __init__(self, recipe: Recipe, args: Any) -> None:
        self._recipe, self._args = recipe, args


def test_calls_of_all_kinds_are_taken_in_the_order_in_which_they_came() -> None:
    inbox, singles, owner = Inbox(bunches=True), _Owner(), _Owner()
    inbox.singles = singles
    double, other = Recipe(1, "double", b""), Recipe(2, "other", b"")
    for recipe in (double, other):
        inbox.learn(recipe, [TINY] * 9)
    inbox.entries.extend(_Token(double, number) for number in range(3))
    inbox.entries.append(_Token(other, 3))
    inbox.entries.extend((double, number, owner, number) for number in (4, 5))
    inbox.entries.append(_Token(double, 6))
    taken = []
    while inbox:
        recipe, whose = inbox.first()
        assert whose is not None
        (bunch,) = inbox.next_bunches(recipe, whose, 1, workers=1)
        taken.append((recipe.name, bunch.owner, list(bunch.items)))
    assert taken == [
        ("double", singles, [0, 1, 2]), ("other", singles, [3]), ("double", owner, [4, 5]),
        ("double", singles, [6]),
    ]  # fmt: skip
