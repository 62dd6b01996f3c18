"""An engine at work, and a stand-in for the core: assigns calls, collects what comes back."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taskrun import messages as m
from taskrun.engines.base import Engine
from taskrun.model import Recipe
from taskrun.observers import Observer
from taskrun.reactor import Reactor
from taskrun.values import decode, decode_failure, encode

SECONDS = 30.0  # until a test that waits for something has failed


class Call:
    """What an engine reads of a core's Call."""

    def __init__(self, id: int, recipe: Recipe, args: Any, **facts: Any) -> None:
        self.id = id
        self.recipe = recipe
        self.attempt: int = facts.get("attempt", 1)
        self.index: Any = facts.get("index", id)
        self.units: Any = facts.get("units")
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

    def output(self, call: Any, stream: str, data: bytes) -> None:
        self.size += len(data)
        if self.keep:
            self.written[call and call.id, stream] += data

    def output_ended(self, call: Any) -> None:
        self.ended.append(call)

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

    def workers(self, count: int = 1) -> list[int]:
        """Start workers; gives their ids when they are ready."""
        before = len(self.all(m.WorkerReady))
        self.engine.perform(m.StartWorkers(count))
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
