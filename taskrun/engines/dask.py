"""Dask as an engine: a LocalCluster of this run's, or a scheduler that is there.

A chunk is one Dask task.  Its records are the task's result, and come here; its large values
are put into the memory of the Dask worker that made them, under a key that this client asks
for, and those who take them get the future: Dask brings them where they are needed, or sends
the calls there.  Dask tries nothing again: which attempt follows which is the core's affair.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from itertools import count
from time import monotonic
from typing import Any, Final

import dask
import distributed
from distributed.scheduler import KilledWorker

from taskrun import sessions
from taskrun.engines.hosts import (
    Broken,
    Done,
    Lost,
    Refused,
    Result,
    Returned,
    Terms,
    Withdrawn,
    first_line,
)
from taskrun.errors import RunError
from taskrun.network.bundles import Bundle
from taskrun.workers.briefs import VERSION
from taskrun.workers.guests import dask as there

CONNECT: Final = 10.0  # seconds for a scheduler to answer
FETCH: Final = 60.0  # seconds for a value, or a chunk's records, to arrive
GONE: Final = 4.0  # seconds without the scheduler after which it is not waited for any more
OWN: Final = frozenset(("cpu", "memory"))  # resources that are counted here, not by Dask
_CONFIG: Final = {
    "distributed.worker.daemon": False,  # so that calls may start processes
    "distributed.comm.timeouts.connect": f"{CONNECT:g}s",
    "distributed.comm.retry.count": 0,
    "distributed.admin.large-graph-warning-threshold": "1GB",
    "distributed.worker.memory.terminate": False,
}


class DaskHost:
    """A ``hosts.Host``: ``text`` is ``dask``, ``dask://HOST:PORT`` or ``tls://HOST:PORT``."""

    keeps = True
    isolated = True

    def __init__(self, text: str, jobs: int) -> None:
        self.name = text
        self.here = self.alone = text == "dask"
        self.far = not self.here
        self._files: tuple[str, str] | None = None
        self._address = text.replace("dask://", "tcp://", 1)
        self._jobs = jobs
        self._cluster: Any = None
        self._client: Any = None
        self._resources: dict[str, float] = {}
        self._keys = count(1)
        self._prefix = f"taskrun-{os.urandom(6).hex()}"
        self._missed: float | None = None
        self._cancelled: set[str] = set()

    # -- beginning and ending ---------------------------------------------------------

    def open(self, files: Bundle | None) -> int:
        """See ``hosts.Host``.  Raises RunError."""
        with dask.config.set(_CONFIG):
            if self.here:
                self._cluster = distributed.LocalCluster(
                    n_workers=self._jobs,
                    threads_per_worker=1,
                    dashboard_address=None,
                    silence_logs=50,
                )
            self._client = self._connect()
        if not self.here:
            self._check_the_other_side()
        self._take_part(files)
        workers = self._workers()
        for worker in workers.values():
            for name, amount in worker.get("resources", {}).items():
                self._resources[name] = max(self._resources.get(name, 0), amount)
        return sum(worker["nthreads"] for worker in workers.values())

    def _connect(self) -> Any:
        try:
            return distributed.Client(
                self._cluster or self._address,
                timeout=CONNECT,
                set_as_default=False,
                name="taskrun",
            )
        except TypeError as error:  # what Dask raises where its settings name no certificates
            raise RunError(
                f"{self.name}: {first_line(error)}; DASK_DISTRIBUTED__COMM__TLS__CA_FILE, "
                "...__CLIENT__CERT and ...__CLIENT__KEY name the files"
            ) from error
        except (OSError, TimeoutError, ValueError) as error:
            raise RunError(
                f"the Dask scheduler at {self.name} cannot be reached within {CONNECT:g} s "
                f"({first_line(error)}): is it running? `dask scheduler` starts one"
            ) from error

    def _take_part(self, files: Bundle | None) -> None:
        """Have the scheduler know what is particular about this run's chunks."""
        digest, data = (files.digest, files.data) if files is not None else ("", b"")
        part = there.Part(self._prefix, self._client.id, data)
        self._client.register_plugin(part, name=part.name)
        if files is not None:
            self._files = digest, part.name

    def _workers(self) -> dict[str, Any]:
        found: dict[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        deadline = monotonic() + CONNECT
        while not found and monotonic() < deadline:
            try:
                self._client.wait_for_workers(1, timeout=deadline - monotonic())
            except TimeoutError:
                break
            found = self._client.scheduler_info(n_workers=-1)["workers"]
        if not found:
            raise RunError(
                f"the Dask scheduler at {self.name} has no workers: start some with "
                f"`dask worker {self._address}`"
            )
        return found

    def _check_the_other_side(self) -> None:
        """Every worker must have our Python and our taskrun.  Raises RunError."""
        import importlib.metadata
        import platform

        pythons = self._client.run(platform.python_version)
        ours = self._client.run(importlib.metadata.version, "taskrun", on_error="return")
        for worker, version in ours.items():
            python = ".".join(pythons[worker].split(".")[:2])
            theirs = f"taskrun {version}, Python {python}"
            if isinstance(version, Exception):
                theirs = f"no taskrun, Python {python}"
            if theirs != VERSION:
                raise RunError(
                    f"{self.name}: the worker {worker} has {theirs}, the coordinator has "
                    f"{VERSION}: both must have the same"
                )

    def is_gone(self) -> str | None:
        """See ``hosts.Host``."""
        if self._client.status == "running":
            self._missed = None
            return None
        self._missed = self._missed or monotonic()
        if monotonic() - self._missed < GONE:
            return None
        return f"the Dask scheduler at {self.name} is gone"

    def close(self, brief: bytes | None, deadline: float) -> None:
        """See ``hosts.Host``."""
        if self._client is not None:
            if brief is not None and self._client.status == "running":
                self._leave(brief, deadline)
            self._client.close(timeout=max(0.1, deadline - monotonic()))
        if self._cluster is not None:
            self._end_cluster(max(0.1, deadline - monotonic()))

    def _end_cluster(self, seconds: float) -> None:
        """Its workers end by themselves; those that do not are killed: one that is just being
        started, in the place of one that died, would be waited for."""
        nannies = list(self._cluster.workers.values())
        killer = threading.Timer(seconds / 2, _kill_workers_of, [nannies])
        killer.start()
        try:
            self._cluster.close(timeout=seconds)
        except TimeoutError:
            _kill_workers_of(nannies)
        finally:
            killer.cancel()

    def _leave(self, brief: bytes, deadline: float) -> None:
        left = max(0.1, (deadline - monotonic()) / 2)
        try:
            self._client.sync(
                self._client._run, there.leave, brief, callback_timeout=left, on_error="ignore"
            )
        except (OSError, TimeoutError):
            pass  # those that are there still are busy, or gone: nothing of this run is new there

    # -- chunks -----------------------------------------------------------------------

    def submit(
        self, brief: bytes, chunk: bytes, inputs: Sequence[Any], terms: Terms, done: Done
    ) -> Any:
        """See ``hosts.Host``."""
        number = next(self._keys)
        values = f"{self._prefix}-values-{number}"
        future = self._client.submit(
            there.execute,
            VERSION,
            brief,
            chunk,
            list(inputs),
            (values, self._client.id),
            self._files,
            key=f"{self._prefix}-{number}",
            pure=False,
            retries=0,
            priority=terms.priority,
            resources=self._their(terms.resources or {}) or None,
        )
        future.add_done_callback(lambda future: done(self._result(future, inputs)))
        return future

    def _result(self, future: Any, inputs: Sequence[Any]) -> Result:
        """On a thread of Dask's; ``inputs``: the kept values among the arguments."""
        status = future.status
        if status == "finished":
            try:
                records, values = future.result(timeout=FETCH)
            except Exception:
                return self._unfetched(inputs)
            return Returned(records, values and self._place(values))
        if status == "error":
            return self._failed(future.exception(timeout=FETCH))
        if self._client.status != "running":
            return Broken(f"the Dask scheduler at {self.name} is gone")
        if future.key in self._cancelled:
            return Withdrawn()
        return self._unfetched(inputs)

    def _unfetched(self, inputs: Sequence[Any]) -> Result:
        """Dask has forgotten a chunk: a worker died that had what it takes, or what it said."""
        if self._client.status != "running":
            return Broken(f"the Dask scheduler at {self.name} is gone")
        if any(place.status != "finished" for place in inputs):
            return Refused("values that it takes were lost with the worker that had them")
        return Lost("died before it was heard what came of the call")

    def _place(self, values: str) -> Any:
        """The future of values that are there already."""
        return distributed.Future(values, self._client, state="memory")

    def _failed(self, error: BaseException) -> Result:
        if isinstance(error, KilledWorker):
            return Lost("died")
        if isinstance(error, RunError):
            return Broken(str(error))
        return Refused(f"{self.name}: {type(error).__name__}: {error}")

    def cancel(self, handle: Any) -> None:
        """See ``hosts.Host``; what is being executed goes on."""
        self._client.loop.add_callback(self._withdraw, handle)

    async def _withdraw(self, handle: Any) -> None:
        """Cancel a chunk unless it is being executed: Dask cannot end that, and its worker would
        be at work though the call had ended."""
        try:
            executing = await self._client.scheduler.call_stack(keys=[handle.key])
        except (OSError, KeyError):
            return  # it has ended, or Dask has
        if not executing:
            self._cancelled.add(handle.key)
            await self._client._cancel([handle])

    def interrupt(self, brief: bytes, call: int, attempt: int) -> bool:
        """See ``hosts.Host``."""
        if self._client.status != "running":
            return False
        self._client.loop.add_callback(
            self._client._run, there.interrupt, brief, call, attempt, on_error="ignore"
        )
        return True

    def fetch(self, place: Any) -> Mapping[Any, Any]:
        """See ``hosts.Host``."""
        try:
            found: Mapping[Any, Any] = place.result(timeout=FETCH)
        except (OSError, TimeoutError, CancelledError) as error:
            raise LookupError(first_line(error)) from error
        return found

    # -- resources --------------------------------------------------------------------

    def _their(self, resources: Mapping[str, float]) -> dict[str, float]:
        """What Dask counts: of a cluster of ours nothing, --resource says what there is."""
        if self.here:
            return {}
        return {name: amount for name, amount in resources.items() if name not in OWN}

    def missing(self, resources: Mapping[str, float]) -> str | None:
        """See ``hosts.Host``."""
        for name, amount in self._their(resources).items():
            have = self._resources.get(name, 0)
            if amount > have:
                return f"{name}={amount:g} ({f'of {have:g}' if have else 'there is none'})"
        return None


def _kill_workers_of(nannies: Sequence[Any]) -> None:
    sessions.send([nanny.pid for nanny in nannies if nanny.pid is not None], signal.SIGKILL)
