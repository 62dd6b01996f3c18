"""Reads workflow instances in WfCommons' WfFormat, JSON schema 1.5.

An instance says which tasks a workflow had, which task needed which, and how long each
took where it really ran.  https://github.com/wfcommons/WfFormat
"""

import graphlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

VERSION = "1.5"


class NotWfFormat(ValueError):
    """The file is not an instance that can be replayed; the message says what is wrong."""


class Job(NamedTuple):
    """One task of a workflow: took ``seconds``, of which it computed the share ``busy``."""

    id: str
    parents: tuple[str, ...]
    seconds: float
    busy: float


class Workflow(NamedTuple):
    """``jobs`` are ordered so that parents come first."""

    name: str
    jobs: tuple[Job, ...]


def load(file: Path) -> Workflow:
    """Read and check an instance; raises NotWfFormat."""
    try:
        return _workflow(json.loads(file.read_bytes()))
    except NotWfFormat as error:
        raise NotWfFormat(f"{file}: {error}") from None
    except ValueError as error:
        raise NotWfFormat(f"{file} is not JSON: {error}") from None


def _workflow(document: Any) -> Workflow:
    version = _get(document, "schemaVersion", str, "the file")
    if version != VERSION:
        raise NotWfFormat(f"schemaVersion is {version!r}, only {VERSION!r} can be read")
    name = _get(document, "name", str, "the file")
    workflow = _get(document, "workflow", dict, "the file")
    needs = _parents(_tasks(workflow, "specification"))
    times = _tasks(workflow, "execution")
    untimed = needs.keys() - times.keys()
    if untimed:
        raise NotWfFormat(f"workflow.execution.tasks has no task {min(untimed)!r}")
    jobs = (_job(id, needs[id], times[id]) for id in _parents_first(needs))
    return Workflow(name, tuple(jobs))


def _tasks(workflow: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    """The tasks of the specification or the execution, by their ids."""
    where = f"workflow.{part}"
    listed = _get(_get(workflow, part, dict, "workflow"), "tasks", list, where)
    tasks = {_get(task, "id", str, f"{where}.tasks[{n}]"): task for n, task in enumerate(listed)}
    if not tasks:
        raise NotWfFormat(f"{where}.tasks is empty")
    if len(tasks) < len(listed):
        raise NotWfFormat(f"{where}.tasks has an id more than once")
    return tasks


def _parents(tasks: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The parents of each task, said by itself or by the parent's ``children``."""
    edges = [(parent, id) for id in tasks for parent in _get(tasks[id], "parents", list, id)]
    edges += [(id, child) for id in tasks for child in _get(tasks[id], "children", list, id)]
    parents: dict[str, list[str]] = {id: [] for id in tasks}
    for parent, child in dict.fromkeys(edges):
        for id, other in ((parent, child), (child, parent)):
            if id not in tasks:
                raise NotWfFormat(f"task {other!r} names {id!r}, which is not there")
        parents[child].append(parent)
    return parents


def _parents_first(parents: dict[str, list[str]]) -> list[str]:
    try:
        return list(graphlib.TopologicalSorter(parents).static_order())
    except graphlib.CycleError as error:
        raise NotWfFormat(f"the tasks form a cycle: {' -> '.join(error.args[1])}") from None


def _job(id: str, parents: list[str], timed: dict[str, Any]) -> Job:
    seconds = _get(timed, "runtimeInSeconds", (int, float), id)
    if not 0 <= seconds < math.inf:
        raise NotWfFormat(f"task {id!r} cannot have taken {seconds} s")
    percent = _get(timed, "avgCPU", (int, float), id) if "avgCPU" in timed else 100
    return Job(id, tuple(parents), float(seconds), min(max(percent, 0), 100) / 100)


def _get(record: Any, key: str, kind: Any, where: str) -> Any:
    """``record[key]``, which must be there and of that kind."""
    if not isinstance(record, dict):
        raise NotWfFormat(f"{where} is not an object")
    if key not in record:
        raise NotWfFormat(f"{where} has no {key!r}")
    if not isinstance(record[key], kind):
        raise NotWfFormat(f"{key!r} of {where} cannot be {record[key]!r:.40}")
    return record[key]
