"""What the lanes of a run need of this machine, checked before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec

from taskrun.errors import UsageError
from taskrun.model import Task

GREEN = "green"


def check_lanes(tasks: Iterable[Task]) -> None:
    """Raises UsageError where a task's lane is not to be had here."""
    for task in tasks:
        if task.options.lane == GREEN:
            check_green(task.name)
            if "gevent.monkey" in sys.modules and _is_patched():
                raise UsageError(
                    f"{task.name} is in lane 'green', whose workers gevent patches before they "
                    "import anything; here gevent.monkey has patched this process, which is the "
                    "wrong one: leave that out of the task file and of what it imports"
                )


def check_green(name: str) -> None:
    """Raises UsageError where the task ``name`` cannot be green."""
    if find_spec("gevent") is None:
        raise UsageError(
            f"{name} is in lane 'green', which needs gevent: pip install 'taskrun[gevent]'"
        )


def _is_patched() -> bool:
    from gevent import monkey

    return bool(monkey.is_module_patched("socket") or monkey.is_module_patched("threading"))
