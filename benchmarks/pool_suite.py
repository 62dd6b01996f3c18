"""The benchmarks of ``taskrun.Pool`` against its peers; see ``pool_peers``."""

from __future__ import annotations

from functools import partial

from measure import Benchmark, BenchmarkError
from pool_peers import Multiprocessing, Taskrun, installed, measured

OURS, STANDARD = Taskrun.name, Multiprocessing.name
ARRAY_PEERS = (STANDARD, "loky", "joblib")
LATE = 30.0  # milliseconds by which the first result may come later than the standard library's


def figure(workload: str, peer: str) -> float:
    try:
        found = measured(workload, peer)
    except RuntimeError as error:
        raise BenchmarkError(str(error)) from error
    if found is None:
        raise BenchmarkError(f"{peer} cannot do {workload}")
    return found


def fastest(workload: str, peers: tuple[str, ...]) -> float:
    """The shortest time of those peers that are installed."""
    here = installed()
    return min(figure(workload, peer) for peer in peers if peer in here)


def compared(
    name: str, what: str, unit: str, target: float, *, at_least: bool = False, rounds: int = 5
) -> Benchmark:
    """A workload against multiprocessing.Pool."""
    return Benchmark(
        f"pool_{name}", what, unit, partial(figure, name, OURS), STANDARD,
        partial(figure, name, STANDARD), target, at_least=at_least, rounds=rounds,
    )  # fmt: skip


POOL_BENCHMARKS = (
    compared("apply", "apply_async one by one, a callback each", "calls/s", 10, at_least=True),
    compared("map", "map of tiny calls", "items/s", 0.9, at_least=True),
    compared("unordered", "imap_unordered(chunksize=1)", "items/s", 8, at_least=True),
    compared("trip", "one call, waited for; median", "us", 0.8),
    compared("trip_p99", "one call, waited for; the slowest hundredth", "us", 1.0),
    compared("results", "64 results of 10 MB", "s", 1 / 3, rounds=3),
    Benchmark(
        "pool_array", "an array of 100 MB to 8 calls", "s", partial(figure, "array", OURS),
        "the fastest of " + ", ".join(ARRAY_PEERS), partial(fastest, "array", ARRAY_PEERS),
        1.3, rounds=3,
    ),
    Benchmark(
        "pool_array_memory", "growth of all processes (PSS) meanwhile", "copies",
        partial(figure, "array_memory", OURS), "one copy", lambda: 1.0, 1.3, rounds=3,
    ),
    Benchmark(
        "pool_start", "from the constructor to the first result", "ms",
        partial(figure, "start", OURS), f"{STANDARD} and {LATE:g} ms",
        lambda: figure("start", STANDARD) + LATE, 1.0,
    ),
    Benchmark(
        "pool_memory", "growth of the parent in 1,000,000 calls", "MB",
        partial(figure, "memory", OURS), "5 MB", lambda: 5.0, 1.0, rounds=1,
    ),
)  # fmt: skip
