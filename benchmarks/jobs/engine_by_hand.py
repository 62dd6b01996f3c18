"""The calls of ``engine_calls`` on an engine that is used by hand; prints calls a second.

    python engine_by_hand.py dask|ray|processes trivial|sleep CALLS

The clock starts when the engine is up and has executed some calls.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

WORKERS = 2
SECONDS = 0.02


def trivial(n: int) -> float:
    return time.time()


def sleep(n: int) -> float:
    began = time.time()
    time.sleep(SECONDS)
    return began


@contextmanager
def dask() -> Any:
    from distributed import Client, LocalCluster

    made = LocalCluster(
        n_workers=WORKERS, threads_per_worker=1, dashboard_address=None, silence_logs=50
    )
    with made as cluster, Client(cluster) as client:
        yield lambda function, items: client.gather(client.map(function, items, pure=False))


@contextmanager
def ray() -> Any:
    import ray

    ray.init(
        "local",
        num_cpus=WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        remote = {function: ray.remote(function) for function in (trivial, sleep)}
        yield lambda function, items: ray.get([remote[function].remote(n) for n in items])
    finally:
        ray.shutdown()


@contextmanager
def processes() -> Any:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(WORKERS) as pool:
        yield lambda function, items: [
            future.result() for future in [pool.submit(function, n) for n in items]
        ]


Map = Callable[[Callable[[int], float], Iterable[int]], list[float]]


def rate(map_: Map, function: Callable[[int], float], count: int) -> float:
    map_(function, range(10))
    began = time.perf_counter()
    values = map_(function, range(count))
    seconds = time.perf_counter() - began
    assert len(values) == count
    return count / seconds


if __name__ == "__main__":
    engine, what, calls = sys.argv[1:]
    with {"dask": dask, "ray": ray, "processes": processes}[engine]() as map_:
        print(rate(map_, {"trivial": trivial, "sleep": sleep}[what], int(calls)))
