"""An engine at work, and a stand-in for the core: assigns calls, collects what comes back.

``make`` and ``shop`` are fixtures; ``conftest`` makes them known.
"""

from __future__ import annotations

import itertools
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from taskrun import messages as m
from taskrun.engines.base import Engine
from taskrun.engines.pool import PoolEngine
from taskrun.model import Recipe
from taskrun.observers import Observer
from taskrun.reactor import Reactor
from taskrun.values import decode, decode_failure, encode

SECONDS = 30.0  # until a test that waits for something has failed

CHORES = """
import ctypes, os, signal, subprocess, sys, threading, time

@task
def add(x, y): return x + y

@task
def same(x): return x

@task
def pid(): return os.getpid()

@task
def size(x): return len(x)

@task
def zeros(x): return bytes(x)

@task
def nap(x):
    time.sleep(x)
    return x

@task
def end_by(x): os.kill(os.getpid(), x); time.sleep(60)

@task
def leave(x): os._exit(x)

@task
def crash(): ctypes.string_at(0)

@task
def shout(x): print(x); print(x, file=sys.stderr); return x

@task
def shout_and_die(x): print(x, flush=True); os.kill(os.getpid(), signal.SIGKILL)

@task
def touch_and_wait(x):
    open(x, "w").close()
    time.sleep(60)
"""

INTERRUPTIBLE = """
@task
def spin(x):
    open(x, "w").close()
    while True: pass

@task
def tidy(x):
    try:
        open(x, "w").close()
        time.sleep(60)
    finally:
        print("tidied up")

@task
def swallow(x):
    while True:
        try:
            open(x, "w").close()
            time.sleep(60)
        except BaseException:
            pass

@task
def immune(x):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    swallow(x)

@task
def subprocesses(x):
    children = [subprocess.Popen(["sleep", "300"]),
                subprocess.Popen(["bash", "-c", "trap '' TERM; sleep 300 & wait; sleep 300"])]
    time.sleep(0.2)
    with open(x + ".part", "w") as file: file.write(" ".join(str(c.pid) for c in children))
    os.rename(x + ".part", x)
    time.sleep(60)

@task
async def dream(x):
    import asyncio
    try:
        open(x, "w").close()
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        print("woken")
        raise
"""

FORKING = """
@task
def fork_and_return(x):
    pid = os.fork()
    if pid == 0:
        print("the child returns")
        return "child"
    os.waitpid(pid, 0)
    return "parent"

@task
def fork_and_raise(x):
    pid = os.fork()
    if pid == 0: raise x
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

@task
def fork_and_exit(x):
    pid = os.fork()
    if pid == 0: sys.exit(x)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

@task
def outlive(x):
    pid = os.fork()
    if pid == 0:
        if x: os.setsid()
        time.sleep(300)
    return pid

@task
def through_multiprocessing(x):
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(abs, [-x, x])

@task
def endless_threads():
    for daemon in (True, False):
        threading.Thread(target=threading.Event().wait, daemon=daemon).start()
"""


class Call:
    """What an engine reads of a core's Call."""

    def __init__(self, id: int, recipe: Recipe, args: Any, **facts: Any) -> None:
        self.id = id
        self.recipe = recipe
        self.attempt: int = facts.get("attempt", 1)
        self.index: Any = facts.get("index", id)
        self.units: Any = facts.get("units")
        self.blob: Any = None
        self._args = args

    @property
    def name(self) -> str:
        return f"{self.recipe.name}[{self.index}]"

    def arguments(self) -> Any:
        return self._args


class Watcher(Observer):
    """Remembers what was observed."""

    def __init__(self) -> None:
        self.written: dict[tuple[Any, str], bytes] = defaultdict(bytes)
        self.size = 0
        self.keep = True
        self.ended: list[Any] = []
        self.notices: list[str] = []
        self.progress: list[tuple[Any, float, float | None]] = []
        self.gone: dict[str, str] = {}  # workers, and how they ended

    def output(self, call: Any, stream: str, data: bytes, worker: str = "") -> None:
        self.size += len(data)
        if self.keep:
            self.written[call and call.id, stream] += data

    def output_ended(self, call: Any) -> None:
        self.ended.append(call)

    def worker_changed(self, worker: str, what: str) -> None:
        if what.startswith(("ended", "lost")):
            self.gone[worker] = what

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def progressed(self, call: Any, done: float, total: float | None) -> None:
        self.progress.append((call, done, total))


