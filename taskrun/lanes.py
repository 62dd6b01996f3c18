"""What is said of the lanes of a run, and what they need here, checked before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec

from taskrun.errors import UsageError
from taskrun.model import LANES, Task, nearest
from taskrun.settings import LANE_JOBS

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


def lanes_here(lane: str | None) -> tuple[str, ...]:
    """The lanes of this machine's workers: ``lane`` alone where there is one, else all that are
    to be had.  Raises UsageError where ``lane`` is not."""
    has_gevent = find_spec("gevent") is not None
    if lane == GREEN and not has_gevent:
        raise UsageError("--lane green needs gevent: pip install 'taskrun[gevent]'")
    if lane is not None:
        return (lane,)
    return tuple(each for each in LANES if each != GREEN or has_gevent)


def check_lane_jobs(jobs: Mapping[str, int], said: str) -> dict[str, int]:
    """Lane -> how many workers it may have; ``said``: where that is said, for the message.

    Raises UsageError for what is no such lane, or no such number.
    """
    for lane, much in jobs.items():
        check_has_workers(lane, said)
        if type(much) is not int or much < 1:
            raise UsageError(f"{said}: {lane} has at least 1 worker, not {much!r}")
    return dict(jobs)


def check_has_workers(lane: object, said: str) -> None:
    """Raises UsageError where ``lane`` is none whose workers ``--lane-jobs`` counts."""
    if lane == "process":
        raise UsageError(f"{said}: how many processes there are is said by -j")
    if lane not in LANE_JOBS:
        near = nearest(lane, list(LANE_JOBS)) if isinstance(lane, str) else None
        hint = f"did you mean {near}?" if near else f"lanes are {', '.join(LANE_JOBS)}"
        raise UsageError(f"{said}: there is no lane {lane!r}; {hint}")


def _is_patched() -> bool:
    from gevent import monkey

    return bool(monkey.is_module_patched("socket") or monkey.is_module_patched("threading"))
