"""The benchmarks: what each compares with what, and the ratio it must reach.

A side of a benchmark is a function that runs one round and gives one number.  Rates and
times leave start-up out: the same command with a single call is run next to it, and its
time subtracted.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import crawl
import lanes
import psutil
from ideals import even_ideal, greedy_list_scheduling, steps
from measure import (
    JOBS,
    PYTHON,
    TASKRUN,
    Benchmark,
    BenchmarkError,
    Sample,
    expect,
    ninja_program,
    run,
    script,
    taskrun,
)
from pool_suite import POOL_BENCHMARKS

sys.path.append(str(JOBS))
from work import DURATIONS, FAN_IN, LEAVES, checksum

# -- start-up -------------------------------------------------------------------------


def help_cpu() -> float:
    return 1000 * run([TASKRUN, "--help"]).cpu


def import_click_cpu() -> float:
    return 1000 * run([PYTHON, "-c", "import click"]).cpu


def one_cpu() -> float:
    sample = taskrun("one")
    if "42" not in sample.out:
        raise BenchmarkError(f"the task did not run: {sample.out!r}")
    return 1000 * sample.cpu


def one_pool_cpu() -> float:
    return 1000 * expect(script("one_pool"), 42).cpu


# -- rates ----------------------------------------------------------------------------


def rate(side: Callable[[int], Sample], size: int) -> float:
    """Calls a second, of a run of ``size`` calls less a run of one."""
    return (size - 1) / (side(size).seconds - side(1).seconds)


def graph_rate(side: Callable[[int], Sample]) -> float:
    calls = graph_calls(LEAVES) - graph_calls(1)
    return calls / (side(LEAVES).seconds - side(1).seconds)


def tiny_taskrun(size: int) -> Sample:
    return expect(taskrun("tiny", CALLS=size), size * (size - 1))


def tiny_pool(size: int) -> Sample:
    return expect(script("tiny_pool", CALLS=size), size * (size - 1))


def graph_calls(leaves: int) -> int:
    calls = level = leaves
    while level > 1:
        level = -(-level // FAN_IN)
        calls += level
    return 1 + leaves + calls


def graph_taskrun(leaves: int) -> Sample:
    return expect(taskrun("graph", CALLS=leaves), checksum(leaves))


def graph_dask(leaves: int) -> Sample:
    return expect(script("graph_dask", CALLS=leaves), checksum(leaves))


def shell_taskrun(size: int) -> Sample:
    return expect(taskrun("shell", CALLS=size), size)


def shell_ninja(size: int) -> Sample:
    edges = "".join(f"build {number}: true\n" for number in range(size))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "build.ninja").write_text(f"rule true\n command = true\n{edges}")
        return run([ninja_program(), "-C", folder, "-j", "2", "--quiet"])


# -- balance --------------------------------------------------------------------------


def even_taskrun(size: int) -> Sample:
    return expect(taskrun("even", CALLS=size, STEPS=steps()), sum(range(size)))


def even_pool(size: int) -> Sample:
    return expect(script("even_pool", CALLS=size, STEPS=steps()), sum(range(size)))


def heavy_seconds(job: str) -> float:
    count = len(DURATIONS)
    whole = expect(taskrun(job, STEPS=steps()), count)
    return whole.seconds - tiny_taskrun(1).seconds


def heavy_greedy_seconds() -> float:
    whole = expect(script("heavy_greedy", STEPS=steps()), len(DURATIONS))
    return whole.seconds - even_ideal(1).seconds + 0.020


# -- faults ---------------------------------------------------------------------------


KILLED_CALLS = 400


class Killer(threading.Thread):
    """Kills with -9, every half second, a worker that is executing a call.

    Only processes below this one, whatever the diary of the calls may say.
    """

    def __init__(self, diary: Path) -> None:
        super().__init__(daemon=True)
        self._diary = diary
        self._over = threading.Event()
        self.killed: list[int] = []

    def run(self) -> None:
        while not self._over.wait(0.5):
            below = {child.pid for child in psutil.Process().children(recursive=True)}
            for pid in self._executing():
                if pid in below and pid not in self.killed:
                    os.kill(pid, signal.SIGKILL)
                    self.killed.append(pid)
                    break

    def _executing(self) -> Iterator[int]:
        """The workers whose last line is a beginning, the one that wrote last first."""
        last: dict[int, str] = {}
        for line in self._diary.read_text().splitlines():
            word, pid = line.split()
            last.pop(int(pid), None)
            last[int(pid)] = word
        return (pid for pid in reversed(last) if last[pid] == "begin")

    def stop(self) -> None:
        self._over.set()
        self.join()


def kills_seconds(disturbed: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        log, diary = Path(folder) / "joblog", Path(folder) / "diary"
        diary.touch()
        with killing(diary, disturbed):
            whole = _kills(KILLED_CALLS, diary, log)
        check_each_once(log)
        return whole.seconds - _kills(1, diary, log).seconds


def _kills(size: int, diary: Path, log: Path) -> Sample:
    sample = taskrun("kills", "--joblog", str(log), CALLS=size, STEPS=steps(), DIARY=diary)
    return expect(sample, sum(range(size)))


@contextmanager
def killing(diary: Path, disturbed: bool) -> Iterator[None]:
    """Kill meanwhile; raises BenchmarkError if there was nothing to kill."""
    if not disturbed:
        yield
        return
    killer = Killer(diary)
    killer.start()
    try:
        yield
    finally:
        killer.stop()
    if len(killer.killed) < 5:
        raise BenchmarkError(f"only {len(killer.killed)} workers were killed")


def check_each_once(log: Path) -> None:
    """Each call must have succeeded in one attempt, however many were lost."""
    header, *rows = (line.split("\t") for line in log.read_text().splitlines())
    records = [dict(zip(header, row, strict=True)) for row in rows]
    completed = Counter(
        record["call"]
        for record in records
        if record["task"] == "done" and record["outcome"] == "value"
    )
    if len(completed) != KILLED_CALLS or set(completed.values()) != {1}:
        wrong = {call: times for call, times in completed.items() if times > 1}
        raise BenchmarkError(f"{len(completed)} calls completed, more than once: {wrong}")


# -- memory ---------------------------------------------------------------------------


def memory_per_call(target: str) -> float:
    """What each of the calls between the 100,000th and the 200,000th has added."""
    few, many = 100_000, 200_000
    return (memory_after(target, many) - memory_after(target, few)) / (many - few)


def memory_after(target: str, size: int) -> int:
    """The coordinator's own memory, in bytes, when ``size`` calls have ended."""
    command = [TASKRUN, "exec", str(JOBS / "memory.py"), target, "-j", "2"]
    sample = run(["/bin/sh", "-c", 'export COORDINATOR=$$; exec "$@"', "sh", *command], CALLS=size)
    return int(sample.out.split()[-1])


