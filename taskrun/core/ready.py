"""Ready calls, in the order in which they are to start.

Higher priority first; within one priority the task known to take longest, so that the
end of a run is not one long call on one busy core.  A task that has never been timed
comes first of all: one call of it teaches what the rest will cost.  Within a task,
first come first served.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count

from taskrun.calls import Call
from taskrun.model import Recipe

UNKNOWN = float("inf")


class Queue:
    """The ready calls of one recipe, and what a call of it costs."""

    __slots__ = ("calls", "key", "mean", "plain", "recipe", "ticket")

    def __init__(self, recipe: Recipe, ticket: int) -> None:
        # Without the function itself, which may be large: a queue outlives the calls.
        self.recipe = replace(recipe, blob=None)
        self.calls: OrderedDict[int, Call] = OrderedDict()  # by id, to take any out at once
        self.mean: float | None = None  # seconds, moving average of recent attempts
        self.ticket = ticket
        self.key: tuple[float, float, int] | None = None  # as it stands in the heap
        self.plain = not recipe.limits and all(
            name == "cpu" and amount == 1 for name, amount in recipe.resources.items()
        )

    @property
    def first(self) -> Call:
        return next(iter(self.calls.values()))

    def learn(self, seconds: float) -> bool:
        """An attempt took so long.  Whether the queue now belongs further up in the heap."""
        mean = self.mean
        self.mean = mean = seconds if mean is None else mean + 0.2 * (seconds - mean)
        return self.key is not None and mean > -self.key[1]

    def order(self) -> tuple[float, float, int]:
        mean = self.mean
        # Rounded to powers of two: noise must not reorder the queue at every call.
        known = UNKNOWN if mean is None else _magnitude(mean)
        return (-self.recipe.priority, -known, self.ticket)


def _magnitude(seconds: float) -> float:
    magnitude = 1e-3
    while magnitude < seconds:
        magnitude *= 2
    return magnitude


class ReadyCalls:
    """The queues of all recipes, best first."""

    def __init__(self) -> None:
        self.count = 0
        self._queues: dict[int, Queue] = {}
        self._tickets = count()
        self._heap: list[tuple[tuple[float, float, int], Queue]] = []

    def queue(self, recipe: Recipe) -> Queue:
        """The queue of ``recipe``."""
        queue = self._queues.get(recipe.id)
        if queue is None:
            queue = self._queues[recipe.id] = Queue(recipe, next(self._tickets))
        return queue

    def forget(self, recipe: int) -> None:
        """No calls of it are left."""
        queue = self._queues.pop(recipe, None)
        if queue is not None and queue.key is not None:
            self._heap = [entry for entry in self._heap if entry[1] is not queue]
            heapq.heapify(self._heap)

    def add(self, call: Call) -> None:
        """At the end of its queue."""
        queue = self._queues.get(call.recipe.id) or self.queue(call.recipe)
        queue.calls[call.id] = call
        self.count += 1
        if queue.key is None:
            self._enter(queue)

    def put_back(self, calls: Iterable[Call]) -> None:
        """At the front of their queues, in this order: they were next already."""
        for call in reversed(list(calls)):
            queue = self.queue(call.recipe)
            queue.calls[call.id] = call
            queue.calls.move_to_end(call.id, last=False)
            self.count += 1
            if queue.key is None:
                self._enter(queue)

    def discard(self, call: Call) -> None:
        """Take one out, wherever it stands, if it is here."""
        if self.queue(call.recipe).calls.pop(call.id, None) is not None:
            self.count -= 1

    def best(self, without: Iterable[Queue] = ()) -> Queue | None:
        """The queue to serve next, leaving out some; None when there is none."""
        skipped = []
        best = None
        while self._heap:
            key, queue = self._heap[0]
            now = queue.order()
            if key != queue.key:
                heapq.heappop(self._heap)  # it has moved up
            elif not queue.calls:
                heapq.heappop(self._heap)
                queue.key = None
            elif now != key:
                queue.key = now
                heapq.heapreplace(self._heap, (now, queue))
            elif queue in without:
                skipped.append(heapq.heappop(self._heap))
            else:
                best = queue
                break
        for entry in skipped:
            heapq.heappush(self._heap, entry)
        return best

    def move_up(self, queue: Queue) -> None:
        """It takes longer than it was known to; moving down can wait until it is on top."""
        self._enter(queue)

    def take(self, queue: Queue, count: int) -> list[Call]:
        """The first calls of a queue."""
        count = min(count, len(queue.calls))
        self.count -= count
        return [queue.calls.popitem(last=False)[1] for _ in range(count)]

    def __iter__(self) -> Iterator[Call]:
        return (call for queue in self._queues.values() for call in queue.calls.values())

    def in_order(self) -> list[Queue]:
        """Those that have calls, best first."""
        return sorted((each for each in self._queues.values() if each.calls), key=Queue.order)

    def clear(self) -> list[Call]:
        """Take all out."""
        calls = list(self)
        for queue in self._queues.values():
            queue.calls.clear()
        self.count = 0
        return calls

    def _enter(self, queue: Queue) -> None:
        queue.key = queue.order()
        heapq.heappush(self._heap, (queue.key, queue))
