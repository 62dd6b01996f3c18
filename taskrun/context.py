"""Where a task's own calls to taskrun go: into the run it is part of, or nowhere.

``submit``, ``current()``, ``sh()`` and futures ask :func:`active` for the context they
are in.  In a worker that is the call being executed; outside a run it is ``Standalone``,
so that a task stays an ordinary function that can be unit-tested.

A future may be an argument of another ``submit`` and may be returned, at any depth; the
run then waits, not the worker.  Waiting for one inside a task (``result``,
``as_completed``, ``await``) lends the worker's slot meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, Protocol

from taskrun.errors import ArgumentError, CallSkipped, Skip

_PENDING: Any = object()


class Current:
    """What :func:`taskrun.current` gives: who and where this call is.

    Attributes: ``task`` (name), ``call`` (its name, such as ``fetch[3]``), ``attempt``
    (1, 2, ...), ``worker`` (name), ``node`` (name), ``pid``, ``ppid``, ``resources``
    (name -> list of units such as GPU numbers, or an amount).
    """

    __slots__ = ("_progress", "attempt", "call", "node", "pid", "ppid", "resources", "task",
                 "worker")  # fmt: skip

    def __init__(
        self,
        task: str = "",
        call: str = "",
        attempt: int = 1,
        worker: str = "",
        node: str = "",
        resources: dict[str, Any] | None = None,
        progress: Callable[[float, float | None], None] | None = None,
    ) -> None:
        self.task = task
        self.call = call
        self.attempt = attempt
        self.worker = worker
        self.node = node
        self.pid = os.getpid()
        self.ppid = os.getppid()
        self.resources = resources or {}
        self._progress = progress

    def progress(self, done: float, total: float | None = None) -> None:
        """Say how far this call is; shown live, and in ``--json`` events."""
        if self._progress is not None:
            self._progress(done, total)

    @property
    def channel(self) -> Any:
        """This call's end of the channel to whoever submitted it, or tells it something."""
        return channel_ends().channel_here()

    def __repr__(self) -> str:
        return f"<call {self.call or '(outside a run)'} attempt {self.attempt} pid {self.pid}>"


class Future:
    """What ``task.submit(...)`` returns.

    ``key`` identifies the call among its parent's children; it is empty outside a run.
    """

    __slots__ = ("__weakref__", "_callbacks", "_error", "_passed_on", "_value", "key", "task")

    def __init__(self, task: str, key: bytes = b"") -> None:
        self.task = task
        self.key = key
        self._value: Any = _PENDING
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._passed_on = False

    # -- what tasks use ---------------------------------------------------------------

    def done(self) -> bool:
        """Whether the outcome is known here already; never waits."""
        return self._value is not _PENDING or self._error is not None

    def result(self, timeout: float | None = None) -> Any:
        """The call's value; raises what the call raised.

        Lends this call's slot while it waits.  Raises TimeoutError after ``timeout``
        seconds, and RuntimeError on a running event loop (``await`` the future there).
        """
        self._wait(timeout)
        if self._error is not None:
            raise self._error
        return self._value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the call raised, or None; waits as :meth:`result` does."""
        self._wait(timeout)
        return self._error

    def cancel(self) -> None:
        """Cancel the call, also while it runs; its outcome is then CallCancelled."""
        active().cancel(self)

    @property
    def channel(self) -> Any:
        """This end of the channel to the call."""
        return channel_ends().channel_to(self.key)

    def __await__(self) -> Generator[Any, None, Any]:
        if not self.done():
            import asyncio  # heavy; only async tasks pay for it

            waiter = asyncio.get_running_loop().create_future()
            wake = partial(_wake, waiter)
            self._callbacks.append(wake)
            active().watch(self)
            try:
                yield from waiter.__await__()
            except asyncio.CancelledError:
                self._left_by(wake)
                raise
        if self._error is not None:
            raise self._error
        return self._value

    def _left_by(self, wake: Callable[[], None]) -> None:
        """A coroutine that awaited the call is cancelled.  So is the call, as an asyncio.Task
        would be, unless another one awaits it, or it was passed on to another call."""
        if self.done():
            return
        self._callbacks.remove(wake)
        if not self._callbacks and not self._passed_on:
            active().unawaited(self)

    # -- what the run uses ------------------------------------------------------------

    def resolve(self, value: Any) -> None:
        """The call has ended with this value."""
        self._value = value
        self._called()

    def fail(self, error: BaseException) -> None:
        """The call has ended, and ``result()`` raises this."""
        self._error = error
        self._called()

    def _called(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        # A future travels as a link, which is replaced by the call's value on the other side.
        if pickling.keys is None or not self.key:
            raise TypeError(
                "a Future cannot be pickled: pass it as an argument of submit() or return it"
            )
        pickling.keys.append(self.key)
        self._passed_on = True
        return linked, (self.key,)

    def _wait(self, timeout: float | None) -> None:
        if self.done():
            return
        if not active().wait([self], any_of=False, timeout=timeout):
            raise TimeoutError(f"{self.task} did not end within {timeout:g} s")

    def __repr__(self) -> str:
        state = "pending" if not self.done() else "failed" if self._error else "done"
        return f"<future of {self.task}, {state}>"


class _Pickling(threading.local):
    """What the futures in a value do when it is pickled; ``values`` sets it meanwhile.

    ``keys`` collects the keys of the futures that were pickled in this thread;
    ``resolve`` gives the value for a key when a pickle with futures is loaded.
    """

    keys: list[bytes] | None = None
    resolve: Callable[[bytes], Any] | None = None


pickling = _Pickling()


def linked(key: bytes) -> Any:
    """The value that stands in a future's place while a pickle is loaded."""
    if pickling.resolve is None:
        raise TypeError("a value with futures in it can be unpickled by taskrun only")
    return pickling.resolve(key)


