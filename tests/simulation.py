"""A scheduler among fake workers, in fake time: seeded, deterministic, never asleep.

What tasks do is data: a script of steps that ends in an outcome.  Workers obey commands
as real ones do: a queue, a stack of calls where waiting ones run others nested, outcomes
that are sent in batches, and a ledger, so that what had ended survives the worker's
death.  A worker's reports arrive in order, late by ``latency``; its commands travel by two
channels, as on two Pipes.  The books are audited after every event.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from invariants import Auditor
from scripts import (
    USUAL,
    Again,
    Behaviour,
    Cancel,
    Dies,
    Error,
    Held,
    Run,
    Script,
    Skipped,
    Step,
    Submit,
    Value,
    WaitFor,
    Yield,
)

from taskrun import messages as m
from taskrun.calls import Call
from taskrun.core.explain import explain
from taskrun.core.scheduler import Scheduler
from taskrun.messages import SAY_BEGAN
from taskrun.model import Failure, Plan, Recipe, Task
from taskrun.planning import in_order
from taskrun.recipes import make_recipe

GRACE = 1.0  # seconds from an interrupt that is not obeyed to SIGKILL
MOST_EVENTS = 200_000  # more than this is a run that does not end


def one_by_one(commands: Iterable[m.Command]) -> Iterator[m.Command]:
    """The ends of calls, as they would be told of without ``Succeeded``."""
    for command in commands:
        if isinstance(command, m.Succeeded):
            for call in command.calls:
                yield command.attempt(call)
                yield m.CallEnded(call)
        else:
            yield command


def keys_of(names: Iterable[str]) -> tuple[bytes, ...]:
    """Keys tell the calls of one parent apart; another's may have the same."""
    return tuple(name.encode() for name in names)


# -- workers --------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Frame:
    """An attempt in a worker's stack."""

    call: Call
    attempt: int
    script: Iterator[Step]
    began: float
    waits: WaitFor | None = None
    got: dict[bytes, Any] = field(default_factory=dict)
    deaf: bool = False
    interrupted: bool = False
    yielded: int = 0

    @property
    def satisfied(self) -> bool:
        if self.waits is None or self.interrupted:
            return True
        arrived = [key in self.got for key in keys_of(self.waits.keys)]
        return any(arrived) if self.waits.any_of else all(arrived)


