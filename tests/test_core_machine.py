"""Random graphs, random tasks and random misfortune; the books are audited at every event."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scripts import (
    Again,
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
    a_task,
)
from simulation import Simulation

from taskrun import messages as m
from taskrun.api import each, result
from taskrun.calls import FINAL, Call
from taskrun.model import Limit, Task

POLICIES = ("stop", "keep-going", "keep-going", "keep-going", "fail-fast")
OFFERED = {"gpu": 2.0, "memory": 8.0}
SECONDS = (0.0, 0.0005, 0.003, 0.06, 1.0)
RESOURCES: tuple[dict[str, float], ...] = (
    {}, {}, {}, {}, {"cpu": 2}, {"cpu": 0.5}, {"cpu": 0}, {"gpu": 1}, {"gpu": 2}, {"gpu": 0.5},
    {"memory": 3}, {"memory": 5, "gpu": 1},
)  # fmt: skip


class World:
    """What a seed stands for: tasks, and what each attempt of each call does.

    ``trouble`` is how likely an attempt ends badly.
    """

    def __init__(self, seed: int, trouble: float = 0.15) -> None:
        self.seed = seed
        self.trouble = trouble
        chance = random.Random(seed)
        self._axes: dict[str, int] = {}
        self._limits = (
            Limit(2, identity="two"), Limit(1, key=abs, identity="one each"),
            Limit(2, per=0.02, identity="two per 20 ms"),
            Limit(1, per=0.5, key=abs, identity="one each per half second"),
        )  # fmt: skip
        self.dynamic = [a_task(f"d{n}", None, **self._options(chance)) for n in range(3)]
        self.static = self._tasks(chance)

    def simulation(self, make: type[Simulation] = Simulation, **options: Any) -> Any:
        chance = random.Random(self.seed + 1)
        does = {task.name: self.script for task in (*self.static, *self.dynamic)}
        how: dict[str, Any] = {
            "seed": self.seed,
            "slots": chance.choice((2, 2, 3, 5)),
            "policy": chance.choice(POLICIES),
            "latency": chance.choice((0.0, 0.001, 0.05)),
            "flushes": chance.choice((1.0, 0.3, 0.0)),
            "spare_factor": chance.choice((1, 2, 4)),
            "resources": OFFERED,
            "lanes": chance.choice(({}, {"async": 1}, {"async": 2, "thread": 1})),
            "limit_keys": lambda call: tuple(
                [bound.keyed and call.id % 3 for bound in call.recipe.limits]
            ),
            "slice": chance.choice((1, 2, 10, None)),
        }
        return make(self.static, does, **{**how, **options})

    # -- the graph --------------------------------------------------------------------

    def _tasks(self, chance: random.Random) -> list[Task]:
        # Some runs are wide: many calls that take no time are sent in batches.
        wide = list(range(chance.choice((3, 3, 60))))
        literals: list[list[int]] = [[], [1], [1, 2], wide]
        tasks: list[Task] = []
        for number in range(chance.randint(1, 6)):
            sources: dict[str, Any] = {}
            axes = 0
            for name in "xy"[: chance.choice((0, 1, 1, 2))]:
                source, brings = self._source(chance, tasks, literals)
                if axes + brings <= (3 if len(wide) < 10 else 1):
                    sources[name], axes = source, axes + brings
            after = tuple(chance.sample(tasks, min(len(tasks), chance.choice((0, 0, 0, 1)))))
            task = a_task(f"t{number}", sources, after=after, **self._options(chance))
            self._axes[task.name] = axes
            tasks.append(task)
        return tasks

    def _source(
        self, chance: random.Random, tasks: list[Task], literals: list[list[int]]
    ) -> tuple[Any, int]:
        """Where a parameter comes from, and by how many dimensions."""
        if not tasks or chance.random() < 0.3:
            return each(chance.choice(literals)), 1
        of = chance.choice(tasks)
        if chance.random() < 0.4:
            return result(of, errors=chance.choice(("fail", "skip", "keep"))), 0
        flat = self._axes[of.name] > 0 and chance.random() < 0.3
        return each(of, flat=flat), max(1, self._axes[of.name] + flat)

    def _options(self, chance: random.Random) -> dict[str, Any]:
        limits = chance.sample(self._limits, chance.choice((0, 0, 0, 1, 2)))
        return {**_options(chance), "limits": tuple(limits)}

    # -- what attempts do -------------------------------------------------------------

    def script(self, call: Call) -> Script:
        chance = random.Random(f"{self.seed} {call.id} {call.attempt}")
        steps: list[Step] = [Run(chance.choice(SECONDS), deaf=chance.random() < 0.1)]
        made: list[str] = []
        depth = _depth(call)
        while chance.random() < 0.1:
            steps.append(Yield(tuple(range(chance.randint(1, 3)))))
            steps.append(Run(chance.choice(SECONDS)))
        if chance.random() < 0.35 and depth < 5:
            made = self._submits(chance, steps)
        steps.append(self._outcome(chance, made))
        if isinstance(steps[-1], Error) and chance.random() < 0.3:
            steps[-1] = Error(items=range(chance.randint(1, 3)))
        return steps

    def _submits(self, chance: random.Random, steps: list[Step]) -> list[str]:
        made: list[str] = []
        for number in range(chance.randint(1, 3)):
            needs = tuple(chance.sample(made, min(len(made), chance.choice((0, 0, 1, 2)))))
            steps.append(Submit(f"c{number}", chance.choice(self.dynamic), needs))
            made.append(f"c{number}")
            if chance.random() < 0.2:
                steps.append(Run(chance.choice(SECONDS)))
            if chance.random() < 0.1:
                steps.append(Cancel(made[0]))
        for _ in range(chance.choice((0, 1, 1, 2))):
            keys = tuple(chance.sample(made, chance.randint(1, len(made))))
            steps.append(
                WaitFor(
                    keys,
                    any_of=chance.random() < 0.3,
                    timeout=0.02 if chance.random() < 0.15 else None,
                    catch=chance.random() < 0.4,
                )
            )
            steps.append(Run(chance.choice(SECONDS)))
        return made

    def _outcome(self, chance: random.Random, made: list[str]) -> Step:
        if chance.random() < self.trouble:
            return chance.choice(
                (
                    Error(),
                    Error(retryable=False),
                    Skipped(),
                    Dies(),
                    Again(chance.choice((0.0, 0.1))) if chance.random() < 0.7 else Dies(),
                )
            )
        if made and chance.random() < 0.4:
            return Held(tuple(chance.sample(made, chance.randint(1, len(made)))), items=True)
        return Value(items=tuple(range(chance.randint(0, 3))))


def _options(chance: random.Random) -> dict[str, Any]:
    return {
        "retries": chance.choice((None, None, 0, 1, 3)),
        "backoff": chance.choice((0.0, 0.0, 0.05)),
        "timeout": chance.choice((None, None, None, 0.03)),
        "priority": chance.choice((0, 0, 1)),
        "always": chance.random() < 0.1,
        "resources": chance.choice(RESOURCES),
    }


def _depth(call: Call) -> int:
    depth = 0
    above = call.parent
    while above is not None:
        depth, above = depth + 1, above.parent
    return depth


def repeat(sim: Simulation, chance: random.Random) -> None:
    """A report comes again: its attempt is over, or what it says is known already."""
    said = [e for _, e in sim.history if isinstance(e, m.Finished | m.Began | m.Submitted)]
    if said:
        sim.post(chance.choice(said))


@pytest.mark.parametrize("block", range(10))
def test_random_runs_end_with_their_books_in_order(block: int) -> None:
    for seed in range(block * 30, block * 30 + 30):
        sim = World(seed).simulation()
        sim.run()
        assert all(call.state in FINAL for call in sim.scheduler.calls), seed


class Misfortunes(RuleBasedStateMachine):
    """A random run, and what may happen to it between any two events."""

    @initialize(seed=st.integers(0, 2**32), trouble=st.sampled_from((0.0, 0.1, 0.4)))
    def a_run_begins(self, seed: int, trouble: float) -> None:
        self.chance = random.Random(seed)
        self.sim = World(seed, trouble).simulation()
        self.sim.begin()

    def is_going_on(self) -> bool:
        return not self.sim.scheduler.over

    @precondition(is_going_on)
    @rule(events=st.integers(1, 30))
    def time_passes(self, events: int) -> None:
        for _ in range(events):
            if self.is_going_on():
                self.sim.step()

    @precondition(is_going_on)
    @rule(which=st.integers(0, 63))
    def a_worker_dies(self, which: int) -> None:
        alive = [worker.id for worker in self.sim.workers.values() if worker.alive]
        if alive:
            self.sim.kill(alive[which % len(alive)])

    @precondition(is_going_on)
    @rule()
    def all_workers_die(self) -> None:
        self.sim.kill(*self.sim.workers)

    @rule()
    def a_report_comes_again(self) -> None:
        repeat(self.sim, self.chance)

    @precondition(is_going_on)
    @rule(which=st.integers(0, 255))
    def somebody_cancels_a_call(self, which: int) -> None:
        calls = self.sim.scheduler.calls
        self.sim.post(m.CancelCalls((calls[which % len(calls)].id,), "somebody said so"))

    @precondition(is_going_on)
    @rule()
    def the_run_is_stopped(self) -> None:
        self.sim.post(m.Stop("Ctrl-C"))

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.run()
            assert all(call.state in FINAL for call in self.sim.scheduler.calls)


def test_whatever_happens_the_run_ends_with_its_books_in_order() -> None:
    run_state_machine_as_test(
        Misfortunes,
        settings=settings(
            max_examples=400,
            stateful_step_count=30,
            deadline=timedelta(seconds=5),
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow],
            print_blob=True,
        ),
    )
