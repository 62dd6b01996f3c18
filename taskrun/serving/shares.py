"""Who gets how many of the slots: a pure function of what there is and who wants it.

Slots go to those that have work for them, in equal parts, but for one slot; what nobody has
work for goes to all in equal parts, so that it is there when work comes.  A run has its slots
where it needs them, for the resources there, and else keeps the places that it has, as far as
it may: to move costs it workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

Shares: TypeAlias = dict[str, dict[str, int]]


class Wish(NamedTuple):
    """``most``: slots that a run may have; ``wants``: those that it has work for.  None: any
    number."""

    most: int | None = None
    wants: int | None = None

    def without(self, idle: int) -> Wish:
        """It has no work for these, after all."""
        return self if self.wants is None else self._replace(wants=max(0, self.wants - idle))


def deal(
    places: Mapping[str, int],
    runs: Mapping[str, Wish],
    before: Shares,
    pins: Shares | None = None,
) -> Shares:
    """run -> place -> slots; places where a run has none are left out.

    ``places``: slots by place.  ``runs``: in order of arrival, the first are served first.
    ``before``: who has what.  ``pins``: where runs need some in any case, no more than there
    are.
    """
    pins = pins or {}
    return _place(places, numbers(sum(places.values()), runs, pins), before, pins)


def numbers(left: int, runs: Mapping[str, Wish], pins: Shares) -> dict[str, int]:
    """How many of ``left`` slots each run gets."""
    most = {run: left if wish.most is None else wish.most for run, wish in runs.items()}
    wanted = {
        run: most[run] if wish.wants is None else min(most[run], wish.wants)
        for run, wish in runs.items()
    }
    have = {run: sum(pins.get(run, {}).values()) for run in runs}
    left -= sum(have.values())
    _fill(have, most, _fill(have, wanted, left))
    return have


def _fill(have: dict[str, int], most: Mapping[str, int], left: int) -> int:
    """Give out ``left`` to those that have least, up to the most that each may have; gives
    what is over."""
    while takers := [one for one in have if left and have[one] < most[one]]:
        level = min(have[one] for one in takers)
        lowest = [one for one in takers if have[one] == level]
        steps = [most[one] - level for one in lowest]
        steps += [have[one] - level for one in takers if have[one] > level]
        step = max(1, min(*steps, left // len(lowest)))
        for one in lowest[:left]:
            have[one] += step
            left -= step
    return left


def _place(
    places: Mapping[str, int], numbers: Mapping[str, int], before: Shares, pins: Shares
) -> Shares:
    """Which slots those are: so many for each run."""
    free = {place: slots - sum(of.get(place, 0) for of in pins.values())
            for place, slots in places.items()}  # fmt: skip
    dealt: Shares = {}
    for run, number in numbers.items():
        had, kept = before.get(run, {}), dict(pins.get(run, {}))
        room = {place: min(had[place] - kept.get(place, 0), free[place])
                for place in free if place in had}  # fmt: skip
        others = dict.fromkeys(room, 0)
        _fill(others, room, number - sum(kept.values()))
        for place, slots in others.items():
            free[place] -= slots
            kept[place] = kept.get(place, 0) + slots
        dealt[run] = kept
    missing = {run: number - sum(dealt[run].values()) for run, number in numbers.items()}
    for place, slots in free.items():
        taken = dict.fromkeys(missing, 0)
        _fill(taken, missing, slots)
        for run, more in taken.items():
            missing[run] -= more
            dealt[run][place] = dealt[run].get(place, 0) + more
    return {
        run: {place: slots for place, slots in of.items() if slots} for run, of in dealt.items()
    }
