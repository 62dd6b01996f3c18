"""What task code reaches of its run: ``submit``, futures, ``current()``, ``per_worker()``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from time import monotonic
from types import TracebackType
from typing import Any, Final, Protocol

from taskrun import blobs
from taskrun.blobs import Portable
from taskrun.context import Current, Future, Outside, left_until
from taskrun.errors import CallError
from taskrun.lanes import GREEN, check_green
from taskrun.messages import (
    CANCEL,
    DEFINE,
    OUTSIDE,
    OUTSIDE_ALONE,
    PROGRESS,
    RESUME,
    SAY_BEGAN,
    SUBMIT,
    WAIT,
)
from taskrun.model import Failure, Task
from taskrun.values import decode, decode_failure, dumps_arguments
from taskrun.workers import native
from taskrun.workers.execute import Executor, Running
from taskrun.workers.outbox import Port
from taskrun.workers.recipes import missing_arguments
from taskrun.workers.settings import Settings

Reference = tuple[str, str] | bytes

PROGRESS_SECONDS: Final = 0.05  # at most so often is progress told


class Line(Port, Protocol):
    """The way to the coordinator, and back."""

    def flush_soon(self) -> None:
        """Have what was told sent soon, whatever the task goes on to do; any thread may ask."""

    def converse(
        self,
        running: Running,
        wait: tuple[Any, ...],
        satisfied: Callable[[], bool],
        deadline: float | None,
        outside: int | None = None,
    ) -> bool:
        """Tell ``wait``, then take what comes, and execute what is nested, until
        ``satisfied()``; False when ``deadline`` (monotonic) came first.  ``outside`` is
        another descriptor that may satisfy it.  Raises Interrupted where ``running`` is to
        end."""

    def listen(self, loop: Any, heard: Callable[[], object]) -> None:
        """From now on take what comes on this event loop, and call ``heard`` after it."""

    def stop_listening(self, loop: Any) -> None: ...


class WorkerContext:
    """A ``context.Context`` for the calls that one executor executes."""

    def __init__(
        self,
        executor: Executor,
        line: Line,
        *,
        worker: str,
        node: str,
        set_by_user: dict[str, frozenset[str]],
    ) -> None:
        self._executor = executor
        self._line = line
        self._worker = worker
        self._node = node
        self._set_by_user = set_by_user
        self._thread = threading.get_ident()
        self._references: dict[int, tuple[Task, Reference, bytes | None]] = {}
        self._defined: set[Reference] = set()
        self._last_progress = 0.0
        self._watches: list[_Watch] = []
        self._submitting = native.RLock()  # a call may have threads
        executor.context = self

    # -- Context ----------------------------------------------------------------------

    def submit(self, task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future:
        running = self._here("submit()")
        given = self._set_by_user.get(task.name, frozenset())
        if reason := missing_arguments(task, given, args, kwargs):
            raise TypeError(f"{task.name}.submit(): {reason}")
        blob, keys = dumps_arguments(args, kwargs)
        if not (running.keys or set()).issuperset(keys):
            raise RuntimeError(f"{task.name}.submit(): a future of another call is no argument")
        reference, by_value = self._reference(task)
        if task.options.lane == GREEN:
            check_green(task.name)
        with _masked(running, self._thread):
            with self._submitting:  # DEFINE comes before SUBMIT
                key = _key(running, reference, blob)
                future = Future(task.name, key)
                if running.keys is None or running.futures is None:
                    running.keys, running.futures = set(), {}
                running.keys.add(key)
                running.futures[key] = future
                self._define(task, reference, by_value)
                said = (SUBMIT, running.call, running.attempt, key, reference, blob, keys)
                self._line.tell(said)
            self._line.flush_soon()
        return future

    def wait(self, futures: Sequence[Future], *, any_of: bool, timeout: float | None) -> bool:
        running = self._here("waiting for a call")
        self._refuse_to_block()
        pending = self._pending(running, futures)
        if not pending or (any_of and len(pending) < len(set(futures))):
            return True
        satisfied = _any_done(pending) if any_of else _all_done(pending)
        deadline = None if timeout is None else monotonic() + timeout
        keys = tuple(future.key for future in pending)
        with _masked(running, self._thread):
            wait = (WAIT, running.call, running.attempt, keys, any_of)
            came = self._line.converse(running, wait, satisfied, deadline)
            if not came:
                self._give_up(running)
            return came

    def watch(self, future: Future) -> None:
        running = self._here("waiting for a call")
        if self._pending(running, [future]):
            self._watch_of(running).add(future)

    def cancel(self, future: Future) -> None:
        running = self._here("cancel()")
        if self._pending(running, [future]):
            with _masked(running, self._thread):
                self._line.tell((CANCEL, running.call, running.attempt, future.key))
                self._line.flush()

    def unawaited(self, future: Future) -> None:
        running = self._executor.asking()
        if running is not None and not running.interrupt and self._goes_on(running):
            self.cancel(future)  # else the attempt ends, and the next one takes it over

    def _goes_on(self, running: Running) -> bool:
        """Whether its own coroutine has not ended: what that leaves behind is cancelled."""
        return running.cancel is not None

    def current(self) -> Current:
        running = self._executor.asking()
        if running is None:
            return Current(worker=self._worker, node=self._node)
        known = running.known
        return Current(
            known.name,
            call_name(known.name, running.index, submitted=known.names is None),
            running.attempt,
            self._worker,
            self._node,
            running.units,
            lambda done, total: self._progress(running, done, total),
        )

    def per_worker(self, make: Callable[[], Any]) -> Any:
        return self._executor.per_worker(make)

    # -- shared state -----------------------------------------------------------------

    def lend(self, outside: Outside, deadline: float | None) -> bool:
        running = self._executor.running
        if running is None or self._executor.forked or threading.get_ident() != self._thread:
            return outside.block(left_until(deadline))
        with _masked(running, self._thread):
            key = OUTSIDE_ALONE if outside.alone else OUTSIDE
            wait = (WAIT, running.call, running.attempt, (key,), False)
            came = self._line.converse(running, wait, outside.ready, deadline, outside.fileno())
            self._line.tell((RESUME, running.call, running.attempt))
            self._line.flush()
            return came

    def lend_awaiting(self, *, alone: bool = False) -> Callable[[], None]:
        running = self._executor.running
        if running is None or self._executor.forked or threading.get_ident() != self._thread:
            return lambda: None
        watch = self._watch_of(running)
        watch.await_outside(alone)
        return lambda: watch.outside_came(alone)

    def beneath(self) -> list[tuple[int, int]]:
        running = self._executor.asking()
        found = []
        while running is not None and running.below is not None:
            running = running.below
            found.append((running.call, running.attempt))
        return found

    # -- what comes back --------------------------------------------------------------

    def deliver(self, call: int | None, outcomes: dict[bytes, Any]) -> None:
        """Resolve futures of attempts on the stack; others' are not wanted any more."""
        for key, outcome in outcomes.items():
            running = self._executor.running
            while running is not None:
                mine = call is None or running.call == call
                if mine and running.futures and key in running.futures:
                    resolve(running.futures[key], outcome)
                    del running.futures[key]
                    break
                running = running.below

    # -- submitting -------------------------------------------------------------------

    def _here(self, what: str) -> Running:
        running = self._executor.asking()
        if running is None or self._executor.forked:
            raise RuntimeError(
                f"{what} works inside a call only, while it lasts, and not in a child it forked"
            )
        return running

    def _reference(self, task: Task) -> tuple[Reference, bytes | None]:
        """How a worker finds ``task``: by name, or by the digest of a pickle, and that."""
        if id(task) not in self._references:
            found: Any = sys.modules.get(task.module)
            for part in task.qualname.split("."):
                found = getattr(found, part, None)
            if found is task and task.module != "__main__":
                self._references[id(task)] = (task, (task.module, task.qualname), None)
            else:
                blob = _by_value(task)
                self._references[id(task)] = (task, _digest(blob), blob)
        return self._references[id(task)][1:]

    def _define(self, task: Task, reference: Reference, blob: bytes | None) -> None:
        if reference not in self._defined:
            # Noted after it: a signal handler of the task may submit in between.
            self._line.tell((DEFINE, reference, task.name, _facts(task, blob)))
            self._defined.add(reference)

    def _give_up(self, running: Running) -> None:
        """What it waited for did not come in time."""
        self._line.tell((RESUME, running.call, running.attempt))
        self._line.flush()

    # -- waiting ----------------------------------------------------------------------

    def _refuse_to_block(self) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                "a call is waited for in the thread that the task runs in: have this thread give "
                "its futures to that one, or use lane='thread'"
            )
        asyncio = sys.modules.get("asyncio")
        if asyncio is not None and asyncio._get_running_loop() is not None:
            raise RuntimeError("this would block the event loop: in an async task, await futures")

    def _pending(self, running: Running, futures: Sequence[Future]) -> list[Future]:
        pending = [future for future in dict.fromkeys(futures) if not future.done()]
        for future in pending:
            known = running.futures is not None and running.futures.get(future.key) is future
            if not (known or future.done()):  # it may be resolved just now, by another thread
                raise RuntimeError(f"{future!r} was submitted by another call, or attempt")
        return pending

    def _watch_of(self, running: Running) -> _Watch:
        import asyncio

        loop = asyncio.get_running_loop()
        for watch in self._watches:
            if watch.running is running:
                return watch
        watch = _Watch(running, loop, self._line, self._watches)
        self._watches.append(watch)
        return watch

    def _progress(self, running: Running, done: float, total: float | None) -> None:
        now = monotonic()
        finished = total is not None and done >= total
        if (
            running.done
            or self._executor.forked
            or (now - self._last_progress < PROGRESS_SECONDS and not finished)
        ):
            return
        self._last_progress = now
        with _masked(running, self._thread):
            self._line.tell((PROGRESS, running.call, running.attempt, done, total))
            self._line.flush()


