"""What the runs of a server say of resources that they share, and what they are told.

    run:     demand    what its calls need, and what those hold that wait
             back      what it gives back
    server:  loan      what more it has, and how much it may have altogether

What was lent is the run's until it gives it back, and only the server lends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias

HERE: Final = "local"
"""The place that is the server's own machine, among the names of nodes."""

MEMORY: Final = "memory"
"""The resource that is lent and has no units."""

Amounts: TypeAlias = dict[str, float]
"""How much, by the name of the resource."""
Lot: TypeAlias = dict[str, dict[str, Any]]
"""place -> name -> the numbers of units, or of what has no units (memory) how much."""


class Need(NamedTuple):
    """So many calls need this, each, and so many slots of the machine where it is; whether they
    are ``submitted``: then others may wait for them, and hold something."""

    amounts: Amounts
    slots: float
    calls: int
    submitted: bool = False


def need_of(
    resources: Mapping[str, float], calls: int, *, one_by_one: bool, submitted: bool = False
) -> Need | None:
    """What ``calls`` calls need of what is lent; None: nothing.  ``one_by_one``: each takes
    slots while it runs.

    Whole units are lent: parts of one are for calls of one run.
    """
    amounts = {name: much for name, much in resources.items() if name != "cpu" and much > 0}
    if not amounts:
        return None
    together = int(1 / max(amounts.values()) + 1e-9)  # calls in one unit; of memory none
    whole = {name: much if name == MEMORY else float(math.ceil(much))
             for name, much in amounts.items()}  # fmt: skip
    slots = resources.get("cpu", 1.0) if one_by_one else 0.0
    return Need(whole, slots, -(-calls // max(1, together)), submitted)


class Demand(NamedTuple):
    """``needs``: of the calls that run and could run, in the order in which they are to start.
    ``waits``: what is held by calls that wait for others, by place.  ``stuck``: nothing in the
    run goes on before it is lent more, for the so manieth time; 0: something does."""

    needs: list[Need]
    waits: dict[str, Amounts]
    stuck: int


NO_DEMAND: Final = Demand([], {}, 0)


def demand_from(said: Any) -> Demand:
    """The Demand in a message.  Raises what is in ``errors.MALFORMED``."""
    needs, waits, stuck = said
    return Demand(
        [_need(*need) for need in needs],
        {str(place): _amounts(amounts) for place, amounts in waits.items()},
        int(stuck),
    )


def _need(amounts: Any, slots: Any, calls: Any, submitted: Any) -> Need:
    return Need(_amounts(amounts), float(slots), int(calls), bool(submitted))


def _amounts(said: Mapping[Any, Any]) -> Amounts:
    return {str(name): float(amount) for name, amount in said.items()}


class Loan(NamedTuple):
    """``more``: what is lent now.  ``most``: how much there is to be of each, at most, by
    place; what is more is to come back as soon as no call holds it.  ``awaited``: resources
    that only submitted calls may take, since another run waits for them.  ``stock``: what all
    places have together.  ``last``: no more will come, as things are."""

    most: dict[str, Amounts]
    more: Lot
    awaited: list[str]
    stock: Amounts
    last: bool
