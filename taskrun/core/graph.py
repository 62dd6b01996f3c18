"""The static graph of a run: families of calls, and how they grow.

The calls of one task are a *family*.  What distinguishes the calls of a family are its
*axes*: each ``each()`` brings the axes of what it iterates over, and, where it takes a
value apart into items, one axis more for the items.  Two parameters that descend from
the same fan-out share its axes and so advance together; axes that are not shared make
the product.  A call's index has one position per axis.

How many positions an axis has may depend on a call that has not ended yet.  So a family
*expands* prefix by prefix: where the next axis's size is not known, the expansion waits
for the call that will tell; where that call fails, one placeholder stands for all the
calls that there will never be.  A generator's items are expanded as they come, and the calls
of a large fan-out are made some at a time, so that the first begin before the last are there.

The graph only keeps the books.  What follows from the end of a call it leaves in
``ready`` (all inputs are there), ``doomed`` (an input is not coming) and ``created``,
for the scheduler to take.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Final

from taskrun import calls as state
from taskrun.calls import FINAL, OK, WAITING, Call
from taskrun.core.families import (
    Axis,
    CallWire,
    Expansion,
    Family,
    Growth,
    Index,
    LiteralWire,
    WholeWire,
    Wire,
    lenders_of,
)
from taskrun.messages import DROP_VALUE, SAY_BEGAN, STOPS, WANT_ITEMS
from taskrun.model import Each, Plan, Result, Task
from taskrun.recipes import make_recipe
from taskrun.values import encode

SLICE: Final = 1024  # calls of a fan-out that are made at a time


class Graph:
    """The families of a plan, and what follows when one of their calls ends."""

    def __init__(
        self,
        plan: Plan,
        new_call: Callable[..., Call],
        new_calls: Callable[..., list[Call]],
        recipe_ids: Iterator[int],
        wanted: Collection[str] = (),
        stops: bool = False,
    ) -> None:
        """``new_call(recipe, index, family)`` makes a call with an id, ``new_calls`` those of a
        range of positions; ``wanted`` names the tasks whose values are kept until the end of
        the run; ``stops``: whether a failure that nobody tolerates stops it."""
        self._new_call = new_call
        self._new_calls = new_calls
        self.ready: list[Call] = []
        self.doomed: list[tuple[Call, Call]] = []
        self.created: list[Call] = []
        self.slice = SLICE
        self.growing: dict[Family, Growth] = {}  # fan-outs whose calls are not all made
        self.families: dict[str, Family] = {}
        self._triggered: list[tuple[int, int, Family, Index, int]] = []
        self._ticket = 0
        self._axes: dict[object, Axis] = {}
        for order, task in enumerate(plan.tasks):
            self.families[task.name] = self._family(task, order)
        self._say_what_is_tolerated()
        for family in self.families.values():
            self._finish(family, plan, recipe_ids, family.name in wanted, stops)

    def begin(self) -> None:
        """Expand every family as far as is known."""
        for family in self.families.values():
            self._trigger(family, ())
        self._expand_triggered()

    # -- building ---------------------------------------------------------------------

    def _family(self, task: Task, order: int) -> Family:
        family = Family(task, order)
        axes: dict[object, Axis] = {}
        for source in task.params.values():
            if isinstance(source, Each):
                for axis in self._axes_of(source):
                    axes.setdefault(axis.key, axis)
        family.axes = tuple(axes.values())
        family.places = {axis.key: place for place, axis in enumerate(family.axes)}
        wires = [
            wire
            for name, source in task.params.items()
            if (wire := self._wire(name, source, family)) is not None
        ]
        family.wires = tuple(wires)
        family.lenders = lenders_of(wires)
        family.after = [self.families[other.name] for other in task.options.after]
        for wire in wires:
            if isinstance(wire, CallWire | WholeWire):
                tolerant = isinstance(wire, WholeWire) and wire.errors != "fail"
                wire.source.consumers.append((family, tolerant))
                family.sources.append(wire.source)
        # How many items an axis has is asked of its source, though no wire may lead there.
        family.sources += [axis.source for axis in family.axes if axis.source is not None]
        for needed in family.sources:
            needed.holds += 1
        for other in family.after:
            other.consumers.append((family, False))
        return family

    def _axes_of(self, source: Each) -> tuple[Axis, ...]:
        # Axes are shared, so that a million literal items are encoded once.
        if source.task is None:
            key: object = ("literal", source.identity)
            if key not in self._axes:
                self._axes[key] = Axis(key, items=[encode(item)[0] for item in source.items])
            return (self._axes[key],)
        of = self.families[source.task.name]
        if not _takes_items(source, of):
            return of.axes
        key = ("items", of.name)
        if key not in self._axes:
            self._axes[key] = Axis(key, source=of)
        return (*of.axes, self._axes[key])

    def _wire(self, name: str, source: Any, family: Family) -> Wire | None:
        if isinstance(source, Result):
            return WholeWire(name, self.families[source.task.name], source.errors)
        if not isinstance(source, Each):
            return None
        places, alone = family.places, len(family.axes) == 1
        if source.task is None:
            axis = self._axes[("literal", source.identity)]
            return LiteralWire(name, axis.items, None if alone else places[axis.key])
        of = self.families[source.task.name]
        positions = tuple(places[axis.key] for axis in of.axes)
        item = places[("items", of.name)] if _takes_items(source, of) else None
        return CallWire(name, of, positions, item)

    def _finish(
        self, family: Family, plan: Plan, recipe_ids: Iterator[int], wanted: bool, stops: bool
    ) -> None:
        """What can only be known when all consumers are."""
        options = family.task.options
        takes_value = wanted or any(
            _takes_value(wire, family) for other, _ in family.consumers for wire in other.wires
        )
        flags = SAY_BEGAN if options.says_began else 0
        flags |= WANT_ITEMS if ("items", family.name) in self._axes else 0
        flags |= 0 if takes_value else DROP_VALUE
        flags |= STOPS if stops and not family.tolerated else 0
        family.holds += wanted
        family.recipe = make_recipe(
            family.task,
            next(recipe_ids),
            names=tuple(wire.name for wire in family.wires),
            constants=plan.constants.get(family.name, {}),
            flags=flags,
        )

    def _say_what_is_tolerated(self) -> None:
        """A failure is tolerated where all consumers take it, directly or by being skipped
        where that is tolerated in turn.  Teardown (``always=``) has no say."""
        for family in reversed(self.families.values()):  # consumers first
            verdicts = [
                takes or consumer.tolerated
                for consumer, takes in family.consumers
                if takes or not consumer.task.options.always
            ]
            family.tolerated = bool(verdicts) and all(verdicts)

    # -- expansion --------------------------------------------------------------------

    def _trigger(self, family: Family, prefix: Index, done: int = 0) -> None:
        # In the order of the graph, so that what an expansion looks up is there already.
        family.pending += 1
        family.open += 1
        self._ticket += 1
        heapq.heappush(self._triggered, (family.order, self._ticket, family, prefix, done))

    def _expand_triggered(self) -> None:
        while self._triggered:
            _, _, family, prefix, done = heapq.heappop(self._triggered)
            self._expand(family, prefix, done)
            self._expanded(family)

    def _expand(self, family: Family, prefix: Index, done: int = 0) -> None:
        """Expand what is known beyond ``prefix``, from item ``done`` of its axis on."""
        level = len(prefix)
        if level == len(family.axes):
            self._create(family, prefix or None)
            return
        axis = family.axes[level]
        if axis.source is None:
            count = len(axis.items)
        else:
            places = family.places
            source = axis.source.at(tuple(prefix[places[each.key]] for each in axis.source.axes))
            count = len(source.items or ())
            if source.state not in FINAL:
                if source.expansions is None:
                    source.expansions = []
                source.expansions.append(Expansion(family, prefix, count))
                family.pending += 1
                family.open += 1
        self._expand_items(family, prefix, done, count)
        if axis.source is not None and source.state in FINAL and source.state != OK:
            self._placeholder(family, prefix, source)

    def _expand_items(self, family: Family, prefix: Index, first: int, end: int) -> None:
        if len(family.axes) > 1:
            self.grow_up()  # what is looked up has to be there
            for position in range(first, end):
                self._expand(family, (*prefix, position))
        elif family in self.growing:
            self.growing[family].end = end
        elif end - first <= self.slice:
            self._create_all(family, first, end)
        else:
            self._create_all(family, first, first + self.slice)
            self.growing[family] = Growth(first + self.slice, end)
            family.pending += 1
            family.open += 1

    def _create_all(self, family: Family, first: int, end: int) -> None:
        used = family.free_of(end)
        if used is None:
            for position in range(first, end):
                self._create(family, position)
            return
        for call in used:
            call.users += end - first
        self._create_free(family, range(first, end))

    def grow(self) -> None:
        """Make some more of the calls of large fan-outs.  Those that share an axis grow in
        step, so that what a call looks up is there already."""
        for family, growth in list(self.growing.items()):
            first, growth.next = growth.next, min(growth.next + self.slice, growth.end)
            self._create_all(family, first, growth.next)
            if growth.next == growth.end:
                del self.growing[family]
                self._expanded(family)

    def grow_up(self) -> None:
        """Make all calls that are to come."""
        while self.growing:
            self.grow()

    @property
    def to_come(self) -> int:
        """How many calls are known of that are not made yet."""
        return sum(growth.end - growth.next for growth in self.growing.values())

    def streamed(self, call: Call) -> None:
        """More items of a running generator are there."""
        count = len(call.items or ())
        for expansion in sorted(call.expansions or (), key=lambda each: each.family.order):
            first, expansion.done = expansion.done, count
            self._expand_items(expansion.family, expansion.prefix, first, count)

    def _expanded(self, family: Family) -> None:
        """One expansion of ``family`` is over, well or not."""
        family.pending -= 1
        if not family.pending:
            for source in family.sources:
                source.holds -= 1
                if not source.holds:
                    self._free_all(source.calls)
        self._one_less(family)

    def _create_free(self, family: Family, positions: range) -> None:
        """What :meth:`_create` does, for calls that wait for nobody: often very many."""
        calls = self._new_calls(family.recipe, positions, family)
        family.calls += calls
        family.open += len(calls)
        self.created += calls
        self.ready += calls

    def _create(self, family: Family, index: Any) -> None:
        call = self._add(family, index)
        for wire in family.wires:
            wire.hold(call)
            if type(wire) is CallWire:
                used = wire.call(call.index)
                if wire.has_come(used, index):
                    continue
                if used.state not in FINAL:
                    call.needs += 1
                    if used.dependants is None:
                        used.dependants = []
                    used.dependants.append(call)
                elif used.state != OK and not family.task.options.always:
                    self.doomed.append((call, used))
            elif type(wire) is WholeWire:
                self._await_family(call, wire.source, wire.errors != "fail")
        for other in family.after:
            self._await_family(call, other, False)
        if not call.needs:
            self.ready.append(call)

    def _placeholder(self, family: Family, prefix: Index, source: Call) -> None:
        self.grow_up()  # behind all others
        call = self._add(family, prefix)
        call.needs = -1  # never ready: it stands for calls that nobody can count
        self.doomed.append((call, source))

    def _add(self, family: Family, index: Any) -> Call:
        call = self._new_call(family.recipe, index, family)
        family.calls.append(call)
        if type(index) is tuple:
            family.by_index[index] = call
        family.open += 1
        self.created.append(call)
        return call

    def _await_family(self, call: Call, other: Family, tolerant: bool) -> None:
        tolerant = tolerant or call.recipe.always
        if not other.closed:
            call.needs += 1
            other.waiters.append((call, tolerant))
        elif other.first_bad is not None and not tolerant:
            self.doomed.append((call, other.first_bad))

    # -- the end of a call ------------------------------------------------------------

    def ended(self, call: Call) -> None:
        """A call reached its final state: who was waiting for it?"""
        if call.dependants is not None:
            dependants, call.dependants = call.dependants, None
            for dependant in dependants:
                self._input_ended(dependant, call)
        if call.expansions is not None:
            expansions, call.expansions = call.expansions, None
            for waiting in expansions:
                waiting.family.pending -= 1
                waiting.family.open -= 1
                self._trigger(waiting.family, waiting.prefix, waiting.done)
        family_of = call.family
        if family_of is not None:
            if call.state != OK and family_of.first_bad is None:
                family_of.first_bad = call
            if family_of.sources and call.needs >= 0:
                for wire in family_of.wires:
                    self._free_all(wire.release(call))
            self._one_less(family_of)
        if call.inputs is not None:
            self.let_inputs_go(call)
        if call.state == OK:
            self._free(call)
        if self._triggered:
            self._expand_triggered()

    def all_ended_well(self, calls: list[Call]) -> None:
        """These calls succeeded; see :meth:`ended`."""
        for call in calls:
            family = call.family
            lenders = None if family is None else family.lenders
            if lenders is None or call.dependants is not None or call.expansions is not None:
                self.ended(call)
                continue
            if not (call.users or family.holds or family.users):
                call.value = None
            for source in lenders:
                self.release(source.calls[0])
            family.open -= 1
            if not family.open:
                self._close(family)

    def _input_ended(self, call: Call, used: Call) -> None:
        if call.state != WAITING and call.state != state.HELD:
            return
        if used.state == OK or (call.recipe.always and call.state == WAITING):
            call.needs -= 1
            if not call.needs:
                self.ready.append(call)
        else:
            self.doomed.append((call, used))

    def _one_less(self, family: Family) -> None:
        family.open -= 1
        if not (family.open or family.closed):
            self._close(family)

    def _close(self, family: Family) -> None:
        family.closed = True
        waiters, family.waiters = family.waiters, []
        for call, tolerant in waiters:
            if call.state != WAITING:
                continue
            if family.first_bad is not None and not tolerant:
                self.doomed.append((call, family.first_bad))
                continue
            call.needs -= 1
            if not call.needs:
                self.ready.append(call)

    # -- letting values go ------------------------------------------------------------

    def _free_all(self, calls: Iterable[Call]) -> None:
        for call in calls:
            self._free(call)

    def _free(self, call: Call) -> None:
        """Let a value go when nobody can ask for it any more."""
        if call.users or call.state not in FINAL:
            return
        family = call.family
        if family is not None and (family.holds or family.users):
            return
        call.value = call.items = None

    def let_inputs_go(self, call: Call) -> None:
        """``call`` needs the futures in its arguments, or in its value, no more."""
        inputs, call.inputs = call.inputs or {}, None
        for used in inputs.values():
            self.release(used)

    def release(self, call: Call) -> None:
        """One who may ask for ``call``'s value is gone."""
        call.users -= 1
        self._free(call)


def _takes_items(source: Each, of: Family) -> bool:
    return source.flat or of.single or of.task.is_generator


def _takes_value(wire: Wire, family: Family) -> bool:
    if isinstance(wire, CallWire):
        return wire.source is family and wire.item is None
    return isinstance(wire, WholeWire) and wire.source is family