class FakeWorker:
    """Obeys commands as a real worker does; its only thread executes ``stack[-1]``."""

    def __init__(self, sim: Simulation, id: int) -> None:
        self.sim = sim
        self.id = id
        self.alive = True
        self.queue: deque[tuple[Call, int]] = deque()
        self.nested: deque[tuple[Call, int]] = deque()
        self.stack: list[Frame] = []
        self.ended: list[tuple[Any, ...]] = []  # reports not sent yet: the ledger
        self.revoked: set[tuple[int, int]] = set()  # interrupted before they came
        self.last_report = 0.0

    # -- what it is told --------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether the innermost attempt waits: only then are deliveries seen to."""
        return bool(self.stack) and self.stack[-1].waits is not None

    def assign(self, calls: list[tuple[Call, int]], nested: bool) -> None:
        (self.nested if nested else self.queue).extend(calls)
        if self.waiting and not nested:
            self.give_back(len(self.queue))
        self.go_on()

    def give_back(self, count: int) -> None:
        back = [self.queue.pop() for _ in range(min(count, len(self.queue)))]
        self.report(m.GaveBack(self.id, [(call.id, n) for call, n in reversed(back)]))

    def reclaim(self, count: int) -> None:
        self.flush()
        if self.stack:
            frame = self.stack[-1]
            self.report(m.Began(self.id, frame.call.id, frame.attempt, self.sim.now))
        self.give_back(count)

    def deliver(self, call: int | None, outcomes: dict[bytes, Any]) -> None:
        for frame in self.stack:
            if frame.call.id == call:
                frame.got.update(outcomes)
        self.go_on()

    def interrupt(self, id: int, attempt: int) -> None:
        for frame in self.stack:
            if (frame.call.id, frame.attempt) == (id, attempt):
                self.interrupt_frame(frame)
                return
        for call, queued in self.queue:
            if (call.id, queued) == (id, attempt):
                self.queue.remove((call, queued))
                self.ends(call, attempt, "error", (CANCELLED, False), None, self.sim.now)
                self.flush()
                return
        self.revoked.add((id, attempt))

    def interrupt_frame(self, frame: Frame) -> None:
        if frame.deaf or frame is not self.stack[-1]:
            frame.interrupted = not frame.deaf
            self.sim.after(GRACE, lambda: self.killed_over(frame))
        else:
            self.finish(frame, "error", (CANCELLED, False))

    def killed_over(self, frame: Frame) -> None:
        """The grace is over."""
        if frame in self.stack:
            self.sim.kill(self.id)

    # -- what it executes -------------------------------------------------------------

    def go_on(self) -> None:
        """Go on with what can go on."""
        frame = self.stack[-1] if self.stack else None
        if not self.alive or (frame is not None and frame.waits is None):
            return
        if frame is not None and frame.satisfied:
            self.resume(frame)
        elif frame is not None and self.nested:
            self.begin(*self.nested.popleft())
        elif frame is None and self.nested:  # the wait was over when it came
            call, attempt = self.nested.popleft()
            self.flush()
            self.report(m.GaveBack(self.id, [(call.id, attempt)]))
            self.go_on()
        elif frame is None and self.queue:
            self.begin(*self.queue.popleft())
        else:
            self.flush()

    def begin(self, call: Call, attempt: int) -> None:
        if (call.id, attempt) in self.revoked:
            self.ends(call, attempt, "error", (CANCELLED, False), None, self.sim.now)
            self.go_on()
            return
        self.sim.executed(call, attempt)
        frame = Frame(call, attempt, iter(self.sim.script(call)), self.sim.now)
        self.stack.append(frame)
        if call.recipe.flags & SAY_BEGAN or call.recipe.timeout is not None:
            self.report(m.Began(self.id, call.id, attempt, self.sim.now))
        self.advance(frame)

    def advance(self, frame: Frame) -> None:
        """Take the steps up to the next one that takes time."""
        for step in frame.script:
            if isinstance(step, Run):
                frame.deaf = step.deaf
                self.sim.after(step.seconds, lambda: self.computed(frame))
                return
            if isinstance(step, WaitFor):
                self.wait(frame, step)
                return
            if isinstance(step, Submit):
                key = step.key.encode()
                new = (key, self.sim.recipe(step.task), key, keys_of(step.needs))
                self.report(m.Submitted(frame.call.id, frame.attempt, [new]))
            elif isinstance(step, Yield):
                first, frame.yielded = frame.yielded, frame.yielded + len(step.items)
                items = list(step.items)
                self.report(m.Yielded(frame.call.id, frame.attempt, first, items))
            elif isinstance(step, Cancel):
                self.report(m.CancelChild(frame.call.id, frame.attempt, step.key.encode()))
            elif isinstance(step, Dies):
                self.sim.kill(self.id)
                return
            else:
                self.finish(frame, *self.outcome(frame.call, step))
                return
        self.finish(frame, *self.outcome(frame.call, Value()))

    def computed(self, frame: Frame) -> None:
        if self.alive and frame in self.stack:
            frame.deaf = False
            self.advance(frame)

    def wait(self, frame: Frame, step: WaitFor) -> None:
        frame.waits = step
        self.flush()
        keys = keys_of(step.keys)
        if not frame.satisfied:
            if self.queue:
                self.give_back(len(self.queue))
            self.report(m.Waiting(self.id, frame.call.id, frame.attempt, keys, step.any_of))
            if step.timeout is not None:
                self.sim.after(step.timeout, lambda: self.time_is_up(frame, step))
        self.go_on()

    def time_is_up(self, frame: Frame, step: WaitFor) -> None:
        # Beneath a nested call nobody can go on; it is late then.
        if self.alive and self.stack and self.stack[-1] is frame and frame.waits is step:
            self.report(m.Resumed(self.id, frame.call.id, frame.attempt))
            self.resume(frame)

    def resume(self, frame: Frame) -> None:
        step, frame.waits = frame.waits, None
        assert step is not None
        outcomes = [frame.got.get(key) for key in keys_of(step.keys)]
        failed = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        if frame.interrupted:
            self.finish(frame, "error", (CANCELLED, False))
        elif failed and not step.catch:
            # It is an exception of its own now, whatever became of the child.
            self.finish(frame, "error", (replace(failed[0], kind="error"), True))
        else:
            self.advance(frame)

    def outcome(self, call: Call, step: Step) -> tuple[str, Any, list[Any] | None]:
        match step:
            case Value(value, items):
                return "value", call.name if value is None else value, list(items)
            case Held(names, items):
                keys = keys_of(names)
                each = [(None, (key,)) for key in keys] if items else None
                return "held", (None if len(keys) == 1 else b"pickle", keys), each
            case Error(message, retryable, items):
                failure = Failure("error", "ValueError", message)
                return "error", (failure, retryable), list(items) or None
            case Again(after):
                return "retry", (after, Failure("error", "Retry", "not yet")), None
            case Skipped(reason):
                return "skip", reason, None
        raise TypeError(step)

    def finish(self, frame: Frame, kind: str, payload: Any, items: Any = None) -> None:
        assert self.stack.pop() is frame
        self.ends(frame.call, frame.attempt, kind, payload, items, frame.began)
        if self.stack or not self.queue or self.sim.random.random() < self.sim.flushes:
            self.flush()
        self.go_on()

    # -- what it reports --------------------------------------------------------------

    def ends(
        self, call: Call, attempt: int, kind: str, payload: Any, items: Any, began: float
    ) -> None:
        seconds = self.sim.now - began
        self.ended.append((call.id, attempt, kind, payload, items, began, seconds, False))

    def flush(self) -> None:
        if self.ended:
            reports = self.ended[:]
            self.ended.clear()
            self.report(m.Finished(self.id, reports))

    def report(self, event: m.Event) -> None:
        # In order, whatever the latency: it is one Pipe.
        self.last_report = max(self.last_report + 1e-9, self.sim.now + self.sim.late())
        self.sim.at(self.last_report, lambda: self.sim.post(event))


