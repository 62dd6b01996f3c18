"""One Python file, one command: all your cores.

Everything here is loaded when it is first used, so that ``import taskrun`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from taskrun.hooks import register as _register

if TYPE_CHECKING:
    from taskrun import state
    from taskrun.api import current, each, per_worker, result, task
    from taskrun.context import Future, as_completed
    from taskrun.errors import Retry, Skip, TaskrunError
    from taskrun.executor import Executor
    from taskrun.library import run
    from taskrun.limiting import limit
    from taskrun.pool import Pool
    from taskrun.shell import sh, sh_async
    from taskrun.state.connecting import connect

__version__ = "0.1.0"

__all__ = [
    "Executor",
    "Future",
    "Pool",
    "Retry",
    "Skip",
    "TaskrunError",
    "as_completed",
    "connect",
    "current",
    "each",
    "limit",
    "per_worker",
    "result",
    "run",
    "sh",
    "sh_async",
    "state",
    "task",
]

_HOMES = {
    "Executor": "taskrun.executor",
    "Future": "taskrun.context",
    "Pool": "taskrun.pool",
    "Retry": "taskrun.errors",
    "Skip": "taskrun.errors",
    "TaskrunError": "taskrun.errors",
    "as_completed": "taskrun.context",
    "connect": "taskrun.state.connecting",
    "current": "taskrun.api",
    "dask_get": "taskrun.dask",  # not in __all__: it is there where dask is
    "each": "taskrun.api",
    "limit": "taskrun.limiting",
    "per_worker": "taskrun.api",
    "result": "taskrun.api",
    "run": "taskrun.library",
    "sh": "taskrun.shell",
    "sh_async": "taskrun.shell",
    "state": "taskrun.state",
    "task": "taskrun.api",
}


_register()


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'taskrun' has no attribute {name!r}")
    from importlib import import_module

    module = import_module(home)
    value = module if home == f"taskrun.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
