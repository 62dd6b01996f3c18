"""What is executed in a worker of Dask, and in its scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distributed import SchedulerPlugin, get_worker
from distributed.utils import sync

from taskrun.workers import chunks
from taskrun.workers.briefs import size_of

Values = tuple[str, str]
"""The key for the values of a chunk, and the client that wants them."""


def execute(
    version: str, brief: bytes, chunk: bytes, inputs: Sequence[Mapping[Any, Any]], values: Values
) -> tuple[bytes, str | None]:
    """Execute a chunk; gives its records, and the key of its values if there are any."""
    records, kept = chunks.execute(version, brief, chunk, inputs)
    if not kept:
        return records, None
    key, client = values
    worker = get_worker()
    sync(worker.loop, _put, worker, key, kept, client)
    return records, key


async def _put(worker: Any, key: str, values: Mapping[Any, Any], client: str) -> None:
    """Keep values in this worker's memory; the scheduler learns of them, and who wants them."""
    size = sum(map(size_of, values.values()))
    worker.update_data(data={key: values})
    await worker.scheduler.update_data(
        who_has={key: [worker.address]}, nbytes={key: size}, client=client
    )


def leave(brief: bytes) -> None:
    """The run is over."""
    chunks.leave(brief)


def interrupt(call: int, attempt: int) -> bool:
    """End a call that runs in a kept child of this worker."""
    from taskrun.workers import apart

    return apart.interrupt(call, attempt)


class NoRetries(SchedulerPlugin):  # type: ignore[misc]
    """In a scheduler that is not ours: a chunk whose worker died is not executed again.

    How often a call is tried is decided by its run, which hears of the death; another attempt
    that it does not know of must not exist.  Other people's tasks are left alone.
    """

    def __init__(self, prefix: str) -> None:
        self.name = f"no retries of {prefix}"
        self._prefix = prefix

    def update_graph(self, scheduler: Any, *, keys: Any = (), **_: Any) -> None:
        """New tasks: ours count as having failed as often as is allowed."""
        for key in keys:
            task = scheduler.tasks.get(key)
            if task is not None and str(key).startswith(self._prefix):
                task.suspicious = scheduler.allowed_failures
