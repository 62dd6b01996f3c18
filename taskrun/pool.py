"""``taskrun.Pool``: in place of ``multiprocessing.Pool``, with the same names and semantics.

Its calls run on the workers and the scheduler core of ``taskrun exec``: a worker that dies
costs the one call that it executed, and that call's ``get()`` says so.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from multiprocessing import parent_process, util
from multiprocessing import pool as standard
from time import monotonic, sleep
from typing import Any, Final, NamedTuple

from taskrun.blobs import Portable, Seen
from taskrun.model import Failure
from taskrun.pooling.driver import Driver
from taskrun.pooling.feeding import feed_imap
from taskrun.pooling.functions import (
    SCALARS,
    Recipes,
    checked,
    dumps_call,
    dumps_scalar,
    is_small,
    is_stateless,
)
from taskrun.pooling.inbox import Job
from taskrun.pooling.iterators import IMapIterator, OrderedIterator, UnorderedIterator
from taskrun.pooling.looping import FOREIGN, Loop
from taskrun.pooling.memory import limits
from taskrun.pooling.remote import Apply, ApplyAny, InitializerFailed, Map, Setup, Starmap
from taskrun.pooling.results import (
    AsyncResult,
    Callback,
    MapResult,
    Raw,
    Singles,
    exception_of,
)
from taskrun.pooling.starting import Starter, Supply
from taskrun.settings import cores_here
from taskrun.values import decode_failure
from taskrun.weakly import living

__all__ = ["AsyncResult", "IMapIterator", "MapResult", "Pool"]

INIT: Final = "INIT"
RUN: Final = "RUN"
CLOSE: Final = "CLOSE"
TERMINATE: Final = "TERMINATE"

WINDOW: Final = 1024  # calls of one imap that may be under way, at least
PER_WORKER: Final = 64  # ... and for each worker
SMALLER: Final = 4  # ... so many times more while their arguments are plain numbers
FIRST: Final = 100  # multiprocessing's own finalizers have less: managers 0, pools 15
LOOK: Final = 0.01  # seconds between two looks whether a worker has ended

Size = int | str | None  # of memory

_standard_init = standard.Pool.__init__

_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()
_waits = 0  # the process of multiprocessing whose end waits for calls
_forks = 0  # how many there are between this process and the one that imported this


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class WorkerProcess(NamedTuple):
    """One worker of a pool; ``node`` is the other machine that it is on, or empty."""

    name: str
    pid: int
    node: str = ""
    link: Any = None

    def is_alive(self) -> bool:
        """Whether the process is there, as far as this one knows."""
        if self.node:
            return not self.link.over
        return self._signal(0)

    def terminate(self) -> None:
        """End it with SIGTERM, which costs the call that it executes; the pool starts another.
        Raises ValueError where it is on another machine."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """The same with SIGKILL."""
        self._end(signal.SIGKILL)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, or ``timeout`` seconds are over."""
        deadline = None if timeout is None else monotonic() + timeout
        while self.is_alive() and (deadline is None or monotonic() < deadline):
            sleep(LOOK)

    def _end(self, number: int) -> None:
        if self.node:
            raise ValueError(f"{self.name} is on {self.node}: it cannot be ended from here")
        if not self.link.over:  # else another process may have its number
            self._signal(number)

    def _signal(self, number: int) -> bool:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


class _Waiting(NamedTuple):
    """The calls that have not begun, as the standard library's pool has a queue of them."""

    driver: Driver

    def qsize(self) -> int:
        """How many there are, about."""
        return max(0, len(self.driver.unfinished()) - self.driver.processes)

    def empty(self) -> bool:
        """Whether there are none."""
        return not self.qsize()


