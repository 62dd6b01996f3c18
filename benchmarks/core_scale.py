"""The scheduler core at scale: a million calls on ten thousand simulated workers.

    python benchmarks/core_scale.py [--calls 1000000] [--workers 10000]

Two shapes.  *pipeline*: a fan-out, a second one on it item by item, and one call that
takes all its results.  *tree*: calls that submit calls and wait for them.  For each it
prints the core's time and memory per call at a tenth of the size and at the whole size, and
how the one compares with the other: what a call costs must not grow with the graph.

Time is what ``Scheduler.handle`` takes, without the simulated workers.  Memory is what the
process has grown by, simulated workers included.  Each size is measured in a process of its
own.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

from taskrun import messages as m
from taskrun.calls import OK, Call
from taskrun.core.scheduler import Scheduler
from taskrun.model import Each, Options, Plan, Recipe, Result, Task

FANOUT = 50  # calls that each inner call of the tree submits
SECONDS = 0.002  # that a call is simulated to take
WORKERS_A_SLOT = 4


def main() -> None:
    options = _arguments()
    if options.measure:
        found = measure(options.measure, options.calls, options.workers)
        print(json.dumps(found))
        return
    print(f"{'shape':<10}{'calls':>10}{'workers':>9}{'s':>8}{'us/call':>10}{'bytes/call':>12}")
    for shape in SHAPES:
        small, large = (
            _in_a_process(shape, calls, options.workers)
            for calls in (options.calls // 10, options.calls)
        )
        for found in (small, large):
            print(
                f"{shape:<10}{found['calls']:>10,}{options.workers:>9,}{found['seconds']:>8.2f}"
                f"{found['us_per_call']:>10.2f}{found['bytes_per_call']:>12.0f}"
            )
        ratio = large["us_per_call"] / small["us_per_call"]
        print(f"{shape:<10}ten times the calls: {ratio:.2f}x the time per call")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=10_000)
    parser.add_argument("--measure", choices=sorted(SHAPES), help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_process(shape: str, calls: int, workers: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", shape]
    done = subprocess.run(
        [*command, "--calls", str(calls), "--workers", str(workers)],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(shape: str, calls: int, workers: int) -> dict[str, Any]:
    """Run one shape to its end; gives what it cost."""
    gc.collect()
    before = _memory()
    run = SHAPES[shape](calls, workers)
    run.to_the_end()
    made = len(run.scheduler.calls)
    assert all(call.state == OK for call in run.scheduler.calls), "a call did not succeed"
    assert run.scheduler.status == 0
    return {
        "calls": made,
        "seconds": run.seconds,
        "us_per_call": run.seconds / made * 1e6,
        "bytes_per_call": (_memory() - before) / made,
    }


def _memory() -> int:
    """Bytes that are resident; where the system does not say, the most that ever were."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- the workers ----------------------------------------------------------------------


class Fleet:
    """Workers that are as cheap to simulate as can be: a heap of what happens when.

    ``behave`` says what a call does when it begins: None, that it ends after SECONDS, or the
    calls that it submits and waits for.
    """

    def __init__(
        self,
        plan: Plan,
        workers: int,
        behave: Callable[[Call], list[tuple[bytes, Recipe, bytes, tuple[bytes, ...]]] | None],
        spare: int = 1,
    ) -> None:
        self.scheduler = Scheduler(
            plan, slots=workers, spare_factor=spare, recipe_ids=itertools.count(1), seed=1
        )
        self.seconds = 0.0
        self._behave = behave
        self._now = 0.0
        self._heap: list[tuple[float, int, m.Event]] = []
        self._tickets = itertools.count()
        self._workers = itertools.count(1)
        self._awaited: dict[int, int] = {}  # waiting call -> how many it waits for

    def to_the_end(self) -> None:
        """Run until nothing is left to do."""
        self._timed(lambda: self.scheduler.begin(0.0))
        while not self.scheduler.over:
            self._next()

    def _next(self) -> None:
        deadline = self.scheduler.deadline()
        if deadline is not None and deadline < self._heap[0][0]:
            self._now = max(self._now, deadline)
            event: m.Event = m.Tick()
        else:
            self._now, _, event = heapq.heappop(self._heap)
        self._timed(lambda: self.scheduler.handle(event, self._now))

    def _timed(self, action: Callable[[], list[m.Command]]) -> None:
        began = perf_counter()
        commands = action()
        self.seconds += perf_counter() - began
        for command in commands:
            kind = type(command)
            if kind is m.Assign:
                self._assigned(command)
            elif kind is m.StartWorkers:
                for _ in range(command.count):
                    self._later(0.0, m.WorkerReady(next(self._workers)))
            elif kind is m.Deliver:
                self._delivered(command)

    def _assigned(self, command: m.Assign) -> None:
        at, reports = 0.0, []
        for call in command.calls:
            submits = self._behave(call)
            if submits is None:
                at += SECONDS
                reports.append(_report(call))
            else:
                self._waits(command.worker, call, submits, at)
        if reports:
            self._later(at, m.Finished(command.worker, reports))

    def _waits(self, worker: int, call: Call, submits: list[Any], at: float) -> None:
        self._awaited[call.id] = len(submits)
        keys = tuple(key for key, *_ in submits)
        self._later(at, m.Submitted(call.id, call.attempt, submits))
        self._later(at, m.Waiting(worker, call.id, call.attempt, keys, False))

    def _delivered(self, command: m.Deliver) -> None:
        assert command.call is not None
        self._awaited[command.call] -= 1
        if not self._awaited[command.call]:
            call = self.scheduler.calls[command.call]
            self._later(0.0, m.Finished(command.worker, [_report(call)]))

    def _later(self, seconds: float, event: m.Event) -> None:
        heapq.heappush(self._heap, (self._now + seconds, next(self._tickets), event))


def _report(call: Call) -> tuple[Any, ...]:
    return (call.id, call.attempt, "value", call.id, None, 0.0, SECONDS, False)


# -- the shapes -----------------------------------------------------------------------


def pipeline(calls: int, workers: int) -> Fleet:
    """Half of the calls on literal items, half on these, and one that takes them all."""
    fetch = _task("fetch", page=Each(items=tuple(range(calls // 2)), identity=1))
    words = _task("words", page=Each(task=fetch))
    total = _task("total", counts=Result(words))
    plan = Plan((fetch, words, total), frozenset(["total"]))
    return Fleet(plan, workers, lambda call: None)


def tree(calls: int, workers: int) -> Fleet:
    """A root that submits inner calls, each of which submits and awaits FANOUT leaves."""
    inner = Recipe(id=-1, name="inner", reference=("bench", "inner"))
    leaf = Recipe(id=-2, name="leaf", reference=("bench", "leaf"))
    inners = [(_key(n), inner, b"inner", ()) for n in range(calls // (FANOUT + 1))]
    leaves = [(_key(n), leaf, b"leaf", ()) for n in range(FANOUT)]
    submits: dict[str, Any] = {"root": inners, "inner": leaves}
    plan = Plan((_task("root"),), frozenset(["root"]))
    return Fleet(plan, workers, lambda call: submits.get(call.recipe.name), WORKERS_A_SLOT)


def _key(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _task(name: str, **sources: Any) -> Task:
    return Task(_nothing, Options(name=name), sources)


def _nothing() -> None:
    """The functions are never called: the workers are simulated."""


SHAPES: dict[str, Callable[[int, int], Fleet]] = {"pipeline": pipeline, "tree": tree}

if __name__ == "__main__":
    main()
