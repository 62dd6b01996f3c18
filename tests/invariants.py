"""What must hold after every event of a run, whatever happened."""

from __future__ import annotations

from typing import Any

from taskrun import messages as m
from taskrun.calls import CANCELLED, FAILED, FINAL, OK, READY, RUNNING, WAITING, Call
from taskrun.core.families import CallWire, WholeWire
from taskrun.core.scheduler import Scheduler
from taskrun.core.workforce import Worker

ROUNDING = 1e-6


class Auditor:
    """Follows a scheduler's commands, and goes through its books."""

    def __init__(self, scheduler: Scheduler, every_event: bool = True) -> None:
        self.scheduler = scheduler
        self.every_event = every_event
        self.ended: dict[int, str] = {}
        self.attempts: dict[int, list[tuple[int, str]]] = {}
        self.run_ended = 0
        self._executed: set[tuple[int, int]] = set()

    def after(self, commands: list[m.Command]) -> None:
        """An event was handled, and this came of it."""
        assert not (self.run_ended and commands), "the run is over, and still commands"
        resumed = False
        for command in commands:
            match command:
                case m.Assign():
                    self._assigned(command)
                case m.Deliver():
                    resumed = True
                case m.AttemptEnded():
                    self._attempt_ended(command)
                case m.CallEnded(call):
                    assert call.id not in self.ended, f"{call!r} ended twice"
                    assert call.state in FINAL
                    self.ended[call.id] = call.state
                case m.RunEnded():
                    self.run_ended += 1
                case _:
                    pass
        if any(isinstance(command, m.Assign) for command in commands) and not resumed:
            self._slots_are_kept(commands)
        if self.every_event:
            self._audit()

    def executed(self, call: Call, attempt: int) -> None:
        """A worker has begun an attempt."""
        assert (call.id, attempt) not in self._executed, f"{call!r} was executed twice"
        self._executed.add((call.id, attempt))

    def at_the_end(self, sim: Any) -> None:
        """The run is over."""
        assert self.run_ended == 1, f"RunEnded {self.run_ended} times:\n{sim.story()}"
        if self.scheduler.status == 3:
            return  # it gave up: calls stay open
        self._audit()
        if not self.scheduler.stopping:
            self._no_call_is_missing()
        for call in self.scheduler.calls:
            assert self.ended.get(call.id) == call.state, f"{call!r} is not at its end"
            if call.state == OK:
                ends = [how for _, how in self.attempts.get(call.id, []) if how == "value"]
                assert ends == ["value"], f"{call!r} was completed by {ends}"
            if not self.scheduler.status:
                _nobody_lacks_it(call)

    def _no_call_is_missing(self) -> None:
        """Families with the same axes have advanced together."""
        sizes: dict[frozenset[object], int] = {}
        for family in self.scheduler.graph.families.values():
            if any(call.placeholder for call in family.calls):
                continue
            axes = frozenset(axis.key for axis in family.axes)
            size = sizes.setdefault(axes, len(family.calls))
            assert len(family.calls) == size, f"{family.name} has {len(family.calls)} calls"

    # -- one command ------------------------------------------------------------------

    def _assigned(self, command: m.Assign) -> None:
        assert command.calls, "an empty assignment"
        for call in command.calls:
            _inputs_have_ended(call)

    def _slots_are_kept(self, commands: list[m.Command]) -> None:
        """Calls that waited may go on beyond the slots; nothing more is started then."""
        placement = self.scheduler.placement
        started = [
            command.calls[0]
            for command in commands
            if isinstance(command, m.Assign) and command.worker in placement.workers
        ]
        if any(call.recipe.resources.get("cpu", 1.0) for call in started):
            assert placement.busy_cpu <= placement.slots + ROUNDING, "slots are over-committed"
        for worker in self.scheduler._workers.values():
            assert worker.home is placement or worker.running <= worker.slots

    def _attempt_ended(self, end: m.AttemptEnded) -> None:
        before = self.attempts.setdefault(end.call.id, [])
        assert not before or before[-1][0] < end.attempt, f"attempt {end.attempt} ended twice"
        before.append((end.attempt, end.outcome))
        retries = end.call.recipe.retries
        if retries is not None:
            assert end.attempt <= retries + 1, f"{end.call!r}: more attempts than allowed"
        elif any(how != "retry" for _, how in before[:-1]):
            raise AssertionError(f"{end.call!r} was tried again without retries: {before}")

    # -- the books --------------------------------------------------------------------

    def _audit(self) -> None:
        for id, state in self.ended.items():
            assert self.scheduler.calls[id].state == state, "a final state was left"
        if self.scheduler.over:
            return
        self._audit_calls()
        self._audit_workers()
        self._audit_resources()
        self._audit_limits()

    def _audit_calls(self) -> None:
        scheduler = self.scheduler
        queued = []
        for home in scheduler._busy_homes:
            assert home.ready.count == len(list(home.ready))
            queued += home.ready
        parked = scheduler._limits.parked()
        assert {call.id for call in (*queued, *parked)} == self._in_state(READY)
        assert len(queued) + len(parked) == len(self._in_state(READY))
        assert scheduler._live == len(scheduler.calls) - len(self.ended)
        for call in scheduler.calls:
            assert call.needs >= 0 or call.placeholder
            assert call.state != WAITING or call.needs, f"{call!r} waits for nothing"
            assert call.users >= 0, f"{call!r} was let go too often"
            assert (call.units is not None) <= (call.state == RUNNING)

    def _audit_workers(self) -> None:
        placement = self.scheduler.placement
        assigned: set[int] = set()
        for worker in self.scheduler._workers.values():
            for call in worker.calls.values():
                assert call.state == RUNNING and call.worker == worker.id, repr(call)
                assert call.id not in assigned
                assigned.add(call.id)
            for wait in worker.waits.values():
                assert wait.call.id in worker.calls, f"worker {worker.id} waits for nobody"
                for child in wait.pending.values():
                    assert child.state in FINAL or wait in (child.watchers or ())
            if worker.home is placement:
                self._audit_one_by_one(worker)
        assert assigned == self._in_state(RUNNING)
        total = sum(worker.cpu for worker in placement.workers.values())
        assert abs(placement.busy_cpu - total) < ROUNDING

    def _audit_one_by_one(self, worker: Worker) -> None:
        assert worker.lent == (0 < len(worker.waits) == len(worker.calls))
        if worker.id in self.scheduler.placement._idle:
            assert not worker.calls and not worker.waits and not worker.cpu
        else:
            assert worker.calls, f"worker {worker.id} is neither idle nor at work"

    def _audit_resources(self) -> None:
        resources = self.scheduler.resources  # of this machine
        taken_from = self.scheduler._claims._taken_from
        running = [call for call in self.scheduler.calls
                   if call.units is not None and taken_from[call.id] is resources]  # fmt: skip
        for name, capacity in resources.capacity.items():
            if name == "cpu":
                continue
            needs = [(call, call.recipe.resources[name]) for call in running
                     if name in call.recipe.resources]  # fmt: skip
            held = sum(amount for _, amount in needs)
            assert held <= capacity + ROUNDING, f"{name} is over-committed"
            assert abs(resources.used(name) - held) < ROUNDING
            if name != "memory":
                _units_are_shared_out_once(name, needs)

    def _audit_limits(self) -> None:
        inside: dict[str, int] = {}
        for call in self.scheduler.calls:
            if call.units is not None:
                for bound in call.recipe.limits:
                    inside[bound.identity] = inside.get(bound.identity, 0) + 1
        for (identity, _), gate in self.scheduler._limits._gates.items():
            if gate.bound.per is None and not gate.bound.keyed:
                said = f"{identity}: {sorted(gate.inside)}"
                assert len(gate.inside) == inside.get(identity, 0) <= gate.bound.most, said

    def _in_state(self, state: str) -> set[int]:
        return {call.id for call in self.scheduler.calls if call.state == state}


