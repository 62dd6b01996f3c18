"""What is executed in a worker of Dask, and in its scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distributed import SchedulerPlugin, get_worker
from distributed.protocol.pickle import dumps
from distributed.utils import sync

from taskrun.workers import chunks, luggage
from taskrun.workers.briefs import size_of

Values = tuple[str, str]
"""The key for the values of a chunk, and the client that wants them."""

_briefs: dict[str, bytes] = {}
"""The runs that this process executes calls of: client -> brief."""

Files = tuple[str, str]
"""The digest of a run's files, and what to ask the scheduler for."""


def execute(
    version: str,
    brief: bytes,
    chunk: bytes,
    inputs: Sequence[Mapping[Any, Any]],
    values: Values,
    files: Files | None,
) -> tuple[bytes, str | None]:
    """Execute a chunk; gives its records, and the key of its values if there are any."""
    if files is not None:
        _fetch(*files)
    _briefs[values[1]] = brief
    records, kept = chunks.execute(version, brief, chunk, inputs)
    if not kept:
        return records, None
    key, client = values
    worker = get_worker()
    sync(worker.loop, _put, worker, key, kept, client)
    return records, key


def _fetch(digest: str, name: str) -> None:
    """The files of the run, where this machine has not had them."""
    if not luggage.has(digest):
        worker = get_worker()
        luggage.keep(digest, sync(worker.loop, getattr(worker.scheduler, name)))


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


def interrupt(brief: bytes, call: int, attempt: int) -> bool:
    """End a call that runs in a kept child of this worker."""
    from taskrun.workers import apart

    return apart.interrupt(brief, call, attempt)


def abandon(client: str) -> None:
    """The run's coordinator is gone, whether it has said so or not."""
    from taskrun.workers import apart

    brief = _briefs.pop(client, None)
    if brief is not None:
        apart.interrupt_all(brief)


class Part(SchedulerPlugin):  # type: ignore[misc]
    """A run's part in a scheduler; it ends when the run's client does.

    A chunk whose worker died is not executed again, neither while it was being executed nor when
    only its records are lost: how often a call is tried is decided by its run, which hears of the
    death; another attempt that it does not know of must not exist.  Other people's tasks are left
    alone.  Workers ask it for the run's files, those that join later too.
    """

    def __init__(self, prefix: str, client: str, files: bytes) -> None:
        self.name = f"{prefix}-part"
        self._prefix = prefix
        self._client = client
        self._files = files

    async def start(self, scheduler: Any) -> None:
        """Answer workers."""
        self._scheduler = scheduler
        scheduler.handlers[self.name] = self._give

    def _give(self, **_: Any) -> bytes:
        return self._files

    def update_graph(self, scheduler: Any, *, keys: Any = (), **_: Any) -> None:
        """New tasks: ours count as having failed as often as is allowed."""
        for key in keys:
            task = scheduler.tasks.get(key)
            if task is not None and str(key).startswith(self._prefix):
                task.suspicious = scheduler.allowed_failures

    def transition(self, key: Any, start: str, finish: str, *_: Any, **__: Any) -> None:
        """What was executed cannot be executed again: Dask has its result, and no way to it."""
        if finish == "memory" and str(key).startswith(self._prefix):
            self._scheduler.tasks[key].run_spec = None

    def remove_client(self, scheduler: Any, client: str) -> None:
        """The run is over, however it ended: what can be ended of its calls does not run on."""
        if client == self._client:
            told = {"op": "run", "function": dumps(abandon), "args": dumps((client,))}
            scheduler.loop.add_callback(scheduler.broadcast, msg=told, on_error="ignore")
            scheduler.handlers.pop(self.name, None)
            scheduler.plugins.pop(self.name, None)
