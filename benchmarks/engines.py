"""The benchmarks of engines that are not ours; see ``suite``.

Each engine is compared with itself, used by hand for the same calls.  Start-up is left out on
both sides: by hand the clock starts when the engine is up and warm, of taskrun when the first
call begins.
"""

from __future__ import annotations

import importlib.util
from functools import partial

from measure import JOBS, PYTHON, Benchmark, BenchmarkError, Unavailable, run, taskrun

TRIVIAL, TRIVIAL_BY_HAND = 20_000, 2_000  # by hand it takes long, and the rate is the same
SLEEPS = 400
PACKAGES = {"dask": "distributed", "ray": "ray"}
NAMES = {"processes": "concurrent.futures:ProcessPoolExecutor"}


def need(engine: str) -> None:
    """Raises Unavailable where the engine is not installed."""
    package = PACKAGES.get(engine)
    if package is not None and importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed (pip install 'taskrun[{engine}]')")


def by_taskrun(engine: str, what: str, calls: int) -> float:
    """Calls a second."""
    need(engine)
    name = NAMES.get(engine, engine)
    sample = taskrun("engine_calls", f"{what}s", "--engine", name, "--output", "raw", CALLS=calls)
    seconds, count = sample.out.split()[-2:]
    if int(count) != calls:
        raise BenchmarkError(f"there were {count} calls: {sample.out[-500:]!r}")
    return calls / float(seconds)


def by_hand(engine: str, what: str, calls: int) -> float:
    """Calls a second."""
    need(engine)
    command = [PYTHON, str(JOBS / "engine_by_hand.py"), engine, what, str(calls)]
    return float(run(command).out.split()[-1])


def growth(engine: str) -> float:
    """MB by which the coordinator grows while 100 MB go from call to call."""
    need(engine)
    return float(run([PYTHON, str(JOBS / "engine_chain.py"), engine]).out.split()[-1])


def trivial(engine: str, title: str, target: float) -> Benchmark:
    return Benchmark(
        f"{engine}_trivial", f"{TRIVIAL:,} trivial calls on `{NAMES.get(engine, engine)}`",
        "calls/s", partial(by_taskrun, engine, "trivial", TRIVIAL),
        f"{title} by hand", partial(by_hand, engine, "trivial", TRIVIAL_BY_HAND),
        target, at_least=True, rounds=3,
    )  # fmt: skip


def longer(engine: str, title: str) -> Benchmark:
    return Benchmark(
        f"{engine}_20ms", f"{SLEEPS} calls of 20 ms on `{NAMES.get(engine, engine)}`",
        "calls/s", partial(by_taskrun, engine, "sleep", SLEEPS),
        f"{title} by hand", partial(by_hand, engine, "sleep", SLEEPS),
        0.9, at_least=True, rounds=3,
    )  # fmt: skip


def chain(engine: str) -> Benchmark:
    return Benchmark(
        f"{engine}_memory", f"coordinator, 100 MB through three calls on `{engine}`", "MB",
        partial(growth, engine), "20 MB", lambda: 20.0, 1.0, rounds=1,
    )  # fmt: skip


BENCHMARKS = (
    trivial("dask", "client.map", 10.0),
    longer("dask", "client.map"),
    chain("dask"),
    trivial("ray", "ray.remote", 5.0),
    longer("ray", "ray.remote"),
    chain("ray"),
    trivial("processes", "ProcessPoolExecutor", 1.0),
    longer("processes", "ProcessPoolExecutor"),
)
