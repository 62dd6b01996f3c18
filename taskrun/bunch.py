"""Small calls that travel together: one call for the scheduler, many for who made them.

What a call costs beside its execution is then shared by the *items* of a bunch.  A worker
executes them in order and tells how each of them ended, so that its death costs only the item
that it was in; what it has not begun can be cut off, to go elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

TINY: Final = frozenset((int, float, bool, type(None)))  # types of what travels as it is


class Bunch:
    """The items of one call, in order; in a call it stands in place of its arguments.

    ``items``: of each its arguments: the only one, if that is TINY, a tuple of such, or pickled
    (args, kwargs).
    ``tokens``: what ``owner`` knows each by.  ``done``: so many have ended, the first ones;
    ``base``: so many had when it was sent.  ``unwanted``: the tokens of those that are to be
    cancelled.
    """

    __slots__ = ("base", "done", "items", "owner", "tokens", "unwanted")

    def __init__(self, owner: Any, tokens: Sequence[Any], items: Sequence[Any]) -> None:
        self.owner = owner
        self.tokens = tokens
        self.items = items
        self.done = self.base = 0
        self.unwanted: list[Any] = []

    @property
    def left(self) -> int:
        """How many have not ended."""
        return len(self.items) - self.done

    def waiting(self) -> list[Any]:
        """Those that have not ended, to be sent."""
        self.base = self.done
        return list(self.items[self.done :])

    def cut(self, count: int) -> Bunch:
        """Take the last ``count`` out, as another bunch."""
        at = len(self.items) - count
        rest = Bunch(self.owner, self.tokens[at:], self.items[at:])
        rest.unwanted = self.unwanted
        self.tokens, self.items = self.tokens[:at], self.items[:at]
        return rest

    def weed(self) -> list[Any]:
        """Take out those that are unwanted and have not ended; gives their tokens."""
        done, unwanted = self.done, self.unwanted
        kept = [
            place
            for place, token in enumerate(self.tokens)
            if place < done or not any(token is other for other in unwanted)
        ]
        out = [self.tokens[place] for place in sorted({*range(len(self.tokens))} - {*kept})]
        self.items = [self.items[place] for place in kept]
        self.tokens = [self.tokens[place] for place in kept]
        return out

    def is_last_unwanted(self) -> bool:
        """Whether nothing is left but one item, which is to be cancelled."""
        return self.left == 1 and any(self.tokens[-1] is other for other in self.unwanted)


def count(calls: Mapping[int, Any]) -> int:
    """How many calls these are, each item of a bunch one of them."""
    return sum(call.blob.left if type(call.blob) is Bunch else 1 for call in calls.values())


def are_many(calls: Mapping[int, Any]) -> bool:
    """Whether these are several calls, or several items."""
    return len(calls) > 1 or count(calls) > 1
