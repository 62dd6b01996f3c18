"""From a task file and a command line to a plan: what runs, in which order, and why.

Everything that can be known to be wrong before anything runs is found here: unknown
names, parameters that do not convert or are missing, cycles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from taskrun.errors import UsageError
from taskrun.loading import Loaded, shown
from taskrun.model import MISSING, Each, Parameter, Plan, Task, describe, nearest

NAMED = "named on the command line"
MARKED = "default=True"
ALL = "all tasks run"

Values = dict[str, dict[str, Any]]
"""Task name -> {run parameter: value}."""


def make_plan(
    loaded: Loaded,
    targets: Sequence[str] = (),
    params: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> Plan:
    """What a run of ``targets`` (none: what runs by default) with ``-p`` ``params`` does.

    ``given``: values for run parameters by ``name`` or ``task.name``, taken as they are.
    Raises UsageError for unknown names, parameters that do not fit or are missing, a cycle,
    or when there is nothing to run.
    """
    values = read_params(loaded, params, given)
    chosen = choose(loaded, targets, values)
    if not chosen:
        raise UsageError(_nothing_to_run(loaded, values))
    reasons = with_needs(loaded, chosen)
    _check_required(loaded, reasons, values)
    return Plan(
        tasks=tuple(in_order(loaded.tasks[name] for name in loaded.tasks if name in reasons)),
        targets=frozenset(chosen),
        constants={name: given for name, given in values.items() if given},
        reasons=reasons,
        file=loaded.file,
        module=loaded.module,
        left_out=_left_out_by_default(loaded, targets, values),
    )


# -- what runs ------------------------------------------------------------------------


def choose(loaded: Loaded, targets: Sequence[str], values: Values) -> dict[str, str]:
    """The targets of a run, each with why it is one.

    Where none is named: the tasks marked ``default=True``, else all but those marked
    ``default=False`` and those that lack a parameter (see :func:`left_out`).
    """
    for name in targets:
        if name not in loaded.tasks:
            raise UsageError(_unknown("task", name, loaded.tasks, loaded))
    if targets:
        return dict.fromkeys(targets, NAMED)
    marked = [name for name, task in loaded.tasks.items() if task.options.default]
    if marked:
        return dict.fromkeys(marked, MARKED)
    return {
        name: ALL
        for name, task in loaded.tasks.items()
        if task.options.default is None and not lacking(task, values)
    }


def left_out(loaded: Loaded, values: Values) -> dict[str, list[str]]:
    """The tasks that run only by ``submit`` or with ``-p``, and the parameters they lack."""
    return {name: names for name, task in loaded.tasks.items() if (names := lacking(task, values))}


def _left_out_by_default(
    loaded: Loaded, targets: Sequence[str], values: Values
) -> dict[str, list[str]]:
    """Of these those that would run now if they did not lack anything."""
    tasks = loaded.tasks
    if targets or any(task.options.default for task in tasks.values()):
        return {}
    lack = left_out(loaded, values)
    return {name: lack[name] for name in lack if tasks[name].options.default is None}


def needs_flags(parameters: Iterable[str]) -> str:
    """What to type where a task lacks ``parameters``: ``needs -p x=... -p y=...``."""
    return " ".join(["needs", *(f"-p {parameter}=..." for parameter in parameters)])


def lacking(task: Task, values: Values) -> list[str]:
    """The run parameters of ``task`` that have neither a default nor a value."""
    given = values.get(task.name, {})
    return [
        name
        for name, source in task.params.items()
        if isinstance(source, Parameter) and source.default is MISSING and name not in given
    ]


def with_needs(loaded: Loaded, chosen: dict[str, str]) -> dict[str, str]:
    """``chosen`` and all that they need, each with why it takes part."""
    reasons = dict(chosen)
    waiting = list(chosen)
    for name in waiting:  # grows meanwhile
        for needed in loaded.tasks[name].inputs():
            if needed.name not in reasons:
                reasons[needed.name] = f"needed by {name}"
                waiting.append(needed.name)
    return reasons


def _check_required(loaded: Loaded, reasons: dict[str, str], values: Values) -> None:
    for name, reason in reasons.items():
        missing = lacking(loaded.tasks[name], values)
        if missing:
            flags = " ".join(f"-p {parameter}=..." for parameter in missing)
            raise UsageError(f"{name} ({reason}) needs a value for {', '.join(missing)}: {flags}")


def _nothing_to_run(loaded: Loaded, values: Values) -> str:
    ways = [
        f"{name} {needs_flags(missing)}" for name, missing in left_out(loaded, values).items()
    ] or [f"name one of {', '.join(_some(loaded.tasks))}"]
    return f"nothing in {_place(loaded)} runs by default: {'; '.join(_some(ways))}"


def in_order(tasks: Iterable[Task]) -> list[Task]:
    """``tasks`` and all that they need, each after what it needs, else in the given order.

    Raises UsageError for a cycle.  Not recursive: a chain may be thousands of tasks long.
    """
    done: dict[int, Task] = {}
    for root in tasks:
        path: dict[int, tuple[Task, Iterator[Task]]] = {}
        following: Task | None = root if id(root) not in done else None
        while following or path:
            if following:
                path[id(following)] = (following, iter(list(following.inputs())))
            task, inputs = path[next(reversed(path))]
            following = next((other for other in inputs if id(other) not in done), None)
            if following is None:
                done[id(task)] = task
                del path[id(task)]
            elif id(following) in path:
                raise UsageError(_cycle([one for one, _ in path.values()], following))
    return list(done.values())


def _cycle(path: list[Task], again: Task) -> str:
    first = next(place for place, task in enumerate(path) if task is again)
    names = [task.name for task in (*path[first:], again)]
    if len(names) > 12:
        names[6:-6] = ["..."]
    return f"tasks need each other in a cycle: {' -> '.join(names)}"


# -- run parameters -------------------------------------------------------------------


def read_params(
    loaded: Loaded, params: Sequence[str], given: Mapping[str, Any] | None = None
) -> Values:
    """The values that ``-p`` texts (and ``given``, see :func:`make_plan`) set: ``name`` in
    every task that has the parameter, ``task.name`` in one, whatever their order; of equals
    the last counts."""
    settings = [(*_split(param), True) for param in params]
    settings += [(*_place_given(place), value, False) for place, value in (given or {}).items()]
    values: Values = {}
    for task, name, value, is_text in sorted(settings, key=lambda one: bool(one[0])):
        for owner in _owners(loaded, task, name):
            made = _convert(owner, name, value) if is_text else value
            values.setdefault(owner.name, {})[name] = made
    return values


def _split(param: str) -> tuple[str, str, Any]:
    left, equals, text = param.partition("=")
    place = _place_of(left)
    if not equals or place is None:
        raise UsageError(f"-p takes name=value or task.name=value, not {param!r}")
    return *place, text


def _place_of(place: str) -> tuple[str, str] | None:
    """(task or "", name), or None where something is missing beside the dot."""
    task, dot, name = place.rpartition(".")
    return (task, name) if name and (task or not dot) else None


def _place_given(place: str) -> tuple[str, str]:
    found = _place_of(place)
    if found is None:
        raise UsageError(f"params takes 'name' or 'task.name', not {place!r}")
    return found


def _convert(owner: Task, name: str, text: str) -> Any:
    from inspect import signature

    from taskrun.parameters import convert_for  # only those who use -p pay for it

    parameter = owner.params[name]
    assert isinstance(parameter, Parameter)
    if signature(owner.function).parameters[name].kind.name == "POSITIONAL_ONLY":
        raise UsageError(
            f"-p {name}: {owner.name} takes it by position only; leave out the '/' there"
        )
    return convert_for(owner, parameter, text)


def _owners(loaded: Loaded, task: str, name: str) -> list[Task]:
    if task and task not in loaded.tasks:
        raise UsageError(f"-p {task}.{name}: {_unknown('task', task, loaded.tasks, loaded)}")
    among = [loaded.tasks[task]] if task else list(loaded.tasks.values())
    having = [one for one in among if name in one.params]
    owners = [one for one in having if isinstance(one.params[name], Parameter)]
    if owners:
        return owners
    if having:
        source = describe(having[0].params[name])
        raise UsageError(f"-p {name}: in {having[0].name} it comes from {source}, not from -p")
    raise UsageError(_unknown_parameter(loaded, task, name))


def _unknown_parameter(loaded: Loaded, task: str, name: str) -> str:
    settable = {
        parameter: one.name
        for one in reversed(loaded.tasks.values())
        for parameter, source in one.params.items()
        if isinstance(source, Parameter)
    }
    here = [] if not task else [
        parameter for parameter, source in loaded.tasks[task].params.items()
        if isinstance(source, Parameter)
    ]  # fmt: skip
    whose = f"task {task} has no" if task else "no task has a"
    near = nearest(name, here or list(settable))
    if task and name in settable:
        return f"-p {task}.{name}: {whose} parameter {name!r}; {settable[name]} has one"
    if near:
        return f"-p {name}: {whose} parameter {name!r}; did you mean {near!r}?"
    there = ", ".join(_some(here if task else settable))
    hint = f"there are {there}" if there else "there is none to set"
    return f"-p {name}: {whose} parameter {name!r}; {hint}"


def _unknown(what: str, name: str, names: Iterable[str], loaded: Loaded) -> str:
    near = nearest(name, list(names))
    hint = f"did you mean {near!r}?" if near else f"there are {', '.join(_some(names))}"
    return f"there is no {what} {name!r} in {_place(loaded)}; {hint}"


def _place(loaded: Loaded) -> str:
    return shown(loaded.file) if loaded.file else "this run"


def _some(names: Iterable[str], most: int = 10) -> list[str]:
    listed = list(names)
    return listed if len(listed) <= most else [*listed[:most], f"... ({len(listed)} in all)"]


# -- how many calls -------------------------------------------------------------------


class Axis(NamedTuple):
    """One dimension of a fan-out; ``size`` is None where only the run will tell."""

    key: object
    size: int | None
    source: str = ""


def estimate(tasks: Sequence[Task]) -> dict[str, str]:
    """How many calls each of ``tasks`` (each after its inputs) makes: ``9 calls``, or
    ``1 per item of urls`` where only the run will tell."""
    axes: dict[str, tuple[Axis, ...]] = {}
    for task in tasks:
        found: dict[object, Axis] = {}
        for source in task.params.values():
            if isinstance(source, Each):
                for axis in _axes_of(source, axes):
                    found.setdefault(axis.key, axis)
        axes[task.name] = tuple(found.values())
    return {name: _count(found) for name, found in axes.items()}


def _axes_of(source: Each, axes: dict[str, tuple[Axis, ...]]) -> tuple[Axis, ...]:
    if source.task is None:
        return (Axis(("literal", source.identity), len(source.items)),)
    name = source.task.name
    if axes[name] and not source.flat and not source.task.is_generator:
        return axes[name]
    return (*axes[name], Axis(("items", name), None, f"item of {name}"))


def _count(axes: tuple[Axis, ...]) -> str:
    known = 1
    for axis in axes:
        known *= 1 if axis.size is None else axis.size
    unknown = [axis.source for axis in axes if axis.size is None]
    if not unknown or not known:
        return f"{known:,} call{'' if known == 1 else 's'}"
    return f"{known:,} per {' and '.join(unknown)}"
