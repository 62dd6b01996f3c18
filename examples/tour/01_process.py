"""Every worker of a task file is a process, and with ``-j 2`` two of them compute at once.
Processes share no memory: what a call leaves in a global is seen by later calls of that
process only. Use them, as every plain task does, for what computes; threads would take
turns on one core.
"""

import os
from math import isqrt

from taskrun import each, result, task

done_here: list[int] = []  # each process has its own


@task
def primes(start: int = each(range(0, 80_000, 10_000))) -> tuple[int, int, int]:
    """Count the primes among 10,000 numbers, in whichever process is free."""
    done_here.append(start)
    return os.getpid(), len(done_here), sum(map(is_prime, range(start, start + 10_000)))


@task
def report(counted: list[tuple[int, int, int]] = result(primes)) -> None:
    """Say who has done what."""
    print(f"{sum(count for _, _, count in counted):,} primes below 80,000")
    calls = {pid: max(n for other, n, _ in counted if other == pid) for pid, _, _ in counted}
    for pid, number in sorted(calls.items()):
        print(f"process {pid} has seen {number} of {len(counted)} calls")


def is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, isqrt(n) + 1))