# -- all of them ----------------------------------------------------------------------

BENCHMARKS = (
    Benchmark(
        "help", "CPU time of `taskrun --help`", "ms",
        help_cpu, 'python -c "import click"', import_click_cpu, 1.5, rounds=15,
    ),
    Benchmark(
        "one_task", "CPU time of `exec` of one trivial task", "ms",
        one_cpu, "multiprocessing.Pool(2), forkserver", one_pool_cpu, 2.5, rounds=11,
    ),
    Benchmark(
        "tiny", "20,000 trivial calls of one fan-out", "calls/s",
        partial(rate, tiny_taskrun, 20_000),
        "Pool.imap_unordered(chunksize=1)", partial(rate, tiny_pool, 20_000),
        3.0, at_least=True,
    ),
    Benchmark(
        "graph", f"a graph of {graph_calls(LEAVES):,} submitted calls", "calls/s",
        partial(graph_rate, graph_taskrun),
        "dask.delayed, LocalCluster(2)", partial(graph_rate, graph_dask),
        60.0, at_least=True, rounds=3,
    ),
    Benchmark(
        "even", "400 calls of 20 ms of pure Python", "calls/s",
        partial(rate, even_taskrun, 400),
        "two processes, half each", partial(rate, even_ideal, 400),
        0.97, at_least=True,
    ),
    Benchmark(
        "even_pool", "the same calls", "calls/s",
        partial(rate, even_taskrun, 400),
        "Pool.imap_unordered(chunksize=1)", partial(rate, even_pool, 400),
        1.0, at_least=True,
    ),
    Benchmark(
        "heavy", "200 sleeps with a heavy tail, makespan", "s",
        partial(heavy_seconds, "heavy"),
        "greedy list scheduling, computed", partial(greedy_list_scheduling, DURATIONS),
        1.05, rounds=3,
    ),
    Benchmark(
        "heavy_busy", "the same durations in pure Python, makespan", "s",
        partial(heavy_seconds, "heavy_busy"),
        "greedy list scheduling, two processes", heavy_greedy_seconds,
        1.05,
    ),
    Benchmark(
        "shell", '1,000 calls of `sh("true")`', "calls/s",
        partial(rate, shell_taskrun, 1000), "ninja -j2", partial(rate, shell_ninja, 1000),
        0.7, at_least=True,
    ),
    Benchmark(
        "kills", "400 calls of 20 ms, a worker killed every 0.5 s", "s",
        partial(kills_seconds, True), "undisturbed", partial(kills_seconds, False),
        1.6,
    ),
    Benchmark(
        "memory_fan_out", "coordinator, per finished call of a fan-out", "bytes",
        partial(memory_per_call, "fan_out"), "1 KB", lambda: 1024.0,
        1.0, rounds=1,
    ),
    Benchmark(
        "memory_chain", "coordinator, per finished call of a chain of submits", "bytes",
        partial(memory_per_call, "chain"), "1 KB", lambda: 1024.0,
        1.0, rounds=1,
    ),
    Benchmark(
        "waits_async", "10,000 calls that wait 50 ms in the lane async", "s",
        partial(lanes.waiting_seconds, "async"),
        "asyncio.gather", partial(lanes.bare_seconds, "async"), 2.0,
    ),
    Benchmark(
        "waits_green", "10,000 calls that wait 50 ms in the lane green", "s",
        partial(lanes.waiting_seconds, "green"),
        "gevent", partial(lanes.bare_seconds, "green"), 2.0,
    ),
    Benchmark(
        "memory_async", "memory of a worker per waiting call of the lane async", "KB",
        partial(lanes.memory_per_call, "async"), "10 KB", lambda: 10.0, 1.0, rounds=3,
    ),
    Benchmark(
        "memory_green", "memory of a worker per waiting call of the lane green", "KB",
        partial(lanes.memory_per_call, "green"), "16 KB", lambda: 16.0, 1.0, rounds=3,
    ),
    Benchmark(
        "mixed", "200 calls of 20 ms beside 10,000 that wait 30 s", "calls/s",
        partial(lanes.computing_rate, lanes.CALLS),
        "the same beside one", partial(lanes.computing_rate, 1), 0.95, at_least=True, rounds=1,
    ),
    Benchmark(
        "crawl_async", "1,000 pages of 100 ms each, lane async, aiohttp", "pages/s",
        partial(crawl.rate, "async"), "lane process, -j 2", crawl.process_rate,
        20.0, at_least=True, rounds=3,
    ),
    Benchmark(
        "crawl_green", "1,000 pages of 100 ms each, lane green, urllib", "pages/s",
        partial(crawl.rate, "green"), "lane process, -j 2", crawl.process_rate,
        20.0, at_least=True, rounds=3,
    ),
    *POOL_BENCHMARKS,
)  # fmt: skip