class Pool(standard.Pool):
    """Worker processes for calls of functions; see ``multiprocessing.pool.Pool``, which it is
    for who asks, and of which nothing is used.

    ``processes``: how many; the cores that this process may use, unless said.
    ``initializer(*initargs)`` is called first in each of them; if that raises, so does every
    ``get()``.  ``maxtasksperchild``: after so many calls a worker is replaced.  ``context``: one
    of multiprocessing's contexts, or its default; says how workers start.  ``maxrss``: bytes,
    or a size such as ``"2G"``: a worker that uses more memory is replaced when its call has
    ended; of a pair, the second is where it is stopped at once, and the call is lost.

    ``address``: of a ``taskrun serve``, as on the command line; then the workers are those of
    the server and of its nodes, at most ``processes`` of them, or all that it lends.  ``authkey``
    is the server's key, or the path of a file with it; without one, that which taskrun always
    takes.  ``insecure_plain`` is for a server that was started with ``--insecure-plain``:
    without TLS, whoever is on the network between can read and change everything, and run code
    on both sides.

    Raises ValueError and TypeError for arguments that cannot be meant, RunError where no process
    can be started, DialError where no such server answers, and UsageError for what cannot be
    used or cannot travel.

    ``timeout=`` seconds and ``retries=`` may be given to each method that calls: a call (of
    ``map`` and with a ``chunksize``: a chunk) that takes longer ends with CallTimeout, and one
    that fails, or loses its worker, is tried again so often.  Each of these methods raises
    ValueError where the pool was closed, or belongs to the process that this one was forked
    from, and ValueError or TypeError for options that cannot be meant.  What a call has
    raised, or why it did not end, is raised where its value is asked for (docs/pool.md).
    """

    _state: Any = INIT  # where __init__ refuses its arguments, __del__ asks all the same

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        *,
        maxrss: Size | tuple[Size, Size] = None,
        address: Any = None,
        authkey: bytes | str | os.PathLike[str] | None = None,
        insecure_plain: bool = False,
    ) -> None:
        if isinstance(self, standard.ThreadPool):
            # Somebody has put this class into the standard library's module, where that one is
            # a Pool as well.
            _standard_init(self, processes, initializer, initargs)
            return
        if processes is not None and processes < 1:
            raise ValueError("Number of processes must be at least 1")
        if maxtasksperchild is not None and (
            not isinstance(maxtasksperchild, int) or maxtasksperchild <= 0
        ):
            raise ValueError("maxtasksperchild must be a positive int or None")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        setup, most = Setup(initializer, tuple(initargs)), limits(maxrss)
        supply: Supply
        if address is None:
            if authkey is not None:
                raise ValueError("authkey is for address, and there is none")
            if insecure_plain:
                raise ValueError("insecure_plain is for address, and there is none")
            supply = Starter(context or _default_context(), setup, most)
            processes = processes or cores_here()
        else:
            if context is not None:
                raise ValueError("context says how workers of this machine start: not for address")
            from taskrun.pooling.lending import Borrower

            supply = Borrower(
                address, authkey, processes, setup, most, insecure_plain=insecure_plain
            )
        self._kinds: tuple[type[Apply], type[ApplyAny]] = Apply, ApplyAny
        self._driver = Driver(processes or 1, supply, maxtasksperchild, _initializer_failed)
        self._forks = _forks
        self._singles = Singles(self._driver)
        self._driver.own_singles(self._singles)
        self._recipes = Recipes(self._driver.recipe_ids, supply.in_main, self._driver.forget)
        self._dumps = partial(dumps_call, found=supply.in_main)
        weakref.finalize(self, self._driver.abandon).atexit = False
        _drivers.add(self._driver)
        self._state = RUN

    # -- one call ---------------------------------------------------------------------

    def apply(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        retries: int = 0,
    ) -> Any:
        """The value of ``func(*args, **kwds)``; raises what that has raised."""
        if self._state is not RUN or self._forks != _forks:
            self._check_running()
        result = AsyncResult(self, None, None)
        if not (is_small(func, args, kwds, timeout, retries) and self._direct(result, func, args)):
            self._apply(result, func, args, kwds, timeout, retries, waits=True)
        return result.get()

    def _direct(self, result: AsyncResult, func: Any, args: Any) -> bool:
        """The shortest way of a small call for which the caller waits; False: take another."""
        recipe = self._recipes.by_name.get(func)
        return recipe is not None and self._driver.submit_direct(
            recipe, args, self._singles, result, waits=True
        )

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        callback: Callback = None,
        error_callback: Callback = None,
        *,
        timeout: float | None = None,
        retries: int = 0,
    ) -> AsyncResult:
        """The same, without waiting for it.  ``callback`` is called with the value, or
        ``error_callback`` with the exception, in a thread of the pool's."""
        if self._state is not RUN or self._forks != _forks:
            self._check_running()
        result = AsyncResult(self, callback, error_callback)
        small = is_small(func, args, kwds, timeout, retries)
        if small and (recipe := self._recipes.by_name.get(func)) is not None:
            direct = callback is None and error_callback is None
            if not (direct and self._driver.submit_direct(recipe, args, self._singles, result)):
                result._where = recipe
                plain: Any = args
                result._value = plain[0] if len(plain) == 1 else plain
                self._driver.submit_entry(result)
        else:
            self._apply(result, func, args, kwds, timeout, retries)
        return result

    def _apply(
        self,
        result: Job,
        func: Callable[..., Any],
        args: Iterable[Any],
        kwds: Mapping[str, Any] | None,
        timeout: float | None,
        retries: int,
        *,
        waits: bool = False,
    ) -> None:
        if timeout is not None or retries != 0:
            timeout, retries = checked(timeout, retries)
        args, kwds = tuple(args), {} if kwds is None else dict(kwds)
        try:
            if is_stateless(func):
                recipe, before = self._recipes.for_call(self._kinds[0], func, timeout, retries)
                args = (*before, *args)
                if len(args) == 1 and type(args[0]) in SCALARS and not kwds:
                    blob = dumps_scalar(args)
                else:
                    blob = self._dumps((args, kwds))
            else:
                recipe = self._recipes.any(timeout, retries, self._kinds[1])
                blob = self._recipes.dumps_with(func, ((func, args, kwds), {}))
        except Exception as error:
            result.failed(error)
            self._loop.nudge()
            return
        self._driver.submit(recipe, blob, result, waits=waits)

    # -- many calls -------------------------------------------------------------------

    def map(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        **options: Any,
    ) -> list[Any]:
        """``[func(x) for x in iterable]``; raises what the first call that failed has raised.

        ``chunksize``: how many items go in one call; unless said, as many as make four calls
        for each worker.  ``options``: ``timeout`` and ``retries``; ``progress=True`` shows how
        far it is.
        """
        result: list[Any] = self._map(Map, func, iterable, chunksize, None, None, **options).get()
        return result

    def map_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callback = None,
        error_callback: Callback = None,
        **options: Any,
    ) -> MapResult:
        """The same, without waiting for it."""
        return self._map(Map, func, iterable, chunksize, callback, error_callback, **options)

    def starmap(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        **options: Any,
    ) -> list[Any]:
        """``[func(*x) for x in iterable]``."""
        made = self._map(Starmap, func, iterable, chunksize, None, None, **options)
        result: list[Any] = made.get()
        return result

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callback = None,
        error_callback: Callback = None,
        **options: Any,
    ) -> MapResult:
        """The same, without waiting for it."""
        return self._map(Starmap, func, iterable, chunksize, callback, error_callback, **options)

    def _map(
        self,
        kind: type[Map],
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None,
        callback: Callback,
        error_callback: Callback,
        *,
        timeout: float | None = None,
        retries: int = 0,
        progress: bool = False,
    ) -> MapResult:
        self._check_running()
        if timeout is not None or retries != 0:
            timeout, retries = checked(timeout, retries)
        if chunksize is not None and chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize:n}")
        sized: Any = iterable if hasattr(iterable, "__len__") else list(iterable)
        size = len(sized)
        if chunksize is None:
            chunksize, extra = divmod(size, self._processes * 4)
            chunksize += bool(extra)
        blobs: list[tuple[Portable, int]] = []
        before: tuple[Any, ...] = ()
        failed: Exception | None = None
        try:
            if size:
                recipe, before = self._recipes.for_items(
                    kind, func, timeout, retries, few=size <= chunksize * self._processes * 4
                )
                seen: Seen = {}  # whoever changes what he maps over while it is taken: his fault
                blobs = [
                    (self._dumps(((*before, chunk), {}), seen), len(chunk))
                    for chunk in _chunked(sized, chunksize)
                ]
        except Exception as error:
            failed = error  # as in the standard library, the result tells it
        # Not what len() promises: chunks that do not come would be waited for for ever.
        chunks = len(blobs) if failed is None else 1
        result = MapResult(self, callback, error_callback, chunks, chunksize)
        result.held = before
        if progress:
            result._advance = _bar(sum(count for _, count in blobs))
        if failed is not None:
            result.part_ended(result.chunk(0, 0), Raw((failed, True)))
        elif not blobs:
            result.start()
        for number, (blob, count) in enumerate(blobs):
            self._driver.submit(recipe, blob, result.chunk(number, count))
        if not blobs:
            self._loop.nudge()
        return result

    def imap(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = 1,
        *,
        buffersize: int | None = None,
        timeout: float | None = None,
        retries: int = 0,
    ) -> IMapIterator:
        """An iterator over ``func(x)`` for each of ``iterable``, in its order.

        It is read by a thread of its own, not further ahead than a thousand unfinished calls,
        four thousand as long as its items are plain numbers, or ``buffersize`` calls whose
        results were not taken.  What a call has raised is raised in its item's place, and what
        the iterable raises behind the last.
        """
        return self._imap(OrderedIterator, func, iterable, chunksize, buffersize, timeout, retries)

    def imap_unordered(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = 1,
        *,
        buffersize: int | None = None,
        timeout: float | None = None,
        retries: int = 0,
    ) -> IMapIterator:
        """The same, in the order in which the calls end."""
        kind = UnorderedIterator
        return self._imap(kind, func, iterable, chunksize, buffersize, timeout, retries)

    def _imap(
        self,
        kind: type[IMapIterator],
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None,
        buffersize: int | None,
        timeout: float | None,
        retries: int,
    ) -> IMapIterator:
        self._check_running()
        if timeout is not None or retries != 0:
            timeout, retries = checked(timeout, retries)
        if chunksize is None:
            chunksize = 1
        if chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize:n}")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be at least 1")
        window = buffersize or max(WINDOW, PER_WORKER * self._processes)
        if chunksize > 1:
            window = max(2 * self._processes, window // chunksize)
        many = buffersize is None and window >= PER_WORKER * self._processes
        made = kind(
            self, self._driver, chunked=chunksize > 1, window=window,
            smaller=SMALLER if buffersize is None else 1,
            # Who feeds is not to be woken for each call that ends.
            buffered=buffersize is not None, at_once=many,
        )  # fmt: skip
        items: Iterable[tuple[Any, ...]]
        try:
            if chunksize > 1:
                recipe, before = self._recipes.for_items(Map, func, timeout, retries, few=False)
                made.held = before
                items = ((*before, chunk) for chunk in _chunked(iterable, chunksize))
            else:
                recipe, before = self._recipes.for_each(func, timeout, retries)
                made.held = before
                items = ((*before, (item,), {}) for item in iterable) if before else zip(iterable)
        except Exception as error:
            made.fed(0, error)
            return made
        feed = object()
        args = (self._driver, self._dumps, recipe, items, [made], feed)
        thread = threading.Thread(target=feed_imap, args=args, name="taskrun-feed", daemon=True)
        try:
            self._driver.open_feed(feed)
            thread.start()
        except BaseException:  # of a signal handler, perhaps: the thread may have started
            self._driver.close_feed(feed)
            raise
        return made

    # -- the end ----------------------------------------------------------------------

    def close(self) -> None:
        """Take no more calls; workers end when those that there are have."""
        if self._state == RUN:
            self._state = CLOSE
            self._driver.close()

    def terminate(self) -> None:
        """End all calls and all workers now; who waits for a call gets CallCancelled."""
        self._state = TERMINATE
        self._driver.terminate()

    def join(self) -> None:
        """Wait until all workers have ended, after ``close()`` or ``terminate()``.  Raises
        ValueError before that, and in a forked process, and RuntimeError in a callback, which
        they wait for."""
        if self._state == RUN:
            raise ValueError("Pool is still running")
        if not self._loop.is_here:
            raise ValueError(FOREIGN)
        if self._loop.in_thread or self._loop.is_run_here:
            raise RuntimeError("cannot join current thread")
        self._loop.finished.wait()

    def __enter__(self) -> Pool:
        self._check_running()
        return self

    def __exit__(self, *exc: object) -> None:
        self.terminate()

    def __del__(self, _warn: Any = warnings.warn, _run: str = RUN) -> None:
        if self._state == _run:
            said = f"unclosed running multiprocessing pool {self!r}"
            _warn(said, ResourceWarning, source=self, stacklevel=2)

    # -- small things -----------------------------------------------------------------

    def workers(self) -> list[WorkerProcess]:
        """The workers that there are."""
        started = self._driver.started()
        return [WorkerProcess(f"w{link.id}", pid, link.node, link) for link, pid in started]

    @property
    def _processes(self) -> int:
        """How many workers there are, or should be."""
        return self._driver.processes

    @property
    def _loop(self) -> Loop:
        return self._driver.loop

    @property
    def _pool(self) -> list[WorkerProcess]:
        """As many ask the standard library's pool; waits until the first have started."""
        self._driver.await_start()
        return self.workers()

    def _repopulate_pool(self) -> None:
        """It is done without being asked."""

    @property
    def _cache(self) -> list[Any]:
        """The calls that are not over: as many look whether there are any, or how many."""
        return self._driver.unfinished()

    @property
    def _taskqueue(self) -> _Waiting:
        """Where as many look before they submit more."""
        return _Waiting(self._driver)

    def _check_running(self) -> None:
        if self._state != RUN:
            raise ValueError("Pool not running")
        if not self._loop.is_here:
            raise ValueError(FOREIGN)

    def __repr__(self) -> str:
        kind = type(self)
        return (
            f"<{kind.__module__}.{kind.__qualname__} state={self._state} "
            f"pool_size={getattr(self, '_processes', 0)}>"
        )

    def __reduce__(self) -> Any:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")


def _default_context() -> Any:
    from multiprocessing import get_context

    return get_context()


def _chunked(iterable: Iterable[Any], size: int) -> Iterable[tuple[Any, ...]]:
    items = iter(iterable)
    while chunk := tuple(itertools.islice(items, size)):
        yield chunk


def _initializer_failed(failure: Failure) -> BaseException | None:
    """What the initializer of a worker raised, where that is how a call ended."""
    name = f"{InitializerFailed.__module__}.{InitializerFailed.__qualname__}"
    if failure.type_name != name:
        return None
    cause = decode_failure(failure).__cause__
    return exception_of(failure) if cause is None else cause


def _bar(total: int) -> Callable[[int], None]:
    from tqdm import tqdm

    bar = tqdm(total=total)

    def advance(count: int) -> None:
        bar.update(count)
        if bar.n >= total:
            bar.close()

    return advance


def wait_at_exit(driver: Driver) -> None:
    """Have the end of this process wait for the calls that ``driver`` has then."""
    global _waits
    driver.waits_at_exit = True
    # A child of multiprocessing leaves without atexit, but not without its finalizers.
    if parent_process() is not None and _waits != os.getpid():
        _waits = os.getpid()
        util.Finalize(None, _wait_for_calls, exitpriority=FIRST)


def _wait_for_calls() -> None:
    # Of the standard library's workers a Ctrl-C ends the calls; of ours it does not.  (In a child
    # of multiprocessing nobody knows of it from Python 3.13 on: there another one ends the wait.)
    if KeyboardInterrupt in (getattr(sys, "last_type", None), sys.exc_info()[0]):
        return
    for driver in living(_drivers):
        if driver.waits_at_exit and driver.loop.is_here:
            driver.close()
            driver.loop.finished.wait()


@atexit.register
def _terminate_all() -> None:
    _wait_for_calls()
    for driver in living(_drivers):
        driver.terminate()
