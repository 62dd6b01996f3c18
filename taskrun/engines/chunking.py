"""Which calls go to a foreign engine together.

A message to an engine costs a millisecond or more, a trivial call some microseconds.  So
calls of one task go in chunks of some tens of milliseconds, by measured duration; those that
may be ended on their own, or that take large values, go alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final

from taskrun.model import Recipe

CHUNK_SECONDS: Final = 0.045
CALL_SECONDS: Final = 40e-6  # what a call costs beside its own code
MOST: Final = 1024  # calls of a chunk


class Backlog:
    """The calls that the engine has not been given yet, by recipe."""

    def __init__(self) -> None:
        self.count = 0
        self._queues: OrderedDict[int, OrderedDict[int, Any]] = OrderedDict()
        self._recipes: dict[int, Recipe] = {}
        self._means: dict[int, float] = {}

    def add(self, call: Any) -> None:
        """At the end of its queue."""
        recipe = call.recipe
        if recipe.id not in self._queues:
            self._queues[recipe.id] = OrderedDict()
            self._recipes[recipe.id] = recipe
        self._queues[recipe.id][call.id] = call
        self.count += 1

    def learn(self, recipe: int, seconds: float) -> None:
        """An attempt took so long."""
        mean = self._means.get(recipe)
        self._means[recipe] = seconds if mean is None else mean + 0.1 * (seconds - mean)

    def take(self, threads: int) -> list[Any]:
        """The calls that go together next; few enough that all threads get some."""
        queue, recipe = self._best()
        share = -(-len(queue) // (2 * threads))
        count = 1 if goes_alone(recipe) else min(self._size(recipe.id), share, MOST)
        taken = [queue.popitem(last=False)[1] for _ in range(count)]
        self.count -= count
        if not queue:
            del self._queues[recipe.id]
        return taken

    def _best(self) -> tuple[OrderedDict[int, Any], Recipe]:
        ids = iter(self._queues)
        best = next(ids)
        for id in ids:
            if self._recipes[id].priority > self._recipes[best].priority:
                best = id
        return self._queues[best], self._recipes[best]

    def _size(self, recipe: int) -> int:
        mean = self._means.get(recipe)
        return 1 if mean is None else max(1, int(CHUNK_SECONDS / (mean + CALL_SECONDS)))

    def remove(self, call: Any) -> bool:
        """Take a call out; False where it is not here."""
        queue = self._queues.get(call.recipe.id)
        if queue is None or queue.pop(call.id, None) is None:
            return False
        self.count -= 1
        if not queue:
            del self._queues[call.recipe.id]
        return True

    def give_back(self, count: int) -> list[tuple[int, int]]:
        """Take out up to ``count`` calls, the last first; gives each with its attempt."""
        back: list[tuple[int, int]] = []
        for recipe in reversed(list(self._queues)):
            queue = self._queues[recipe]
            while queue and len(back) < count:
                call = queue.popitem()[1]
                back.append((call.id, call.attempt))
            if not queue:
                del self._queues[recipe]
        self.count -= len(back)
        back.reverse()
        return back

    def clear(self) -> None:
        """Forget all of them."""
        self._queues.clear()
        self.count = 0


def goes_alone(recipe: Recipe) -> bool:
    """Whether calls of a recipe may be ended on their own, and so run in a kept process."""
    return recipe.timeout is not None or recipe.cancellable


def split_at_inputs(calls: list[Any], inputs: Iterable[bool]) -> tuple[list[Any], list[Any]]:
    """The first of ``calls`` that can go together, and the rest: a call that takes large
    values goes alone, so that the engine need not have many of them in one place."""
    for at, takes in enumerate(inputs):
        if takes:
            cut = at or 1
            return calls[:cut], calls[cut:]
    return calls, []
