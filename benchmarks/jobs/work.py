"""What the benchmarks have both sides do."""

from __future__ import annotations

import json
import os
import random

CALLS = int(os.environ.get("CALLS", "1"))
STEPS: dict[str, int] = json.loads(os.environ.get("STEPS", "{}"))
"""How many steps of each of LOOPS take 20 ms on this machine, found out beforehand."""

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


# Pure Python that keeps a core busy for a fixed number of steps: a clock would run on while
# the process waits.  There are several kinds, since each by itself takes up to a tenth longer
# or shorter, in a bare process as in any other, as its numbers happen to lie in memory.


def arithmetic(steps: int) -> None:
    total = 0
    for number in range(steps):
        total = (total * 31 + number) % 1_000_003


def squares(steps: int) -> None:
    sum(number * number for number in range(steps))


def recursion(steps: int) -> None:
    def fibonacci(n: int) -> int:
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    for _ in range(steps):
        fibonacci(8)


def halving(steps: int) -> None:
    for number in range(steps):
        rest = 2 + number % 997
        while rest != 1:
            rest = 3 * rest + 1 if rest % 2 else rest // 2


def floats(steps: int) -> None:
    x = 0.5
    for _ in range(steps):
        x = 3.7 * x * (1 - x)


def words(steps: int) -> None:
    counts: dict[str, int] = {}
    for number in range(steps):
        word = f"w{number % 977}"
        counts[word] = counts.get(word, 0) + 1


def sieve(steps: int) -> None:
    for _ in range(steps):
        prime = [True] * 1000
        for number in range(2, 32):
            if prime[number]:
                for multiple in range(number * number, 1000, number):
                    prime[multiple] = False


LOOPS = {
    loop.__name__: loop for loop in (arithmetic, squares, recursion, halving, floats, words, sieve)
}
_KINDS = list(LOOPS)


def chore(number: int) -> int:
    """20 ms of work, call ``number`` of many: each kind in turn, and twice, so that of two
    workers both get the same."""
    kind = _KINDS[number // 2 % len(_KINDS)]
    LOOPS[kind](STEPS[kind])
    return number


def spin(seconds: float) -> None:
    """So much work of one kind."""
    arithmetic(round(seconds / 0.020 * STEPS["arithmetic"]))


def checksum(leaves: int) -> int:
    """The last value of the graph: of 1 plus each number, twice (itself and its neighbour)."""
    return 2 * sum(1 + number for number in range(leaves))
