"""The calls of a Pool that wait: how many of them travel together."""

from __future__ import annotations

from typing import Any

import pytest

from taskrun.errors import CallCancelled
from taskrun.model import Recipe
from taskrun.pooling.inbox import BUNCH_ITEMS, Inbox

TINY, LONG = 1e-6, 0.02  # seconds


class _Owner:
    def items_ended(self, tokens: Any, values: Any, row: Any) -> None: ...

    def items_failed(self, tokens: Any, error: Any) -> None:
        for token in tokens:
            token.failed(error)

    def is_withdrawn(self, token: Any) -> bool:
        return bool(getattr(token, "call", None))


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
        self._where, self._value = recipe, args
        self.call: int | None = None
        self.told: list[BaseException] = []

    def ended(self, call: Any, last: Any, pid: int | None) -> None: ...

    def failed(self, error: BaseException) -> None:
        self.told.append(error)


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


@pytest.mark.parametrize("how", ["job", "token", "single"])
@pytest.mark.parametrize("at_once", [False, True])
def test_at_the_end_all_that_wait_are_told_once_and_of_each_what_became_of_it(
    how: str, at_once: bool
) -> None:
    inbox, recipe, owner, over = Inbox(bunches=True), Recipe(1, "double", b""), _Owner(), OSError()
    inbox.singles = owner
    tokens = [_Token(recipe, number) for number in range(4)]
    for token in tokens:
        entry = (recipe, b"", None if how == "job" else owner, token)
        inbox.entries.append(token if how == "single" else entry)
    inbox.withdraw(tokens[1])
    if at_once:
        inbox.tell_withdrawn()
    inbox.withdraw(tokens[2])
    inbox.fail(over)
    inbox.tell_withdrawn()
    assert not inbox
    assert tokens[0].told == tokens[3].told == [over]
    for token in tokens[1:3]:
        (told,) = token.told
        assert isinstance(told, CallCancelled) and "it was asked for" in str(told)
