"""What engines cost: ``python benchmarks/engines.py [ENGINE...]``; minutes long.

Each engine is compared with itself, used by hand for the same calls in the same minute: 20,000
trivial calls, and 400 calls of 20 ms.  Start-up is left out on both sides: by hand the clock
starts when the engine is up and warm, of taskrun when the first call begins.
Ends with status 1 where a target was missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TASKRUN = str(Path(sys.executable).with_name("taskrun"))
WORKERS = 2
TRIVIAL, TRIVIAL_BY_HAND = 20_000, 2_000  # by hand it takes long, and the rate is the same
SLEEPS, SECONDS = 400, 0.02
TARGETS = {"dask": 10.0, "ray": 5.0}  # times the rate by hand
NEAR = 0.9  # of the rate by hand, for the longer calls

FILE = """
import os, time
from taskrun import each, result, task
N = int(os.environ["CALLS"])

@task(default=False)
def trivial(n=each(range(N))): return time.time()

@task(default=False)
def sleep(n=each(range(N))):
    began = time.time()
    time.sleep(0.02)
    return began

@task(default=False)
def added(began=result(trivial)): print("took", len(began), time.time() - min(began))

@task(default=False)
def slept(began=result(sleep)): print("took", len(began), time.time() - min(began))
"""


def double(n: int) -> int:
    return 2 * n


def sleep(n: int) -> int:
    time.sleep(SECONDS)
    return n


# -- by hand --------------------------------------------------------------------------

Map = Callable[[Callable[[int], int], Iterable[int]], list[int]]


@contextmanager
def dask_by_hand() -> Any:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield lambda function, items: client.gather(client.map(function, items, pure=False))


@contextmanager
def ray_by_hand() -> Any:
    import ray

    ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    try:
        remote = {function: ray.remote(function) for function in (double, sleep)}
        yield lambda function, items: ray.get([remote[function].remote(n) for n in items])
    finally:
        ray.shutdown()


@contextmanager
def pool_by_hand() -> Any:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(WORKERS) as pool:
        yield lambda function, items: [
            future.result() for future in [pool.submit(function, n) for n in items]
        ]


ENGINES = {
    "dask": dask_by_hand,
    "ray": ray_by_hand,
    "concurrent.futures:ProcessPoolExecutor": pool_by_hand,
}


def rates_by_hand(engine: str) -> tuple[float, float]:
    with ENGINES[engine]() as map_:
        map_(double, range(10))
        return rate(map_, double, TRIVIAL_BY_HAND), rate(map_, sleep, SLEEPS)


def rate(map_: Map, function: Callable[[int], int], count: int) -> float:
    began = time.perf_counter()
    values = map_(function, range(count))
    seconds = time.perf_counter() - began
    if len(values) != count or values[:2] != [function(0), function(1)]:
        raise SystemExit(f"wrong answer of {function.__name__}")
    return count / seconds


# -- by taskrun -----------------------------------------------------------------------


def rate_by_taskrun(engine: str | None, target: str, count: int) -> float:
    words = [TASKRUN, "exec", "tasks.py", target, "-j", str(WORKERS), "--output", "raw"]
    words += ["--engine", engine] if engine else []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tasks.py").write_text(FILE)
        done = subprocess.run(
            words, cwd=folder, env={**os.environ, "CALLS": str(count)}, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
    took = [line.split() for line in done.stdout.splitlines() if line.startswith("took")]
    if done.returncode or not took or int(took[0][1]) != count:
        raise SystemExit(f"{words} failed:\n{done.stderr}{done.stdout}")
    return count / float(took[0][2])


# -- the table ------------------------------------------------------------------------


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engines", nargs="*", default=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(words)
    print("| engine | calls | by hand, calls/s | taskrun, calls/s | ratio | target |")
    print("|---|---|---|---|---|---|")
    reached = [measure(engine, options.rounds) for engine in options.engines]
    for target, count, what in (("added", TRIVIAL, "trivial"), ("slept", SLEEPS, "20 ms")):
        own = statistics.median(rate_by_taskrun(None, target, count) for _ in range(options.rounds))
        print(f"| own workers | {what} | | {own:,.0f} | | |")
    return 0 if all(reached) else 1


def measure(engine: str, rounds: int) -> bool:
    hand = [rates_by_hand(engine) for _ in range(rounds)]
    trivial = [rate_by_taskrun(engine, "added", TRIVIAL) for _ in range(rounds)]
    slept = [rate_by_taskrun(engine, "slept", SLEEPS) for _ in range(rounds)]
    first = row(engine, "trivial", [one for one, _ in hand], trivial, TARGETS.get(engine, 1.0))
    return row(engine, "20 ms", [two for _, two in hand], slept, NEAR) and first


def row(engine: str, what: str, hand: list[float], ours: list[float], target: float) -> bool:
    theirs, mine = statistics.median(hand), statistics.median(ours)
    print(
        f"| {engine} | {what} | {theirs:,.0f} | {mine:,.0f} | {mine / theirs:.2f} "
        f"| at least {target:g} |",
        flush=True,
    )
    return mine / theirs >= target


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