CANCELLED = Failure("cancelled", "CallCancelled", "was interrupted")


# -- the simulation -------------------------------------------------------------------


class Strand(FakeWorker):
    """One call among many in a worker."""

    def __init__(self, crowd: FakeCrowd) -> None:
        super().__init__(crowd.sim, crowd.id)
        self.ended = crowd.ended

    def flush(self) -> None:
        self.sim.workers[self.id].flush()

    def killed_over(self, frame: Frame) -> None:
        """It does not end: it is abandoned."""
        if frame in self.stack:
            self.finish(frame, "error", (CANCELLED, False))


class FakeCrowd(FakeWorker):
    """Begins every call when it comes; each has a thread, a coroutine or a greenlet."""

    def __init__(self, sim: Simulation, id: int) -> None:
        super().__init__(sim, id)
        self.strands: dict[int, Strand] = {}

    def assign(self, calls: list[tuple[Call, int]], nested: bool) -> None:
        assert not nested
        for call, attempt in calls:
            strand = self.strands[call.id] = Strand(self)
            strand.revoked = self.revoked
            strand.assign([(call, attempt)], False)

    def deliver(self, call: int | None, outcomes: dict[bytes, Any]) -> None:
        if call in self.strands:
            self.strands[call].deliver(call, outcomes)

    def interrupt(self, id: int, attempt: int) -> None:
        strand = self.strands.get(id)
        if strand is not None and any(frame.attempt == attempt for frame in strand.stack):
            strand.interrupt(id, attempt)
        else:
            self.revoked.add((id, attempt))

    def kill(self) -> None:
        for strand in self.strands.values():
            strand.alive = False


