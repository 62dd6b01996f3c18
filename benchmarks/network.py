"""Calls over the network: a node with two workers on this machine, reached by TLS.

    python benchmarks/network.py [--rounds 3] [--calls 20000]

- So many trivial calls, of one fan-out, beside a local multiprocessing.Pool with two workers
  and apply_async; at least 5x as many a second.
- The round trip of one trivial call, from the coordinator to the node and back; 1 ms.
- 100 MB that eight calls take: the bytes that cross to the node; once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import TASKRUN

from taskrun import messages as m
from taskrun import transport
from taskrun.addresses import Tls, shown
from taskrun.engines.nodes import ROLE, Nodes
from taskrun.engines.pool import PoolEngine
from taskrun.model import Recipe
from taskrun.network.bundles import make_bundle
from taskrun.observers import Observer
from taskrun.reactor import Reactor
from taskrun.values import encode

DEADLINE = 120.0
LARGE = 100 * 1000 * 1000
TASKS = """
import time
from taskrun import each, result, task

@task
def numbers():
    print("began", time.time())
    return list(range({calls}))

@task
def double(number=each(numbers)):
    return number * 2

@task
def total(doubled=result(double)):
    print("ended", time.time(), sum(doubled))

@task(default=False)
def size(data):
    return len(data)
"""


def double(number: int) -> int:
    return number * 2


# -- many calls -----------------------------------------------------------------------


def of_a_pool(calls: int) -> float:
    """Calls a second of a local Pool."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(double, range(100))
        began = time.perf_counter()
        pending = [pool.apply_async(double, (number,)) for number in range(calls)]
        assert sum(one.get(DEADLINE) for one in pending) == calls * (calls - 1)
        return calls / (time.perf_counter() - began)


def of_a_run(folder: Path, calls: int) -> float:
    """Calls a second of a run over the node, from the end of the task before to the begin of
    the one that takes all their values."""
    with node(folder, run := listening(folder)):
        out, err = run.communicate(timeout=DEADLINE)
    if run.returncode:
        raise SystemExit(f"the run ended with {run.returncode}: {err}")
    said = {words[0]: words[1:] for words in map(str.split, out.splitlines())}
    assert int(said["ended"][1]) == calls * (calls - 1)
    return calls / (float(said["ended"][0]) - float(said["began"][0]))