class _Watch:
    """The futures that one attempt's coroutines await, all told in one WAIT at a time."""

    def __init__(self, running: Running, loop: Any, line: Line, watches: list[_Watch]) -> None:
        self.running = running
        self._loop = loop
        self._line = line
        self._watches = watches
        self._futures: list[Future] = []
        self._outside = 0  # coroutines that wait for something other than calls
        self._alone = 0  # of these, those that do so alone
        self._about_to_ask = False
        running.on_end = self.stop
        line.listen(loop, self._heard)

    def add(self, future: Future) -> None:
        self._futures.append(future)
        self._ask_soon()

    def await_outside(self, alone: bool) -> None:
        """A coroutine waits for something other than calls."""
        self._outside += 1
        self._alone += alone
        self._ask_soon()

    def outside_came(self, alone: bool) -> None:
        """It does not wait any more."""
        self._outside -= 1
        self._alone -= alone
        running = self.running
        if running.on_end is None:
            return  # the attempt's coroutine has ended
        with _masked(running, threading.get_ident()):
            self._line.tell((RESUME, running.call, running.attempt))
            self._line.flush()
        if self._futures or self._outside:
            self._ask_soon()
        else:
            self.stop()

    def stop(self) -> None:
        """Nothing is awaited any more, or the attempt's coroutine has ended."""
        if self.running.on_end is None:
            return
        self.running.on_end = None
        self._watches.remove(self)
        self._line.stop_listening(self._loop)

    def _ask_soon(self) -> None:
        if not self._about_to_ask:
            self._about_to_ask = True
            self._loop.call_soon(self._ask)

    def _ask(self) -> None:
        self._about_to_ask = False
        running = self.running
        self._futures = [future for future in self._futures if not future.done()]
        if not (self._futures or self._outside) or running.on_end is None:
            return
        keys = tuple(dict.fromkeys(future.key for future in self._futures))
        if self._outside:
            keys = (*keys, OUTSIDE_ALONE if self._alone else OUTSIDE)
        with _masked(running, threading.get_ident()):
            self._line.tell((WAIT, running.call, running.attempt, keys, True))
            self._line.flush()

    def _heard(self) -> None:
        before = len(self._futures)
        self._futures = [future for future in self._futures if not future.done()]
        if not (self._futures or self._outside):
            self.stop()
        elif len(self._futures) < before:
            self._ask_soon()  # the one WAIT is over, as soon as anything was delivered
        running = self.running
        if running.interrupt is not None and not running.raised and running.cancel is not None:
            running.raised = True  # it came while a nested call was on top
            running.cancel()


