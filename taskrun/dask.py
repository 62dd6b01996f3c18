"""dask on a taskrun Pool: ``dask.compute(..., scheduler=taskrun.dask_get)``.

dask's own local scheduler walks through the graph; the tasks run on an ``Executor``.  What a
task returns stays pickled on its way to those that need it, and large data in it stay where
they are, in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from os import getpid
from typing import Any, NamedTuple

from dask import config
from dask.local import get_async
from dask.multiprocessing import MultiprocessingPoolExecutor, initialize_worker_process
from dask.optimization import cull
from dask.utils import ensure_dict

from taskrun import blobs, places
from taskrun.blobs import Portable
from taskrun.executor import Executor
from taskrun.model import Failure
from taskrun.pool import Pool
from taskrun.pooling.functions import dumps_by_value
from taskrun.pooling.results import exception_of
from taskrun.settings import cores_here
from taskrun.values import encode_failure


class Packed(NamedTuple):
    """What goes to a worker, or comes back: a pickle."""

    data: Portable


class Value:
    """What a task returned, not unpickled; in the worker of a task that needs it it is the
    value itself."""

    __slots__ = ("data",)

    def __init__(self, data: Portable) -> None:
        self.data = data

    def __reduce__(self) -> Any:
        return blobs.loads, (self.data,)


def dask_get(
    dsk: Any,
    keys: Any,
    num_workers: int | None = None,
    pool: Executor | Pool | None = None,
    initializer: Callable[[], object] | None = None,
    **options: Any,
) -> Any:
    """A scheduler for dask: the values of ``keys``, nested as these are, of the graph ``dsk``.

    ``num_workers``: processes; as many as there are cores, unless said.  ``pool``: an
    Executor or a Pool to use; without it there is an Executor for this call, with
    ``initializer`` called in each worker, after its random numbers were seeded.  Each is looked
    for in dask's configuration, too.  Raises what a task raises.
    """
    if pool is None and isinstance(found := config.get("pool", None), Executor | Pool):
        pool = found  # one of others is for dask's own schedulers
    if isinstance(pool, Pool):
        executor = MultiprocessingPoolExecutor(pool)
        executor._max_workers = max(1, pool._processes)  # not how many there are just now
        return _get(executor, dsk, keys, options)
    if pool is not None:
        return _get(pool, dsk, keys, options)
    workers = num_workers or config.get("num_workers", None) or cores_here()
    initializer = initializer or config.get("multiprocessing.initializer", None)
    travelling = None if initializer is None else dumps_by_value(initializer)
    with Executor(workers, _context(), _initialize, (travelling,)) as executor:
        return _get(executor, dsk, keys, options)


def _initialize(initializer: Portable | None) -> None:
    """In a worker, as dask does in those of its own."""
    initialize_worker_process(None if initializer is None else blobs.loads(initializer))


def _get(executor: Any, dsk: Any, keys: Any, options: dict[str, Any]) -> Any:
    if hasattr(dsk, "__dask_graph__"):
        dsk = dsk.__dask_graph__()
    graph, _ = cull(ensure_dict(dsk), keys)

    def submit(function: Callable[..., Any], batch: Any) -> Any:
        future = executor.submit(function, batch)
        future.held = batch  # whose data would be removed else
        return future

    found = get_async(
        submit, executor._max_workers, graph, keys,
        get_id=getpid, dumps=_dumps, loads=_loads,
        pack_exception=_pack, raise_exception=_raise, **options,
    )  # fmt: skip
    return _unpacked(found)


def _dumps(obj: Any) -> Packed | tuple[Packed, int]:
    """A task and the values that it needs; in a worker what it returned, and the pid."""
    result, second = obj
    if isinstance(second, int):
        return Packed(dumps_by_value(result)), second
    return Packed(dumps_by_value(obj, places.own()))


def _loads(obj: Any) -> Any:
    """The inverse in the other process; but what a task returned stays pickled."""
    if isinstance(obj, Packed):
        return blobs.loads(obj.data)
    if isinstance(obj, Failure):
        return obj, None
    packed, pid = obj
    return Value(packed.data), pid


def _pack(error: BaseException, dumps: Any) -> Failure:
    return encode_failure(error)


def _raise(failure: Failure, traceback: None) -> None:
    raise exception_of(failure)


def _unpacked(found: Any) -> Any:
    if isinstance(found, Value):
        return blobs.loads(found.data)
    if isinstance(found, tuple | list):
        return type(found)(map(_unpacked, found))
    return found


def _context() -> Any:
    """What dask's configuration says, or multiprocessing; but with ``spawn`` workers would not
    agree on the hashes of strings."""
    default = get_context(config.get("multiprocessing.context", None))
    return get_context("forkserver") if default.get_start_method() == "spawn" else default
