"""Calls that wait, ten thousand at once in a worker, beside the bare library."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from measure import PYTHON, TASKRUN, BenchmarkError, Sample, run

CALLS = 10_000
LANES = {"async": ("async def", "await asyncio.sleep"), "green": ("def", "time.sleep")}

WAITS = """
import asyncio, time
from taskrun import task, each

@task(lane={lane!r})
{define} nap(n=each(range({calls}))): {pause}(0.05)
"""

BARE = {
    "async": """
import asyncio, time
async def nap(): await asyncio.sleep(0.05)
async def all_of_them(): await asyncio.gather(*[nap() for _ in range({calls})])
began = time.perf_counter()
asyncio.run(all_of_them())
print(time.perf_counter() - began)
""",
    "green": """
from gevent import monkey; monkey.patch_all()
import gevent, time
began = time.perf_counter()
gevent.joinall([gevent.spawn(time.sleep, 0.05) for _ in range({calls})])
print(time.perf_counter() - began)
""",
}

MEMORY = """
import asyncio, os, time
from taskrun import task, each

began = ended = 0

def resident():
    with open("/proc/self/statm") as file: return int(file.read().split()[1]) * {page}

@task(lane={lane!r})
{define} before():
    global began
    {pause}(0.1)
    began = resident()

@task(lane={lane!r}, after=[before])
{define} nap(n=each(range({calls}))):
    global ended
    {pause}(5)
    if not ended:
        ended = resident()
        print("each", (ended - began) / {calls})
"""

COMPUTES = """
import asyncio, time
from taskrun import task, each, result, state

@task(lane={lane!r})
{define} nap(n=each(range({calls}))): {pause}(30)

@task(priority=-1, resources={{"cpu": 0}})
def begin():
    time.sleep(3)  # until all wait
    return time.monotonic()

@task(after=[begin])
def spin(n=each(range(200))):
    end = time.thread_time() + 0.02
    while time.thread_time() < end: pass

@task
def took(began=result(begin), all=result(spin)): print("took", time.monotonic() - began)
"""


def waiting_seconds(lane: str) -> float:
    """Seconds until all calls have waited 50 ms, less those for one call."""
    many, one = (_taskrun(WAITS, lane, calls).seconds for calls in (CALLS, 1))
    return many - one + 0.05


def bare_seconds(lane: str) -> float:
    """The same by the library alone."""
    return float(run([PYTHON, "-c", BARE[lane].format(calls=CALLS)]).out)


def memory_per_call(lane: str) -> float:
    """Kilobytes of the worker for each waiting call."""
    return float(_said(_taskrun(MEMORY, lane, CALLS), "each")) / 1024


def computing_rate(calls: int) -> float:
    """Calls of 20 ms of CPU time a second, while so many others wait."""
    return 200 / float(_said(_taskrun(COMPUTES, "async", calls, "took", "nap"), "took"))


def _taskrun(source: str, lane: str, calls: int, *tasks: str) -> Sample:
    define, pause = LANES[lane]
    facts = {"lane": lane, "define": define, "pause": pause, "calls": calls}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "waits.py"
        path.write_text(source.format(page=os.sysconf("SC_PAGE_SIZE"), **facts))
        return run([TASKRUN, "exec", str(path), *tasks, "-j", "2", "--output", "raw"])


def _said(sample: Sample, word: str) -> str:
    found = re.search(rf"^{word} (\S+)$", sample.out, re.MULTILINE)
    if found is None:
        raise BenchmarkError(f"no {word!r} in {sample.out[-500:]!r}")
    return found[1]