def listening(folder: Path) -> subprocess.Popen[str]:
    command = [TASKRUN, "exec", "tasks.py", "total", "-j", "0", "--output", "raw"]
    return subprocess.Popen(
        [*command, "--listen", "tls://127.0.0.1:0"], cwd=folder, env=environment(folder),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@contextmanager
def node(
    folder: Path, run: subprocess.Popen[str] | None = None, address: str = ""
) -> Iterator[None]:
    """A node with two workers."""
    if run is not None:
        assert run.stderr is not None
        line = next(line for line in run.stderr if "listening on" in line)
        address = line.split()[-1]
    with subprocess.Popen(
        [TASKRUN, "worker", address, "-j", "2"], env=environment(folder), cwd=folder,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            yield
        finally:
            process.kill()


def environment(folder: Path) -> dict[str, str]:
    own = {"TASKRUN_AUTHKEY_FILE": str(folder / "key"), "XDG_CACHE_HOME": str(folder / "cache")}
    return {**os.environ, **own}


# -- one call -------------------------------------------------------------------------


class Bench(Observer):
    """The coordinator's side without a scheduler: calls are given to a worker by hand."""

    def __init__(self, folder: Path) -> None:
        file = str(folder / "tasks.py")
        self.crossed = 0  # bytes to the node
        self.ready: list[int] = []
        self.reactor = Reactor()
        self._ended = 0
        self._made = 0
        nodes = Nodes(bundle=lambda: make_bundle(file))
        self.engine = PoolEngine(module="tasks", file=file, slots=0, nodes=nodes)
        self.engine.start(self.reactor, self._post, self)
        self.listener = transport.listen(
            Tls("127.0.0.1", 0), (folder / "key").read_bytes(), self.reactor,
            self._counting(nodes.accept),
        )  # fmt: skip

    def _counting(self, accept: Callable[[Any], object]) -> Callable[[Any], object]:
        def accepted(peer: Any) -> None:
            send = peer.send

            def counted(*parts: Any) -> None:
                self.crossed += sum(map(len, parts))
                send(*parts)

            assert peer.hello == ROLE
            peer.send = counted
            accept(peer)

        return accepted

    def _post(self, event: m.Event) -> None:
        if isinstance(event, m.WorkerReady):
            self.ready.append(event.worker)
        elif isinstance(event, m.Finished):
            assert all(report[2] == "value" for report in event.reports), event
            self._ended += len(event.reports)
        elif isinstance(event, m.Capacity) and event.slots:
            self.engine.perform(m.StartWorkers(event.slots))

    def until(self, holds: Callable[[], bool]) -> None:
        if not self.reactor.run_until(holds, time.monotonic() + DEADLINE):
            raise SystemExit("it takes too long")

    def call(self, recipe: Recipe, *args: Any, worker: int = 0) -> None:
        """One more call, for a worker."""
        made = _Call(self._made, recipe, tuple(args))
        self._made += 1
        self.engine.perform(m.Assign(self.ready[worker % len(self.ready)], [made]))

    def settle(self) -> None:
        """Until all calls have ended."""
        self.until(lambda: self._ended == self._made)

    def close(self) -> None:
        self.engine.close(time.monotonic() + 5)
        self.listener.close()
        self.reactor.close()


class _Call:
    """What an engine reads of a call."""

    attempt = 1
    blob = index = units = None

    def __init__(self, id: int, recipe: Recipe, args: Any) -> None:
        self.id, self.recipe, self._args = id, recipe, args
        self.name = f"{recipe.name}[{id}]"

    def arguments(self) -> Any:
        return self._args


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    made = Bench(folder)
    with node(folder, address=shown(made.listener.address)):
        made.until(lambda: len(made.ready) == 2)
        yield made
        made.close()


def round_trip(made: Bench, times: int = 1000) -> float:
    """The median, in milliseconds."""
    recipe = Recipe(1, "double", ("tasks", "double"), names=("number",))
    took = []
    for number in range(times):
        began = time.perf_counter()
        made.call(recipe, number)
        made.settle()
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1000


def large(made: Bench) -> tuple[float, float]:
    """How often the value crossed, and how many seconds eight calls took."""
    recipe = Recipe(2, "size", ("tasks", "size"), names=("data",))
    value, _ = encode(bytes(LARGE))
    before, began = made.crossed, time.perf_counter()
    for number in range(8):
        made.call(recipe, value, worker=number)
    made.settle()
    return (made.crossed - before) / LARGE, time.perf_counter() - began


# -- all of it ------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tasks.py").write_text(TASKS.format(calls=options.calls))
        (folder / "key").write_text(os.urandom(32).hex())
        (folder / "key").chmod(0o600)
        pools, runs, trips = [], [], []
        for _ in range(options.rounds):
            pools.append(of_a_pool(options.calls))
            runs.append(of_a_run(folder, options.calls))
            with bench(folder) as made:
                trips.append(round_trip(made))
                times, seconds = large(made)
    ours, theirs = statistics.median(runs), statistics.median(pools)
    trip = statistics.median(trips)
    print(f"calls/s    {ours:10,.0f}   Pool.apply_async {theirs:10,.0f}   "
          f"{ours / theirs:.1f}x (target 5)")  # fmt: skip
    print(f"round trip {trip:10.2f} ms   (target 1)")
    print(f"100 MB for 8 calls crossed {times:.3f} times, {seconds:.2f} s (target once)")
    return 0 if ours >= 5 * theirs and trip <= 1 and times < 1.01 else 1


if __name__ == "__main__":
    sys.exit(main())
