"""What no scheduler can beat: the same work with nothing in between."""

from __future__ import annotations

import heapq
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache

from measure import JOBS, Sample, expect, script

sys.path.append(str(JOBS))
from work import LOOPS


@cache
def steps() -> str:
    """How many steps of each loop take 20 ms of CPU time, as JSON."""
    return json.dumps({name: _steps_of(loop) for name, loop in LOOPS.items()})


def _steps_of(loop: Callable[[int], None]) -> int:
    trial = 16
    while _cpu_of(loop, trial) < 0.004:
        trial *= 2
    return round(trial * 0.020 / min(_cpu_of(loop, trial) for _ in range(15)))


def _cpu_of(loop: Callable[[int], None], trial: int) -> float:
    started = time.process_time()
    loop(trial)
    return time.process_time() - started


def even_ideal(size: int) -> Sample:
    """Calls of 20 ms: two processes, half each."""
    return expect(script("even_ideal", CALLS=size, STEPS=steps()), sum(range(size)))


def greedy_list_scheduling(calls: Sequence[float], workers: int = 2) -> float:
    """The makespan when each call, in order, goes to the worker that is free first."""
    free_at = [0.0] * workers
    for seconds in calls:
        heapq.heapreplace(free_at, free_at[0] + seconds)
    return max(free_at)
