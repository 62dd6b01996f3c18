"""From a task to the recipe that the scheduler and the workers go by.

A worker finds a task by its module and name where it can, and else gets it whole, by
cloudpickle: a task from a notebook, from a closure, or from a script run as ``__main__``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from taskrun.errors import CallTimeout
from taskrun.model import Each, Options, Recipe, Result, Source, Task, is_importable
from taskrun.values import encode


def make_recipe(
    task: Task,
    id: int,
    *,
    names: tuple[str, ...] | None,
    constants: dict[str, Any] | None = None,
    flags: int = 0,
) -> Recipe:
    """The recipe of ``task``; ``constants`` are run parameters' values, not encoded yet."""
    options = task.options
    reference, blob = reference_to(task)
    return Recipe(
        id=id,
        name=task.name,
        reference=reference,
        blob=blob,
        names=names,
        constants={name: encode(value)[0] for name, value in (constants or {}).items()},
        flags=flags,
        retries=options.retries,
        retry_timeouts=retries_timeouts(options.retry_on),
        backoff=options.backoff,
        timeout=options.timeout,
        priority=options.priority,
        resources=options.resources,
        always=options.always,
        lane=options.lane,
    )


def retries_timeouts(retry_on: Iterable[type[BaseException]]) -> bool:
    """Whether these exceptions cover a timeout."""
    return any(issubclass(CallTimeout, kind) for kind in retry_on)


def reference_to(task: Task) -> tuple[tuple[str, str] | bytes, bytes | None]:
    """How a worker finds ``task``: (module, qualname), or a digest with the task's blob."""
    if is_importable(task):
        return (task.module, task.qualname), None
    import cloudpickle  # heavy; most tasks are found by name

    blob = cloudpickle.dumps(_without_inputs(task))
    return blake2b(blob, digest_size=16).digest(), blob


def _without_inputs(task: Task) -> Task:
    """``task`` without the tasks and items it takes its inputs from: a worker is given the
    arguments, and has no use for where they came from."""
    options: Options = replace(task.options, after=())
    params = {name: _bare(source) for name, source in task.params.items()}
    return Task(task.function, options, params)


def _bare(source: Source) -> Source:
    return Each() if isinstance(source, Each | Result) else source