class _Masked(AbstractContextManager[None]):
    """Our own code, in which the task must not be interrupted."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def __enter__(self) -> None:
        self._was_user, self._running.user = self._running.user, False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._was_user:
            self._running.enter_user()


class _Unmasked(AbstractContextManager[None]):
    """In a thread that is not the task's own, where signals do not arrive."""

    def __exit__(self, *_: object) -> None:
        return None


def _masked(running: Running, thread: int) -> AbstractContextManager[None]:
    return _Masked(running) if threading.get_ident() == thread else _Unmasked()


def _all_done(futures: list[Future]) -> Callable[[], bool]:
    def all_done() -> bool:
        while futures and futures[-1].done():
            futures.pop()
        return not futures

    return all_done


def _any_done(futures: list[Future]) -> Callable[[], bool]:
    return lambda: any(future.done() for future in futures)


def resolve(future: Future, outcome: Any) -> None:
    if isinstance(outcome, Failure):
        future.fail(decode_failure(outcome))
        return
    try:
        value = decode(outcome)
    except Exception as error:
        failure = CallError(f"the value of {future.task} cannot be unpickled here: {error!r}")
        failure.__cause__ = error
        future.fail(failure)
        return
    future.resolve(value)


def _key(running: Running, reference: Reference, blob: Portable) -> bytes:
    """Identifies a call among its parent's: what it is, and its ordinal among equals."""
    named = reference if isinstance(reference, bytes) else "\0".join(reference).encode()
    same = blobs.hashed(named + b"\0", blob, 12)
    if running.ordinals is None:
        running.ordinals = {}
    digest = same.digest()
    ordinal = running.ordinals.get(digest, 0)
    running.ordinals[digest] = ordinal + 1
    same.update(b"\0%d" % ordinal)
    key: bytes = same.digest()
    return key


