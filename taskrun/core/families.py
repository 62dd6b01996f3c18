"""Families of calls, and the wires by which arguments reach them; see ``graph``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from taskrun.calls import OK, Call
from taskrun.model import Encoded, Recipe, Task

Index = tuple[int, ...]


class Axis:
    """One dimension of a fan-out: literal items, or the items of ``source``'s calls."""

    __slots__ = ("items", "key", "source")

    def __init__(
        self, key: object, source: Family | None = None, items: list[Encoded] | None = None
    ) -> None:
        self.key = key
        self.source = source
        self.items = items or []


class Expansion:
    """A fan-out that waits for the items of a call: those before ``done`` are expanded."""

    __slots__ = ("done", "family", "prefix")

    def __init__(self, family: Family, prefix: Index, done: int) -> None:
        self.family = family
        self.prefix = prefix
        self.done = done


class Growth:
    """The positions of a fan-out whose calls are still to be made."""

    __slots__ = ("end", "next")

    def __init__(self, next: int, end: int) -> None:
        self.next = next
        self.end = end


class Family:
    """The calls of one task.

    ``open`` counts calls that have not ended and expansions that still wait; at zero the
    family is closed.  ``holds`` counts consumers that may yet create calls, ``users`` live
    calls that take the whole family: while either is there, values are kept.
    ``lenders``: where its calls take nothing but literals and items of single calls, whose
    those are; else None.
    """

    __slots__ = (
        "after",
        "axes",
        "by_index",
        "calls",
        "closed",
        "consumers",
        "first_bad",
        "holds",
        "lenders",
        "name",
        "open",
        "order",
        "pending",
        "places",
        "recipe",
        "sources",
        "task",
        "tolerated",
        "users",
        "waiters",
        "wires",
    )

    def __init__(self, task: Task, order: int) -> None:
        self.task = task
        self.name = task.name
        self.order = order
        self.recipe: Recipe
        self.axes: tuple[Axis, ...] = ()
        self.places: dict[object, int] = {}  # axis key -> position in an index
        self.wires: tuple[Wire, ...] = ()
        self.lenders: tuple[Family, ...] | None = None
        self.after: list[Family] = []
        self.sources: list[Family] = []  # those whose values, or their items, it takes
        self.consumers: list[tuple[Family, bool]] = []  # and whether they take failures
        self.calls: list[Call] = []
        self.by_index: dict[Index, Call] = {}
        self.waiters: list[tuple[Call, bool]] = []
        self.pending = 0
        self.open = 0
        self.closed = False
        self.first_bad: Call | None = None
        self.holds = 0
        self.users = 0
        self.tolerated = False

    def free_of(self, end: int) -> list[Call] | None:
        """Where its calls before position ``end`` need nothing but items that are there: the
        calls whose items those are; else None."""
        if self.after or self.lenders is None:
            return None
        used = [source.calls[0] for source in self.lenders]
        return used if all(len(call.items or ()) >= end for call in used) else None

    @property
    def single(self) -> bool:
        return not self.axes

    def at(self, index: Index) -> Call:
        """The call at a full index."""
        if len(self.axes) > 1:
            return self.by_index[index]
        return self.calls[index[0] if index else 0]

    def in_order(self) -> list[Call]:
        """All calls, in item order, placeholders in the places of what they stand for: behind
        the items that were there before the failure."""
        if len(self.axes) > 1:
            self.calls.sort(key=_place)
        return self.calls


def _place(call: Call) -> tuple[float, ...]:
    index: Index = call.index
    return (*index, math.inf) if call.placeholder else index


# -- wires: how an argument is fetched ------------------------------------------------


class Wire:
    """Where one parameter of a family's calls comes from."""

    __slots__ = ("name",)
    name: str

    def fetch(self, index: Any) -> Encoded:
        """The argument of the call at ``index``."""
        raise NotImplementedError

    def hold(self, call: Call) -> None:
        """A call that uses this wire was created."""

    def release(self, call: Call) -> Iterator[Call]:
        """Such a call has ended; gives the calls that it used."""
        return iter(())


class LiteralWire(Wire):
    """``each([1, 2, 3])``: an item of a literal axis."""

    __slots__ = ("items", "position")

    def __init__(self, name: str, items: list[Encoded], position: int | None) -> None:
        self.name = name
        self.items = items
        self.position = position  # None: the family has this axis only

    def fetch(self, index: Any) -> Encoded:
        return self.items[index if self.position is None else index[self.position]]


class CallWire(Wire):
    """``each(fan-out)``: the value of the source's call at the same positions; or, with
    ``item``, one of that value's items."""

    __slots__ = ("item", "positions", "source")

    def __init__(
        self, name: str, source: Family, positions: tuple[int, ...], item: int | None
    ) -> None:
        self.name = name
        self.source = source
        self.positions = positions
        self.item = item

    def call(self, index: Any) -> Call:
        if type(index) is not tuple:  # one axis, which the source shares or brings as items
            return self.source.calls[index if self.positions else 0]
        return self.source.at(tuple([index[position] for position in self.positions]))

    def fetch(self, index: Any) -> Encoded:
        call = self.call(index)
        items = call.items
        if self.item is not None and items is not None:
            place = index[self.item] if type(index) is tuple else index
            if place < len(items):
                return items[place]
        if call.state != OK:
            return call.ended_as()  # only for always= tasks
        return call.value

    def has_come(self, call: Call, index: Any) -> bool:
        """Whether it takes an item, and that is there, however ``call`` is or ends."""
        if self.item is None or call.items is None:
            return False
        place: int = index[self.item] if type(index) is tuple else index
        return place < len(call.items)

    def hold(self, call: Call) -> None:
        self.call(call.index).users += 1

    def release(self, call: Call) -> Iterator[Call]:
        used = self.call(call.index)
        used.users -= 1
        yield used


class WholeWire(Wire):
    """``result(t)``: the value of a single call, or the list of a fan-out's values."""

    __slots__ = ("errors", "source")

    def __init__(self, name: str, source: Family, errors: str) -> None:
        self.name = name
        self.source = source
        self.errors = errors

    def fetch(self, index: Any) -> Encoded:
        if self.source.single:
            call = self.source.calls[0]
            if call.state == OK:
                return call.value
            return None if self.errors == "skip" else call.ended_as()
        if self.errors == "skip":
            return [call.value for call in self.source.in_order() if call.state == OK]
        return [
            call.value if call.state == OK else call.ended_as() for call in self.source.in_order()
        ]

    def hold(self, call: Call) -> None:
        self.source.users += 1

    def release(self, call: Call) -> Iterator[Call]:
        self.source.users -= 1
        return iter(self.source.calls) if not self.source.users else iter(())


def lenders_of(wires: Iterable[Wire]) -> tuple[Family, ...] | None:
    """The single calls' families of which each call of the one with these wires takes an item;
    None: its calls take something else, too."""
    lenders = []
    for wire in wires:
        if type(wire) is CallWire and wire.item is not None and not wire.positions:
            lenders.append(wire.source)
        elif type(wire) is not LiteralWire:
            return None
    return tuple(lenders)
