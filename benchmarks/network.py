"""Calls over the network: a node with two workers on this machine, reached by TLS.

    python benchmarks/network.py [--rounds 3] [--calls 20000] [--nodes 1000]

- So many trivial calls, one by one through the apply_async of a Pool on the node, and of one
  fan-out, beside a local multiprocessing.Pool with two workers and apply_async; at least 5x as
  many a second.
- The round trip of one trivial call, from the coordinator to the node and back; 1 ms.
- 100 MB that eight calls take: the bytes that cross to the node; once.
- Trivial calls of Dask distributed and of Ray with two worker processes on this machine, where
  they are installed; at least 50x and 20x as many a second.
- 1,000 nodes that are nothing but connections (``tests/stubs.py``): how long it takes them to join
  one coordinator, what their heartbeats cost, and what each takes of memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from measure import TASKRUN

from taskrun import Pool, transport
from taskrun import messages as m
from taskrun.addresses import Tls, shown
from taskrun.engines.nodes import ROLE, Nodes
from taskrun.engines.pool import PoolEngine
from taskrun.model import Recipe
from taskrun.network.bundles import make_bundle
from taskrun.observers import Observer
from taskrun.reactor import Reactor
from taskrun.values import encode

DEADLINE = 120.0
STUBS = Path(__file__).parents[1] / "tests" / "stubs.py"
LARGE = 100 * 1000 * 1000
FEW = 2000  # calls of Dask and Ray, which take long
TASKS = """
import time
from taskrun import each, result, task

@task
def warm(number=each(range(100))):  # as the Pool is: both workers are there when it is over
    time.sleep(0.001)

@task
def numbers(warmed=result(warm)):
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


