"""The benchmarks of the Manager server and of shared state; see ``suite``.

Each side of them runs a job in ``jobs/`` that prints its figure.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import partial

from measure import JOBS, PYTHON, BenchmarkError, Unavailable, run
from suite import Benchmark

IDLE = 11_000
STDLIB_IDLE = 1_000  # it has a thread for each


def job(name: str, side: str, what: str, number: int) -> float:
    """The figure that a job prints."""
    sample = run([PYTHON, str(JOBS / f"{name}.py"), side, what, str(number)])
    try:
        return float(sample.out.split()[-1])
    except (IndexError, ValueError):
        raise BenchmarkError(f"{name} printed no figure: {sample.out[-500:]!r}") from None


manager = partial(job, "manager_ops")
idle = partial(job, "manager_idle")


def redis(what: str, number: int) -> float:
    if not (os.environ.get("REDIS_SERVER") or shutil.which("redis-server")):
        raise Unavailable("there is no redis-server here (apt install redis-server)")
    if importlib.util.find_spec("redis") is None:
        raise Unavailable("redis-py is not installed (pip install redis)")
    return job("state_ops", "redis", what, number)


def against_stdlib(what: str, unit: str, clients: int, target: float) -> Benchmark:
    said = {"cpu": "server CPU of a Manager operation", "rate": "Manager operations"}[what]
    return Benchmark(
        f"manager_{what}_{clients}", f"{said}, {clients} stock client{'s' * (clients > 1)}", unit,
        partial(manager, "taskrun", what, clients),
        "the standard library's server", partial(manager, "stdlib", what, clients),
        target, at_least=what == "rate",
    )  # fmt: skip


def against_redis(what: str, said: str, clients: int, target: float) -> Benchmark:
    return Benchmark(
        f"state_{what}", said, "items/s" if what.startswith("bulk") else "operations/s",
        partial(job, "state_ops", "taskrun", what, clients),
        "redis-py, pipelined" if what.startswith("bulk") else "redis-py",
        partial(redis, what, clients),
        target, at_least=True, rounds=3,
    )  # fmt: skip


BENCHMARKS = (
    against_stdlib("rate", "operations/s", 1, 1.0),
    against_stdlib("rate", "operations/s", 64, 1.8),
    against_stdlib("cpu", "us", 8, 0.5),
    against_stdlib("cpu", "us", 64, 0.5),
    Benchmark(
        "manager_connect", "a stock client connects over TCP", "ms",
        partial(manager, "taskrun", "connect", 20), "3 ms", lambda: 3.0,
        1.0,
    ),
    Benchmark(
        "manager_at_once", "64 stock clients connect at the same instant", "s",
        partial(manager, "taskrun", "at_once", 64), "1 s", lambda: 1.0,
        1.0,
    ),
    Benchmark(
        "manager_idle", f"memory of an idle client, of {IDLE:,}", "KiB",
        partial(idle, "taskrun", "memory", IDLE), "4 KiB", lambda: 4.0,
        1.0, rounds=1,
    ),
    Benchmark(
        "manager_idle_1000", f"memory of an idle client, of {STDLIB_IDLE:,}", "KiB",
        partial(idle, "taskrun", "memory", STDLIB_IDLE),
        "the standard library's server", partial(idle, "stdlib", "memory", STDLIB_IDLE),
        1.0, rounds=1,
    ),
    Benchmark(
        "manager_beside", f"a get beside {IDLE:,} idle clients", "us",
        partial(idle, "taskrun", "latency", IDLE), "alone", partial(idle, "taskrun", "latency", 0),
        1.2, rounds=3,
    ),
    Benchmark(
        "manager_pieces", f"{3 * IDLE:,} requests, each in three parts", "s",
        partial(idle, "taskrun", "speak", IDLE), "a bare selectors loop, then", lambda: 2.2,
        3.0, rounds=3,
    ),
    against_redis("add", "`counter.add`, 8 clients", 8, 1.5),
    against_redis("set", "a dict's key set, 8 clients", 8, 1.5),
    against_redis("get", "a dict's key read, 8 clients", 8, 1.5),
    against_redis("bulk_write", "10,000 items by `d.update`", 1, 1.0),
    against_redis("bulk_read", "10,000 items by `d.get_many`", 1, 1.0),
    against_redis("bulk_append", "10,000 items by `l.extend`", 1, 1.0),
    against_redis("bulk_slice", "10,000 items by `l[:]`", 1, 1.0),
)  # fmt: skip
