"""From a task to the recipe that the scheduler and the workers go by.

A worker finds a task by its module and name where it can, and else gets it whole, by
cloudpickle: a task from a notebook, from a closure, or from a script run as ``__main__``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b
from types import FunctionType
from typing import Any

from taskrun.errors import CallTimeout, UsageError
from taskrun.model import Each, Options, PerWorker, Recipe, Result, Source, Task, is_importable
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
        limits=tuple([limit.bound for limit in options.limits]),
        cancellable=options.cancellable,
    )


def retries_timeouts(retry_on: Iterable[type[BaseException]]) -> bool:
    """Whether these exceptions cover a timeout."""
    return any(issubclass(CallTimeout, kind) for kind in retry_on)


def reference_to(task: Task) -> tuple[tuple[str, str] | bytes, bytes | None]:
    """How a worker finds ``task``: (module, qualname), or a digest with the task's blob.

    Raises UsageError where it has no name to be found by, and cannot be pickled either.
    """
    if is_importable(task, task) or (_is_plain(task) and is_importable(task, task.function)):
        return (task.module, task.qualname), None
    from taskrun.byvalue import dumps  # heavy; most tasks are found by name

    try:
        blob = dumps(_without_inputs(task))
    except Exception as error:
        raise UsageError(
            f"{task.name} is not found by its name {task.qualname!r} in {task.module}, and cannot "
            f"be pickled: {error}"
        ) from error
    return blake2b(blob, digest_size=16).digest(), blob


def _is_plain(task: Task) -> bool:
    """Whether its function alone tells a worker all that it has to know."""
    options = task.options
    by_worker = any(isinstance(source, PerWorker) for source in task.params.values())
    return options == Options(options.name, lane=options.lane) and not by_worker


def _without_inputs(task: Task) -> Task:
    """``task`` without the tasks and items it takes its inputs from: a worker is given the
    arguments, and has no use for where they came from."""
    options: Options = replace(task.options, after=())
    params = {name: _bare(source) for name, source in task.params.items()}
    return Task(_without_defaults(task.function), options, params)


def _without_defaults(function: Any) -> Any:
    """``function`` without the defaults that say where its parameters come from: through
    them it would take along every task that it depends on."""
    if not isinstance(function, FunctionType):
        return function
    bare = FunctionType(
        function.__code__, function.__globals__, function.__name__,
        tuple(map(_bare_default, function.__defaults__ or ())), function.__closure__,
    )  # fmt: skip
    bare.__kwdefaults__ = {
        name: _bare_default(value) for name, value in (function.__kwdefaults__ or {}).items()
    }
    bare.__dict__.update(function.__dict__)
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(bare, name, getattr(function, name))
    return bare


def _bare_default(value: Any) -> Any:
    return _bare(value) if isinstance(value, Each | Result) else value


def _bare(source: Source) -> Source:
    return Each() if isinstance(source, Each | Result) else source
