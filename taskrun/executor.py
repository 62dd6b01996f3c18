"""``taskrun.Executor``: in place of ``concurrent.futures.ProcessPoolExecutor``.

As the Pool, on the same workers: a worker that dies costs the one call that it executed,
and the executor goes on.  A future can be cancelled while its call runs.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import (
    BrokenProcessPool,
    ProcessPoolExecutor,
    _RemoteTraceback,
)
from functools import partial
from typing import Any

from taskrun import blobs
from taskrun.errors import (
    ArgumentError,
    CallCancelled,
    RemoteError,
    ResultError,
    RunError,
    TaskExit,
    WorkerLost,
)
from taskrun.failures import guarded
from taskrun.model import Failure
from taskrun.pool import Pool, WorkerProcess, wait_at_exit
from taskrun.pooling.driver import Driver
from taskrun.pooling.looping import FOREIGN
from taskrun.pooling.remote import Submit, SubmitAny
from taskrun.pooling.results import Raw, decoded, exception_of, raw_of, report

__all__ = ["Executor"]


class ExecutorWorkerLost(WorkerLost, BrokenProcessPool):
    """The worker that executed a call has died; the executor itself goes on."""


class ExecutorArgumentError(ArgumentError, BrokenProcessPool):
    """The arguments could not be unpickled in the worker; the executor itself goes on."""


class ExecutorResultError(ResultError, BrokenProcessPool):
    """The result could not be unpickled; the executor itself goes on."""


class ExecutorCallCancelled(CallCancelled, BrokenProcessPool):
    """The executor's workers were ended before the call had."""


class ExecutorTaskExit(TaskExit, SystemExit):
    """The call has called ``sys.exit``."""

    def __init__(self, message: str, code: str | int | None = None) -> None:
        super().__init__(message)
        self.code = code


class ExecutorBroken(RunError, BrokenProcessPool):
    """The executor's workers cannot start."""


class CallFuture(concurrent.futures.Future[Any]):
    """The future of one call; ``cancel()`` ends the call also while it runs."""

    _driver: Driver | None = None
    _job: _FutureJob | None = None
    held: Any = None  # what the call needs until it ends

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call ``fn`` with the future when it is done."""
        # Without self, which would have a callback that has it: it and its result would stay
        # until the cyclic collector came.
        super().add_done_callback(partial(_call_back, self._driver, fn))

    def cancel(self) -> bool:
        """End the call; False where it has ended."""
        if not super().cancel():
            return False
        driver, job = self._driver, self._job
        if driver is not None and job is not None:
            driver.cancel(lambda: [job])
        return True

    def running(self) -> bool:
        """Whether a worker has the call; it may begin it a moment later, as in the standard
        library."""
        driver, job = self._driver, self._job
        if self.done():
            return False
        # Also where the call has just ended: nobody sees anything in between.
        return super().running() or (driver is not None and job is not None and driver.runs(job))

    def __repr__(self) -> str:
        shown = super().__repr__()
        return shown.replace("state=pending", "state=running") if self.running() else shown


def _call_back(driver: Driver | None, fn: Callable[[Any], object], future: Any) -> None:
    try:
        fn(future)
    except Exception:
        raise  # it is logged
    except BaseException as error:
        # sys.exit ends neither the loop nor the other callbacks.
        if driver is None or not driver.loop.in_thread:
            raise
        report(error)


class _FutureJob:
    """Takes a call's end to its future; see ``pooling.inbox.Job``."""

    __slots__ = ("call", "executor", "future", "raw")

    def __init__(self, executor: Executor, future: CallFuture) -> None:
        self.call: int | None = None
        self.executor: Executor | None = executor  # lives as long as its calls
        self.future = future

    def ended(self, call: Any, last: Any, pid: int | None) -> None:
        self._end(raw_of(call))

    def failed(self, error: BaseException) -> None:
        self._end(Raw((error, True)))

    def _end(self, raw: Raw) -> None:
        assert self.future._driver is not None
        self.raw: Raw | None = raw
        self.future._driver.loop.call_back(self._settle)

    def _settle(self) -> None:
        raw, self.raw, self.executor = self.raw, None, None
        if raw is None:
            return
        future = self.future
        wanted = future.set_running_or_notify_cancel()
        future._job = future.held = None  # only now: until then it is asked whether it runs
        if not wanted:
            return
        success, value = decoded(raw)
        if success:
            future.set_result(value)
        elif future._driver is not None and value is future._driver.error:
            future.set_exception(_broken(value))
        elif not raw[1]:
            future.set_exception(_unreadable(value))
        else:
            future.set_exception(_translated(value))


def _broken(error: BaseException | None) -> ExecutorBroken:
    made = ExecutorBroken(f"the workers cannot start: {type(error).__name__}: {error}")
    made.__cause__ = error
    return made


def _unreadable(error: BaseException) -> ExecutorResultError:
    said = f"the result cannot be unpickled: {type(error).__name__}: {guarded(error, str)}"
    made = ExecutorResultError(said)
    made.__cause__ = error
    return made


def _translated(error: BaseException) -> BaseException:
    """As those expect it who know the standard library's executor."""
    made = _counterpart(error)
    text = getattr(error.__cause__, "tb", None)
    if made is error and text is None:
        return error
    cause = error.__cause__ if text is None else _RemoteTraceback(text)
    BaseException.__setattr__(made, "__cause__", cause)
    return made


