"""What this run has of a machine's resources where it shares them with other runs.

A server lends, and wants back what it gives to others.  An amount or a unit is this run's
until it gives it back, which it does as soon as no call holds it: so calls of two runs never
hold the same unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from taskrun.core.resources import AMOUNTS, Resources


class Borrowed(Resources):
    """Resources of which only what is lent can be taken; at first that is nothing.

    ``place``: the server's name of the machine.
    """

    def __init__(self, place: str, capacity: Mapping[str, float]) -> None:
        super().__init__(dict(capacity))
        self.place = place
        self._lent: dict[str, set[int]] = {}  # units
        self._amounts: dict[str, float] = {}  # lent of what has no units
        self._most: Mapping[str, float] = {}
        self._back: dict[str, Any] = {}

    def offer(self, capacity: Mapping[str, float]) -> None:
        """What the machine has.  It was lent before the machine came, perhaps, or this is
        another one of the same name."""
        for name, amount in capacity.items():
            if name in AMOUNTS:
                more = amount - self.capacity.get(name, 0)
                self._free[name] = self._free.get(name, 0) + more
            else:
                self._number_units(name, int(amount))
        self.capacity = dict(capacity)

    def lend(self, most: Mapping[str, float], more: Mapping[str, Any]) -> None:
        """From now on there is ``more``, and ``most`` at most."""
        self._most = most
        for name, lot in more.items():
            if name in AMOUNTS:
                self._amounts[name] = self._amounts.get(name, 0) + lot
            else:
                self._number_units(name, max(lot, default=-1) + 1)
                self._lent.setdefault(name, set()).update(lot)
        self._let_go()

    def give_back(self, needs: dict[str, float], got: dict[str, Any]) -> None:
        """See ``Resources``."""
        super().give_back(needs, got)
        self._let_go()

    def returned(self) -> dict[str, Any]:
        """What goes back to the server: name -> numbers of units, or how much."""
        back, self._back = self._back, {}
        return back

    def lent(self, name: str) -> float:
        """How much of it this run has."""
        return self._amounts.get(name, 0) if name in AMOUNTS else len(self._lent.get(name, ()))

    def _number_units(self, name: str, count: int) -> None:
        units = self._units.setdefault(name, [])
        units += [1.0] * (count - len(units))

    def _let_go(self) -> None:
        """What is too much, and held by nobody, is ours no more."""
        for name, amount in self._amounts.items():
            kept = max(self._most.get(name, 0), self.used(name))
            if kept < amount:
                self._amounts[name] = kept
                self._back[name] = self._back.get(name, 0) + amount - kept
        for name, lent in self._lent.items():
            excess = max(0, len(lent) - int(self._most.get(name, 0)))
            idle = [unit for unit in lent if self._units[name][unit] == 1.0][:excess]
            lent.difference_update(idle)
            if idle:
                self._back.setdefault(name, []).extend(idle)

    def _left(self, name: str) -> float:
        """See ``Resources``."""
        return min(self._most.get(name, 0), self._amounts.get(name, 0)) - self.used(name)

    def _usable(self, name: str) -> Iterable[int]:
        """See ``Resources``.  Of units that are too many, parts are held: no others are taken
        of as many as are to go back, or they would never be free."""
        lent = sorted(self._lent.get(name, ()))
        return lent[: int(self._most.get(name, 0))]
