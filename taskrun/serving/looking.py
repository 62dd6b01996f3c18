"""What a server tells those who look at it: its runs, each as its own process sees it, the
machines that work for them, and what runs where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any, Final

from taskrun.demand import HERE
from taskrun.reactor import Reactor
from taskrun.serving.lent import LentPool
from taskrun.serving.runs import RUNNING, ServedRun

PATIENCE: Final = 2.0  # seconds that the process of a run has to answer


class Look:
    """Asks all runs how they go; ``done`` is called once, with a description of each.

    What a run that runs has said is its ``now``, which is None where it does not answer, as a
    Pool elsewhere never does.
    """

    def __init__(
        self,
        runs: Sequence[ServedRun | LentPool],
        reactor: Reactor,
        done: Callable[[list[dict[str, Any]]], object],
    ) -> None:
        self._found = {run.name: {**run.described(), "now": None} for run in runs}
        self._done = done
        asked = [run for run in runs if isinstance(run, ServedRun) and run.state == RUNNING]
        self._open = {run.name for run in asked}
        self._timer = reactor.call_at(monotonic() + PATIENCE, self._finish)
        for run in asked:
            run.control.ask({"do": "status"}, partial(self._on_answer, run.name))
        self._finish_if_complete()

    def _on_answer(self, name: str, now: Any) -> None:
        self._found[name]["now"] = now
        self._open.discard(name)
        self._finish_if_complete()

    def _finish_if_complete(self) -> None:
        if not self._open:
            self._finish()

    def _finish(self) -> None:
        self._timer.cancel()
        done, self._done = self._done, _nothing
        done(list(self._found.values()))


def machines(
    runs: Sequence[dict[str, Any]], slots: int, nodes: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """This machine and all nodes, each with its workers for all runs: ``nodes`` as they
    describe themselves, ``runs`` as :class:`Look` does."""
    here = {"node": HERE, "slots": slots, "state": "here"}
    found: dict[str, dict[str, Any]] = {
        one["node"]: {**one, "runs": {}, "workers": []} for one in (here, *nodes)
    }
    for run in runs:
        for place, share in run["shares"].items():
            if place in found:
                found[place]["runs"][run["run"]] = share
        now = run["now"] or {}
        # To a run that still waits for what was there before, a machine has another name.
        places = {node["node"]: node["place"] for node in now.get("nodes", ())}
        for worker in now.get("workers", ()):
            machine = found.get(places.get(worker["node"], worker["node"]) or HERE)
            if machine is not None:
                machine["workers"].append({"run": run["run"], **worker})
    return list(found.values())


def running(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls that run, of all runs."""
    return [
        {"run": run["run"], **call}
        for run in runs
        for call in (run["now"] or {}).get("running", ())
    ]


def _nothing(runs: list[dict[str, Any]]) -> None:
    """It has been told."""
