"""One Python file, one command: all your cores.

Everything here is loaded when it is first used, so that ``import taskrun`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskrun.api import current, each, per_worker, result, task
    from taskrun.context import Future, as_completed
    from taskrun.errors import Retry, Skip, TaskrunError
    from taskrun.library import run
    from taskrun.shell import sh

__version__ = "0.1.0"

__all__ = [
    "Future",
    "Retry",
    "Skip",
    "TaskrunError",
    "as_completed",
    "current",
    "each",
    "per_worker",
    "result",
    "run",
    "sh",
    "task",
]

_HOMES = {
    "Future": "taskrun.context",
    "Retry": "taskrun.errors",
    "Skip": "taskrun.errors",
    "TaskrunError": "taskrun.errors",
    "as_completed": "taskrun.context",
    "current": "taskrun.api",
    "each": "taskrun.api",
    "per_worker": "taskrun.api",
    "result": "taskrun.api",
    "run": "taskrun.library",
    "sh": "taskrun.shell",
    "task": "taskrun.api",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'taskrun' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
