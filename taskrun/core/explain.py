"""Why a call runs, waits, was skipped or retried, in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from taskrun.calls import (
    FAILED,
    FINAL,
    HELD,
    OK,
    READY,
    RUNNING,
    SLEEPING,
    WAITING,
    Call,
    both_names,
)
from taskrun.core.families import CallWire, WholeWire
from taskrun.core.scheduler import Scheduler
from taskrun.core.workforce import Wait, worker_name


def explain(scheduler: Scheduler, call: Call, now: float, takes_part: str = "") -> str:
    """What ``call`` is doing and why, live or afterwards; ``takes_part``: why it takes part in
    the run at all, which is said while it runs."""
    sentence = f"{both_names(call.name, call.label)} {_why(scheduler, call, now)}"
    if takes_part and call.state is RUNNING:
        sentence += f" ({takes_part})"
    if call.failure is not None and not call.ending and call.state not in FINAL:
        ended = call.attempt if call.state in (READY, SLEEPING) else call.attempt - 1
        sentence += f"; attempt {ended} ended with {call.failure.headline}"
    return sentence


def _why(scheduler: Scheduler, call: Call, now: float) -> str:
    state = call.state
    if state is WAITING:
        return f"waits for {_awaited(call)}"
    if state is READY:
        return f"is ready and waits{_why_ready(scheduler, call, now)}"
    if state is RUNNING:
        return _what_runs(scheduler, call)
    if state is SLEEPING:
        left = max(0.0, scheduler.wakes(call) - now)
        return f"is tried again in {left:.1f} s (attempt {call.attempt + 1})"
    if state is HELD:
        return f"returned futures and waits for {_names((call.inputs or {}).values())}"
    return _why_ended(scheduler, call)


def _why_ready(scheduler: Scheduler, call: Call, now: float) -> str:
    if scheduler.paused:
        return ", because the run is paused"
    if (limit := scheduler.parked_at(call)) is not None:
        return f" until {limit} lets it pass"
    why = _what_is_lacking(scheduler, call)
    if (limit := scheduler.closed_to(call, now)) is not None:
        why += f", and until {limit} lets it pass"
    return why


def _what_is_lacking(scheduler: Scheduler, call: Call) -> str:
    lacking = scheduler.lacking(call)
    shares = "".join(_share(scheduler, name) for name in lacking)
    if (missing := scheduler.missing(call)) and not shares:
        return f" for a node that has {missing.partition(' (')[0]}"
    if lacking:
        return f" until enough {', '.join(lacking)} is free{shares}"
    if nobody := _who_is_missing(scheduler, call):
        return f" for {nobody}"
    placement = scheduler.placement
    if placement.busy_cpu < placement.slots:
        return " for its turn"
    return f" for a slot: {placement.busy_cpu:g} of {placement.slots} are taken"


def _share(scheduler: Scheduler, name: str) -> str:
    lent = scheduler.lent(name)
    if lent is None:
        return ""
    return f": of {name} the server lends this run {lent[0]:g} of {lent[1]:g} for now"


def _who_is_missing(scheduler: Scheduler, call: Call) -> str | None:
    """Where there is no worker that executes calls like this one: what it waits for."""
    home, lane = scheduler.home_of(call), call.recipe.lane
    if home.workers:
        return None
    if scheduler.growing and not (scheduler.placement.slots or home.offered):
        return f"a node that executes calls of the lane {lane}: none is here"
    return None if home is scheduler.placement else f"a worker of the lane {lane}: none is ready"


def _what_runs(scheduler: Scheduler, call: Call) -> str:
    wait = scheduler.wait_of(call)
    if wait is not None and (wait.pending or wait.outside):
        return f"runs and waits for {' and '.join(_what_is_awaited(wait))}"
    worker = scheduler.worker(call.worker) if call.worker is not None else None
    name = worker_name(call.worker, worker.node if worker is not None else "")
    return f"runs in worker {name}, attempt {call.attempt}"


def _what_is_awaited(wait: Wait) -> Iterator[str]:
    if wait.pending:
        yield _names(wait.pending.values())
    if wait.hosts:
        yield "shared state or a channel"
    elif wait.outside:
        yield "a lock or a semaphore of the shared state"


def _why_ended(scheduler: Scheduler, call: Call) -> str:
    tries = f" in attempt {call.attempt}" if call.attempt > 1 else ""
    if call.state is OK:
        return f"succeeded{tries}"
    if call.state is FAILED:
        return f"failed{tries}: {call.ended_as().headline}"
    if call.cause is not None:
        return f"was {call.state}, because {call.cause.title} {call.cause.verdict}"
    if call.failure is not None and call.failure.kind == "cancelled":
        return call.failure.message.removeprefix(f"{call.title} ")
    if call.failure is not None:
        return f"was {call.state}: {call.failure.message}"
    return f"was {call.state}, because the run was stopped: {scheduler.stopping}"


def _awaited(call: Call) -> str:
    """What a waiting call waits for."""
    if call.family is None:
        inputs = (call.inputs or {}).values()
        return _names(used for used in inputs if used.state not in FINAL)
    open_ = []
    for wire in call.family.wires:
        if isinstance(wire, CallWire) and wire.call(call.index).state not in FINAL:
            used = wire.call(call.index)
            open_.append(f"{used.title} ({used.state})")
        elif isinstance(wire, WholeWire) and not wire.source.closed:
            open_.append(f"{wire.source.name} ({wire.source.open} open)")
    open_ += [f"{family.name} ({family.open} open)" for family in call.family.after if family.open]
    return ", ".join(open_) or "nothing"


def _names(calls: Iterable[Call]) -> str:
    titles = [f"{call.title} ({call.state})" for call in calls]
    more = f" and {len(titles) - 3} more" if len(titles) > 3 else ""
    return ", ".join(titles[:3]) + more
