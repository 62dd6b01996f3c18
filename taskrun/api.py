"""What a task file is written with: ``@task``, and where its parameters come from.

Everything is checked when it is written down, that is at decoration, so that a mistake
shows as a traceback that ends in the user's own line.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args, overload

from taskrun import context
from taskrun.context import Current, Future, active, as_completed
from taskrun.errors import Retry, Skip
from taskrun.model import (
    LANES,
    MOST_ITEMS,
    Each,
    Errors,
    Limit,
    Options,
    Parameter,
    PerWorker,
    Result,
    Source,
    Task,
    nearest,
)

if TYPE_CHECKING:
    from typing import Unpack

__all__ = [
    "Future",
    "Retry",
    "Skip",
    "as_completed",
    "collecting",
    "current",
    "each",
    "per_worker",
    "result",
    "task",
]


class TaskOptions(TypedDict, total=False):
    """The options of :func:`task`."""

    name: str
    label: str
    after: Task | Iterable[Task]
    retries: int
    retry_on: type[BaseException] | Iterable[type[BaseException]]
    backoff: float
    timeout: float
    lane: Literal["process", "thread", "async", "green"]
    limits: Limit | Iterable[Limit]
    priority: float
    resources: dict[str, float | str]
    always: bool
    default: bool
    cancellable: bool


# -- tasks ----------------------------------------------------------------------------


@overload
def task(function: Callable[..., Any], /, **options: Unpack[TaskOptions]) -> Task: ...


@overload
def task(**options: Unpack[TaskOptions]) -> Callable[[Callable[..., Any]], Task]: ...


def task(function: Any = None, /, **options: Any) -> Any:
    """Make a function a task: ``@task`` or ``@task(retries=3, timeout=10)``.

    The function stays an ordinary function: calling the task calls it.  Options:

    - ``name``: what the task is called, instead of the function's name.
    - ``label``: how a call is shown, a format of its parameters: ``"{url}"``.
    - ``after``: a task or tasks that must have succeeded before; pulls them in.
    - ``retries``: how many more attempts a failed call gets; ``retry_on``: for which
      exceptions (default: Exception); ``backoff``: seconds before the first retry, doubled
      each time, with jitter.
    - ``timeout``: seconds an attempt may take.
    - ``lane``: how a worker executes it: ``"process"`` (one call at a time, and the default),
      ``"thread"`` (some dozens), ``"async"`` (thousands; the default of ``async def``) or
      ``"green"`` (thousands, by gevent).
    - ``limits``: what :func:`limit` gives: how many calls may run at once, or start in a time.
    - ``priority``: higher runs first.
    - ``resources``: what a call holds while it runs: ``{"gpu": 1, "memory": "4G"}``.  In
      sizes K, M, G, T are powers of 1000; Ki, Mi, Gi, Ti powers of 1024.
    - ``always``: runs however its inputs ended, after Ctrl-C as well.
    - ``default``: whether it runs when no task is named.
    - ``cancellable``: on an engine other than own workers it runs in a process of its own,
      so that cancelling ends it (as with ``timeout``); own workers' calls always are.

    Raises TypeError, ValueError, or UsageError for what is not available yet.
    """
    checked = _check_options(options)
    if function is None:
        return lambda function: _make(function, checked)
    return _make(function, checked)


def _make(function: Any, options: dict[str, Any]) -> Task:
    _refuse_what_is_no_function(function)
    name = options.get("name", getattr(function, "__name__", "<lambda>"))
    if name == "<lambda>":
        raise ValueError(f"{function!r} has no name of its own: write task(..., name='...')")
    params = _sources(function, name)
    lane = _lane_for(function, name, options.get("lane"))
    made = Task(function, Options(**{**options, "name": name, "lane": lane}), params)
    if made.options.label is not None:
        _check_label(made.options.label, params)
    if _collected is not None:
        _collected.append(made)
    return made


def _refuse_what_is_no_function(function: Any) -> None:
    if isinstance(function, Task):
        raise TypeError(f"{function.name} is a task already")
    if isinstance(function, type):
        raise TypeError(f"a task is a function; {function.__name__} is a class")
    if isinstance(function, staticmethod | classmethod | property) or inspect.ismethod(function):
        raise TypeError("a task is a function of a module, not a method")
    if not callable(function):
        raise TypeError(
            f"a task is a function, not {function!r}; options are given by name: @task(name=...)"
        )
    owner = getattr(function, "__qualname__", "").rpartition(".")[0]
    if owner and not owner.endswith("<locals>") and inspect.isfunction(function):
        raise TypeError(f"a task is a function of a module, not a method of {owner}")


def _sources(function: Any, name: str) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for parameter in _signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue  # filled by submit and plain calls only
        source = parameter.default
        if not isinstance(source, Each | Result | PerWorker):
            source = Parameter(parameter.name, parameter.default, parameter.annotation)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"{name}: {parameter.name!r} is filled by name, so it cannot be "
                            "positional-only: leave out the '/'")  # fmt: skip
        if isinstance(parameter.default, Task):
            of = parameter.default.name
            raise TypeError(f"{name}: the default of {parameter.name!r} is the task {of} "
                            f"itself: write result({of}) or each({of})")  # fmt: skip
        sources[parameter.name] = source
    return sources


def _signature(function: Any) -> inspect.Signature:
    try:
        if sys.version_info >= (3, 14):
            # Annotations may be names that exist for type checkers only.
            from annotationlib import Format

            return inspect.signature(function, annotation_format=Format.FORWARDREF)
        return inspect.signature(function)
    except ValueError:
        raise TypeError(f"{function!r} has no signature that could be read") from None


# -- the options ----------------------------------------------------------------------


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    checked = {}
    for option, value in options.items():
        if option not in _CHECKS:
            near = nearest(option, list(_CHECKS))
            hint = f"; did you mean {near}?" if near else f"; there are {', '.join(_CHECKS)}"
            raise TypeError(f"@task has no option {option!r}{hint}")
        if value is not None:
            checked[option] = _CHECKS[option](option, value)
    return checked


def _text(option: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{option} must be a str, not {value!r}")
    return value


def _name(option: str, value: Any) -> str:
    name = _text(option, value)
    if not name.isprintable() or name != name.strip() or name[:1] in ("", "-") or "=" in name:
        raise ValueError(f"{option} must be printable, without '=' or a '-' in front, not {name!r}")
    return name


def _tasks(option: str, value: Any) -> tuple[Task, ...]:
    tasks = (value,) if isinstance(value, Task) or not isinstance(value, Iterable) else value
    tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    for one in tasks:
        if not isinstance(one, Task):
            raise TypeError(f"{option} takes tasks, not {_told(one)}")
    return tasks


def _count(option: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{option} must be a whole number, not {value!r}")
    if value < 0:
        raise ValueError(f"{option} must be 0 or more, not {value}")
    return value


def _number(option: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{option} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{option} must be finite, not {value}")
    return value


def _not_negative(option: str, value: Any) -> float:
    if _number(option, value) < 0:
        raise ValueError(f"{option} is in seconds and must be 0 or more, not {value}")
    return float(value)


def _positive(option: str, value: Any) -> float:
    if _number(option, value) <= 0:
        raise ValueError(f"{option} is in seconds and must be more than 0, not {value}")
    return float(value)


def _exceptions(option: str, value: Any) -> tuple[type[BaseException], ...]:
    classes = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else value
    classes = tuple(classes)
    for one in classes:
        if not (isinstance(one, type) and issubclass(one, BaseException)):
            raise TypeError(f"{option} takes exception classes, not {one!r}")
    return classes


def _lane(option: str, value: Any) -> str:
    if value not in LANES:
        near = nearest(value, LANES) if isinstance(value, str) else None
        hint = f"did you mean {near!r}?" if near else f"lanes are {', '.join(LANES)}"
        raise ValueError(f"there is no {option} {value!r}; {hint}")
    return str(value)


def _limits(option: str, value: Any) -> tuple[Limit, ...]:
    limits = (value,) if isinstance(value, Limit) else value
    if not isinstance(limits, Iterable):
        raise TypeError(f"{option} takes limits, not {value!r}: limits=[limit(10)]")
    limits = tuple(limits)
    for one in limits:
        if not isinstance(one, Limit):
            raise TypeError(f"{option} takes limits, not {one!r}: limits=[limit(10)]")
    return limits


def _resources(option: str, value: Any) -> dict[str, float]:
    from taskrun.parameters import amount  # few files need it

    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{option} must be a dict of names and amounts, not {value!r}")
    amounts = {name: amount(name, much) for name, much in value.items()}
    for name, much in amounts.items():
        if name not in ("cpu", "memory") and much > 1 and much != int(much):
            raise ValueError(f"{name} must be a whole number or less than 1, not {much:g}")
    return amounts


def _flag(option: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{option} must be True or False, not {value!r}")
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "name": _name,
    "label": _text,
    "after": _tasks,
    "retries": _count,
    "retry_on": _exceptions,
    "backoff": _not_negative,
    "timeout": _positive,
    "lane": _lane,
    "limits": _limits,
    "priority": _number,
    "resources": _resources,
    "always": _flag,
    "default": _flag,
    "cancellable": _flag,
}


def _lane_for(function: Any, name: str, chosen: str | None) -> str:
    is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    if chosen == "async" and not is_async:
        raise ValueError(f"lane 'async' is for async def, which {name} is not")
    if is_async and chosen in ("thread", "green"):
        raise ValueError(f"lane {chosen!r} is for plain functions, and {name} is async def: leave "
                         "lane= out")  # fmt: skip
    return chosen or ("async" if is_async else "process")


def _check_label(label: str, params: dict[str, Source]) -> None:
    from string import Formatter

    try:
        fields = [field for _, field, _, _ in Formatter().parse(label) if field is not None]
    except ValueError as error:
        raise ValueError(f"label {label!r} is not a format: {error}") from None
    for field in fields:
        first = field.replace("[", ".").partition(".")[0]
        if first not in params:
            near = nearest(first, list(params))
            hint = f"did you mean {{{near}}}?" if near else "a label can show parameters only"
            raise ValueError(f"label {label!r}: there is no parameter {first!r}; {hint}")


# -- where a parameter comes from -----------------------------------------------------


_literals: dict[int, tuple[object, tuple[Any, ...]]] = {}
"""id -> the iterable (kept alive, so that its id stays its own) and its items."""


def each(source: Any, flat: bool = False) -> Any:
    """As a parameter's default: one call per item of ``source``.

    ``source`` is a task (of a single call the items of its value, of a fan-out one item per
    call; ``flat=True`` flattens the lists that a fan-out returns) or an iterable of literal
    items.  Two parameters that descend from the same fan-out, or from the same iterable
    object, advance together; others make the product.  (Two equal tuples written out in one
    file may be one object to Python; two lists never are.)

    Raises TypeError for what has no items, or is one value (a str, bytes), and ValueError for
    more than ten million of them, and where there is nothing to flatten.
    """
    _flag("flat", flat)
    if isinstance(source, Task):
        if flat:
            _check_flat(source)
        return Each(task=source, flat=flat)
    if flat:
        raise ValueError("each(): flat=True flattens what a task returns, not literal items")
    if isinstance(source, str | bytes | bytearray | memoryview):
        raise TypeError(f"each() makes one call per item, and {source!r} is one value: "
                        f"write each([{source!r}])")  # fmt: skip
    if not isinstance(source, Iterable):
        raise TypeError(f"each() takes a task or an iterable of items, not {_told(source)}")
    return Each(items=_items(source), identity=id(source))


def _check_flat(task: Task) -> None:
    """Of what is no fan-out the items are taken anyway, and nothing is left to flatten."""
    if task.is_generator:
        what = f"{task.name} is a generator, of which each() takes the items that it yields"
    elif not any(isinstance(source, Each) for source in task.params.values()):
        what = f"{task.name} makes a single call, of which each() takes the items of its value"
    else:
        return
    raise ValueError(f"each(): flat=True flattens the lists that a fan-out returns, and {what}: "
                     f"write each({task.name})")  # fmt: skip


def _items(source: Iterable[Any]) -> tuple[Any, ...]:
    known = _literals.get(id(source))
    if known is not None and isinstance(source, Iterator):
        return known[1]  # it can be read only once
    if isinstance(source, Sized) and len(source) > MOST_ITEMS:
        raise ValueError(f"each(): more than {MOST_ITEMS:,} items")
    items = tuple(itertools.islice(source, MOST_ITEMS + 1))
    if len(items) > MOST_ITEMS:
        raise ValueError(f"each(): more than {MOST_ITEMS:,} items; is the iterable endless?")
    if known is not None and len(known[1]) != len(items):
        raise ValueError(f"each(): this {type(source).__name__} has changed since an earlier "
                         "each() took its items; give each its own copy")  # fmt: skip
    _literals[id(source)] = (source, items)
    return items


def result(task: Task, errors: Errors = "fail") -> Any:
    """As a parameter's default: the whole result of ``task``; of a fan-out the list.

    ``errors``: what becomes of failed calls: ``"fail"`` (this task is skipped), ``"skip"``
    (they are left out) or ``"keep"`` (the exception stands in the place).  Raises TypeError
    for what is no task, and ValueError for other ``errors``.
    """
    if not isinstance(task, Task):
        raise TypeError(f"result() takes a task, not {_told(task)}")
    if errors not in get_args(Errors):
        near = nearest(errors, get_args(Errors)) if isinstance(errors, str) else None
        hint = f"did you mean {near!r}?" if near else "it is 'fail', 'skip' or 'keep'"
        raise ValueError(f"result(): there is no errors={errors!r}; {hint}")
    return Result(task, errors)


def per_worker(make: Callable[[], Any]) -> Any:
    """As a parameter's default: ``make()``, called once per worker.

    For a client, a model, a connection.  A generator function yields the value once and is
    finished when the worker ends.  Raises TypeError for what is no plain function.
    """
    if isinstance(make, Task):
        raise TypeError(f"per_worker() takes a function, and {make.name} is a task")
    if not callable(make):
        raise TypeError(f"per_worker() takes a function that makes the value, not {make!r}")
    if inspect.iscoroutinefunction(make) or inspect.isasyncgenfunction(make):
        raise TypeError("per_worker() takes a plain function or generator, not async def")
    return PerWorker(make)


def _told(value: Any) -> str:
    """What somebody gave in a task's place, and what to do about it."""
    if isinstance(value, str):
        return f"the name {value!r}: pass the task itself, defined above"
    if inspect.isfunction(value):
        return f"the plain function {value.__name__}: decorate it with @task"
    return repr(value)


# -- around the tasks -----------------------------------------------------------------


def current() -> Current:
    """Who and where the call is that asks; outside a run a stand-in."""
    return active().current()


def _channel_ends() -> Any:
    from taskrun.state import ends  # only those who use channels pay for them

    return ends


context.channel_ends = _channel_ends

_collected: list[Task] | None = None


@contextlib.contextmanager
def collecting() -> Iterator[list[Task]]:
    """While it lasts, every task that is made is put on the list it gives."""
    global _collected
    before = _collected
    collected: list[Task] = []
    _collected = collected
    try:
        yield collected
    finally:
        _collected = before
