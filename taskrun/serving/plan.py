"""What each run is to have of resources: a pure function of what there is, and who needs it.

The runs stand in a line.  In turn, each of them gets what one call needs, all of it on one
machine, and again, until nothing is left that anybody needs.  So those who need the same get
the same, and whoever is first can have all that a machine has.

What is planned for one may still be held by calls of others: it is left to them until they
end.  Only what calls hold that wait for others is taken into account: they may wait for just
what they would have to make room for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from taskrun.demand import Amounts, Demand, Need
from taskrun.serving.shares import Shares

Has = Mapping[str, Mapping[str, Amounts]]
"""run -> place -> what it has of its resources."""


class Plan:
    """``stocks``: what the places have.  ``slots``: those of the places, ``numbers``: those of
    the runs.  ``line``: whose turn it is, first first; ``has``: what each has now, and what
    nobody has, under the name ``""``.

    ``shares``: run -> place -> how much.  ``first``: what a run got in its first turn, and
    where.  ``unserved``: what of a run's needs gets nothing, though it could if others had less.
    ``blocked``: what whoever is first does not get, since calls of others hold it that wait.
    """

    def __init__(
        self,
        stocks: Mapping[str, Amounts],
        slots: Mapping[str, int],
        numbers: Mapping[str, int],
        line: Sequence[str],
        demands: Mapping[str, Demand],
        has: Has,
    ) -> None:
        self.shares: dict[str, dict[str, Amounts]] = {run: {} for run in demands}
        self.first: dict[str, tuple[str, Need]] = {}
        self.unserved: dict[str, Need] = {}
        self.blocked: Need | None = None
        self._stocks = stocks
        self._slots = slots
        self._has = has
        self._left = {place: dict(stock) for place, stock in stocks.items()}
        self._room = dict(slots)
        self._number = dict(numbers)
        self._taken: dict[str, dict[str, float]] = {run: {} for run in demands}  # slots
        self._needs = {
            run: [need for need in demands[run].needs if self._is_possible(run, need)]
            for run in line
        }
        self._open = {run: [need.calls for need in needs] for run, needs in self._needs.items()}
        self._line = line
        self._leave_to_those_that_wait(demands)
        if line:
            self._look_at_the_first(demands[line[0]].waits)
        while [run for run in line if self._serve(run)]:
            pass
        self._find_unserved()

    def amount(self, run: str, place: str, name: str) -> float:
        """How much of it a run is to have there."""
        return self.shares.get(run, {}).get(place, {}).get(name, 0.0)

    @property
    def pins(self) -> Shares:
        """How many slots the runs need where their resources are."""
        return {
            run: {place: _whole(slots) for place, slots in taken.items()}
            for run, taken in self._taken.items()
        }

    # -- in turn ----------------------------------------------------------------------

    def _leave_to_those_that_wait(self, demands: Mapping[str, Demand]) -> None:
        for run, demand in demands.items():
            for place, amounts in demand.waits.items():
                if place in self._left:
                    self._take(run, place, amounts)

    def _look_at_the_first(self, waits: Mapping[str, Amounts]) -> None:
        """``waits``: what calls of its own hold that wait."""
        alone = [_without(stock, waits.get(place, {})) for place, stock in self._stocks.items()]
        for need in self._needs[self._line[0]]:
            if not _any_covers(self._left.values(), need) and _any_covers(alone, need):
                self.blocked = self.blocked or need

    def _serve(self, run: str) -> bool:
        """Give a run what one of its calls needs, the best for which there is enough."""
        # What better calls wait for, or whoever is first: others leave it alone.
        is_first, blocked = run == self._line[0], self.blocked
        awaited = set() if is_first or blocked is None else set(blocked.amounts)
        for number, need in enumerate(self._needs[run]):
            if not self._open[run][number]:
                continue
            if not need.submitted and not awaited.isdisjoint(need.amounts):
                continue
            # For many calls at a time where there is enough: a part of them, to be fair.
            fits = self._fits(run, need)
            if not fits:
                awaited.update(need.amounts)
                continue
            place = max(fits, key=lambda place: self._nearness(run, place, need))
            part = max(1, sum(fits.values()) // (4 * len(self._line)))
            calls = min(self._open[run][number], fits[place], part)
            self._open[run][number] -= calls
            self.first.setdefault(run, (place, need))
            self._occupy(run, place, calls * need.slots)
            self._take(run, place, {name: calls * much for name, much in need.amounts.items()})
            return True
        return False

    def _fits(self, run: str, need: Need) -> dict[str, int]:
        """For how many calls there is enough, by place."""
        found = {}
        for place, left in self._left.items():
            enough = min(left.get(name, 0.0) // much for name, much in need.amounts.items())
            if enough >= 1 and (calls := min(enough, self._have_slots(run, place, need.slots))):
                found[place] = int(calls)
        return found

    def _have_slots(self, run: str, place: str, slots: float) -> float:
        """How many calls that take ``slots`` have room there.  A run's first call may need more
        slots than the run gets, as it would never start."""
        taken, spare = self._taken[run], min(self._room[place], self._number[run])
        if not taken and self._number[run] and _whole(slots) <= self._room[place]:
            return max(1, spare // slots if slots else math.inf)
        if place not in taken and not spare:
            return 0
        begun = _whole(taken[place]) - taken[place] if place in taken else 0.0
        return (spare + begun) // slots if slots else math.inf

    def _occupy(self, run: str, place: str, slots: float) -> None:
        cost = self._cost(run, place, slots)
        self._room[place] -= cost
        self._number[run] -= cost
        self._taken[run][place] = self._taken[run].get(place, 0.0) + slots

    def _take(self, run: str, place: str, amounts: Amounts) -> None:
        share = self.shares[run].setdefault(place, {})
        for name, amount in amounts.items():
            share[name] = share.get(name, 0.0) + amount
            self._left[place][name] = self._left[place].get(name, 0.0) - amount

    def _nearness(self, run: str, place: str, need: Need) -> tuple[float, float, int]:
        """Most where the run has most of that already, then where it can have it at once."""
        own = at_once = 0.0
        for name, amount in need.amounts.items():
            spare = self._had(run, place, name) - self.amount(run, place, name)
            own += min(1.0, max(0.0, spare) / amount)
            at_once += min(1.0, max(0.0, spare + self._had("", place, name)) / amount)
        return own, at_once, self._room[place]

    def _had(self, run: str, place: str, name: str) -> float:
        return self._has.get(run, {}).get(place, {}).get(name, 0.0)

    def _cost(self, run: str, place: str, slots: float) -> int:
        """How many slots more the run needs there for these; one at least for all."""
        taken = self._taken[run]
        before = _whole(taken[place]) if place in taken else 0
        return _whole(taken.get(place, 0.0) + slots) - before

    def _is_possible(self, run: str, need: Need) -> bool:
        """Whether the run could have it if others had less."""
        return self._number[run] > 0 and any(
            _covers(stock, need.amounts) and _whole(need.slots) <= self._slots[place]
            for place, stock in self._stocks.items()
        )

    def _find_unserved(self) -> None:
        for run, needs in self._needs.items():
            for need, left in zip(needs, self._open[run], strict=True):
                if left == need.calls:
                    self.unserved.setdefault(run, need)


def _whole(slots: float) -> int:
    return max(1, math.ceil(slots - 1e-9))


def _covers(stock: Amounts, amounts: Amounts) -> bool:
    return all(stock.get(name, 0.0) >= amount for name, amount in amounts.items())


def _any_covers(stocks: Iterable[Amounts], need: Need) -> bool:
    return any(_covers(stock, need.amounts) for stock in stocks)


def _without(stock: Amounts, amounts: Amounts) -> Amounts:
    return {name: amount - amounts.get(name, 0.0) for name, amount in stock.items()}
