"""What calls hold while they run: cpu, memory, GPUs and whatever ``--resource`` names.

``cpu`` is special: a slot of ``-j``, lent while a call waits for other calls.  All other
resources stay held until the attempt ends.  Whole-numbered resources have numbered
units, so that a call can be told *which* GPUs it got.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

AMOUNTS = frozenset(("cpu", "memory"))
"""Resources that are amounts and have no numbered units."""


class Resources:
    """Capacities, and what is free of them (all but ``cpu``, which the scheduler counts)."""

    def __init__(self, capacity: dict[str, float]) -> None:
        self.capacity = dict(capacity)
        self._free = {name: amount for name, amount in capacity.items() if name in AMOUNTS}
        self._units = {
            name: [1.0] * int(amount) for name, amount in capacity.items() if name not in AMOUNTS
        }

    def missing(self, needs: dict[str, float]) -> str | None:
        """Why ``needs`` can never be met, or None: ``gpu=3 (of 2)``."""
        for name, amount in needs.items():
            have = self.capacity.get(name, 0)
            if amount > have:
                return f"{name}={amount:g} ({'there is none' if not have else f'of {have:g}'})"
        return None

    def lacking(self, needs: dict[str, float]) -> list[str]:
        """The resources of which too little is free just now."""
        return [name for name, amount in needs.items() if not self._fits(name, amount)]

    def take(self, needs: dict[str, float]) -> dict[str, Any]:
        """Take what ``lacking`` found free; gives the amounts and the units' numbers."""
        got: dict[str, Any] = {}
        for name, amount in needs.items():
            if name in AMOUNTS:
                if name != "cpu":
                    self._free[name] -= amount
                got[name] = amount
            else:
                got[name] = self._take_units(name, amount)
        return got

    def give_back(self, needs: dict[str, float], got: dict[str, Any]) -> None:
        """Undo :meth:`take`."""
        for name, amount in needs.items():
            if name in AMOUNTS:
                if name != "cpu":
                    self._free[name] += amount
                continue
            share = 1.0 if amount >= 1 else amount
            for unit in got[name]:
                self._units[name][unit] = round(self._units[name][unit] + share, 9)

    def used(self, name: str) -> float:
        """How much of a resource is held."""
        if name in AMOUNTS:
            return self.capacity.get(name, 0) - self._free.get(name, 0)
        return len(self._units[name]) - sum(self._units[name])

    def _fits(self, name: str, amount: float) -> bool:
        if name == "cpu":
            return True
        if name in AMOUNTS:
            return self._left(name) >= amount
        units = [self._units[name][unit] for unit in self._usable(name)]
        if amount < 1:
            return amount <= 0 or any(free >= amount for free in units)
        return sum(free >= 1.0 for free in units) >= amount

    def _left(self, name: str) -> float:
        """How much of an amount may be taken."""
        return self._free.get(name, 0)

    def _usable(self, name: str) -> Iterable[int]:
        """The units of which something may be taken."""
        return range(len(self._units.get(name, ())))

    def _take_units(self, name: str, amount: float) -> list[int]:
        units = self._units[name]
        share = 1.0 if amount >= 1 else amount
        count = int(amount) if amount >= 1 else int(amount > 0)
        # A share goes where another share already is, so that whole units stay whole.
        order = sorted(self._usable(name), key=lambda unit: (units[unit], unit))
        taken = [unit for unit in order if units[unit] >= share][:count]
        for unit in taken:
            units[unit] = round(units[unit] - share, 9)
        return sorted(taken)
