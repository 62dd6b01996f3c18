"""What the benchmarks have both sides do."""

from __future__ import annotations

import os
import random

CALLS = int(os.environ.get("CALLS", "1"))
STEPS = int(os.environ.get("STEPS", "100000"))
"""Steps of :func:`spin` that take 20 ms on this machine, found out beforehand."""

LEAVES = 4800
FAN_IN = 16

_draw = random.Random(1989)
DURATIONS = [min(1.0, 0.008 * _draw.paretovariate(1.2)) for _ in range(200)]
"""In seconds, with a heavy tail: 6.25 in all, the longest 1.

Of the Pareto draws one that tells schedulers apart: batches of 8, 16 or 25 calls make it 14 to
25 % longer than greedy list scheduling.
"""


def double(number: int) -> int:
    return 2 * number


def spin(steps: int) -> int:
    """Keep a core busy; a fixed number of steps, since a clock would run on while waiting.

    They are a little arithmetic: an empty loop takes up to a fifth longer or shorter, as its
    numbers happen to lie in memory.
    """
    total = 0
    for number in range(steps):
        total = (total * 31 + number) % 1_000_003
    return steps


def checksum(leaves: int) -> int:
    """The last value of the graph: of 1 plus each number, twice (itself and its neighbour)."""
    return 2 * sum(1 + number for number in range(leaves))
