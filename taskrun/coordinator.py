"""The coordinator: the process that owns a run.

The main flow is :func:`execute`: the plan becomes a scheduler core, an engine and those
who watch; then one loop turns events into commands until nothing is left to do.

    engine, signals, timers --events--> core --commands--> engine, observers

Only the loop's thread touches the core.  Whatever ends the loop, the engine is closed:
workers and all that they started end before ``execute`` returns.
"""

from __future__ import annotations

import itertools
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from taskrun import messages as m
from taskrun import sessions
from taskrun.alarm import Alarm
from taskrun.core.scheduler import Scheduler
from taskrun.core.workforce import worker_name
from taskrun.engines.base import Engine
from taskrun.errors import RunError
from taskrun.garbage import collecting_rarely
from taskrun.lanes import check_lanes
from taskrun.limiting import LimitKeys
from taskrun.loading import Loaded
from taskrun.model import Plan, Task
from taskrun.observers import Observer, Observers
from taskrun.reactor import Reactor
from taskrun.reporting.terminal import Target
from taskrun.roles import STEER
from taskrun.settings import Settings, memory_here
from taskrun.signals import Here, Signals
from taskrun.state.service import Service

if TYPE_CHECKING:
    from taskrun.engines.nodes import Nodes  # only where others may join
    from taskrun.feed import Argument
    from taskrun.network.bundles import Bundle

CLOSE_SECONDS = 5.0  # how long workers may take to finish what per_worker() made
STATUS_OF_SIGNAL = {signal.SIGINT: 130, signal.SIGTERM: 143}


def execute(
    plan: Plan, settings: Settings, *, more: Sequence[Observer] = (), stdout: Target = None
) -> int:
    """Run a plan to its end; gives the exit status.

    ``stdout``: where it goes, unless to this process's own.
    Raises UsageError where the job log cannot be written or a task's lane is not to be had,
    RunError (after all workers have ended) where the run could not go on.
    """
    from taskrun.reporting.display import Display  # its parts come only with a run

    reactor = Reactor()
    reactor.call_soon(lambda: _adopt(settings))
    display = Display(settings, reactor, stdout)
    return Run(plan, settings, [*display.observers, *more], reactor).execute()


def _adopt(settings: Settings) -> None:
    """Where the template is killed, be the one who ends what it has left.  Called in the first
    turn, while the template starts: it takes a moment.  Not for a Pool's or run()'s process,
    which is its user's."""
    if not settings.inline and settings.engine is None:
        sessions.adopt_orphans()


