"""``taskrun.run``: a run from Python, or from a notebook."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from taskrun import context
from taskrun.calls import FAILED, OK, Call
from taskrun.coordinator import Run
from taskrun.errors import RunFailed, UsageError
from taskrun.lanes import check_lane_jobs
from taskrun.loading import Loaded, gather, load
from taskrun.model import Plan, Task
from taskrun.observers import Observer
from taskrun.parameters import capacity
from taskrun.planning import make_plan
from taskrun.reactor import Reactor
from taskrun.settings import Settings, cores_here
from taskrun.values import decode, decode_failure


def run(
    *what: str | os.PathLike[str] | Task,
    jobs: int | None = None,
    params: Mapping[str, Any] | None = None,
    policy: str = "stop",
    resources: Mapping[str, float | str] | None = None,
    output: str = "line",
    inline: bool = False,
    state: str | os.PathLike[str] | None = None,
    listen: str | None = None,
    engine: str | None = None,
    lane_jobs: Mapping[str, int] | None = None,
) -> Any:
    """Run tasks and give their values.

    ``what``: task objects, ``run(total, words)``, or a task file and the names of tasks in
    it, ``run("tasks.py", "total")``; without names, what ``taskrun exec`` would run.
    ``jobs`` defaults to the cores.  ``params``: run parameters, by ``name`` or
    ``task.name``; not converted.  ``policy``: ``stop``, ``keep-going`` or ``fail-fast``.
    ``resources``: what there is to be shared out, ``{"gpu": 2, "memory": "16G"}``.
    ``output``: ``line``, ``group``, ``raw`` or ``quiet``.  ``inline``: every call in this
    process.  ``state``: a file from which shared state is loaded, if it exists, and in which
    it is kept.  ``listen``: ``"HOST:PORT"``, where clients reach the shared state.
    ``engine``: where calls are executed, other than by own workers: ``"dask"``, ``"ray"``,
    ``"dask://HOST:PORT"``, ``"module:factory"`` (docs/engines.md).  ``lane_jobs``: how many
    workers a lane may have, ``{"async": 2}``; unless said, one each.

    Gives the value of the one task named, or a dict of values by task name.  The value of
    a fan-out is the list of its calls' values, in item order.

    Raises RunFailed, from the exception of the call that failed first, UsageError for what
    cannot be run and while a task file is imported, and RunError where the run could not go on.
    """
    if context.importing:
        raise UsageError(
            "run() is called while the task file is imported, which every process does: put it "
            "under  if __name__ == '__main__':"
        )
    if inline and engine is not None:
        raise UsageError("run(inline=True) and run(engine=...) exclude each other")
    loaded, names, single = _tasks_of(what)
    plan = make_plan(loaded, names, given=_mapping("params", params))
    settings = Settings(
        jobs=_jobs(jobs),
        policy=_one_of("policy", policy, ("stop", "keep-going", "fail-fast")),
        resources=_capacities(_mapping("resources", resources)),
        output=_one_of("output", output, ("line", "group", "raw", "quiet")),
        inline=inline,
        state=None if state is None else os.fspath(state),
        listen=_text("listen", listen),
        engine=_text("engine", engine),
        lane_jobs=check_lane_jobs(_mapping("lane_jobs", lane_jobs), "run(lane_jobs=...)"),
    )
    return _values_of(plan, settings, single)


def _tasks_of(what: tuple[Any, ...]) -> tuple[Loaded, list[str], bool]:
    if not what:
        raise UsageError("run() needs a task, or a task file: run(total) or run('tasks.py')")
    if all(isinstance(one, Task) for one in what):
        return Loaded(gather(what)), [task.name for task in what], len(what) == 1
    file, *names = what
    if not (isinstance(file, str | os.PathLike) and all(isinstance(one, str) for one in names)):
        given = ", ".join(type(one).__name__ for one in what)
        raise UsageError(f"run() takes tasks, or a task file and names of tasks, not ({given})")
    return load(file), names, len(names) == 1


def _jobs(jobs: int | None) -> int:
    if jobs is None:
        return cores_here()
    if not isinstance(jobs, int) or jobs < 1:
        raise UsageError(f"run(jobs=...) is a number of workers, 1 or more, not {jobs!r}")
    return jobs


def _capacities(resources: Mapping[str, float | str]) -> dict[str, float]:
    said = "run(resources=...)"
    return {name: capacity(name, much, said) for name, much in resources.items()}


def _mapping(option: str, value: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise UsageError(f"run({option}=...) is a dict, by names, not {value!r}")
    return value or {}


def _text(option: str, value: str | None) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UsageError(f"run({option}=...) is a str, not {value!r}")
    return value


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise UsageError(f"run({option}=...) is one of {', '.join(allowed)}, not {value!r}")
    return value


class _Failures(Observer):
    """The failed and the cancelled calls of a run, in the order of their end."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def call_ended(self, call: Any) -> None:
        if call.is_to_blame:
            self.calls.append(call)


def _values_of(plan: Plan, settings: Settings, single: bool) -> Any:
    from taskrun.reporting.display import Display

    reactor = Reactor()
    display = Display(settings, reactor)
    failures = _Failures()
    observers = [*display.observers, failures]
    run = Run(plan, settings, observers, reactor, wanted=plan.targets)
    status = run.execute()
    if run.signalled:
        raise KeyboardInterrupt
    untolerated = [call for call in failures.calls if not call.tolerated]
    if status:
        raise _failed(untolerated, run)
    values = {name: _value_of(run, name) for name in plan.targets}
    return next(iter(values.values())) if single else values


def _failed(calls: list[Call], run: Run) -> RunFailed:
    failed = [call for call in calls if call.state == FAILED]
    if not failed and run.reason:
        return RunFailed(f"the run was stopped: {run.reason}")
    calls = failed or calls
    said = tuple(call.ended_as() for call in calls)
    first = calls[0]
    more = f", and {len(calls) - 1} more" if len(calls) > 1 else ""
    error = RunFailed(f"{first.title} {first.verdict}{more}: {said[0].headline}", said)
    error.__cause__ = decode_failure(said[0])
    return error


def _value_of(run: Run, name: str) -> Any:
    family = run.core.graph.families[name]
    values = [decode(call.value) if call.state == OK else None for call in family.in_order()]
    return values[0] if family.single else values
