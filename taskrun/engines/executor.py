"""Any executor of PEP 3148 as an engine: threads, processes, loky, MPI, Parsl.

An executor that breaks when one of its workers dies, as those of the standard library do,
is made anew; which calls were lost is known from the notes.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
)
from importlib import import_module
from time import monotonic
from typing import Any

from taskrun.engines.hosts import (
    Done,
    Lost,
    Refused,
    Result,
    Returned,
    Terms,
    Withdrawn,
    first_line,
)
from taskrun.errors import RunError, UsageError
from taskrun.network.bundles import Bundle
from taskrun.workers.briefs import VERSION
from taskrun.workers.chunks import execute


class ExecutorHost:
    """A ``hosts.Host`` on an executor, made by ``factory``; ``jobs``: how many calls it is to
    execute at a time, as far as it lets itself be told."""

    keeps = False
    here = True
    isolated = False
    far = False

    def __init__(self, name: str, factory: Callable[..., Executor], jobs: int) -> None:
        self.name = name
        self._factory = factory
        self._jobs = jobs
        self._executor: Executor | None = None
        self.alone = True

    def open(self, files: Bundle | None = None) -> int:
        """See ``hosts.Host``.  Raises RunError."""
        self._executor = self._make()
        return self._jobs

    def _make(self) -> Executor:
        try:
            made = self._factory(**_accepted(self._factory, max_workers=self._jobs))
        except Exception as error:
            raise RunError(f"--engine {self.name}: {type(error).__name__}: {error}") from error
        if not hasattr(made, "submit"):
            raise RunError(
                f"--engine {self.name} made a {type(made).__name__}, which is no executor: it has "
                "no submit()"
            )
        return made

    def submit(
        self, brief: bytes, chunk: bytes, inputs: Sequence[Any], terms: Terms, done: Done
    ) -> Future[Any] | None:
        """See ``hosts.Host``."""
        try:
            future = self._submit(brief, chunk)
        except (BrokenExecutor, RuntimeError) as error:
            done(Refused(f"{self.name} takes no calls: {error}"))
            return None
        future.add_done_callback(lambda future: done(self._result(future)))
        return future

    def _submit(self, brief: bytes, chunk: bytes) -> Future[Any]:
        assert self._executor is not None
        try:
            return self._executor.submit(execute, VERSION, brief, chunk)
        except (BrokenExecutor, RuntimeError):  # the latter: it was shut down, as loky's is
            self._executor.shutdown(wait=False)
            self._executor = self._make()
            return self._executor.submit(execute, VERSION, brief, chunk)

    def _result(self, future: Future[Any]) -> Result:
        if future.cancelled():
            return Withdrawn()
        error = future.exception()
        if error is None:
            return Returned(future.result()[0])
        if isinstance(error, BrokenExecutor):
            return Lost(f"ended ({first_line(error)})")
        if isinstance(error, CancelledError):
            return Withdrawn()
        return Refused(f"{self.name}: {type(error).__name__}: {error}")

    def cancel(self, handle: Any) -> None:
        """See ``hosts.Host``; what is being executed goes on."""
        if handle is not None:
            handle.cancel()

    def interrupt(self, brief: bytes, call: int, attempt: int) -> bool:
        """See ``hosts.Host``: its process is signalled."""
        return False

    def fetch(self, place: Any) -> Mapping[Any, Any]:
        """See ``hosts.Host``; nothing is kept."""
        raise NotImplementedError

    def missing(self, resources: Mapping[str, float]) -> str | None:
        """See ``hosts.Host``: what there is is said by --resource."""
        return None

    def is_gone(self) -> str | None:
        """See ``hosts.Host``."""
        return None

    def close(self, brief: bytes | None, deadline: float) -> None:
        """See ``hosts.Host``."""
        if self._executor is None:
            return
        shutdown: Callable[..., object] = self._executor.shutdown
        accepted = _accepted(shutdown, cancel_futures=True, kill_workers=True)
        if isinstance(self._executor, ProcessPoolExecutor):
            # Where its own thread ends while the interpreter does, CPython 3.11 prints a
            # traceback.  The calls have ended, so it does soon.
            failed: list[Exception] = []

            def end() -> None:
                try:
                    shutdown(**accepted)
                except Exception as error:
                    failed.append(error)

            waiting = threading.Thread(target=end, daemon=True)
            waiting.start()
            waiting.join(max(0.0, deadline - monotonic()))
            if failed:
                raise failed[0]
        else:
            shutdown(wait=False, **accepted)


def executor_host(text: str, jobs: int) -> ExecutorHost:
    """The host of ``module:factory``.  Raises UsageError where there is none."""
    module, _, name = text.partition(":")
    try:
        found: Any = import_module(module)
    except ImportError as error:
        raise UsageError(f"--engine {text}: {error}") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"--engine {text}: there is no {part} in {module}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"--engine {text}: it makes no executor: it is not callable")
    return ExecutorHost(text, found, jobs)


def _accepted(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that ``function`` takes."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in arguments.items() if name in parameters}