class Run:
    """One run: core, engine and observers around one loop."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        observers: Sequence[Observer],
        reactor: Reactor,
        *,
        wanted: Collection[str] = (),
        open_feed: bool = False,
    ) -> None:
        if settings.lanes:
            check_lanes(plan.tasks)
        self.plan = plan
        self.settings = settings
        self.status: int | None = None
        self.began = 0.0  # wall clock
        self.on_event: Callable[[], None] | None = None
        self.reactor = reactor
        self.observer = Observers(observers)
        self.recipe_ids = itertools.count(1)
        self.core = Scheduler(
            plan,
            slots=settings.jobs,
            policy=settings.policy,
            resources={"memory": memory_here(), **settings.resources},
            recipe_ids=self.recipe_ids,
            wanted=wanted,
            spare_factor=0 if settings.inline else 4,  # 0: one worker, whatever calls need
            ahead=not settings.inline,
            open_feed=open_feed,
            engine=settings.engine is not None,
            limit_keys=LimitKeys(plan.tasks),
            lanes=settings.lanes,
            growing=settings.listen is not None and not settings.inline,
            borrows=settings.borrows,
        )
        self._state = Service(
            reactor,
            is_running=self.core.is_running,
            is_idle=lambda: self._alarm.at is None,
            line=self._line,
            title_of=self.core.title_of,
            notice=self.observer.notice,
            key_file=settings.authkey_file,
            listen=settings.listen,
            certificates=(settings.tls_cert, settings.tls_key, settings.tls_ca),
            insecure_plain=settings.insecure_plain,
            file=settings.state,
        )
        self._state.roles[STEER] = self._steered_by
        self._steering: Any = None
        self._here: Here | None = None
        self.engine = self._make_engine()
        self._names: dict[int | None, str] = {None: ""}  # of workers
        self._alarm = Alarm(self.reactor, self.core, self.post)
        self.signalled = False  # whether a Ctrl-C or a SIGTERM came
        self._stopped_by = ""
        self._stopped_with: int | None = None  # the exit status of one who was told to stop
        self._taken_back = False
        self._failure: str | None = None
        self._performers = self._make_performers()

    def _make_engine(self) -> Engine:
        if self.settings.inline:
            from taskrun.engines.inline import InlineEngine

            self._here = engine = InlineEngine(
                recipe_ids=self.recipe_ids,
                constants=self.plan.constants,
                state=self._state.client,
                on_ctrl_c=lambda: self._signal(signal.SIGINT),
            )
            return engine
        if self.settings.engine is not None:
            return self._make_foreign_engine(self.settings.engine)
        from taskrun.engines.pool import PoolEngine

        return PoolEngine(
            module=self.plan.module,
            file=self.plan.file,
            start_method=self.settings.start_method,
            grace=self.settings.grace,
            recipe_ids=self.recipe_ids,
            constants=self.plan.constants,
            state=lambda: (self._state.address, self._state.authkey),
            slots=self.settings.jobs,
            nodes=self._make_nodes(),
        )

    def _make_foreign_engine(self, text: str) -> Engine:
        from taskrun.engines.choosing import make_engine

        return make_engine(
            text,
            jobs=self.settings.jobs,
            module=self.plan.module,
            file=self.plan.file,
            grace=self.settings.grace,
            recipe_ids=self.recipe_ids,
            constants=self.plan.constants,
            state=self._state.for_guests,
            bundle=self._make_bundle,
        )

    def _make_bundle(self) -> Bundle | None:
        """The files that workers on other machines need."""
        from taskrun.network.bundles import make_bundle

        file = self.plan.file
        return None if file is None else make_bundle(file, self.settings.bundle)

    def _make_nodes(self) -> Nodes | None:
        """Those who may join, where others can reach this run."""
        if self.settings.listen is None:
            return None
        from taskrun.engines.nodes import ROLE, Nodes

        nodes = Nodes(
            lease=self.settings.lease,
            bundle=self._make_bundle,
            state=lambda: (self._state.address, self._state.authkey),
        )
        self._state.roles[ROLE] = nodes.accept
        return nodes

    @property
    def reason(self) -> str:
        """Why it ended before its time, if it did."""
        return self._failure or self.core.stopping or self._stopped_by

    # -- the main flow ----------------------------------------------------------------

    def execute(self) -> int:
        """Run to the end; gives the exit status."""
        self.began = time.time()
        try:
            signals = Signals(
                self.reactor, self._signal, self._here, lambda: self.observer.signalled()
            )
            with signals, collecting_rarely:
                self._run()
                signals.settle()
                assert self.status is not None
                self.observer.run_ended(self.status, self.reason)
        finally:
            self.reactor.close()
        if self._failure is not None:
            raise RunError(self._failure)
        return self.status

    def _run(self) -> None:
        try:
            self._state.start()
            self._run_engine()
        finally:
            self._close_state()

    def _close_state(self) -> None:
        try:
            self._state.close()
        except RunError as error:  # what was to be kept is not
            if self.status == 0:
                self._failure, self.status = str(error), error.exit_status
            else:
                self.observer.notice(str(error))

    def _run_engine(self) -> None:
        try:
            self.engine.start(self.reactor, self.post, self.observer)
            self.observer.run_started(self)
            for lacking in self.core.unmet() if self.core.growing else ():
                self.observer.notice(f"{lacking}: waiting for a node that has it")
            self._perform(self.core.begin(time.monotonic()))
            self.reactor.run_until(lambda: self.status is not None)
        except RunError as error:
            self._failure = str(error)
            self.status = error.exit_status
        finally:
            self.engine.close(time.monotonic() + CLOSE_SECONDS)

    def post(self, event: m.Event) -> None:
        """Take an event, on the loop's thread."""
        self._perform(self.core.handle(event, time.monotonic()))
        if type(event) is m.Began:
            self._announce(event)
        elif type(event) is m.WorkerReady:
            self._names[event.worker] = worker_name(event.worker, event.node)
        if self.on_event is not None:
            self.on_event()
        if self.core.stopping and self.settings.engine is not None and not self._taken_back:
            # What an engine was given in advance does not begin any more.
            self._taken_back = True
            self.engine.perform(m.Reclaim(1, sys.maxsize))

    def _announce(self, began: m.Began) -> None:
        call = self.core.calls[began.call]
        if call.attempt == began.attempt and call.worker == began.worker:
            self.observer.call_began(call, began.attempt, self._name(began.worker), began.wall)

    def _name(self, worker: int | None) -> str:
        """What people see of a worker."""
        return self._names.get(worker) or worker_name(worker)

    def _steered_by(self, peer: Any) -> None:
        """Somebody wants to look at the run, or to change it."""
        if self._steering is None:
            from taskrun.steering import Steering  # few runs are asked

            self._steering = Steering(self)
        self._steering.admit(peer)

    def _line(self, name: str) -> Any:
        """Which channel of a call is meant."""
        from taskrun.state.channels import line_of

        return line_of(name, self.core.find)

    def tell(self, call: int, message: Any) -> None:
        """Send a message to a call.  Raises ChannelClosed where that has ended."""
        self._state.tell(call, message)

    def stop(self, reason: str) -> None:
        """Stop gracefully: start nothing more, interrupt what runs."""
        self.observer.stopping(reason)
        self.post(m.Stop(reason))

    def _perform(self, commands: list[m.Command]) -> None:
        performers = self._performers
        for command in commands:
            performers[type(command)](command)
        self._alarm.follow()

    # -- what commands mean here ------------------------------------------------------

    def _make_performers(self) -> dict[type, Callable[[Any], None]]:
        engine, observer = self.engine.perform, self.observer
        names, name = self._names, self._name
        state = self._state

        def calls_added(command: m.CallsAdded) -> None:
            observer.calls_added(command.calls)
            observer.calls_to_come(command.to_come)

        def attempt_ended(command: m.AttemptEnded) -> None:
            if state.is_used:
                state.attempt_ended(command.call.id, command.attempt)
            observer.attempt_ended(command, names.get(command.worker) or name(command.worker))

        def call_ended(command: m.CallEnded) -> None:
            observer.call_ended(command.call)
            if state.is_used:
                state.call_ended(command.call.id)

        def succeeded(command: m.Succeeded) -> None:
            if state.is_used:
                for call in command.calls:
                    state.attempt_ended(call.id, call.attempt)
            observer.succeeded(command, names.get(command.worker) or name(command.worker))
            if state.is_used:
                for call in command.calls:
                    state.call_ended(call.id)

        return {
            m.StartWorkers: engine,
            m.StopWorker: engine,
            m.Assign: engine,
            m.Reclaim: engine,
            m.Interrupt: engine,
            m.Deliver: engine,
            m.CallsAdded: calls_added,
            m.AttemptEnded: attempt_ended,
            m.CallEnded: call_ended,
            m.Succeeded: succeeded,
            m.RunEnded: self._run_ended,
        }

    def _run_ended(self, command: m.RunEnded) -> None:
        self.status = command.status if self._stopped_with is None else self._stopped_with
        if command.status == 3:
            self._failure = command.reason

    # -- being told to stop -----------------------------------------------------------

    def cancel(self) -> None:
        """Do as at Ctrl-C: somebody has said ``taskrun cancel``."""
        self._stop_by("taskrun cancel", STATUS_OF_SIGNAL[signal.SIGINT])

    def _signal(self, number: int) -> None:
        self.observer.signalled()  # a Ctrl-C that a call has taken first comes here alone
        self.signalled = True
        by = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        self._stop_by(by, STATUS_OF_SIGNAL[signal.Signals(number)])

    def _stop_by(self, by: str, status: int) -> None:
        """The first time stops the run in order; the second time, or one that comes when there
        is nothing left but to let the workers end, ends it at once."""
        first, self._stopped_with = self._stopped_with is None, status
        if first:
            self._stopped_by = by
        if first and self.status is None:
            self.stop(by)
            return
        self.engine.kill()
        self.status = status


# -- one call per line ----------------------------------------------------------------


def execute_map(
    loaded: Loaded,
    task: Task,
    arguments: Iterator[Argument],
    settings: Settings,
    keep_order: bool,
    *,
    stdout: Target = None,
) -> int:
    """Call ``task`` once per argument and print each result; gives the exit status.

    ``stdout``: as in :func:`execute`.  ``arguments`` are read as far ahead as the workers need,
    in a thread of its own.
    """
    from taskrun.feed import Feed, Results
    from taskrun.reporting.display import Display

    reactor = Reactor()
    reactor.call_soon(lambda: _adopt(settings))
    display = Display(settings, reactor, stdout, results=True)
    results = Results(display.show_result, keep_order)
    plan = Plan((), frozenset([task.name]), file=loaded.file, module=loaded.module)
    if settings.lanes:
        check_lanes([task])
    run = Run(plan, settings, [*display.observers, results], reactor, open_feed=True)
    feed = Feed(run, task, arguments)
    results.taken = feed.taken
    feed.start()
    return run.execute()
