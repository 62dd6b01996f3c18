"""``limit()``, and the value of a limit's key for a call.

A key is code of the task file, and runs in the coordinator: only there is it known what
else runs.  It sees the arguments of the call, unpickled for it.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Hashable, Iterable
from itertools import count
from typing import TYPE_CHECKING, Any

from taskrun.errors import TaskExit
from taskrun.model import MISSING, Limit, Parameter, Task, find_task
from taskrun.values import decode, loads_arguments

if TYPE_CHECKING:  # a task file that has a limit needs no scheduler
    from taskrun.calls import Call
    from taskrun.core.limits import Keys

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_made: dict[str, count[int]] = {}  # by module


def limit(
    count: int, per: str | float | None = None, key: Callable[..., Hashable] | None = None
) -> Limit:
    """For ``@task(limits=)``: at most ``count`` calls at once, on all workers together.

    ``per``: instead, at most ``count`` starts in that time, in seconds or as ``"1s"``,
    ``"500ms"``, ``"2m"``, ``"1h"``.  ``key``: a function of the call's arguments; each value
    that it gives has a limit of its own.  Its parameters are matched with the task's by name;
    a single one that matches none gets the first argument.  One limit may be shared by
    several tasks.

    Raises TypeError and ValueError for what makes no limit.
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"limit() takes a whole number of calls, not {count!r}")
    if count < 1:
        raise ValueError(f"limit() takes 1 call or more, not {count}")
    if key is not None and not callable(key):
        raise TypeError(f"the key of a limit is a function, not {key!r}")
    if inspect.iscoroutinefunction(key):
        raise TypeError(f"the key of a limit is a plain function, and {_name(key)} is async")
    module = sys._getframe(1).f_globals.get("__name__", "")
    return Limit(count, None if per is None else _seconds(per), key, _identity(module))


def _identity(module: str) -> str:
    """The same in every process that imports the task file."""
    return f"{module}:{next(_made.setdefault(module, count()))}"


def _seconds(per: str | float) -> float:
    number: Any = per
    unit = "s"
    if isinstance(per, str):
        digits = per.strip().rstrip("abcdefghijklmnopqrstuvwxyz")
        number, unit = digits.strip() or "1", per.strip()[len(digits) :] or "s"
    try:
        seconds = float(number) * _UNITS[unit]
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"per= of a limit is a time such as '1s', '500ms' or 2.5, not {per!r}"
        ) from None
    if not 0 < seconds < math.inf:
        raise ValueError(f"per= of a limit must be more than 0, not {per!r}")
    return seconds


class LimitKeys:
    """Gives the values of a call's limits' keys; see ``limits.Limits``."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = {task.name: task for task in tasks}

    def __call__(self, call: Call) -> Keys:
        """Raises what unpickling the arguments, or a key function, raises; TaskExit in the
        place of what would end the coordinator, such as SystemExit."""
        try:
            task = self._task(call)
            arguments = _arguments(task, call)
            return tuple([_value(limit, arguments) for limit in task.options.limits])
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise TaskExit(f"{error!r} was raised").with_traceback(error.__traceback__) from None

    def _task(self, call: Call) -> Task:
        recipe = call.recipe
        if call.family is not None and recipe.name in self._tasks:
            return self._tasks[recipe.name]
        return find_task(recipe.reference, recipe.blob)


def _arguments(task: Task, call: Call) -> dict[str, Any]:
    """The arguments of a call by name, run parameters and defaults included."""
    given = {
        name: source.default
        for name, source in task.params.items()
        if isinstance(source, Parameter) and source.default is not MISSING
    }
    given |= {name: decode(value) for name, value in call.recipe.constants.items()}
    if call.recipe.names is not None:
        values = map(decode, call.arguments())
        given |= dict(zip(call.recipe.names, values, strict=True))
    else:
        args, kwargs = loads_arguments(*call.arguments())
        given |= inspect.signature(task.function).bind_partial(*args, **kwargs).arguments
    return {name: given[name] for name in task.params if name in given}


def _value(limit: Limit, arguments: dict[str, Any]) -> Hashable:
    if limit.key is None:
        return None
    try:
        parameters = list(inspect.signature(limit.key).parameters.values())
    except ValueError:
        parameters = []  # a builtin that does not tell
    named = [each for each in parameters if each.kind not in _REST]
    required = {each.name for each in named if each.default is each.empty}
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    names = arguments if takes_all else [each.name for each in named]
    known = {name: arguments[name] for name in names if name in arguments}
    if known and required <= known.keys():
        by_place = [
            known.pop(each.name)
            for each in named
            if each.kind is each.POSITIONAL_ONLY and each.name in known
        ]
        return limit.key(*by_place, **known)  # type: ignore[no-any-return]
    if len(required) > 1 or not arguments:
        lacking = ", ".join(sorted(required - known.keys())) or "an argument"
        raise TypeError(f"the key {_name(limit.key)} needs {lacking}, which the task has not")
    return limit.key(next(iter(arguments.values())))  # type: ignore[no-any-return]


def _name(key: Any) -> str:
    return str(getattr(key, "__name__", key))