def _by_value(task: Task) -> bytes:
    from taskrun.byvalue import dumps  # slow to import, and needed for tasks without a name only

    return dumps(task)


def _digest(blob: bytes) -> bytes:
    from hashlib import blake2b

    return blake2b(blob, digest_size=16).digest()


def _facts(task: Task, blob: bytes | None) -> dict[str, Any]:
    from taskrun.errors import CallTimeout

    options = task.options
    return {
        "blob": blob,
        "flags": SAY_BEGAN if options.says_began else 0,
        "retries": options.retries,
        "retry_timeouts": any(issubclass(CallTimeout, kind) for kind in options.retry_on),
        "backoff": options.backoff,
        "timeout": options.timeout,
        "priority": options.priority,
        "resources": options.resources,
        "always": options.always,
        "lane": options.lane,
        "limits": tuple([limit.bound for limit in options.limits]),
        "cancellable": options.cancellable,
    }


def state_home(
    settings: Settings, executor: Executor, *, shared: bool = False
) -> Callable[[], Any] | None:
    """What gives the client of shared state in this worker; see ``context.state_home``.

    ``shared``: many calls use it at a time.
    """
    if settings.state is None:
        return None
    address, authkey = settings.state
    base = 0 if settings.pool is None else settings.pool.base
    made: list[Any] = []

    def attempt() -> tuple[int, int] | None:
        found = executor.attempt()
        return None if found is None else (base + found[0], found[1])

    def client() -> Any:
        if not made:
            made.append(_client_class(shared)(address, authkey, attempt))
        return made[0]

    return client


def _client_class(shared: bool) -> Any:
    if shared:  # only those who use state pay for the import
        from taskrun.state.shared import SharedClient

        return SharedClient
    from taskrun.state.remote import RemoteClient

    return RemoteClient


def call_name(task: str, index: Any, *, submitted: bool) -> str:
    if index is None:
        return task
    if submitted:
        return f"{task}#{index}"
    places = ",".join(map(str, index)) if isinstance(index, tuple) else index
    return f"{task}[{places}]"
