"""Who gets how many of the slots: a pure function of what there is and who is there.

Slots are dealt one by one, each to the run that has the fewest: so runs have equal shares,
but for one slot, and where there is a slot for each of them nobody goes without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

Shares: TypeAlias = dict[str, dict[str, int]]


def deal(places: Mapping[str, int], runs: Mapping[str, int | None]) -> Shares:
    """run -> place -> slots; places where a run has none are left out.

    ``places``: slots by place.  ``runs``: the most that each may have, None: any number;
    in order of arrival, the first are served first.
    """
    dealt: Shares = {run: {} for run in runs}
    have = dict.fromkeys(runs, 0)
    for place, slots in places.items():
        for _ in range(slots):
            takers = [run for run, most in runs.items() if most is None or have[run] < most]
            if not takers:
                return dealt
            taker = min(takers, key=have.__getitem__)
            have[taker] += 1
            dealt[taker][place] = dealt[taker].get(place, 0) + 1
    return dealt