class Workshop:
    """Runs an engine; ``source`` becomes the task file."""

    def __init__(self, engine: Engine, module: str) -> None:
        self.engine = engine
        self.module = module
        self.reactor = Reactor()
        self.events: list[m.Event] = []
        self.watcher = Watcher()
        self.reports: dict[tuple[int, int], m.Report] = {}
        self._ids = itertools.count()
        self._recipes: dict[Any, Recipe] = {}
        self._recipe_ids = itertools.count(1000)
        self.on_event: Callable[[m.Event], None] = lambda event: None
        engine.start(self.reactor, self._post, self.watcher)

    def _post(self, event: m.Event) -> None:
        self.events.append(event)
        if isinstance(event, m.Finished):
            for report in event.reports:
                key = report[0], report[1]
                assert key not in self.reports, f"{key} ended twice"
                self.reports[key] = m.Report(*report)
        self.on_event(event)

    def until(self, predicate: Callable[[], Any], seconds: float = SECONDS) -> None:
        """Run until ``predicate()`` holds."""
        deadline = time.monotonic() + seconds
        while not predicate():
            self.reactor.run_once(0.02)  # it may ask for what wakes no loop
            assert time.monotonic() < deadline, f"it did not come to that: {self.events[-20:]}"

    def all(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def await_event(self, kind: type, count: int = 1) -> Any:
        """The ``count``-th event of a kind, as soon as it is there."""
        self.until(lambda: len(self.all(kind)) >= count)
        return self.all(kind)[count - 1]

    def workers(self, count: int = 1, lane: str = "process") -> list[int]:
        """Start workers; gives their ids when they are ready."""
        before = len(self.all(m.WorkerReady))
        self.engine.perform(m.StartWorkers(count, lane))
        self.until(lambda: len(self.all(m.WorkerReady)) == before + count)
        return [event.worker for event in self.all(m.WorkerReady)[before:]]

    def pid(self, worker: int) -> int:
        return next(event.pid for event in self.all(m.WorkerReady) if event.worker == worker)

    def recipe(self, name: str, names: tuple[str, ...] | None, **facts: Any) -> Recipe:
        key = name, names, repr(sorted(facts.items()))
        if key not in self._recipes:
            reference = facts.pop("reference", (self.module, name))
            self._recipes[key] = Recipe(
                next(self._recipe_ids), name, reference, names=names, **facts
            )
        return self._recipes[key]

    def make(self, name: str, *args: Any, names: Any = None, **facts: Any) -> Call:
        """A call of the task ``name`` with these arguments; parameters are named x, y, z."""
        about = {key: facts.pop(key) for key in ("attempt", "index", "units") if key in facts}
        names = names if names is not None else tuple("xyz"[: len(args)])
        encoded = tuple(encode(arg)[0] for arg in args)
        return Call(next(self._ids), self.recipe(name, names, **facts), encoded, **about)

    def again(self, call: Call) -> Call:
        """Another call with the very same arguments."""
        return Call(next(self._ids), call.recipe, call.arguments())

    def assign(self, worker: int, *calls: Any, nested: bool = False) -> None:
        self.engine.perform(m.Assign(worker, list(calls), nested))

    def start(self, worker: int, name: str, *args: Any, **facts: Any) -> Call:
        """Make one call and assign it."""
        call = self.make(name, *args, **facts)
        self.assign(worker, call)
        return call

    def report(self, call: Any) -> m.Report:
        """How a call ended, as soon as it has."""
        key = call.id, call.attempt
        self.until(lambda: key in self.reports)
        return self.reports[key]

    def value(self, call: Any) -> Any:
        report = self.report(call)
        assert report.kind == "value", report
        return decode(report.payload)

    def error(self, call: Any) -> BaseException:
        report = self.report(call)
        assert report.kind == "error", report
        return decode_failure(report.payload[0])

    def do(self, worker: int, name: str, *args: Any, **facts: Any) -> Any:
        """Call a task and wait for its value."""
        return self.value(self.start(worker, name, *args, **facts))

    def written(self, call: Any, stream: str = "stdout") -> bytes:
        return self.watcher.written[call and call.id, stream]

    def close(self, seconds: float = 10.0) -> None:
        self.engine.close(time.monotonic() + seconds)
        self.reactor.close()


def task_file(folder: Path, source: str, name: str = "chores") -> tuple[str, str]:
    """Write a task file; gives its module name and path."""
    path = folder / f"{name}.py"
    path.write_text("from taskrun import task, per_worker, current, as_completed\n" + source)
    return name, str(path)


Make = Callable[..., Workshop]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    shops: list[Workshop] = []

    def make_shop(source: str = "", **options: Any) -> Workshop:
        module, file = task_file(tmp_path, CHORES + textwrap.dedent(source))
        shops.append(Workshop(PoolEngine(module=module, file=file, **options), module))
        return shops[-1]

    yield make_shop
    for shop in shops:
        shop.close()


@pytest.fixture
def shop(make: Make) -> Workshop:
    return make()


# -- processes ------------------------------------------------------------------------


def gone(*pids: int, seconds: float = 5.0) -> bool:
    """Whether these processes end in time."""
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.005)


# -- interrupts -----------------------------------------------------------------------


def interrupt(shop: Workshop, worker: int, call: Any) -> None:
    shop.engine.perform(m.Interrupt(worker, call.id, call.attempt, "cancelled"))


def cancelled(shop: Workshop, call: Any) -> bool:
    report = shop.report(call)
    return report.kind == "error" and report.payload[0].kind == "cancelled"
