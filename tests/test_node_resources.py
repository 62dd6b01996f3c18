"""What other machines have of resources: a call goes where there is enough for it."""

from __future__ import annotations

from typing import Any

import pytest
from scripts import Run, Script, Submit, Value, WaitFor, a_task
from simulation import Simulation

from taskrun import messages as m
from taskrun.api import each
from taskrun.errors import RunError

SLOW: Script = (Run(1.0), Value())
GPU = {"gpu": 1.0}


def simulation(*tasks: Any, does: Any = None, slots: int = 2, **options: Any) -> Simulation:
    return Simulation(tasks, {"train": SLOW, "t": SLOW, **(does or {})}, slots=slots, growing=True,
                      **options)  # fmt: skip


def join(sim: Simulation, when: float, slots: int, **nodes: dict[str, float]) -> None:
    offers = {node: {"cpu": 4.0, **has} for node, has in nodes.items()}
    sim.at(when, lambda: sim.post(m.Capacity(slots, offers)))


def train(count: int = 1, **options: Any) -> Any:
    return a_task("train", {"x": each(range(count))}, resources=GPU, **options)


def nodes_of(sim: Simulation, name: str) -> set[str]:
    workers = {event.worker: event.node for event in sim.of(m.WorkerReady)}
    return {workers[command.worker] for command in sim.of(m.Assign)
            for call in command.calls if call.recipe.name == name}  # fmt: skip


def test_a_call_waits_for_a_node_that_has_what_it_needs() -> None:
    sim = simulation(train(), a_task("t", {"x": each(range(4))}))
    sim.run(until=1.5)
    assert sim.explain("train[0]") == "train[0] is ready and waits for a node that has gpu=1"
    join(sim, 2.0, 3, lab={"gpu": 1.0})
    assert sim.run() == 0
    assert nodes_of(sim, "train") == {"lab"}
    assert sim.began("train[0]")[0] >= 2.0


def test_what_a_node_has_is_shared_out_once() -> None:
    sim = simulation(train(4), slots=4)
    join(sim, 0.0, 8, lab={"gpu": 2.0})
    sim.run()
    began = sorted(sim.began(call.name)[0] for call in sim.calls("train"))
    assert began[2] >= began[0] + 1.0 and began[1] < began[0] + 0.5


def test_each_node_shares_out_its_own() -> None:
    sim = simulation(train(2), slots=1)
    join(sim, 0.0, 3, a={"gpu": 1.0}, b={"gpu": 1.0})
    sim.run()
    assert nodes_of(sim, "train") == {"a", "b"}
    assert [sim.scheduler.calls[n].state for n in (0, 1)] == ["ok", "ok"]


def test_other_calls_do_not_wait_for_what_only_a_node_has() -> None:
    sim = simulation(train(2), a_task("t", {"x": each(range(4))}))
    join(sim, 0.0, 3, lab={"gpu": 1.0})
    sim.run()
    assert sim.now < 4.0


def test_a_node_where_a_call_waits_for_its_child_gets_a_worker_for_that() -> None:
    child = a_task("child", resources={"gpu": 0.5})
    parent = a_task("parent", resources={"gpu": 0.5})
    does = {"parent": (Submit("c", child), WaitFor(("c",)), Value())}
    sim = simulation(parent, does=does, slots=1)
    join(sim, 0.0, 2, lab={"gpu": 1.0})
    assert sim.run() == 0
    assert nodes_of(sim, "child") == {"lab"}


def test_a_call_that_those_waiting_for_it_keep_from_the_only_node_fails() -> None:
    child = a_task("child", resources=GPU)
    parent = a_task("parent", resources=GPU)
    does = {"parent": (Submit("c", child), WaitFor(("c",), catch=True), Value())}
    sim = simulation(parent, does=does)
    join(sim, 0.0, 3, lab=GPU)
    assert sim.run() == 0
    assert sim.states("child") == ["failed"]


def test_a_node_that_leaves_takes_its_resources_along() -> None:
    sim = simulation(train(2, retries=1), slots=1)
    join(sim, 0.0, 2, lab={"gpu": 1.0})
    sim.run(until=0.5)
    lab = next(event.worker for event in sim.of(m.WorkerReady) if event.node == "lab")
    sim.kill(lab)
    sim.post(m.Capacity(1, {}))
    sim.run(until=3.0)
    assert "waits for a node" in sim.explain("train[1]")
    join(sim, 3.0, 2, other={"gpu": 1.0})
    assert sim.run() == 0


def test_a_run_that_nobody_can_join_refuses_what_nobody_has() -> None:
    with pytest.raises(RunError, match=r"train needs gpu=1 \(there is none\)"):
        Simulation([train()]).run()
