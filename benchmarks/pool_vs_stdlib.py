"""taskrun.Pool against multiprocessing.Pool, round by round, each in a fresh process.

    python benchmarks/pool_vs_stdlib.py [ROUNDS] [START_METHOD]

Prints the medians and their ratio, with the machine's load.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

CALLS = 20_000
ITEMS = 500_000
TRIPS = 1_500
WORKERS = 2


def same(x: int) -> int:
    return x


def one_by_one(pool: Any) -> float:
    """Calls a second of apply_async, a callback each."""
    done, seen = threading.Event(), []

    def note(value: int) -> None:
        seen.append(value)
        if len(seen) == CALLS:
            done.set()

    start = time.perf_counter()
    for number in range(CALLS):
        pool.apply_async(same, (number,), callback=note)
    done.wait()
    return CALLS / (time.perf_counter() - start)


def unordered(pool: Any) -> float:
    """Items a second of imap_unordered, a call each."""
    start = time.perf_counter()
    assert sum(1 for _ in pool.imap_unordered(same, range(CALLS))) == CALLS
    return CALLS / (time.perf_counter() - start)


def mapped(pool: Any) -> float:
    """Items a second of map, in chunks as large as it likes."""
    start = time.perf_counter()
    assert len(pool.map(same, range(ITEMS))) == ITEMS
    return ITEMS / (time.perf_counter() - start)


def trips(pool: Any) -> list[float]:
    """Microseconds of each of many calls, one after the other; sorted."""
    taken = []
    for number in range(TRIPS):
        start = time.perf_counter()
        pool.apply(same, (number,))
        taken.append((time.perf_counter() - start) * 1e6)
    return sorted(taken)


def measure(which: str, method: str) -> dict[str, float]:
    """One round of one of the two."""
    from multiprocessing.pool import Pool as TheirPool

    from taskrun import Pool as OurPool

    make: Any = OurPool if which == "taskrun" else TheirPool
    context = multiprocessing.get_context(method)
    start = time.perf_counter()
    pool = make(WORKERS, context=context)
    pool.apply(same, (1,))
    found = {"first result, ms": (time.perf_counter() - start) * 1e3}
    pool.map(same, range(100))
    found["apply_async, calls/s"] = one_by_one(pool)
    found["imap_unordered, items/s"] = unordered(pool)
    found["map, items/s"] = mapped(pool)
    round_trips = trips(pool)
    found["round trip, median, us"] = round_trips[TRIPS // 2]
    found["round trip, p99, us"] = round_trips[TRIPS * 99 // 100]
    pool.close()
    pool.join()
    return found


def main(rounds: int, method: str) -> None:
    """Interleave the rounds, then print."""
    found: dict[str, list[dict[str, float]]] = {"multiprocessing": [], "taskrun": []}
    for _ in range(rounds):
        for which, results in found.items():
            command = [sys.executable, __file__, "--one", which, method]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout))
    print(f"{rounds} rounds, {method}, load {os.getloadavg()[0]:.1f}")
    for name in found["taskrun"][0]:
        theirs, ours = (
            statistics.median(result[name] for result in results) for results in found.values()
        )
        print(f"{name:28} multiprocessing {theirs:12,.0f}  taskrun {ours:12,.0f}  "
              f"ratio {ours / theirs:.2f}")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main(int((sys.argv[1:] or ["5"])[0]), (sys.argv[2:] or ["fork"])[0])