def of_a_local_pool(calls: int) -> float:
    """Calls a second of multiprocessing.Pool."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return one_by_one(pool, calls)


def of_a_pool(folder: Path, calls: int) -> float:
    """Calls a second of a Pool on the node of a server, which has no workers of its own."""
    command = [TASKRUN, "serve", "-j", "0", "--listen", "tls://127.0.0.1:0"]
    with subprocess.Popen(
        command, cwd=folder, env=environment(folder), stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            address = listens_at(server)
            with (
                node(folder, address=address),
                Pool(2, address=address, authkey=folder / "key") as pool,
            ):
                return one_by_one(pool, calls)
        finally:
            server.terminate()


def one_by_one(pool: Any, calls: int) -> float:
    """Calls a second of its apply_async."""
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


def listens_at(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return next(line for line in process.stderr if "listening on" in line).split()[-1]


@contextmanager
def node(
    folder: Path, run: subprocess.Popen[str] | None = None, address: str = ""
) -> Iterator[None]:
    """A node with two workers."""
    if run is not None:
        address = listens_at(run)
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


def of_dask(calls: int) -> float:
    """Calls a second of a local cluster of Dask."""
    from distributed import Client, LocalCluster

    made = LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    )
    with made as cluster, Client(cluster) as client:
        client.gather(client.map(double, range(-100, 0), pure=False))
        began = time.perf_counter()
        found = client.gather(client.map(double, range(calls), pure=False))
        assert sum(found) == calls * (calls - 1)
        return calls / (time.perf_counter() - began)


def of_ray(calls: int) -> float:
    """Calls a second of Ray."""
    import ray

    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    try:
        remote = ray.remote(double)
        ray.get([remote.remote(number) for number in range(100)])
        began = time.perf_counter()
        found = ray.get([remote.remote(number) for number in range(calls)])
        assert sum(found) == calls * (calls - 1)
        return calls / (time.perf_counter() - began)
    finally:
        ray.shutdown()


PEERS: dict[str, tuple[Callable[[int], float], int]] = {
    "distributed": (of_dask, 50),
    "ray": (of_ray, 20),
}
"""By module: calls a second, and how many times as many taskrun has to reach."""


# -- one call -------------------------------------------------------------------------


class Bench(Observer):
    """The coordinator's side without a scheduler: calls are given to a worker by hand."""

    def __init__(self, folder: Path, address: Any = None) -> None:
        file = str(folder / "tasks.py")
        self.crossed = 0  # bytes to the node
        self.ready: list[int] = []
        self.reactor = Reactor()
        self._ended = 0
        self._made = 0
        self.slots = 0  # of all nodes
        self.nodes = nodes = Nodes(bundle=lambda: make_bundle(file))
        self.engine = PoolEngine(module="tasks", file=file, slots=0, nodes=nodes)
        self.engine.start(self.reactor, self._post, self)
        self.listener = transport.listen(
            address or Tls("127.0.0.1", 0), (folder / "key").read_bytes(), self.reactor,
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
        elif isinstance(event, m.Capacity):
            self.slots = event.slots

    def until(self, holds: Callable[[], bool]) -> None:
        if not self.reactor.run_until(holds, time.monotonic() + DEADLINE):
            raise SystemExit("it takes too long")

    def call(self, recipe: Recipe, *args: Any, worker: int = 0) -> None:
        """One more call, for a worker."""
        made = _Call(self._made, recipe, tuple(args))
        self._made += 1
        self.engine.perform(m.Assign(self.ready[worker % len(self.ready)], [made]))

    def start(self, workers: int) -> None:
        """So many workers, as soon as there is a place for each."""
        self.until(lambda: self.slots >= workers)
        self.engine.perform(m.StartWorkers(workers))
        self.until(lambda: len(self.ready) == workers)

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
        made.start(2)
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


# -- many nodes -----------------------------------------------------------------------


class Crowd(NamedTuple):
    """``joined``, ``worked``, ``lost``: seconds until all nodes have joined, until each has a
    worker and all calls have ended, until the end of all was noticed.  ``beats``: of one core.
    ``memory``: bytes a node."""

    joined: float
    worked: float
    beats: float
    memory: float
    lost: float


def crowd(folder: Path, count: int, processes: int = 4) -> Crowd:
    """So many nodes at one coordinator, two calls for each; killed in the end."""
    allow_descriptors(2 * count)
    made = Bench(folder, ("127.0.0.1", 0))
    before = resident()
    began = time.perf_counter()
    command = [sys.executable, str(STUBS), shown(made.listener.address), str(folder / "key")]
    stubs = [
        subprocess.Popen([*command, str(count // processes)], stdin=subprocess.PIPE)
        for _ in range(processes)
    ]
    made.until(lambda: made.slots == count)
    joined, memory = time.perf_counter() - began, (resident() - before) / count
    began = time.perf_counter()
    made.start(count)
    recipe = Recipe(1, "same", ("tasks", "double"), names=("number",))
    for number in range(2 * count):
        made.call(recipe, number, worker=number)
    made.settle()
    worked = time.perf_counter() - began
    beats = share_of_a_core(made, 10.0)
    assert made.slots == count
    for process in stubs:
        process.kill()
        process.communicate()
    began = time.perf_counter()
    made.until(lambda: made.slots == 0)
    lost = time.perf_counter() - began
    made.close()
    return Crowd(joined, worked, beats, memory, lost)


def share_of_a_core(made: Bench, seconds: float) -> float:
    """What the coordinator uses of one, with nothing to do."""
    end, used = time.monotonic() + seconds, time.process_time()
    made.until(lambda: time.monotonic() >= end)
    return (time.process_time() - used) / seconds


def resident() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def allow_descriptors(count: int) -> None:
    """Let this process and its children have so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * count), hard))


# -- one of them ----------------------------------------------------------------------


def trip(folder: Path, options: argparse.Namespace) -> float:
    with bench(folder) as made:
        return round_trip(made)


def crossed(folder: Path, options: argparse.Namespace) -> float:
    """MB to the node, of LARGE that eight calls take."""
    with bench(folder) as made:
        return large(made)[0] * LARGE / 1e6


def beats(folder: Path, options: argparse.Namespace) -> float:
    return 100 * crowd(folder, options.nodes).beats


FIGURES: dict[str, Callable[[Path, argparse.Namespace], float]] = {
    "run": lambda folder, options: of_a_run(folder, options.calls),
    "pool": lambda folder, options: of_a_pool(folder, options.calls),
    "local_pool": lambda folder, options: of_a_local_pool(options.calls),
    "dask": lambda folder, options: of_dask(min(options.calls, FEW)),
    "ray": lambda folder, options: of_ray(min(options.calls, FEW)),
    "trip": trip,
    "crossed": crossed,
    "beats": beats,
}
"""For ``make bench``: calls a second, milliseconds, MB, percent of a core."""


# -- all of it ------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--figure", choices=FIGURES, help="print this one alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tasks.py").write_text(TASKS.format(calls=options.calls))
        (folder / "key").write_text(os.urandom(32).hex())
        (folder / "key").chmod(0o600)
        if options.figure:
            print(FIGURES[options.figure](folder, options))
            return 0
        # Its memory is measured while this process is fresh.
        verdicts = [many(folder, options.nodes), *rates(folder, options.rounds, options.calls)]
    print(f"others on this machine: load {os.getloadavg()[0]:.1f}")
    return 0 if all(verdicts) else 1


def rates(folder: Path, rounds: int, calls: int) -> Iterator[bool]:
    """Calls, round trips and bulk; gives whether each target is reached."""
    local, pools, runs, trips = [], [], [], []
    peers: dict[str, list[float]] = {
        name: [] for name in PEERS if importlib.util.find_spec(name) is not None
    }
    for _ in range(rounds):
        local.append(of_a_local_pool(calls))
        pools.append(of_a_pool(folder, calls))
        runs.append(of_a_run(folder, calls))
        for name, found in peers.items():
            found.append(PEERS[name][0](min(calls, FEW)))
        with bench(folder) as made:
            trips.append(round_trip(made))
            times, seconds = large(made)
    ours, trip = statistics.median(pools), statistics.median(trips)
    print(f"calls/s    {ours:10,.0f} of a Pool")
    yield compared(ours, "Pool.apply_async", local, 5)
    ours = statistics.median(runs)
    print(f"calls/s    {ours:10,.0f} of a fan-out")
    yield compared(ours, "Pool.apply_async", local, 5)
    for name, (_, target) in PEERS.items():
        if name in peers:
            yield compared(ours, name, peers[name], target)
        else:
            print(f"  {name} is not installed")
    print(f"round trip {trip:10.2f} ms   (target 1)")
    yield trip <= 1
    print(f"100 MB for 8 calls crossed {times:.3f} times, {seconds:.2f} s (target once)")
    yield times < 1.01


def compared(ours: float, name: str, found: list[float], target: float) -> bool:
    """Whether this many times as many are reached."""
    theirs = statistics.median(found)
    print(f"  {name} {theirs:,.0f}: {ours / theirs:.1f}x (target {target})")
    return ours >= target * theirs


def many(folder: Path, count: int) -> bool:
    """Whether the heartbeats of so many nodes are cheap."""
    seen = crowd(folder, count)
    print(
        f"{count:,} nodes: joined in {seen.joined:.1f} s, {2 * count:,} calls in "
        f"{seen.worked:.1f} s, {seen.memory / 1024:.1f} KiB each, end noticed in {seen.lost:.1f} s"
    )
    print(f"  their heartbeats: {100 * seen.beats:.1f} % of a core (target 10)")
    return seen.beats < 0.1


if __name__ == "__main__":
    sys.exit(main())
