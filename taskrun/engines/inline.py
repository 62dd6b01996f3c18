"""Every call in this process, one at a time: for ``breakpoint()``, and to see it plainly.

There is one worker, which is this thread.  Output is not captured and stdin stays what it
is.  A call that waits for others runs the loop meanwhile, and executes what the core sends
it to execute, on its own stack.  Nothing else runs beside a call: its timeout, which a person
in a debugger would exceed anyway, can end it only where it waits.  Ctrl-C is raised in what
runs, as in any program, so that a debugger may take it; if it ends the call, it stops the run.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from threading import get_ident
from time import time
from typing import Any, Final

from taskrun import context
from taskrun import messages as m
from taskrun.engines.records import Records
from taskrun.model import Recipe
from taskrun.observers import Observer
from taskrun.reactor import Reactor, Timer
from taskrun.workers.execute import Executor, Running
from taskrun.workers.folder import Folder
from taskrun.workers.recipes import Home
from taskrun.workers.scope import WorkerContext
from taskrun.workers.settings import Preloaded, environment_additions
from taskrun.workers.threads import follow_calls, leave_calls

WORKER: Final = 1

Attempt = Callable[[], tuple[int, int] | None]
"""Gives the (call, attempt) that is being executed."""


class InlineEngine:
    """An ``Engine`` with one worker, in the thread that runs the reactor."""

    id = WORKER
    lane = "process"
    slots = 1

    def __init__(
        self,
        *,
        recipe_ids: Iterator[int] | None = None,
        constants: Mapping[str, dict[str, Any]] | None = None,
        state: Callable[[Attempt], Any] | None = None,
        on_ctrl_c: Callable[[], object] | None = None,
    ) -> None:
        """``state`` gives a client of the run's shared state.  ``on_ctrl_c`` is called where
        a KeyboardInterrupt has ended a call."""
        self.name = f"w{WORKER}"
        self.node = ""
        self.ready = False
        self.assigned: dict[int, Any] = {}
        self.escalations: dict[int, Timer] = {}
        self._recipe_ids = recipe_ids or count(1)
        self._constants = constants or {}
        self._make_client = state
        self._on_ctrl_c = on_ctrl_c
        self._client: Any = None
        self._known: set[int] = set()
        self._queue: deque[tuple[Any, ...]] = deque()
        self._nested: deque[tuple[Any, ...]] = deque()
        self._said: deque[tuple[Any, ...]] = deque()  # threads of a call say something, too
        self.bunch: tuple[int, int, float] | None = None
        self._ears: dict[Any, _Ear] = {}
        self._closed = self._about_to_work = False
        self._performers: dict[type, Callable[[Any], None]] = {
            m.StartWorkers: self._start_worker,
            m.StopWorker: lambda command: None,
            m.Assign: self._assign,
            m.Reclaim: self._reclaim,
            m.Interrupt: self._interrupt,
            m.Deliver: lambda command: self._context.deliver(command.call, command.outcomes),
        }

    # -- Engine -----------------------------------------------------------------------

    def start(self, reactor: Reactor, post: Callable[[m.Event], None], observer: Observer) -> None:
        """See ``engines.base``."""
        self._reactor = reactor
        self._thread = get_ident()
        self._notice = observer.notice
        self._records = Records(post, observer, self._recipe_ids, self._constants)
        self._folder = Folder()
        self._executor = Executor(
            self,
            Home(None, Preloaded(None)),
            _Nobody(),
            _Nobody(),
            thread_variables=frozenset(environment_additions(dict(os.environ))),
            on_ctrl_c=self._on_ctrl_c,
            folder=self._folder,
        )
        self._context = WorkerContext(
            self._executor,
            self,
            worker=self.name,
            node="local",
            set_by_user={task: frozenset(values) for task, values in self._constants.items()},
        )
        follow_calls(self._executor)

    def perform(self, command: m.Command) -> None:
        """See ``engines.base``."""
        self._performers[type(command)](command)

    def kill(self) -> None:
        """See ``engines.base``; here it is the caller itself that runs."""
        self._queue.clear()

    def close(self, deadline: float) -> None:
        """See ``engines.base``."""
        if self._closed:
            return
        self._closed = True
        self._queue.clear()
        leave_calls(self._executor)
        self._executor.close()
        self._folder.close()

    # -- commands ---------------------------------------------------------------------

    def _start_worker(self, command: m.StartWorkers) -> None:
        if not self.ready:
            self.ready = True
            self._reactor.post(self._say_ready)

    def _say_ready(self) -> None:
        self.tell((m.READY, os.getpid()))
        self.flush()

    def _assign(self, command: m.Assign) -> None:
        for call in command.calls:
            recipe = call.recipe
            if recipe.id not in self._known:
                self._known.add(recipe.id)
                self._warn(recipe)
                self._executor.learn(
                    (m.TASK, recipe.id, recipe.name, recipe.reference, recipe.blob,
                     recipe.names, recipe.constants, recipe.flags)
                )  # fmt: skip
            self.assigned[call.id] = call
            record = (m.CALL, call.id, call.attempt, recipe.id, call.index, call.arguments(),
                      call.units)  # fmt: skip
            (self._nested if command.nested else self._queue).append(record)
        self._work_soon()

    def _warn(self, recipe: Recipe) -> None:
        if recipe.timeout is not None:
            self._notice(
                f"--inline ends no call of {recipe.name} at its timeout of {recipe.timeout:g} s, "
                "unless it waits for other calls"
            )

    def _reclaim(self, command: m.Reclaim) -> None:
        self._reactor.post(lambda: self._give_back(command.count))

    def _interrupt(self, command: m.Interrupt) -> None:
        for queue in (self._queue, self._nested):
            for record in queue:
                if record[1:3] == (command.call, command.attempt):
                    queue.remove(record)
                    self._executor.refuse(record, command.reason)
                    self._reactor.post(self.flush)
                    return
        self._executor.interrupt(command.call, command.attempt, command.reason)

    @property
    def takes_ctrl_c(self) -> bool:
        """See ``signals.Here``."""
        running = self._executor.running
        return running is not None and running.user and running.cancel is None

    def interrupt(self) -> None:
        """See ``signals.Here``."""
        running = self._executor.running
        while running is not None:  # those that wait for it, too
            running.interrupt = running.interrupt or "the run was stopped"
            running = running.below
        self._executor.on_interrupt(signal.SIGTERM, None)

    # -- working ----------------------------------------------------------------------

    def _work_soon(self) -> None:
        if not self._about_to_work:
            self._about_to_work = True
            self._reactor.post(self._work)

    def _work(self) -> None:
        """Execute one call; what waits for others takes nested calls by itself."""
        self._about_to_work = False
        if self._closed or self._executor.running is not None or not self._queue:
            return
        token = context.activate(self._context)
        try:
            with context.state_at(self._state if self._make_client else None):
                self._executor.execute(self._queue.popleft())
        finally:
            context.deactivate(token)
        if self._nested:  # the wait was over when they came
            self.tell((m.GAVE_BACK, [record[1:3] for record in self._nested]))
            self._nested.clear()
        self._work_soon()
        self.flush()

    def _state(self) -> Any:
        if self._client is None and self._make_client is not None:
            self._client = self._make_client(self._executor.attempt)
        return self._client

    def _give_back(self, count: int) -> None:
        calls = [self._queue.pop()[1:3] for _ in range(min(count, len(self._queue)))]
        self.tell((m.GAVE_BACK, calls))
        self.flush()

    def read_output_of(self, call: int, attempt: int) -> None:
        """Nothing is captured here."""

    # -- the executor's way to the core -----------------------------------------------

    def tell(self, record: tuple[Any, ...]) -> None:
        """See ``execute.Port``."""
        self._said.append(record)

    def tell_item(self, call: int, attempt: int, value: Any, seconds: float, now: float) -> None:
        """See ``outbox.Port``."""
        self.tell((m.ITEM, call, attempt, value, time() - seconds, seconds))

    def give_all_back(self) -> None:
        """See ``outbox.Port``.  Nothing is given in advance."""

    def flush(self) -> None:
        """See ``execute.Port``.  What other threads say waits for this one, the core's."""
        if get_ident() != self._thread:
            return
        said = [self._said.popleft() for _ in range(len(self._said))]
        if said and not self._closed:
            self._records.take(self, said)

    def flush_soon(self) -> None:
        """See ``scope.Line``.  Nobody could do anything before the call waits or ends."""

    def converse(
        self,
        running: Running,
        wait: tuple[Any, ...],
        satisfied: Callable[[], bool],
        deadline: float | None,
        outside: int | None = None,
    ) -> bool:
        """See ``scope.Line``."""
        if self._queue:
            self._give_back(len(self._queue))
        self.tell(wait)
        self.flush()

        def is_over() -> bool:
            return satisfied() or bool(self._nested) or running.interrupt is not None

        while not satisfied():
            running.enter_user()  # here may a waiting attempt be interrupted
            running.user = False
            if self._nested:
                self._executor.execute_nested(self._nested.popleft())
                self.flush()
            elif not self._reactor.run_until(is_over, deadline):
                return False
        return True

    def listen(self, loop: Any, heard: Callable[[], object]) -> None:
        """See ``scope.Line``."""
        if self._queue:
            self._give_back(len(self._queue))
        self._ears[loop] = _Ear(loop, self._reactor, self._execute_nested, heard)

    def stop_listening(self, loop: Any) -> None:
        """See ``scope.Line``."""
        self._ears.pop(loop).stop()

    def _execute_nested(self) -> None:
        while self._nested:
            self._executor.execute_nested(self._nested.popleft())
            self.flush()


class _Ear:
    """Turns the reactor from within the event loop that a task runs in."""

    def __init__(
        self,
        loop: Any,
        reactor: Reactor,
        execute: Callable[[], None],
        heard: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._reactor = reactor
        self._execute = execute
        self._heard = heard
        self._timer: Any = None
        self._stopped = False
        loop.add_reader(reactor.fileno(), self._turn)
        self._turn_in_time()

    def stop(self) -> None:
        self._stopped = True
        self._loop.remove_reader(self._reactor.fileno())
        if self._timer is not None:
            self._timer.cancel()

    def _turn(self) -> None:
        self._reactor.run_once(0)
        self._execute()
        self._heard()
        if not self._stopped:
            self._turn_in_time()

    def _turn_in_time(self) -> None:
        """The reactor's timers are due although none of its descriptors is ready."""
        if self._timer is not None:
            self._timer.cancel()
        patience = self._reactor.patience()
        self._timer = None if patience is None else self._loop.call_later(patience, self._turn)


class _Nobody:
    """No ledger and no output Pipes: what is executed here does not outlive its caller."""

    def begin(self, call: int, attempt: int, resumed: int = 0) -> None:
        return None

    def ended(self, call: int, attempt: int, *, ended: bool = True) -> bool:
        return False
