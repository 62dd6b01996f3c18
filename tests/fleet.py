"""Simulated runs of a server, in one fake time: what it lends them, and what they do with it.

The server is the real policy without its sockets: messages between it and the runs take a
while, and keep their order.  After every step nobody may hold what another run holds.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from simulation import FakeWorker, Simulation

from taskrun import messages as m
from taskrun.core.workforce import Worker
from taskrun.demand import HERE, NO_DEMAND, Amounts, Demand
from taskrun.serving.lending import Lending
from taskrun.serving.shares import Shares, Wish, deal, numbers
from taskrun.wanting import roughly

MOST_STEPS = 300_000  # more than this are runs that do not end
PAUSE = 0.05  # seconds after which a run says what it wants


class Member(Simulation):
    """A run that borrows; its workers are where it has slots."""

    def __init__(self, *args: Any, places: Mapping[str, Amounts], **options: Any) -> None:
        self.places = places
        self.shares: dict[str, int] = {}
        options |= {"growing": True, "borrows": True, "slots": 0, "resources": places[HERE]}
        super().__init__(*args, **options)

    def take_share(self, shares: dict[str, int]) -> None:
        """So many slots it has from now on, and where."""
        self.shares = shares
        nodes = {
            place: {**self.places[place], "cpu": float(slots)}
            for place, slots in shares.items() if slots and place != HERE
        }  # fmt: skip
        self.post(m.Capacity(sum(shares.values()), nodes))
        for place in self.places:
            workers = [each for each in self.scheduler._workers.values()
                       if place_of(each) == place and not each.retiring]  # fmt: skip
            workers.sort(key=lambda each: bool(each.calls))
            for worker in workers[: max(0, len(workers) - shares.get(place, 0))]:
                self.post(m.Retiring(worker.id))

    def new_worker(
        self, lane: str = "process", slots: int = 1, node: str | None = None
    ) -> FakeWorker:
        have = Counter(place_of(each) for each in self.scheduler._workers.values())
        if node is None and self.shares:
            most = max(self.shares, key=lambda place: self.shares[place] - have[place])
            node = "" if most == HERE else most
        return super().new_worker(lane, slots, node)

    def held(self) -> dict[tuple[str, str], dict[Any, float]]:
        """(place, name) -> unit -> how much of it calls hold; of memory one unit."""
        found: dict[tuple[str, str], dict[Any, float]] = {}
        for worker in self.scheduler._workers.values():
            for call in worker.calls.values():
                for name, lot in (call.units or {}).items():
                    if name != "cpu":
                        parts = {"all": lot} if name == "memory" else dict.fromkeys(
                            lot, min(1.0, call.recipe.resources[name])
                        )  # fmt: skip
                        into = found.setdefault((place_of(worker), name), {})
                        for unit, part in parts.items():
                            into[unit] = into.get(unit, 0.0) + part
        return found


def place_of(worker: Worker) -> str:
    return worker.node or HERE


class Fleet:
    """A server: ``places`` have these resources and so many slots."""

    def __init__(
        self, places: Mapping[str, Amounts], slots: Mapping[str, int], *, seed: int = 0
    ) -> None:
        self.now = 0.0
        self.places = places
        self.slots = slots
        self.members: dict[str, Member] = {}
        self.lending = Lending()
        self.verdicts: list[str] = []
        self._random = random.Random(seed)
        self._demands: dict[str, Demand] = {}
        self._wants: dict[str, int] = {}
        self._shares: Shares = {}
        self._said: dict[str, Any] = {}
        self._looking: set[str] = set()
        self._lines: dict[tuple[str, str], float] = {}
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._tickets = itertools.count()

    def add(self, name: str, *args: Any, **options: Any) -> Member:
        """A run comes now."""
        member = self.members[name] = Member(*args, places=self.places, **options)
        self.admit(name)
        return member

    def admit(self, name: str) -> None:
        member = self.members[name]
        member.now = self.now
        member.begin()
        self._demands[name], self._wants[name] = NO_DEMAND, 0
        self._look(name)

    def kill(self, name: str) -> None:
        """A run is gone; a while later nothing of it is left."""
        del self.members[name], self._demands[name], self._wants[name]
        self._shares.pop(name, None)
        self.lending.forget(name)
        self._deal()
        self.at(self.now + 2.0, lambda: self._let_go(name))

    def at(self, when: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._heap, (when, next(self._tickets), action))

    # -- the main flow ----------------------------------------------------------------

    def run(self, until: float = 1e9) -> None:
        """Go on until all runs have ended, or to a time."""
        for _ in range(MOST_STEPS):
            times = {name: each.next_time() for name, each in self.members.items()
                     if not each.scheduler.over}  # fmt: skip
            if not times:
                return
            name, when = min(((name, when) for name, when in times.items() if when is not None),
                             key=lambda each: each[1], default=("", None))  # fmt: skip
            due = self._heap[0][0] if self._heap else None
            coming = [each for each in (when, due) if each is not None]
            assert coming, f"all hang:\n{self.story()}"
            if min(coming) > until:
                self.now = until
                return
            if due is not None and due == min(coming):
                self.now, _, action = heapq.heappop(self._heap)
                action()
            else:
                self.members[name].step()
                self.now = self.members[name].now
                self._look(name)
            self._audit()
        raise AssertionError("they do not end:\n" + self.story())

    def story(self) -> str:
        return "\n".join(f"{name}: {each.story()}" for name, each in self.members.items())

    def _audit(self) -> None:
        held: dict[tuple[str, str], dict[Any, float]] = {}
        for name, member in self.members.items():
            for (place, resource), units in member.held().items():
                stock = self.places[place][resource]
                before = held.setdefault((place, resource), {})
                if resource == "memory":
                    before["all"] = before.get("all", 0.0) + units["all"]
                    assert before["all"] <= stock + 1e-6, f"{name}: too much memory"
                else:
                    assert max(units.values()) <= 1 + 1e-6 and max(units) < stock
                    assert before.keys().isdisjoint(units), f"{name} holds what others hold"
                    before.update(units)

    # -- what is said -----------------------------------------------------------------

    def _send(self, line: tuple[str, str], action: Callable[[], object]) -> None:
        last = self._lines.get(line, 0.0)
        when = self._lines[line] = max(last + 1e-9, self.now + self._random.uniform(0, 0.01))
        self.at(when, lambda: action() if line[0] in self.members else None)

    def _look(self, name: str) -> None:
        if name not in self._looking:
            self._looking.add(name)
            self.at(self.now + PAUSE, lambda: self._say(name))

    def _say(self, name: str) -> None:
        self._looking.discard(name)
        member = self.members.get(name)
        if member is None:
            return
        core = member.scheduler
        demand, wants = (NO_DEMAND, 0) if core.over else (
            core.demand(), roughly(core.wanted_slots())
        )  # fmt: skip
        back = core.returned()
        if back or core.over or self._said.get(name) != (demand, wants):
            self._said[name] = demand, wants
            self._send((name, "up"), lambda: self._hear(name, demand, wants, back))

    def _hear(self, name: str, demand: Demand, wants: int, back: Any) -> None:
        self.lending.ledger.take_back(name, back)
        self._demands[name], self._wants[name] = demand, wants
        if self.members[name].scheduler.over:
            del self._demands[name], self._wants[name]
            self._shares.pop(name, None)
            self._let_go(name)
        self._deal()

    def _let_go(self, name: str) -> None:
        for place in self.places:
            self.lending.ledger.let_go(name, place)
        self._deal()

    def _deal(self) -> None:
        wishes = {name: Wish(None, wants) for name, wants in self._wants.items()}
        number = numbers(sum(self.slots.values()), wishes, {})
        pins = self.lending.deal(self.places, self.slots, number, self._demands, self.now)
        wishes = {name: wish.without(self.lending.idle(name)) for name, wish in wishes.items()}
        dealt = deal(self.slots, wishes, self._shares, pins)
        for place, slots in self.slots.items():
            assert sum(of.get(place, 0) for of in dealt.values()) <= slots
        for name, shares in dealt.items():
            if shares != self._shares.get(name):
                self._send((name, "down"), lambda name=name, shares=shares:
                           self._tell(name, lambda each: each.take_share(shares)))  # fmt: skip
        self._shares = dealt
        for name, loan in self.lending.loans():
            self.verdicts += [name] * loan.last
            self._send((name, "down"), lambda name=name, loan=loan:
                       self._tell(name, lambda each: each.post(m.Lent(loan))))  # fmt: skip
        if self.lending.due is not None:
            self.at(max(self.lending.due, self.now + 1e-9), self._deal_if_due)

    def _deal_if_due(self) -> None:
        if self.lending.due is not None and self.lending.due <= self.now:
            self._deal()

    def _tell(self, name: str, action: Callable[[Member], object]) -> None:
        member = self.members[name]
        if not member.scheduler.over:
            member.now = self.now
            action(member)
            self._look(name)
