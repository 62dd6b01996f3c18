"""How a server lends what its places have of resources to its runs.

What a run has it has until it gives it back, or until it has ended and nothing of it is left
at the place.  What is free goes to those for whom it is planned (see ``plan``).  What is
missing then is wanted back from those that have more than is planned for them; what nobody
misses stays where it is, so that a run that is alone waits for nothing.

Where not all get what they need, they take turns: whoever has had something for ``TURN``
seconds goes to the end of the line.  A turn is no limit for a call: units come back when
calls end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from taskrun.demand import MEMORY, NO_DEMAND, Amounts, Demand, Loan, Lot
from taskrun.serving.plan import Plan
from taskrun.serving.shares import Shares

TURN: Final = 2.0  # seconds


class Ledger:
    """Who has what: units by number, of memory how much."""

    def __init__(self) -> None:
        self._has: dict[str, Lot] = {}  # by run

    def runs(self) -> list[str]:
        """Those that have something, or had and have not ended."""
        return list(self._has)

    def places(self, run: str) -> list[str]:
        """Where a run has something."""
        return [place for place, lots in self._has.get(run, {}).items() if any(lots.values())]

    def amount(self, run: str, place: str, name: str) -> float:
        """How much of it a run has there."""
        lot = self._has.get(run, {}).get(place, {}).get(name, 0.0)
        return float(len(lot)) if isinstance(lot, set) else float(lot)

    def free(self, place: str, name: str, stock: float) -> float:
        """How much of ``stock`` nobody has."""
        return max(0.0, stock - sum(self.amount(run, place, name) for run in self._has))

    def give(self, run: str, place: str, name: str, amount: float, stock: float) -> Any:
        """Give a run so much of what is free; gives the numbers of the units, or how much."""
        lots = self._has.setdefault(run, {}).setdefault(place, {})
        if name == MEMORY:
            lots[name] = lots.get(name, 0.0) + amount
            return amount
        others = [has.get(place, {}).get(name, ()) for has in self._has.values()]
        free = set(range(int(stock))).difference(*others)
        units = sorted(free)[: int(amount)]
        lots.setdefault(name, set()).update(units)
        return units

    def take_back(self, run: str, back: Lot) -> None:
        """A run gives this back.  Raises what is in ``errors.MALFORMED``."""
        for place, lots in back.items():
            has = self._has.get(run, {}).get(place, {})
            for name, lot in lots.items():
                if name in has:
                    has[name] = max(0.0, has[name] - lot) if name == MEMORY else has[name] - {*lot}

    def let_go(self, run: str, place: str) -> None:
        """Nothing of an ended run is left at that place."""
        self._has.get(run, {}).pop(place, None)
        if not self.places(run):
            self._has.pop(run, None)


class Lending:
    """Deals anew at each :meth:`deal`; :meth:`loans` are what is to be told then.

    ``due``: when it is to deal again, though nothing happens; None: that is not needed.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.due: float | None = None
        self._line: list[str] = []
        self._since: dict[str, float] = {}  # when those that have something got it
        self._demands: Mapping[str, Demand] = {}
        self._pins: Shares = {}
        self._loans: dict[str, Loan] = {}
        self._told: dict[str, Loan] = {}

    def deal(
        self,
        stocks: Mapping[str, Amounts],
        slots: Mapping[str, int],
        numbers: Mapping[str, int],
        demands: Mapping[str, Demand],
        now: float,
    ) -> Shares:
        """Plan for the runs, in order of arrival, and lend; gives how many slots they need where
        their resources are.  See :class:`Plan`."""

        def plan() -> Plan:
            return Plan(stocks, slots, numbers, self._line, demands, has)

        wanting = [run for run, demand in demands.items() if demand.needs]
        self._line = [run for run in self._line if run in wanting]
        self._line += [run for run in wanting if run not in self._line]
        has = self._amounts(stocks, demands)
        planned = plan()
        self._look_who_has(planned, now)
        if planned.unserved and self._next_turn(now):
            planned = plan()
            self._look_who_has(planned, now)
        self.due = None
        if planned.unserved and self._since:
            self.due = min(self._since.values()) + TURN
        self._lend(stocks, demands, planned)
        self._demands, self._pins = demands, planned.pins
        return self._pins

    def idle(self, run: str) -> int:
        """How many of the slots that the run wants are for calls that get nothing now."""
        demand = self._demands.get(run, NO_DEMAND)
        wanted = sum(need.calls * need.slots for need in demand.needs)
        return max(0, int(wanted) - sum(self._pins.get(run, {}).values()))

    def loans(self) -> Iterator[tuple[str, Loan]]:
        """What is to be told to which run, since the last time."""
        for run, loan in self._loans.items():
            if loan.more or loan.last or loan != self._told.get(run):
                self._told[run] = loan._replace(more={})
                yield run, loan
        self._loans = {}

    def forget(self, run: str) -> None:
        """It has ended; the ledger knows what is left of it."""
        self._told.pop(run, None)

    # -- turns ------------------------------------------------------------------------

    def _amounts(
        self, stocks: Mapping[str, Amounts], demands: Mapping[str, Demand]
    ) -> dict[str, dict[str, Amounts]]:
        amount = self.ledger.amount
        has = {
            run: {
                place: {name: amount(run, place, name) for name in stock}
                for place, stock in stocks.items()
            }
            for run in demands
        }
        has[""] = {
            place: {name: self.ledger.free(place, name, much) for name, much in stock.items()}
            for place, stock in stocks.items()
        }
        return has

    def _look_who_has(self, plan: Plan, now: float) -> None:
        """Whose turn has begun: those that have what they got first, in the plan."""
        for run in list(self._since.keys() | plan.first.keys()):
            place, need = plan.first.get(run, ("", None))
            if need is not None and all(
                self.ledger.amount(run, place, name) >= much for name, much in need.amounts.items()
            ):
                self._since.setdefault(run, now)
            else:
                self._since.pop(run, None)

    def _next_turn(self, now: float) -> bool:
        """Send those to the end of the line whose time is over; whether there are any."""
        over = [run for run in self._line if self._since.get(run, now) + TURN <= now]
        self._line = [run for run in self._line if run not in over] + over
        self._since.update(dict.fromkeys(over, now))
        return bool(over)

    # -- handing out ------------------------------------------------------------------

    def _lend(
        self, stocks: Mapping[str, Amounts], demands: Mapping[str, Demand], plan: Plan
    ) -> None:
        last = _who_waits_in_vain(demands, plan)
        blocked = sorted(plan.blocked.amounts) if plan.blocked is not None else []
        names = {name for stock in stocks.values() for name in stock}
        together = {name: sum(stock.get(name, 0.0) for stock in stocks.values()) for name in names}
        for run in demands:
            awaited = [] if run in self._line[:1] else blocked
            self._loans[run] = Loan({}, {}, awaited, together, run == last)
        for place, stock in stocks.items():
            for name, much in stock.items():
                self._lend_one(place, name, much, plan)

    def _lend_one(self, place: str, name: str, stock: float, plan: Plan) -> None:
        """Deal one resource of one place."""
        missing = 0.0
        for run in self._in_turn():
            lacks = plan.amount(run, place, name) - self.ledger.amount(run, place, name)
            given = max(0.0, min(lacks, self.ledger.free(place, name, stock)))
            if given:
                lot = self.ledger.give(run, place, name, given, stock)
                self._loans[run].more.setdefault(place, {})[name] = lot
            missing += max(0.0, lacks - given)
        for run in reversed(self._in_turn()):
            planned, has = plan.amount(run, place, name), self.ledger.amount(run, place, name)
            wanted_back = min(missing, max(0.0, has - planned))
            missing -= wanted_back
            if most := max(planned, has - wanted_back):
                self._loans[run].most.setdefault(place, {})[name] = most

    def _in_turn(self) -> list[str]:
        """Those that need something, in turn, then the others."""
        return [*self._line, *(run for run in self._loans if run not in self._line)]


def _who_waits_in_vain(demands: Mapping[str, Demand], plan: Plan) -> str | None:
    """Where all that hold something while they wait, wait for what others of them hold: the
    last of these."""
    holders = [run for run, demand in demands.items() if demand.waits]
    unserved = plan.unserved.keys() - plan.first.keys()
    in_vain = [run for run in holders if demands[run].stuck and run in unserved]
    return in_vain[-1] if in_vain and in_vain == holders else None
