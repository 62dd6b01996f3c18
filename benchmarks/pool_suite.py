"""The benchmarks of ``taskrun.Pool`` against its peers; see ``pool_peers``."""

from __future__ import annotations

from functools import partial

from ideals import even_ideal, greedy_list_scheduling, steps
from measure import Benchmark, BenchmarkError
from pool_peers import DURATIONS, Multiprocessing, Taskrun, installed, measured

OURS, STANDARD = Taskrun.name, Multiprocessing.name
ARRAY_PEERS = (STANDARD, "loky", "joblib")
LATE = 30.0  # milliseconds by which the first result may come later than the standard library's


def figure(workload: str, peer: str, **variables: object) -> float:
    try:
        found = measured(workload, peer, **variables)
    except RuntimeError as error:
        raise BenchmarkError(str(error)) from error
    if found is None:
        raise BenchmarkError(f"{peer} cannot do {workload}")
    return found


def even(peer: str) -> float:
    return figure("even", peer, STEPS=steps())


def even_alone() -> float:
    """The ideal of 400 calls of 20 ms."""
    return 400 / 399 * (even_ideal(400).seconds - even_ideal(1).seconds)


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
        "pool_even", "400 calls of 20 ms of pure Python", "s", partial(even, OURS),
        "two processes, half each", even_alone, 1 / 0.98,
    ),
    Benchmark(
        "pool_even_standard", "the same calls", "s", partial(even, OURS),
        f"{STANDARD}.imap_unordered(chunksize=1)", partial(even, STANDARD), 1 / 0.98,
    ),
    Benchmark(
        "pool_heavy", "200 sleeps with a heavy tail, makespan", "s",
        partial(figure, "heavy", OURS), "greedy list scheduling, computed",
        partial(greedy_list_scheduling, DURATIONS), 1.05, rounds=3,
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
