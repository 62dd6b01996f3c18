"""How many calls may run, or start in a time, wherever they run: ``@task(limits=)``.

A limit has a *gate* for every value of its key.  A call whose gate is closed is *parked* at
it: it is ready, takes no place in a queue and holds no worker.  A gate that opens sends the
call that has been there longest back to be considered again.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator

from taskrun.calls import Call
from taskrun.core.timers import Timers
from taskrun.model import Bound

MANY = 1000  # gates after which those that nobody needs are looked for

Keys = tuple[Hashable, ...]
"""The value of each limit's key for one call; None where a limit has no key."""


class Gate:
    """One limit for one value of its key.

    ``inside``: the calls that run, where their number is bounded; ``starts``: when the last
    ones began, where that is.  ``before``: how many calls stand before it or are parked.
    ``parked``: by recipe, since those of one recipe may lack something else meanwhile.
    """

    __slots__ = ("before", "bound", "inside", "parked", "starts", "timed")

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.inside: set[int] = set()
        self.starts: deque[float] = deque(maxlen=bound.most)
        self.parked: dict[int, OrderedDict[int, Call]] = {}
        self.timed = False  # a timer will open it
        self.before = 0

    def opens(self, now: float) -> float | None:
        """When another call may pass; None: when one that is inside ends."""
        if self.bound.per is None:
            return now if len(self.inside) < self.bound.most else None
        if len(self.starts) < self.bound.most:
            return now
        return max(now, self.starts[0] + self.bound.per)

    def park(self, call: Call, first: bool) -> None:
        """``call`` cannot pass; ``first``: it was let out before."""
        line = self.parked.setdefault(call.recipe.id, OrderedDict())
        line[call.id] = call
        if first:
            line.move_to_end(call.id, last=False)

    def unpark(self, call: Call) -> None:
        """``call`` is parked here no more."""
        line = self.parked[call.recipe.id]
        del line[call.id]
        if not line:
            del self.parked[call.recipe.id]

    def next_parked(self, count: int) -> list[Call]:
        """The first ``count`` of each recipe."""
        lines = self.parked.values()
        return [call for line in lines for call in itertools.islice(line.values(), count)]

    def is_rested(self, now: float) -> bool:
        """Whether no start counts any more."""
        return not self.starts or self.starts[-1] + (self.bound.per or 0.0) <= now


