"""joblib on a taskrun Pool: importing this module registers the backend "taskrun".

    import joblib
    import taskrun.joblib

    with joblib.parallel_config(backend="taskrun"):
        joblib.Parallel(n_jobs=2)(joblib.delayed(work)(item) for item in items)

The workers stay as long as the ``parallel_config``, or the ``Parallel``, does.  Whatever is
run goes by cloudpickle, so that functions of ``__main__`` and of notebooks may be defined at
any time; large arrays go through shared memory (docs/pool.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from joblib.parallel import (
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
    register_parallel_backend,
)

from taskrun import places
from taskrun.executor import CallFuture, Executor
from taskrun.pooling.functions import dumps_by_value
from taskrun.pooling.remote import call_pickled
from taskrun.settings import cores_here


class TaskrunBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """The backend; what its methods are for is said in joblib's ``ParallelBackendBase``."""

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._executor: Executor | None = None
        self._wanted: tuple[int, int] | None = None  # workers, and threads in each
        self._futures: set[CallFuture] = set()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many workers ``n_jobs`` means; -1: as many as there are cores."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        return n_jobs if n_jobs > 0 else max(cores_here() + 1 + n_jobs, 1)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
        """Have so many workers ready."""
        workers = self.effective_n_jobs(n_jobs)
        if workers == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        threads = self.inner_max_num_threads or max(cores_here() // workers, 1)
        if self._executor is None or self._wanted != (workers, threads):
            self._close()
            self._wanted = workers, threads
            self._executor = Executor(workers, initializer=_limit_threads, initargs=(threads,))
        return workers

    def submit(
        self, func: Callable[[], Any], callback: Callable[[Any], object] | None = None
    ) -> CallFuture:
        """Have a batch of calls executed."""
        assert self._executor is not None
        pickled = dumps_by_value(func, places.own())
        future = self._executor.submit(call_pickled, pickled)
        future.held = pickled  # whose data would be removed else
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, future: CallFuture) -> Any:
        """The values of a batch."""
        return future.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End what runs; the workers can go on."""
        for future in list(self._futures):
            future.cancel()
        if not ensure_ready:
            self._close()

    def terminate(self) -> None:
        """One Parallel is over; the next of this backend gets the same workers."""
        self.reset_batch_stats()

    def _close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None


def _limit_threads(count: int) -> None:
    """In a worker: so many threads a call in numeric libraries."""
    for name in ParallelBackendBase.MAX_NUM_THREADS_VARS:
        os.environ.setdefault(name, str(count))
    try:
        import threadpoolctl  # comes with scikit-learn; it reaches what is loaded already
    except ImportError:
        return
    threadpoolctl.threadpool_limits(count)


register_parallel_backend("taskrun", TaskrunBackend)
