"""Ray as an engine: one of this run's on this machine, one that this process is connected to
already, or a cluster.

A chunk is one Ray task with two results: its records, which come here, and its large values,
which stay in Ray's object store; those who take them get the reference.  Ray tries nothing
again: which attempt follows which is the core's affair.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any, Final

import ray
from ray import exceptions

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
from taskrun.workers.guests import ray as there

LEAVE: Final = 1.0  # seconds for Ray's processes to end by themselves
CONNECT: Final = 30.0  # seconds for a cluster to answer: it starts a process first
FETCH: Final = 60.0  # seconds for a value, or a chunk's records, to arrive
OWN: Final = frozenset(("cpu", "memory", "gpu"))
_DEAD = (
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.OutOfMemoryError,
    exceptions.LocalRayletDiedError,
)


class RayHost:
    """A ``hosts.Host``: ``text`` is ``ray`` or ``ray://HOST:PORT``."""

    keeps = True
    alone = True
    isolated = True

    def __init__(self, text: str, jobs: int) -> None:
        self.name = text
        self.here = text == "ray"
        self.far = not self.here
        self._files: tuple[str, list[Any]] | None = None
        self._address = text
        self._jobs = jobs
        self._mine = False
        self._resources: dict[str, float] = {}
        self._execute: Any = None
        self._thread: threading.Thread | None = None
        self._waiting: dict[Any, tuple[Any, Done]] = {}
        self._news = threading.Condition()
        self._closed = False
        self._over = threading.Event()
        self._session = ""
        self._gone: str | None = None

    # -- beginning and ending ---------------------------------------------------------

    def open(self, files: Bundle | None) -> int:
        """See ``hosts.Host``.  Raises RunError.

        What Ray starts is killed when the thread that started it ends: that thread
        listens, and stays until Ray has ended.
        """
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._live, args=[opened], daemon=True)
        self._thread.start()
        if self.here:
            opened.result()
        else:
            self._await_connection(opened)
        if files is not None:
            self._files = files.digest, [ray.put(files.data)]  # in a list: not sent with chunks
        self._resources = ray.cluster_resources()
        return max(1, int(self._resources.get("CPU", 1)))

    def _live(self, opened: Future[None]) -> None:
        try:
            self._begin()
        except BaseException as error:
            opened.set_exception(error)
            return
        opened.set_result(None)
        self._listen()
        self._over.wait()

    def _begin(self) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # they are outcomes of calls
        if not (self.here and ray.is_initialized()):  # else it is the user's own
            if self.here:
                self._start()
            else:
                ray.init(address=self._address, logging_level="ERROR")
            self._mine = True
        self._execute = ray.remote(max_retries=0, num_returns=2)(there.execute)

    def _start(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        ray.init(
            address="local",
            num_cpus=self._jobs,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        self._session = ray.get_runtime_context().get_session_name()

    def _await_connection(self, opened: Future[None]) -> None:
        try:
            opened.result(CONNECT)
        except (TimeoutError, ConnectionError) as error:
            raise RunError(
                f"the Ray cluster at {self.name} cannot be reached within {CONNECT:g} s: is it "
                "running? `ray start --head` starts one; its port for clients is 10001"
            ) from error
        except Exception as error:  # it has other versions, which it names
            raise RunError(f"the Ray cluster at {self.name}: {error}") from error

    def is_gone(self) -> str | None:
        """See ``hosts.Host``."""
        if self._gone is None and not ray.is_initialized():
            self._gone = f"Ray ({self.name}) has ended"
        return self._gone

    def close(self, brief: bytes | None, deadline: float) -> None:
        """See ``hosts.Host``."""
        with self._news:
            self._closed = True
            self._waiting.clear()
            self._news.notify()
        if self._mine and ray.is_initialized():
            started = _processes_of(self._session) if self._session else set()
            ray.shutdown()
            if self._session:
                _await_end(self._session, started, min(deadline, monotonic() + LEAVE))
        self._over.set()

    # -- chunks -----------------------------------------------------------------------

    def submit(
        self, brief: bytes, chunk: bytes, inputs: Sequence[Any], terms: Terms, done: Done
    ) -> Any:
        """See ``hosts.Host``."""
        resources = dict(terms.resources or {})
        options = {"num_cpus": resources.get("cpu", 1)}
        if not self.here:
            options.update(self._their(resources))
        try:
            records, values = self._execute.options(**options).remote(
                VERSION, brief, chunk, self._files, *inputs
            )
        except Exception as error:
            done(Broken(f"Ray ({self.name}) takes no calls: {first_line(error)}"))
            return None
        with self._news:
            self._waiting[records] = (values, done)
            self._news.notify()
        return records

    def _their(self, resources: Mapping[str, float]) -> dict[str, Any]:
        custom = {name: amount for name, amount in resources.items() if name not in OWN}
        options: dict[str, Any] = {"resources": custom} if custom else {}
        if "gpu" in resources:
            options["num_gpus"] = resources["gpu"]
        if "memory" in resources:
            options["memory"] = resources["memory"]
        return options

    def _listen(self) -> None:
        """In a thread: tell of chunks as they end."""
        while True:
            with self._news:
                while not self._waiting and not self._closed:
                    self._news.wait()
                if self._closed:
                    return
                pending = list(self._waiting)
            try:
                ended, _ = ray.wait(pending, num_returns=1, timeout=0.02, fetch_local=False)
            except Exception as error:
                self._break(error)
                return
            for records in ended:
                with self._news:
                    values, done = self._waiting.pop(records, (None, None))
                if done is not None:
                    done(self._result(records, values))

    def _break(self, error: Exception) -> None:
        self._gone = f"Ray ({self.name}) is gone: {first_line(error)}"

    def _result(self, records: Any, values: Any) -> Result:
        try:
            told, kept = ray.get(records, timeout=FETCH)
        except exceptions.TaskCancelledError:
            return Withdrawn()
        except _DEAD as error:
            return Lost(f"died ({first_line(error)})")
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RunError):
                return Broken(str(cause))
            if isinstance(cause, KeyboardInterrupt):
                return Withdrawn()
            # Its own first line says where it was, and not what.
            return Refused(f"{self.name}: {type(cause).__name__}: {first_line(cause)}")
        except Exception as error:
            return Refused(f"{self.name}: {type(error).__name__}: {first_line(error)}")
        return Returned(told, values if kept else None)

    def cancel(self, handle: Any) -> None:
        """See ``hosts.Host``: its process ends, if the call does not."""
        if handle is not None and ray.is_initialized():
            ray.cancel(handle, force=True, recursive=False)

    def interrupt(self, brief: bytes, call: int, attempt: int) -> bool:
        """See ``hosts.Host``: Ray itself ends the call."""
        return False

    def fetch(self, place: Any) -> Mapping[Any, Any]:
        """See ``hosts.Host``."""
        try:
            found: Mapping[Any, Any] = ray.get(place, timeout=FETCH)
        except exceptions.RayError as error:
            raise LookupError(first_line(error)) from error
        return found

    def missing(self, resources: Mapping[str, float]) -> str | None:
        """See ``hosts.Host``."""
        if self.here:
            return None  # what there is, is said by -j and --resource
        for name, amount in resources.items():
            have = self._resources.get({"cpu": "CPU", "gpu": "GPU"}.get(name, name), 0)
            if amount > have:
                return f"{name}={amount:g} ({f'of {have:g}' if have else 'there is none'})"
        return None


def _await_end(session: str, started: set[int], deadline: float) -> None:
    """Wait for the processes of a Ray of ours to end; kill those that do not: its agents take a
    minute to tell a server that is gone, a worker was just being started."""
    while pids := _processes_of(session) | started.intersection(_living()):
        if monotonic() > deadline:
            sessions.send(pids, signal.SIGKILL)
            return
        time.sleep(0.02)


def _living() -> set[int]:
    return {process.pid for process in sessions.processes()}


def _processes_of(session: str) -> set[int]:
    """The processes that have a Ray session's name in their command line, and those that they
    have started, which may have given themselves another (Linux)."""
    parents = {process.pid: process.parent for process in sessions.processes()}
    found = {pid for pid in parents if session.encode() in _command_of(pid)}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _command_of(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""  # it has ended meanwhile
