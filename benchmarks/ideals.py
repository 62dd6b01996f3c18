"""What no scheduler can beat: the same work with nothing in between."""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Sequence
from functools import cache

from measure import JOBS, Sample, expect, script

sys.path.append(str(JOBS))
from work import spin


@cache
def steps() -> int:
    """How many steps of ``spin`` take 20 ms of CPU time."""
    trial = 200_000
    best = min(_cpu_of(trial) for _ in range(15))
    return round(trial * 0.020 / best)


def _cpu_of(trial: int) -> float:
    started = time.process_time()
    spin(trial)
    return time.process_time() - started


def even_ideal(size: int) -> Sample:
    """Calls of 20 ms: two processes, half each."""
    return expect(script("even_ideal", CALLS=size, STEPS=steps()), size * steps())


def greedy_list_scheduling(calls: Sequence[float], workers: int = 2) -> float:
    """The makespan when each call, in order, goes to the worker that is free first."""
    free_at = [0.0] * workers
    for seconds in calls:
        heapq.heapreplace(free_at, free_at[0] + seconds)
    return max(free_at)