class Limits:
    """The gates of a run, and who is inside and parked."""

    def __init__(
        self,
        timers: Timers,
        keys_of: Callable[[Call], Keys],
        again: Callable[[list[Call]], None],
    ) -> None:
        """``keys_of(call)`` may run code of the task file, and raise anything.  ``again``
        takes the calls that are to be considered again."""
        self._timers = timers
        self._keys_of = keys_of
        self._again = again
        self._gates: dict[tuple[str, Hashable], Gate] = {}
        self._passed: dict[int, tuple[Gate, ...]] = {}  # of the calls inside
        self._known: dict[int, tuple[Gate, ...]] = {}  # of those that were considered
        self._parked: dict[int, tuple[Gate, Call]] = {}
        self._let_out: set[int] = set()
        self._many = MANY

    def admit(self, call: Call, now: float) -> bool:
        """Let ``call`` pass all its gates, or park it at one that is closed.

        Raises what the key function of a limit raises.
        """
        gates = self._gates_of(call, now)
        self._unpark(call)
        for gate in gates:
            if gate.opens(now) != now:
                self._park(call, gate, gates, now)
                return False
        self._forget(call)
        self._passed[call.id] = gates
        for gate in gates:
            if gate.bound.per is None:
                gate.inside.add(call.id)
            else:
                gate.starts.append(now)
            if gate.parked:
                self._open_when_due(gate, now)
        return True

    def leave(self, call: Call) -> None:
        """The attempt of ``call`` is over, if it is inside."""
        for gate in self._passed.pop(call.id, ()):
            gate.inside.discard(call.id)
            self._open(gate, 1)

    def holders(self, call: Call) -> Iterator[tuple[Gate, set[int]]]:
        """The gates that keep ``call`` out until a call that is inside ends."""
        for gate in self._known.get(call.id, ()):
            if gate.bound.per is None and len(gate.inside) >= gate.bound.most:
                yield gate, gate.inside

    def keeps_out(self, call: Call, now: float) -> bool:
        """Whether it is parked at a gate that is closed."""
        gate = self._parked.get(call.id, (None, call))[0]
        return gate is not None and gate.opens(now) != now

    def give_up(self, call: Call) -> bool:
        """``call`` is not going to pass; whether it was parked."""
        was_parked = self._unpark(call)
        for gate in self._forget(call):
            self._open(gate, 1)  # it was perhaps let out of this one for nothing
        return was_parked

    def _unpark(self, call: Call) -> bool:
        gate = self._parked.pop(call.id, (None, call))[0]
        if gate is not None:
            gate.unpark(call)
        return gate is not None

    @property
    def parked_count(self) -> int:
        """How many calls are parked."""
        return len(self._parked)

    def parked(self) -> list[Call]:
        """All calls that are parked."""
        return [call for _, call in self._parked.values()]

    def clear(self) -> list[Call]:
        """Take away all that are parked, and forget who was considered."""
        parked = self.parked()
        for gate, _ in self._parked.values():
            gate.parked.clear()
        self._parked.clear()
        for gates in self._known.values():
            for gate in gates:
                gate.before -= 1
        self._known.clear()
        self._let_out.clear()
        return parked

    def stuck(self) -> list[Call]:
        """The calls that are parked until another one ends."""
        return [call for gate, call in self._parked.values() if gate.bound.per is None]

    def consider_again(self, holder: Call) -> None:
        """``holder`` begins to wait: can those go on that it keeps out?"""
        for gate in self._passed.get(holder.id, ()):
            if gate.bound.per is None:
                self._open(gate, len(self._parked))

    def why(self, call: Call) -> str | None:
        """What keeps a parked call, for people."""
        parked = self._parked.get(call.id)
        return None if parked is None else str(parked[0].bound)

    def closed_to(self, call: Call, now: float) -> str | None:
        """What would keep a call that is not considered yet, for people; without its keys, for
        which code of the task file would have to run."""
        gates: Iterable[Gate | None] = self._known.get(call.id) or [
            self._gates.get((bound.identity, None)) for bound in call.recipe.limits
        ]
        for gate in gates:
            if gate is not None and gate.opens(now) != now:
                return str(gate.bound)
        return None

    # -- gates ------------------------------------------------------------------------

    def _gates_of(self, call: Call, now: float) -> tuple[Gate, ...]:
        known = self._known.get(call.id)
        if known is None:
            bounds = call.recipe.limits
            keys: Keys = (None,) * len(bounds)
            if any(bound.keyed for bound in bounds):
                keys = self._keys_of(call)
            pairs = zip(bounds, keys, strict=True)
            known = tuple([self._gate(bound, key if bound.keyed else None, now)
                           for bound, key in pairs])  # fmt: skip
            for gate in known:
                gate.before += 1
            self._known[call.id] = known
        return known

    def _gate(self, bound: Bound, key: Hashable, now: float) -> Gate:
        place = (bound.identity, key)
        gate = self._gates.get(place)
        if gate is None:
            if len(self._gates) >= self._many:
                self._tidy_up(now)
            gate = self._gates[place] = Gate(bound)
        return gate

    def _tidy_up(self, now: float) -> None:
        """Let go of gates that nobody needs, such as those of hosts that were crawled."""
        for place, gate in list(self._gates.items()):
            if not gate.before and not gate.inside and gate.is_rested(now):
                del self._gates[place]
        self._many = max(MANY, 2 * len(self._gates))

    def _forget(self, call: Call) -> tuple[Gate, ...]:
        """``call`` stands before no gate any more; gives those where it stood."""
        self._let_out.discard(call.id)
        gates = self._known.pop(call.id, ())
        for gate in gates:
            gate.before -= 1
        return gates

    def _park(self, call: Call, gate: Gate, gates: tuple[Gate, ...], now: float) -> None:
        gate.park(call, first=call.id in self._let_out)
        self._let_out.discard(call.id)
        self._parked[call.id] = gate, call
        self._open_when_due(gate, now)
        for other in gates:
            if other is not gate and other.parked and other.opens(now) == now:
                self._open(other, 1)  # it was perhaps let out of this one for nothing

    def _open_when_due(self, gate: Gate, now: float) -> None:
        due = gate.opens(now)
        if due is not None and not gate.timed:
            gate.timed = True
            self._timers.at(due, lambda: self._time_to_open(gate, due))

    def _time_to_open(self, gate: Gate, now: float) -> None:
        gate.timed = False
        per = gate.bound.per or 0.0
        self._open(gate, max(1, sum(start + per <= now for start in gate.starts)))

    def _open(self, gate: Gate, count: int) -> None:
        """Let the first ``count`` calls of each recipe be considered again; what cannot pass is
        parked again."""
        out = gate.next_parked(count)
        for call in out:
            gate.unpark(call)
            del self._parked[call.id]
            self._let_out.add(call.id)
        if out:
            self._again(out)
