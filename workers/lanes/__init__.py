"""Workers that execute many calls at a time, each in one way: its *lane*.

``base`` is what they have in common; ``thread``, ``asyncio`` and ``gevent`` are the lanes.
All the calls of such a worker share one process, so the call that runs is found by a
context variable, what it prints is sent as records, and an interrupt ends it alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskrun.workers.lanes.base import LaneWorker


def worker_class(lane: str) -> type[LaneWorker]:
    """What a worker of this lane is made by; only that lane's module is imported."""
    if lane == "thread":
        from taskrun.workers.lanes.thread import ThreadWorker

        return ThreadWorker
    if lane == "async":
        from taskrun.workers.lanes.asyncio import AsyncWorker

        return AsyncWorker
    from taskrun.workers.lanes.gevent import GreenWorker

    return GreenWorker
