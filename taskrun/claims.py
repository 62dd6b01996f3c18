"""What a call must have before it starts, beside a worker: resources, and its limits' leave.

Both are held until the attempt ends, also while it waits for calls that it submitted.  So
those that wait may hold what the awaited lack; such a call can never start, and is found
here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from taskrun.calls import Call
from taskrun.limits import Limits
from taskrun.resources import Resources
from taskrun.workforce import Worker, waits_for


class Impossible(Exception):
    """A call cannot start, and never will: ``call``."""

    def __init__(self, call: Call, why: BaseException | None = None) -> None:
        self.call = call
        self.why = why


class Claims:
    """Who holds what, of the resources and the limits."""

    def __init__(self, resources: Resources, limits: Limits, everyone: dict[int, Worker]) -> None:
        self.resources = resources
        self.limits = limits
        self._everyone = everyone

    def lacking(self, call: Call, needs: dict[str, float]) -> list[str]:
        """The resources of which ``call`` would have too little just now.

        Raises Impossible where those that wait for ``call`` hold them.
        """
        lacking = self.resources.lacking(needs)
        if lacking and self._held_by_ancestors(call, lacking):
            raise Impossible(call)
        return lacking

    def admit(self, call: Call, now: float) -> bool:
        """Let ``call`` pass its limits; else it is parked until it may.

        Raises Impossible where those that wait for ``call`` keep it out, or where the key
        of a limit cannot be had.
        """
        try:
            if self.limits.admit(call, now):
                return True
        except Exception as error:
            raise Impossible(call, error) from None
        if self._kept_out_by_ancestors(call):
            self.limits.give_up(call)
            raise Impossible(call)
        return False

    def keep_out(self, call: Call, now: float) -> bool:
        """Whether it could not start just now."""
        if self.resources.lacking(call.recipe.resources):
            return True
        return bool(call.recipe.limits) and self.limits.keeps_out(call, now)

    def take(self, call: Call, needs: dict[str, float]) -> None:
        """``call`` starts: it holds what it needs."""
        call.units = self.resources.take(needs)

    def put_down(self, call: Call, needs: dict[str, float]) -> None:
        """Its attempt is over: what it held is free."""
        assert call.units is not None
        self.resources.give_back(needs, call.units)
        call.units = None
        if call.recipe.limits:
            self.limits.leave(call)

    def deadlocked(self, ready: Iterable[Call]) -> Call | None:
        """One that can never start, of those that are ready and parked, where nothing runs
        that could change it."""
        workers = self._everyone.values()
        if any(worker.running for worker in workers):
            return None
        if any(wait.outside for worker in workers for wait in worker.waits.values()):
            return None  # it may go on at any time
        stuck = [call for call in ready if self.resources.lacking(call.recipe.resources)]
        return min([*stuck, *self.limits.stuck()], key=self._innocence, default=None)

    # -- those that wait --------------------------------------------------------------

    def _held_by_ancestors(self, call: Call, lacking: list[str]) -> bool:
        needs, capacity = call.recipe.resources, self.resources.capacity
        return any(capacity[name] - self._held_above(call, name) < needs[name] for name in lacking)

    def _held_above(self, call: Call, name: str) -> float:
        """How much of a resource those hold that wait for ``call``, its parent and so on."""
        return sum(
            above.recipe.resources[name]
            for above in self._waiting_above(call)
            if above.units and name in above.units
        )

    def _kept_out_by_ancestors(self, call: Call) -> bool:
        above = {each.id for each in self._waiting_above(call)}
        return any(
            gate.bound.most <= len(inside & above) for gate, inside in self.limits.holders(call)
        )

    def _waiting_above(self, call: Call) -> Iterator[Call]:
        while (parent := call.parent) is not None and waits_for(self._everyone, parent, call):
            yield parent
            call = parent

    def _innocence(self, call: Call) -> tuple[bool, bool, int]:
        """Least of a call whose ancestors hold what it lacks; it keeps others from going on."""
        lacking = self.resources.lacking(call.recipe.resources)
        held: Any = any(self._held_above(call, name) for name in lacking)
        return (not held, call.parent is None, call.id)
