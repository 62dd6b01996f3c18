"""taskrun.Pool and its peers, each doing the same in a process of its own.

    python benchmarks/pool_peers.py [WORKLOAD...] [--peers A,B] [--rounds N] [--method M]

The peers take turns, round by round; the medians are printed, and their ratios to
taskrun's.  A peer that is not installed, or cannot do a workload, is left out.  All have two
workers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "jobs"))
from work import DURATIONS, chore, double  # beside this file

WORKERS = 2
ARRAY = 12_500_000  # float64: 100 MB
RESULT = 1_250_000  # 10 MB


# -- what is called -------------------------------------------------------------------


def total(array: Any) -> float:
    return float(array.sum())


def ones(size: int) -> Any:
    import numpy

    return numpy.ones(size)


# -- the peers ------------------------------------------------------------------------


class Peer:
    """One pool.  What a library cannot do is not there."""

    name = ""
    module = ""  # that must be there
    size = 3_000  # tiny calls in one workload

    def __init__(self, method: str) -> None:
        self.context = multiprocessing.get_context(method)
        self.open()

    def open(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def submit(self, function: Any, item: Any, done: Callable[[Any], object]) -> Any:
        raise NotImplementedError

    def call(self, function: Any, item: Any) -> Any:
        raise NotImplementedError

    def map(self, function: Any, items: Any) -> list[Any]:
        raise NotImplementedError

    def unordered(self, function: Any, items: Any) -> Iterable[Any]:
        raise NotImplementedError


class Multiprocessing(Peer):
    name, module, size = "multiprocessing.Pool", "multiprocessing.pool", 60_000

    def open(self) -> None:
        self.pool: Any = self.context.Pool(WORKERS)

    def close(self) -> None:
        self.pool.close()
        self.pool.join()

    def submit(self, function: Any, item: Any, done: Callable[[Any], object]) -> Any:
        return self.pool.apply_async(function, (item,), callback=done)

    def call(self, function: Any, item: Any) -> Any:
        return self.pool.apply(function, (item,))

    def map(self, function: Any, items: Any) -> list[Any]:
        found: list[Any] = self.pool.map(function, items)
        return found

    def unordered(self, function: Any, items: Any) -> Iterable[Any]:
        found: Iterable[Any] = self.pool.imap_unordered(function, items)
        return found


class Taskrun(Multiprocessing):
    name, module, size = "taskrun.Pool", "taskrun.pool", 60_000

    def open(self) -> None:
        from taskrun import Pool

        self.pool = Pool(WORKERS, context=self.context)


class Futures(Peer):
    """Whatever has ``submit`` and futures."""

    executor: Any

    def close(self) -> None:
        self.executor.shutdown()

    def submit(self, function: Any, item: Any, done: Callable[[Any], object]) -> Any:
        future = self.executor.submit(function, item)
        future.add_done_callback(done)
        return future

    def call(self, function: Any, item: Any) -> Any:
        return self.executor.submit(function, item).result()

    def map(self, function: Any, items: Any) -> list[Any]:
        items = list(items)
        return list(self.executor.map(function, items, chunksize=max(1, len(items) // 8)))

    def unordered(self, function: Any, items: Any) -> Iterable[Any]:
        futures = [self.executor.submit(function, item) for item in items]
        return (future.result() for future in as_completed(futures))


class ProcessPoolExecutor(Futures):
    name, module = "ProcessPoolExecutor", "concurrent.futures"

    def open(self) -> None:
        from concurrent.futures import ProcessPoolExecutor as Executor

        self.executor = Executor(WORKERS, mp_context=self.context)


class Loky(Futures):
    name, module = "loky", "loky"

    def open(self) -> None:
        from loky import get_reusable_executor

        self.executor = get_reusable_executor(WORKERS)


class Joblib(Peer):
    name, module = "joblib", "joblib"

    def open(self) -> None:
        from joblib import Parallel

        self.parallel = Parallel

    def close(self) -> None:
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown()

    def map(self, function: Any, items: Any) -> list[Any]:
        from joblib import delayed

        found: list[Any] = self.parallel(WORKERS)(delayed(function)(item) for item in items)
        return found


class Mpire(Multiprocessing):
    name, module, size = "mpire", "mpire", 3_000

    def open(self) -> None:
        from mpire import WorkerPool

        self.pool = WorkerPool(WORKERS, start_method=self.context.get_start_method())

    def close(self) -> None:
        self.pool.stop_and_join()

    def unordered(self, function: Any, items: Any) -> Iterable[Any]:
        found: Iterable[Any] = self.pool.imap_unordered(function, items, chunk_size=1)
        return found


class Pebble(Futures):
    name, module = "pebble", "pebble"

    def open(self) -> None:
        from pebble import ProcessPool

        self.executor = ProcessPool(WORKERS, context=self.context)

    def close(self) -> None:
        self.executor.close()
        self.executor.join()

    def submit(self, function: Any, item: Any, done: Callable[[Any], object]) -> Any:
        future = self.executor.schedule(function, (item,))
        future.add_done_callback(done)
        return future

    def call(self, function: Any, item: Any) -> Any:
        return self.executor.schedule(function, (item,)).result()

    def map(self, function: Any, items: Any) -> list[Any]:
        items = list(items)
        return list(self.executor.map(function, items, chunksize=max(1, len(items) // 8)).result())

    def unordered(self, function: Any, items: Any) -> Iterable[Any]:
        futures = [self.executor.schedule(function, (item,)) for item in items]
        return (future.result() for future in as_completed(futures))


class Dask(Futures):
    name, module, size = "dask", "distributed", 1_000

    def open(self) -> None:
        from distributed import Client, LocalCluster

        self.cluster = LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None)
        self.executor = Client(self.cluster)

    def close(self) -> None:
        self.executor.close()
        self.cluster.close()

    def map(self, function: Any, items: Any) -> list[Any]:
        futures = self.executor.map(function, list(items), pure=False)
        return list(self.executor.gather(futures))

    def unordered(self, function: Any, items: Any) -> Iterable[Any]:
        from distributed import as_completed as completed

        return (future.result() for future in completed(self.executor.map(function, list(items))))


class Ray(Peer):
    name, module, size = "ray", "ray", 1_000

    def open(self) -> None:
        import ray

        self.ray = ray
        ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)

    def close(self) -> None:
        self.ray.shutdown()

    def call(self, function: Any, item: Any) -> Any:
        return self.ray.get(self.ray.remote(function).remote(item))

    def map(self, function: Any, items: Any) -> list[Any]:
        remote, known = self.ray.remote(function), {}
        for item in items:
            if hasattr(item, "nbytes") and id(item) not in known:
                known[id(item)] = self.ray.put(item)
        found = [remote.remote(known.get(id(item), item)) for item in items]
        return list(self.ray.get(found))


PEERS = {
    peer.name: peer
    for peer in (Taskrun, Multiprocessing, ProcessPoolExecutor, Loky, Joblib, Mpire, Pebble,
                 Dask, Ray)
}  # fmt: skip


# -- the workloads --------------------------------------------------------------------
#
# Each gives one figure; those in seconds and microseconds are better when they are small.


def apply(peer: Peer) -> float:
    """Calls a second, one by one, a callback each."""
    done, left = threading.Event(), [peer.size]

    def note(_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            done.set()

    start = time.perf_counter()
    kept = [peer.submit(double, number, note) for number in range(peer.size)]
    if not done.wait(120):
        raise TimeoutError(f"{left[0]} of {len(kept)} calls have not ended")
    return peer.size / (time.perf_counter() - start)


def map_(peer: Peer) -> float:
    """Items a second, in batches as the library makes them."""
    size = peer.size * 10
    start = time.perf_counter()
    assert sum(peer.map(double, range(size))) == size * (size - 1)
    return size / (time.perf_counter() - start)


def unordered(peer: Peer) -> float:
    """Items a second, a call each, in the order in which they end."""
    start = time.perf_counter()
    assert sum(peer.unordered(double, range(peer.size))) == peer.size * (peer.size - 1)
    return peer.size / (time.perf_counter() - start)


def trips(peer: Peer) -> list[float]:
    found = []
    for number in range(1000):
        start = time.perf_counter()
        assert peer.call(double, number) == 2 * number
        found.append((time.perf_counter() - start) * 1e6)
    return sorted(found)


def trip(peer: Peer) -> float:
    """Microseconds of a call that is waited for, the median."""
    return trips(peer)[500]


def trip_p99(peer: Peer) -> float:
    """The same, the slowest hundredth."""
    return trips(peer)[990]


def array(peer: Peer) -> float:
    """Seconds for 8 calls that take one array of 100 MB and return its sum."""
    import numpy

    data = numpy.arange(float(ARRAY))
    start = time.perf_counter()
    sums = peer.map(total, [data] * 8)
    seconds = time.perf_counter() - start
    assert len(set(sums)) == 1
    return seconds


def array_memory(peer: Peer) -> float:
    """By how many copies of the array the memory of all processes grows meanwhile (PSS)."""
    import numpy

    data = numpy.arange(float(ARRAY))
    peer.map(total, [data[:1000]] * 8)  # numpy is imported everywhere
    before, most, over = pss(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, pss())

    watcher = threading.Thread(target=watch)
    watcher.start()
    peer.map(total, [data] * 8)
    over.set()
    watcher.join()
    return (most - before) / data.nbytes


def pss() -> int:
    """Bytes of memory of this process and all below it, shared pages by their share."""
    import psutil

    own = psutil.Process()
    found = 0
    for process in [own, *own.children(recursive=True)]:
        try:
            with open(f"/proc/{process.pid}/smaps_rollup") as file:
                found += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return found * 1024


def results(peer: Peer) -> float:
    """Seconds for 64 results of 10 MB."""
    start = time.perf_counter()
    found = peer.map(ones, [RESULT] * 64)
    seconds = time.perf_counter() - start
    assert sum(float(one[-1]) for one in found) == 64
    return seconds


def even(peer: Peer) -> float:
    """Seconds for 400 calls of 20 ms of pure Python."""
    start = time.perf_counter()
    assert sum(peer.unordered(chore, range(400))) == sum(range(400))
    return time.perf_counter() - start


def heavy(peer: Peer) -> float:
    """Seconds for 200 sleeps with a heavy tail."""
    start = time.perf_counter()
    assert len(list(peer.unordered(time.sleep, DURATIONS))) == len(DURATIONS)
    return time.perf_counter() - start


def memory(peer: Peer) -> float:
    """MB that this process grows by in 1,000,000 tiny calls, after a hundredth as many."""
    import psutil

    def after(size: int) -> float:
        assert sum(1 for _ in peer.unordered(double, iter(range(size)))) == size
        return psutil.Process().memory_info().rss / 1e6

    return after(1_000_000) - after(10_000)


WORKLOADS: dict[str, Callable[[Peer], float]] = {
    "apply": apply, "map": map_, "unordered": unordered, "trip": trip, "trip_p99": trip_p99,
    "array": array, "array_memory": array_memory, "results": results, "even": even,
    "heavy": heavy, "memory": memory,
}  # fmt: skip
START = "start"  # milliseconds from the constructor to the first result


# -- one round of one peer ------------------------------------------------------------


def one(workload: str, peer: str, method: str) -> float | None:
    """The figure; None where the peer cannot do it."""
    kind = PEERS[peer]
    importlib.import_module(kind.module)
    began = time.perf_counter()
    made = kind(method)
    try:
        if workload == START:
            assert made.call(double, 1) == 2
            return (time.perf_counter() - began) * 1e3
        if workload not in ("even", "heavy", "trip", "trip_p99", "apply", "unordered", "memory"):
            made.map(double, range(100))  # all workers are up
        else:
            list(made.unordered(double, range(100)))
        return WORKLOADS[workload](made)
    except NotImplementedError:
        return None
    finally:
        made.close()


def measured(workload: str, peer: str, method: str = "fork", **variables: Any) -> float | None:
    """The same, in a fresh process.  Raises RuntimeError where that fails."""
    environ = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = [sys.executable, __file__, "--one", workload, peer, method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
    if done.returncode:
        raise RuntimeError(f"{peer}, {workload}: {done.stderr[-2000:]}")
    found: float | None = json.loads(done.stdout.splitlines()[-1])
    return found


def installed() -> list[str]:
    """The peers that are here."""
    return [name for name, peer in PEERS.items() if importlib.util.find_spec(peer.module)]


# -- all of them ----------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    from ideals import steps  # what is here only for whoever compares

    parser = argparse.ArgumentParser(description="Workloads: " + ", ".join([*WORKLOADS, START]))
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", default=[*WORKLOADS, START])
    parser.add_argument("--peers", default=",".join(installed()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="fork")
    options = parser.parse_args(arguments)
    for workload in options.workloads:
        figures: dict[str, list[float]] = {name: [] for name in options.peers.split(",")}
        for _ in range(options.rounds):
            for name, found in figures.items():
                figure = measured(workload, name, options.method, STEPS=steps())
                if figure is not None:
                    found.append(figure)
        show(workload, {name: found for name, found in figures.items() if found})


def show(workload: str, figures: dict[str, list[float]]) -> None:
    what = (WORKLOADS[workload].__doc__ if workload in WORKLOADS else None) or workload
    print(f"{workload}: {what}  (load {os.getloadavg()[0]:.1f})")
    medians = {name: statistics.median(found) for name, found in figures.items()}
    ours = medians.get(Taskrun.name)
    for name, median in medians.items():
        ratio = f"   {median / ours:8.2f} of taskrun's" if ours else ""
        print(f"  {name:22} {median:14,.3f}{ratio}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
