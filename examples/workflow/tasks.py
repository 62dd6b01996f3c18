"""Replays a scientific workflow: the graph of a recorded run, executed again.

``replay`` submits a call per task of the workflow and gives it the futures of its parents;
taskrun starts each as soon as its own parents are done, however irregular the graph is.
Nobody waits in a worker meanwhile.
"""

import time
from pathlib import Path
from typing import NamedTuple

from taskrun import Future, result, task

from wfformat import Job, Workflow, load

INSTANCE = Path(__file__).with_name("orchard.json")


class Ran(NamedTuple):
    """When a job ran, by the clock that all processes of one machine share."""

    id: str
    began: float
    ended: float


@task
def replay(instance: Path = INSTANCE, scale: float = 0.02) -> list[Future]:
    """Run the workflow again; a recorded second takes ``scale`` seconds."""
    calls: dict[str, Future] = {}
    for job in load(instance).jobs:
        parents = [calls[parent] for parent in job.parents]
        calls[job.id] = work.submit(job, job.seconds * scale, parents)
    return list(calls.values())


@task(label="{job.id}")
def work(job: Job, seconds: float, parents: list[Ran]) -> Ran:
    """Take so many seconds, computing for the job's share of them and sleeping for the rest.

    It gets what its parents returned; being given them is what made it wait for them.
    """
    began = time.monotonic()
    while time.monotonic() < began + seconds * job.busy:
        pass
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    return Ran(job.id, began, time.monotonic())


@task
def report(instance: Path = INSTANCE, ran: list[Ran] = result(replay)) -> None:
    """Check that no job began before its parents had ended, and say how the run went."""
    workflow = load(instance)
    runs = {run.id: run for run in ran}
    check_order(workflow, runs)
    makespan = max(run.ended for run in ran) - min(run.began for run in ran)
    total = sum(run.ended - run.began for run in ran)
    path = critical_path(workflow, runs)
    critical = sum(runs[id].ended - runs[id].began for id in path)
    print(f"{workflow.name}: {len(ran)} jobs, each after all of its parents")
    print(f"total work     {total:8.2f} s")
    print(f"critical path  {critical:8.2f} s  {' > '.join(path)}")
    print(f"makespan       {makespan:8.2f} s")
    print(f"speed-up       {total / makespan:8.2f}    at most {total / critical:.2f} in this graph")


# -- plain functions ------------------------------------------------------------------


def check_order(workflow: Workflow, runs: dict[str, Ran]) -> None:
    """Raise unless every job ran, and began after its parents had ended."""
    for job in workflow.jobs:
        for parent in job.parents:
            early = runs[parent].ended - runs[job.id].began
            if early > 0:
                raise AssertionError(f"{job.id} began {early:.6f} s before {parent} had ended")


def critical_path(workflow: Workflow, runs: dict[str, Ran]) -> list[str]:
    """The chain of jobs, each a parent of the next, that took longest in all."""
    longest: dict[str, tuple[float, list[str]]] = {}
    for job in workflow.jobs:  # parents first
        before, path = max((longest[parent] for parent in job.parents), default=(0.0, []))
        run = runs[job.id]
        longest[job.id] = (before + run.ended - run.began, [*path, job.id])
    return max(longest.values())[1]