def _wake(waiter: Any) -> None:
    if not waiter.done():
        waiter.set_result(None)


def as_completed(futures: Iterable[Future], timeout: float | None = None) -> Iterator[Future]:
    """Yield each future as its call ends; lends this call's slot while it waits.

    Raises TimeoutError when ``timeout`` seconds have passed since the call of as_completed.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    pending = list(dict.fromkeys(futures))
    while pending:
        ended = [future for future in pending if future.done()]
        if not ended:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not active().wait(pending, any_of=True, timeout=left):
                raise TimeoutError(f"{len(pending)} calls did not end within {timeout:g} s")
            continue
        known = set(ended)  # more may have ended since: another thread takes what comes
        pending = [future for future in pending if future not in known]
        yield from ended


class Context(Protocol):
    """What a run offers to the task code inside it."""

    def submit(self, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future:
        """Make a new call; returns at once."""

    def wait(self, futures: Sequence[Future], *, any_of: bool, timeout: float | None) -> bool:
        """Block until all (or any) of ``futures`` are resolved; False when time is up."""

    def watch(self, future: Future) -> None:
        """On a running event loop: resolve ``future`` when its call ends; returns at once."""

    def cancel(self, future: Future) -> None:
        """Cancel a submitted call."""

    def unawaited(self, future: Future) -> None:
        """What awaited a submitted call was cancelled, and nothing else needs that."""

    def current(self) -> Current:
        """Who and where this call is."""

    def per_worker(self, make: Callable[[], Any]) -> Any:
        """The value of ``make()``, made once per worker."""

    def lend(self, outside: Outside, deadline: float | None) -> bool:
        """Block until ``outside`` is ready; False when ``deadline`` (monotonic) came first."""

    def lend_awaiting(self, *, alone: bool = False) -> Callable[[], None]:
        """On a running event loop: a coroutine waits for something outside of the run's
        calls, until it calls what is given here.  ``alone``: see :class:`Outside`."""

    def beneath(self) -> list[tuple[int, int]]:
        """(call, attempt) of those that wait for this call, on the same stack."""


class Outside(Protocol):
    """Something other than calls that a call waits for, such as the answer of a server."""

    alone: bool
    """Whether no other call may be executed on top of the one that waits: what comes, such
    as a lock, would be kept from others meanwhile."""

    def ready(self) -> bool:
        """Whether it is there."""

    def fileno(self) -> int | None:
        """A descriptor that is readable then; None where :meth:`ready` must be asked."""

    def block(self, timeout: float | None) -> bool:
        """Wait for it, at most ``timeout`` seconds; False when these are over."""


class Standalone:
    """The context outside a run: everything happens at once, in this process."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}
        self._generators: list[Iterator[Any]] = []
        self._making = threading.RLock()  # what is made may call tasks that need others

    def submit(self, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future:
        future = Future(task.name)
        take = _outcome if task.options.always else Future.result
        try:
            args, kwargs = resolved(args, take), resolved(kwargs, take)
        except Exception as error:
            future.fail(_skipped(f"{task.name} was skipped, because a call failed", error))
            return future
        try:
            future.resolve(run_plainly(task, args, kwargs))
        except Skip as error:
            future.fail(_skipped(str(error), error))
        except Exception as error:
            future.fail(error)
        return future

    def wait(self, futures: Sequence[Future], *, any_of: bool, timeout: float | None) -> bool:
        return True  # submit() resolved them

    def watch(self, future: Future) -> None:
        return None  # submit() resolved it

    def cancel(self, future: Future) -> None:
        return None  # nothing is ever pending here

    def unawaited(self, future: Future) -> None:
        return None  # nor is anything awaited

    def current(self) -> Current:
        return Current()

    def per_worker(self, make: Callable[[], Any]) -> Any:
        with self._making:
            if make not in self._made:
                made = make()
                if isinstance(made, Iterator):
                    self._generators.append(made)
                    made = yielded(make, made)
                self._made[make] = made
            return self._made[make]

    def lend(self, outside: Outside, deadline: float | None) -> bool:
        return outside.block(left_until(deadline))

    def lend_awaiting(self, *, alone: bool = False) -> Callable[[], None]:
        return _nothing

    def beneath(self) -> list[tuple[int, int]]:
        return []


def yielded(make: Callable[[], Any], generator: Iterator[Any]) -> Any:
    """The value that the generator of a ``per_worker(make)`` yields.  Raises ArgumentError
    where that is none."""
    value = next(generator, _PENDING)
    if value is not _PENDING:
        return value
    name, code = getattr(make, "__name__", make), getattr(make, "__code__", None)
    where = "" if code is None else f", at {code.co_filename}:{code.co_firstlineno},"
    raise ArgumentError(
        f"per_worker({name}) yielded nothing: {name}{where} has to yield its value once"
    )


def _skipped(why: str, error: Exception) -> CallSkipped:
    skipped = CallSkipped(why)
    skipped.__cause__ = error
    return skipped


def left_until(deadline: float | None) -> float | None:
    """Seconds from now on, not less than 0; None is for ever."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _nothing() -> None:
    """There is no slot that could be lent."""


def run_plainly(task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a task to its end in this thread: coroutines are run, generators listed."""
    value = task(*args, **kwargs)
    if task.is_generator:
        if not task.is_async:
            return list(value)
        return _run(_collect(value))
    return resolved(_run(value) if task.is_async else value)


def resolved(value: Any, take: Callable[[Future], Any] = Future.result) -> Any:
    """``value`` with every Future in it, at any depth of lists, tuples and dicts, replaced by
    what ``take`` gives for it."""
    if isinstance(value, Future):
        return take(value)
    if type(value) in (list, tuple):
        return type(value)(resolved(item, take) for item in value)
    if type(value) is dict:
        return {key: resolved(item, take) for key, item in value.items()}
    return value


def _outcome(future: Future) -> Any:
    """What ``always=True`` gets: in the place of a call that failed its exception."""
    error = future.exception()
    return future.result() if error is None else error


async def _collect(generator: Any) -> list[Any]:
    return [item async for item in generator]


def _run(coroutine: Any) -> Any:
    import asyncio  # heavy; only async tasks pay for it

    if asyncio._get_running_loop() is None:
        return asyncio.run(coroutine)
    from concurrent.futures import ThreadPoolExecutor  # where no loop runs

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(copy_context().run, asyncio.run, coroutine).result()


_elsewhere: Context = Standalone()
_active: ContextVar[Context] = ContextVar("taskrun_context")


def active() -> Context:
    """The context of the code that asks."""
    return _active.get(_elsewhere)


def activate_everywhere(context: Context) -> None:
    """Make a context the one of all code in this process that has no other: also of threads
    and greenlets, which begin without context variables."""
    global _elsewhere
    _elsewhere = context


importing = 0
"""Imports of task files that are going on in this process."""

show: Callable[[int, bytes], None] | None = None
"""Takes what a command of ``sh`` writes to stdout (1) or stderr (2), where calls share their
process; None: it goes to this process's own."""

owner: Callable[[], object] | None = None
"""Gives whose the commands are that ``sh`` starts, where calls share their process."""

channel_ends: Any = None
"""Gives the ends of channels (``state.ends``), which are far above this ground floor: ``api``,
without which there are neither tasks nor calls, sets it."""

state_home: Callable[[], Any] | None = None
"""Gives the client of shared state (``state.clients.Client``) where that is a run's."""

state_address: tuple[Any, bytes] | None = None
"""In a worker: where shared state is, and the key."""


@contextmanager
def an_import() -> Iterator[None]:
    """While it lasts, a task file is imported: shared state cannot be used."""
    global importing
    importing += 1
    try:
        yield
    finally:
        importing -= 1


@contextmanager
def state_at(home: Callable[[], Any] | None) -> Iterator[None]:
    """While it lasts, shared state is where ``home`` says."""
    global state_home
    before, state_home = state_home, home
    try:
        yield
    finally:
        state_home = before


activate = _active.set
"""Make a context the active one; returns a token for :func:`deactivate`."""

deactivate = _active.reset