def _counterpart(error: BaseException) -> BaseException:
    if type(error) is WorkerLost:
        return ExecutorWorkerLost(*error.args)
    if type(error) is CallCancelled:
        return ExecutorCallCancelled(*error.args)
    if type(error) is ArgumentError:
        return ExecutorArgumentError(*error.args).with_traceback(error.__traceback__)
    if type(error) is TaskExit and error.exited:
        return ExecutorTaskExit(str(error), error.code)
    if type(error) is TaskExit and isinstance(error.raised, Failure):
        # KeyboardInterrupt and the like arrive as themselves, where they can be rebuilt.
        raised = exception_of(error.raised)
        return error if isinstance(raised, RemoteError) else raised
    return error


class ExecutorProcess:
    """One of the workers, for who looks for the standard library's: to end one of these ends all,
    and their calls raise BrokenProcessPool."""

    def __init__(self, worker: WorkerProcess, executor: Executor) -> None:
        self.pid, self.name = worker.pid, worker.name
        self.is_alive, self.join = worker.is_alive, worker.join
        self.terminate, self.kill = executor.terminate_workers, executor.kill_workers


class Executor(ProcessPoolExecutor):
    """An executor of PEP 3148; the parameters are those of ``ProcessPoolExecutor``, and
    ``address``, ``authkey`` and ``insecure_plain`` those of ``Pool``.

    It is a ``ProcessPoolExecutor`` for who asks, and uses nothing of it.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        address: Any = None,
        authkey: bytes | str | os.PathLike[str] | None = None,
        insecure_plain: bool = False,
    ) -> None:
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
        self._pool = Pool(
            max_workers, initializer, initargs, max_tasks_per_child, mp_context,
            address=address, authkey=authkey, insecure_plain=insecure_plain,
        )  # fmt: skip
        self._pool._kinds = Submit, SubmitAny
        wait_at_exit(self._pool._driver)  # as the standard library's
        weakref.finalize(self, _close, self._pool).atexit = False

    @property
    def workers(self) -> int:
        """How many calls run at a time."""
        return self._pool._processes

    @property
    def _max_workers(self) -> int:
        """The same: where dask and others look."""
        return self.workers

    @property
    def _processes(self) -> dict[int, ExecutorProcess]:  # type: ignore[override]
        """Where many look who want to end all, and Pythons before 3.14 have no method for it."""
        return {worker.pid: ExecutorProcess(worker, self) for worker in self._pool._pool}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> CallFuture:
        """``fn(*args, **kwargs)``, later.  Raises RuntimeError after ``shutdown()``, and in a
        forked child of the process whose executor it is, and BrokenProcessPool where workers
        cannot start."""
        pool = self._pool
        if pool._state != "RUN":
            raise RuntimeError("cannot schedule new futures after shutdown")
        driver = pool._driver
        if not driver.loop.is_here:
            raise RuntimeError(FOREIGN)
        if driver.error is not None:
            raise _broken(driver.error)
        if driver.closing:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        future = CallFuture()
        future._driver = driver
        future._job = job = _FutureJob(self, future)
        pool._apply(job, fn, args, kwargs, None, 0)
        return future

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """The results of ``fn`` called with an item of each of ``iterables``, in order.

        ``timeout``: seconds from now on, after which taking a result that is not there yet
        raises TimeoutError.  ``chunksize``: how many items go in one call.  ``buffersize``: so
        many calls are submitted ahead of what was taken, and not all at once.  Raises
        ValueError where one of these two is less than 1, and what :meth:`submit` raises.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        items = zip(*iterables, strict=False)
        chunks = iter(lambda: tuple(itertools.islice(items, chunksize)), ())
        carried = self._pool._recipes.carried(fn)

        def submit(*chunk: tuple[Any, ...]) -> CallFuture:
            future = self.submit(_call_each, carried, *chunk)
            future.held = carried  # whose data would be removed else
            return future

        futures = deque(submit(*chunk) for chunk in itertools.islice(chunks, buffersize))
        return _results(futures, submit, chunks, deadline)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; end when those that there are have, or have not begun and
        are cancelled."""
        if cancel_futures:
            self._pool._driver.cancel_queued(_cancelled)
        self._pool.close()
        if wait:
            self._pool.join()

    def terminate_workers(self) -> None:
        """End all workers now; the calls that there are raise BrokenProcessPool, and no more are
        taken.  As the standard library's of Python 3.14."""
        self._pool.terminate()

    kill_workers = terminate_workers  # one that does not end by itself is killed

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> bool | None:
        """Wait for the calls; but end them after a Ctrl-C, which workers do not hear of."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._pool.terminate()
        self.shutdown()
        return None


def _close(pool: Pool) -> None:
    pool.close()


def _cancelled(job: Any) -> None:
    if isinstance(job, _FutureJob):
        job.future.cancel()


def _call_each(carried: Any, *chunk: tuple[Any, ...]) -> list[Any]:
    function = carried if callable(carried) else blobs.loads(carried)
    return [function(*args) for args in chunk]


def _results(
    futures: deque[CallFuture],
    submit: Callable[..., CallFuture],
    chunks: Iterator[tuple[Any, ...]],
    deadline: float | None,
) -> Iterator[Any]:
    try:
        while futures:
            left = None if deadline is None else deadline - time.monotonic()
            values = futures[0].result(left)
            del futures[0]  # only now: what is waited for is cancelled with the others
            for chunk in itertools.islice(chunks, 1):
                futures.append(submit(*chunk))
            values.reverse()
            while values:
                yield values.pop()
    finally:
        for future in futures:
            future.cancel()
