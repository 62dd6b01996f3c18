"""joblib on a taskrun Pool: importing this module registers the backend "taskrun".

    import joblib
    import taskrun.joblib

    with joblib.parallel_config(backend="taskrun"):
        joblib.Parallel(n_jobs=2)(joblib.delayed(work)(item) for item in items)

The workers stay as long as the ``parallel_config``, or the ``Parallel``, does.  They are fresh,
as loky's are, and no forks: what OpenMP has begun in this process would hang in a fork.
Whatever is run goes by cloudpickle, and so does what it returns, so that functions and classes
of ``__main__`` and of notebooks may be defined at any time; large arrays go through shared
memory (docs/pool.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

from joblib.parallel import (
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
    register_parallel_backend,
)

from taskrun import blobs, places
from taskrun.blobs import Portable
from taskrun.executor import CallFuture, Executor
from taskrun.pooling.functions import dumps_by_value
from taskrun.pooling.remote import dumps
from taskrun.pooling.starting import Bare
from taskrun.settings import cores_here

# Whoever is told how long batches take: another Parallel of the same backend may go on.
_NOBODY: Final = SimpleNamespace(verbose=0)

_Initializer = tuple[Callable[..., object] | None, tuple[Any, ...]]


class TaskrunBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """The backend; what its methods are for is said in joblib's ``ParallelBackendBase``."""

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._executor: Executor | None = None
        self._wanted: tuple[int, int] | None = None  # workers, and threads in each
        self._initializer: _Initializer = None, ()
        self._futures: set[CallFuture] = set()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many workers ``n_jobs`` means; -1: as many as there are cores."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        return n_jobs if n_jobs > 0 else max(cores_here() + 1 + n_jobs, 1)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        """Have so many workers ready.  ``initializer`` and ``initargs`` are taken, as by loky's
        backend, from the ``Parallel`` or from the ``parallel_config``."""
        workers = self.effective_n_jobs(n_jobs)
        if workers == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        asked = self.inner_max_num_threads
        threads = asked or max(cores_here() // workers, 1)
        options = {**self.backend_kwargs, **options}
        wanted = options.get("initializer"), tuple(options.get("initargs") or ())
        if (
            self._executor is None
            or self._wanted != (workers, threads)
            or not _same(self._initializer, wanted)
        ):
            self._close()
            self._wanted, self._initializer = (workers, threads), wanted
            self._executor = Executor(
                workers, Bare(), _initialize, (threads, bool(asked), *_travelling(*wanted))
            )
        return workers

    def submit(
        self, func: Callable[[], Any], callback: Callable[[Any], object] | None = None
    ) -> CallFuture:
        """Have a batch of calls executed."""
        assert self._executor is not None
        pickled = dumps_by_value(func, places.own())
        future = self._executor.submit(_call, pickled)
        future.held = pickled  # whose data would be removed else
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, future: CallFuture) -> Any:
        """The values of a batch."""
        return blobs.loads(future.result())

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End what runs; the workers can go on."""
        for future in list(self._futures):
            future.cancel()
        if not ensure_ready:
            self._close()

    def terminate(self) -> None:
        """One Parallel is over; the next of this backend gets the same workers."""
        self.reset_batch_stats()
        # It has this backend: both, and the workers, would stay until the cyclic collector came.
        self.parallel = _NOBODY

    def _close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None


def _same(one: _Initializer, other: _Initializer) -> bool:
    """By identity: arrays, for one, do not say simply whether they are equal."""
    (first, args), (second, others) = one, other
    return (
        first is second
        and len(args) == len(others)
        and all(a is b for a, b in zip(args, others, strict=True))
    )


def _travelling(initializer: Callable[..., object] | None, args: tuple[Any, ...]) -> Any:
    """A pickled initializer, and its arguments: pickled too, but for locks, queues and the like,
    which travel only with the process itself."""
    if initializer is None:
        return None, None
    try:
        return dumps_by_value((initializer, args)), None
    except Exception:
        return dumps_by_value((initializer, ())), args


def _initialize(
    threads: int, asked: bool, pickled: Portable | None, args: tuple[Any, ...] | None
) -> None:
    """In a worker, before its first call."""
    _limit_threads(threads, asked)
    if pickled is not None:
        initializer, travelled = blobs.loads(pickled)
        initializer(*(travelled if args is None else args))


def _call(pickled: Portable) -> Portable:
    """In a worker: what a batch returns, pickled; classes of the user's ``__main__``, which is not
    there, by value."""
    found = blobs.loads(pickled)()
    try:
        return dumps(found)
    except Exception:
        return dumps_by_value(found)


def _limit_threads(count: int, asked: bool) -> None:
    """So many threads a call in numeric libraries.  ``asked``: whatever the environment says."""
    for name in ParallelBackendBase.MAX_NUM_THREADS_VARS:
        if asked or name not in os.environ:
            os.environ[name] = str(count)
    try:
        import threadpoolctl  # comes with scikit-learn; it reaches what is loaded already
    except ImportError:
        return
    threadpoolctl.threadpool_limits(count)


register_parallel_backend("taskrun", TaskrunBackend)