def _nobody_lacks_it(call: Call) -> None:
    """A run that went well: where a failure, or a cancelled call, kept ``call`` from running,
    that is tolerated."""
    cause = call.cause
    if call.family is None or cause is None or cause.state not in (FAILED, CANCELLED):
        return
    while cause.parent is not None:
        cause = cause.parent
    assert cause.family is None or cause.family.tolerated, f"{call!r} lacks {call.cause!r}"


def _inputs_have_ended(call: Call) -> None:
    if call.family is None:
        for used in (call.inputs or {}).values():
            assert used.state == OK or (call.recipe.always and used.state in FINAL), repr(call)
        return
    for wire in call.family.wires:
        if isinstance(wire, CallWire):
            used = wire.call(call.index)
            if wire.has_come(used, call.index):
                continue
            assert used.state == OK or (call.recipe.always and used.state in FINAL), repr(call)
        elif isinstance(wire, WholeWire):
            assert wire.source.closed, f"{call!r} has begun before {wire.source.name} ended"
            tolerant = call.recipe.always or wire.errors != "fail"
            assert tolerant or wire.source.first_bad is None, repr(call)
    for other in call.family.after:
        assert other.closed and (call.recipe.always or other.first_bad is None), repr(call)


def _units_are_shared_out_once(name: str, needs: list[tuple[Call, float]]) -> None:
    shares: dict[int, float] = {}
    for call, amount in needs:
        assert call.units is not None
        assert len(call.units[name]) == (int(amount) if amount >= 1 else int(amount > 0))
        for unit in call.units[name]:
            shares[unit] = shares.get(unit, 0.0) + min(amount, 1.0)
    assert all(share <= 1.0 + ROUNDING for share in shares.values()), f"{name}: {shares}"
