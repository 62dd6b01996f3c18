"""What a call must have before it starts, beside a worker: resources, and its limits' leave.

Both are held until the attempt ends, also while it waits for calls that it submitted.  So
those that wait may hold what the awaited lack; such a call can never start, and is found
here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Reversible
from typing import Any

from taskrun.calls import Call
from taskrun.core.borrowed import Borrowed
from taskrun.core.limits import Limits
from taskrun.core.resources import AMOUNTS, Resources
from taskrun.core.workforce import Worker, waits_for
from taskrun.demand import Amounts, Loan, Lot


class Impossible(Exception):
    """A call cannot start, and never will: ``call``."""

    def __init__(self, call: Call, why: BaseException | None = None) -> None:
        self.call = call
        self.why = why


class Claims:
    """Who holds what, of the resources and the limits."""

    def __init__(
        self, resources: Resources, slots: int, limits: Limits, everyone: dict[int, Worker]
    ) -> None:
        """``resources`` and ``slots``: what this machine has."""
        self.resources = resources
        self.limits = limits
        self.awaited: frozenset[str] = frozenset()
        """What other runs wait for: only submitted calls may take it."""
        self._everyone = everyone
        self._nodes: dict[str, Resources] = {"": resources}
        self._known = self._nodes  # and those that take no more calls
        self._slots: dict[str, float] = {"": slots}
        self._taken_from: dict[int, Resources] = {}  # by call
        self._stock: Amounts = {}  # what there is to be lent
        self._borrowed: dict[str, Borrowed] | None = None  # by place
        if isinstance(resources, Borrowed):
            self._borrowed = {resources.place: resources}

    def set_nodes(
        self, slots: float, offers: dict[str, dict[str, float]], places: Mapping[str, str]
    ) -> None:
        """So many ``slots`` there are altogether, and these other machines, with what they have;
        cpu is their slots.  ``places``: what the server calls them, where there is one."""
        before = self._nodes
        self._nodes = {"": self.resources}
        self._slots = {"": slots - sum(offer.get("cpu", 0.0) for offer in offers.values())}
        for node, offer in offers.items():
            if self._borrowed is None:
                self._nodes[node] = before.get(node) or Resources(offer)
            else:
                # Of one place there may be two: the other one is away, and does not come back.
                self._nodes[node] = place = self._place(places.get(node, node))
                place.offer(offer)
            self._slots[node] = offer.get("cpu", 0.0)
        self._known = {**self._known, **self._nodes}

    # -- what is lent -----------------------------------------------------------------

    @property
    def borrows(self) -> bool:
        """Whether a server lends this run what it may use."""
        return self._borrowed is not None

    def _place(self, name: str) -> Borrowed:
        assert self._borrowed is not None
        return self._borrowed.setdefault(name, Borrowed(name, {}))

    def lend(self, loan: Loan) -> None:
        """A server lends, or wants something back."""
        assert self._borrowed is not None
        self.awaited, self._stock = frozenset(loan.awaited), loan.stock
        for name in self._borrowed.keys() | loan.most.keys() | loan.more.keys():
            self._place(name).lend(loan.most.get(name, {}), loan.more.get(name, {}))

    def returned(self) -> Lot:
        """What goes back to the server."""
        places = (self._borrowed or {}).values()
        return {place.place: back for place in places if (back := place.returned())}

    def lent(self, name: str) -> tuple[float, float] | None:
        """How much of a resource a server lends this run, and of how much, where that is not
        all of it."""
        places = (self._borrowed or {}).values()
        lent, of = sum(place.lent(name) for place in places), self._stock.get(name, 0)
        return (lent, of) if lent < of else None

    def held_by_those_that_wait(self) -> dict[str, Amounts]:
        """What calls hold that wait for others, by place."""
        held: dict[str, dict[str, Any]] = {}
        for worker in self._everyone.values():
            for wait in worker.waits.values():
                place = self._taken_from.get(wait.call.id)
                if isinstance(place, Borrowed):
                    _add(held.setdefault(place.place, {}), wait.call.units or {})
        return {
            place: {name: float(len(lot)) if name not in AMOUNTS else lot
                    for name, lot in lots.items()}
            for place, lots in held.items() if lots
        }  # fmt: skip

    # -- what calls hold --------------------------------------------------------------

    def missing(self, needs: dict[str, float]) -> str | None:
        """Why ``needs`` can never be met, as things are: ``gpu=3 (of 2)``."""
        cpu = self.resources.capacity.get("cpu", 0)  # of all machines together
        if needs.get("cpu", 0) > cpu:
            return f"cpu={needs['cpu']:g} (of {cpu:g})"
        others = _without_cpu(needs)
        reasons = [resources.missing(others) for resources in self._nodes.values()]
        return None if None in reasons else next(filter(None, reasons))

    def lacking(self, needs: dict[str, float]) -> list[str]:
        """The resources of which no machine has enough just now."""
        found = [resources.lacking(needs) for resources in self._nodes.values()]
        return [] if [] in found else found[0]

    def find_place(
        self, call: Call, needs: dict[str, float], workers: Reversible[Worker]
    ) -> tuple[Worker | None, list[str]]:
        """The last of ``workers`` on whose machine there is enough for ``call``; or what is
        lacking, on all machines.

        Raises Impossible where those that wait for ``call`` hold it.
        """
        able = self.able(needs)
        for worker in reversed(workers) if able else ():
            if worker.node in able:
                return worker, []
        lacking = [] if able else self.lacking(needs)
        if lacking and self._held_by_ancestors(call, needs):
            raise Impossible(call)
        return None, lacking

    @property
    def slots_here(self) -> float:
        """How many slots this machine has."""
        return self._slots[""]

    def free_slots(self, node: str) -> float:
        """How many slots of a machine nothing takes just now."""
        workers = self._everyone.values()
        return self._slots[node] - sum(worker.cpu for worker in workers if worker.node == node)

    def able(self, needs: dict[str, float]) -> set[str]:
        """The machines where there is enough just now."""
        return {node for node, has in self._nodes.items() if not has.lacking(needs)}

    def _of(self, worker: Worker) -> Resources:
        return self._known.get(worker.node, self.resources)

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

    def keep_out(self, call: Call, place: Worker, now: float) -> bool:
        """Whether it could not start there just now."""
        if self._of(place).lacking(call.recipe.resources):
            return True
        return bool(call.recipe.limits) and self.limits.keeps_out(call, now)

    def take(self, call: Call, needs: dict[str, float], place: Worker) -> None:
        """``call`` starts: it holds what it needs."""
        resources = self._taken_from[call.id] = self._of(place)
        call.units = resources.take(needs)

    def put_down(self, call: Call, needs: dict[str, float]) -> None:
        """Its attempt is over: what it held is free."""
        assert call.units is not None
        self._taken_from.pop(call.id).give_back(needs, call.units)
        call.units = None
        if call.recipe.limits:
            self.limits.leave(call)

    def deadlocked(self, ready: Iterable[Call], *, patient: bool = False) -> Call | None:
        """One that can never start, of those that are ready and parked, where nothing runs
        that could change it; ``patient``: there is none while more may be lent."""
        if self._may_go_on():
            return None
        stuck = self._stuck(ready)
        if stuck and patient:
            return None
        return min([*stuck, *self.limits.stuck()], key=self._innocence, default=None)

    def is_stuck(self, ready: Iterable[Call]) -> bool:
        """Whether nothing goes on before more is lent."""
        return not self._may_go_on() and bool(self._stuck(ready))

    def _may_go_on(self) -> bool:
        workers = self._everyone.values()
        if any(worker.running for worker in workers):
            return True
        return any(wait.outside for worker in workers for wait in worker.waits.values())

    def _stuck(self, ready: Iterable[Call]) -> list[Call]:
        # What nobody has may come yet, with another machine; what there is a server knows.
        needs = ((call, call.recipe.resources) for call in ready)
        return [call for call, need in needs
                if self.lacking(need) and (self.borrows or not self.missing(need))]  # fmt: skip

    # -- those that wait --------------------------------------------------------------

    def _held_by_ancestors(self, call: Call, needs: dict[str, float]) -> bool:
        """Whether on each machine that could ever do, those hold too much that wait for
        ``call``, its parent and so on."""
        able = [each for each in self._nodes.values() if not each.missing(_without_cpu(needs))]
        above = list(self._waiting_above(call))
        return bool(able) and all(
            any(
                resources.capacity[name] - self._held(resources, above, name) < amount
                for name, amount in needs.items()
                if name != "cpu"
            )
            for resources in able
        )

    def _held(self, resources: Resources, calls: Iterable[Call], name: str) -> float:
        """How much of one resource of a machine these calls hold."""
        return sum(
            call.recipe.resources[name]
            for call in calls
            if call.units and name in call.units and self._taken_from.get(call.id) is resources
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
        above = list(self._waiting_above(call))
        held = any(
            self._held(resources, above, name)
            for resources in self._nodes.values()
            for name in self.lacking(call.recipe.resources)
        )
        return (not held, call.parent is None, call.id)


def _add(held: dict[str, Any], units: Mapping[str, Any]) -> None:
    """What another call holds; two may share a unit."""
    for name, lot in units.items():
        if name not in AMOUNTS:
            held[name] = held.get(name, set()) | set(lot)
        elif name != "cpu":
            held[name] = held.get(name, 0.0) + lot


def _without_cpu(needs: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in needs.items() if name != "cpu"}