class Simulation:
    """``does`` says what the calls of a task do, by its name; see :data:`USUAL`.

    ``latency`` is the most seconds that a message takes; ``flushes`` how likely a worker
    sends what it has after each call of a batch; ``start`` how long a worker takes to
    start.  ``audit=False`` leaves out the checks after every event.  ``slice``: how many
    calls of a fan-out are made at a time.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        does: Mapping[str, Behaviour] | None = None,
        *,
        seed: int = 0,
        latency: float = 0.0,
        flushes: float = 1.0,
        start: float = 0.01,
        audit: bool = True,
        slots: int = 2,
        slice: int | None = None,
        **options: Any,
    ) -> None:
        self.random = random.Random(seed)
        self.does = does or {}
        self.latency = latency
        self.flushes = flushes
        self.start = start
        self.now = 0.0
        self.workers: dict[int, FakeWorker] = {}
        self.lane_of: dict[int, str] = {}
        self.history: list[tuple[float, Any]] = []
        self.arguments: dict[tuple[int, int], Any] = {}
        self.recipes = itertools.count()
        self._recipe_of: dict[int, Recipe] = {}
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._tickets = itertools.count()
        self._worker_ids = itertools.count(1)
        self._channels: dict[tuple[int, str], float] = {}
        plan = Plan(tuple(in_order(tasks)), frozenset())
        self.scheduler = Scheduler(plan, slots=slots, recipe_ids=self.recipes, seed=seed, **options)
        if slice is not None:
            self.scheduler.graph.slice = slice
        self.auditor = Auditor(self.scheduler, every_event=audit)

    # -- what tests ask ---------------------------------------------------------------

    def calls(self, name: str) -> list[Call]:
        """The calls of a task, in the order of their index."""
        calls = [call for call in self.scheduler.calls if call.recipe.name == name]
        return sorted(calls, key=lambda call: (str(type(call.index)), call.index or 0))

    def call(self, name: str) -> Call:
        """The call of this name: ``fetch[3]``."""
        return next(call for call in self.scheduler.calls if call.name == name)

    def states(self, name: str) -> list[str]:
        return [call.state for call in self.calls(name)]

    def got(self, name: str) -> Any:
        """The arguments that the last attempt of a call was sent."""
        call = self.call(name)
        return self.arguments[(call.id, call.attempt)]

    def explain(self, name: str) -> str:
        return explain(self.scheduler, self.call(name), self.now)

    def of(self, kind: type) -> list[Any]:
        """The events or commands of one kind, in order."""
        return [entry for _, entry in self.history if isinstance(entry, kind)]

    def began(self, name: str) -> list[float]:
        """When the attempts of a call were executed."""
        call = self.call(name)
        return [when for when, entry in self.history if entry == ("executes", call.id)]

    def ended(self, name: str) -> float:
        call = self.call(name)
        return next(
            when
            for when, entry in self.history
            if isinstance(entry, m.CallEnded) and entry.call is call
        )

    def outcomes(self, name: str) -> list[str]:
        """How the attempts of a call ended."""
        return [end.outcome for end in self.of(m.AttemptEnded) if end.call.name == name]

    def order(self) -> list[str]:
        """The calls in the order in which they were executed."""
        ids = [entry[1] for _, entry in self.history if isinstance(entry, tuple)
               and entry[0] == "executes"]  # fmt: skip
        return [self.scheduler.calls[id].name for id in ids]

    # -- what tests do ----------------------------------------------------------------

    def run(self, until: float | None = None) -> int:
        """Go on to the end, or to a time; gives the exit status.  Fails when nothing more
        can happen and the run is not over."""
        if not self.history:
            self.begin()
        for _ in range(MOST_EVENTS):
            if self.scheduler.over:
                break
            following = self.next_time()
            if until is not None and (following is None or following > until):
                self.now = until
                return self.scheduler.status
            self.step()
        self.auditor.at_the_end(self)
        return self.scheduler.status

    def begin(self) -> None:
        self.history.append((self.now, "begin"))
        self._perform(self.scheduler.begin(self.now))

    def next_time(self) -> float | None:
        times = [self._heap[0][0]] if self._heap else []
        deadline = self.scheduler.deadline()
        return min([*times, *([] if deadline is None else [deadline])], default=None)

    def step(self) -> None:
        """The next thing that happens."""
        deadline = self.scheduler.deadline()
        if deadline is not None and (not self._heap or deadline < self._heap[0][0]):
            self.now = max(self.now, deadline)
            self.post(m.Tick())
            return
        if not self._heap:
            raise AssertionError(f"the run hangs at {self.now:g}:\n{self.story()}")
        self.now, _, action = heapq.heappop(self._heap)
        action()

    def story(self) -> str:
        """What every open call waits for."""
        open_ = [call for call in self.scheduler.calls if call.id not in self.auditor.ended]
        return "\n".join(explain(self.scheduler, call, self.now) for call in open_)

    def at(self, when: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._heap, (max(when, self.now), next(self._tickets), action))

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        self.at(self.now + seconds, action)

    def post(self, event: m.Event) -> None:
        """An event reaches the scheduler."""
        self.history.append((self.now, event))
        self._perform(self.scheduler.handle(event, self.now))

    def kill(self, *ids: int) -> None:
        """Workers die, whatever they are doing."""
        for id in ids:
            if self.workers[id].alive:
                self._kill(self.workers[id])

    def _kill(self, worker: FakeWorker) -> None:
        """What had ended is in its ledger."""
        worker.alive = False
        if isinstance(worker, FakeCrowd):
            worker.kill()
        worker.flush()
        top = worker.stack[-1] if worker.stack else None
        executing = (top.call.id, top.attempt) if top is not None else None
        lane = self.lane_of[worker.id]
        worker.report(m.WorkerLost(worker.id, "killed by SIGKILL", executing, lane=lane))

    # -- what workers ask -------------------------------------------------------------

    def script(self, call: Call) -> Script:
        behaviour = self.does.get(call.recipe.name, USUAL)
        return behaviour(call) if callable(behaviour) else behaviour

    def recipe(self, task: Task) -> Recipe:
        if id(task) not in self._recipe_of:
            made = make_recipe(task, next(self.recipes), names=None)
            self._recipe_of[id(task)] = made
        return self._recipe_of[id(task)]

    def executed(self, call: Call, attempt: int) -> None:
        self.history.append((self.now, ("executes", call.id)))
        self.auditor.executed(call, attempt)

    def late(self) -> float:
        return self.random.uniform(0.0, self.latency) if self.latency else 0.0

    # -- obeying ----------------------------------------------------------------------

    def _perform(self, commands: list[m.Command]) -> None:
        commands = list(one_by_one(commands))
        for command in commands:
            self.history.append((self.now, command))
            if isinstance(command, m.Assign):
                for call in command.calls:
                    self.arguments[(call.id, call.attempt)] = call.arguments()
            self._obey(command)
        self.auditor.after(commands)

    def _obey(self, command: m.Command) -> None:
        match command:
            case m.StartWorkers(count, lane, node):
                for _ in range(count):
                    self.after(self.start, partial(self.new_worker, lane, node=node))
            case m.Assign(id, calls, nested):
                sent = [(call, call.attempt) for call in calls]
                self._tell(id, "calls", lambda worker: worker.assign(sent, nested))
            case m.Reclaim(id, count):
                self._tell(id, "control", lambda worker: worker.reclaim(count))
            case m.Interrupt(id, call, attempt, _):
                self._tell(id, "control", lambda worker: worker.interrupt(call, attempt))
            case m.Deliver(id, outcomes, waiting):
                self._tell(id, "calls", lambda worker: worker.deliver(waiting, outcomes))

    def new_worker(
        self, lane: str = "process", slots: int = 1, node: str | None = None
    ) -> FakeWorker:
        """A worker is there; one of a lane of its own has room for three calls."""
        id = next(self._worker_ids)
        alone = lane == "process" and slots == 1
        worker = FakeWorker(self, id) if alone else FakeCrowd(self, id)
        self.workers[id] = worker
        self.lane_of[id] = lane
        slots = slots if alone or slots > 1 else 3
        worker.report(m.WorkerReady(id, lane=lane, slots=slots, node=node or ""))
        return worker

    def _tell(self, id: int, channel: str, action: Callable[[FakeWorker], None]) -> None:
        worker = self.workers[id]
        last = self._channels.get((id, channel), 0.0)
        when = self._channels[(id, channel)] = max(last + 1e-9, self.now + self.late())
        self.at(when, lambda: action(worker) if worker.alive else None)
