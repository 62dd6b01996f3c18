"""What the scheduler keeps of a run, and the questions that its parts ask of it.

The scheduler has four layers over this ground, each in a module of its own: ``attempts``
(how attempts begin and end), ``children`` (calls that make calls, and wait for them),
``bunches`` (small calls that travel together) and ``scheduler`` (what an event means for the
run).
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from taskrun import messages as m
from taskrun.calls import RUNNING, Call
from taskrun.core.borrowed import Borrowed
from taskrun.core.claims import Claims
from taskrun.core.crowd import Crowd
from taskrun.core.graph import Graph
from taskrun.core.limits import Keys, Limits
from taskrun.core.placement import Placement
from taskrun.core.resources import Resources
from taskrun.core.timers import Timer, Timers
from taskrun.core.workforce import Home, Wait, Worker
from taskrun.demand import HERE, Demand, Lot, need_of
from taskrun.model import LANES, Plan, Recipe

PROCESS = "process"
SPARE_FACTOR = 4  # workers a slot, when calls lend theirs


class Books:
    """One run: its calls, its workers, and what is to happen next.

    ``slots`` is ``-j``.  ``policy``: ``stop`` (after a failure start nothing new),
    ``keep-going`` or ``fail-fast`` (interrupt what runs, too).  ``wanted`` names the tasks
    whose values are kept.  ``open_feed``: calls will come by ``Fed``.  ``keep``: whether
    calls are remembered when they have ended.  ``standing``: so many workers are wanted even
    while there is nothing to do.  ``most_calls``: how many a worker executes before another
    takes its place.  ``lanes``: those that have workers of their own, and how many at most;
    the calls of the others are executed as those of the lane ``process``.  ``engine``: these
    go to workers that come by themselves and execute many at a time.  ``limit_keys`` gives
    the value of each of a call's limits' keys.  ``growing``: other machines may come,
    with more slots and what nobody has yet.  ``borrows``: a server lends this run, in shares,
    what machines have of resources; until then it has none.
    ``seed`` makes the jitter of retries repeatable.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        slots: int,
        recipe_ids: Iterator[int],
        policy: str = "stop",
        resources: dict[str, float] | None = None,
        wanted: Collection[str] = (),
        spare_factor: int = SPARE_FACTOR,
        ahead: bool = True,
        open_feed: bool = False,
        keep: bool = True,
        standing: int = 0,
        most_calls: int | None = None,
        lanes: Mapping[str, int] | None = None,
        engine: bool = False,
        limit_keys: Callable[[Call], Keys] | None = None,
        growing: bool = False,
        borrows: bool = False,
        seed: int | None = None,
    ) -> None:
        self.policy = policy
        self.calls: list[Call] = []
        self._keep = keep
        self._open: dict[int, Call] = {}  # where none are kept: those that have not ended
        self._made = 0
        self.status = 0
        self.stopping = ""  # why
        self.over = False
        self.paused = False
        self.growing = growing
        most = math.inf if growing else slots
        has = {"cpu": most, **(resources or {})}
        self.resources = Borrowed(HERE, has) if borrows else Resources(has)
        self.graph = Graph(
            plan, self._new_call, self._new_calls, recipe_ids, wanted, policy != "keep-going"
        )
        self._timers = Timers()
        self._out: list[m.Command] = []
        self._workers: dict[int, Worker] = {}
        self._limits = Limits(self._timers, limit_keys or _no_keys, self._consider_again)
        self._claims = Claims(self.resources, slots, self._limits, self._workers)
        self.placement = Placement(
            slots, spare_factor, ahead, self._claims, self._timers, self._workers, self._out
        )
        self.placement.standing = standing
        self.placement.most_calls = most_calls
        self._homes = self._make_homes(lanes or {}, engine)
        self._ready = {lane: home.ready for lane, home in self._homes.items()}
        self._busy_homes = list(dict.fromkeys(self._homes.values()))
        self._random = random.Random(seed)
        self._live = 0  # calls that have not ended
        self._feeding = open_feed
        self._ordinals: dict[int, int] = {}
        self._idle_deaths: deque[float] = deque()
        self._yielded: dict[int, int] = {}  # how many items the current attempts have delivered
        self._timeouts: dict[int, Timer] = {}
        self._given_up = 0  # calls for which a server would lend nothing more
        self._wakings: dict[int, float] = {}  # when calls that sleep are tried again
        self._now = 0.0
        self._handlers = self._make_handlers()

    def _make_homes(self, lanes: Mapping[str, int], engine: bool) -> dict[str, Home]:
        """Who gives each lane's calls to workers."""
        process: Home = self.placement
        if engine:
            process = Crowd(PROCESS, 0, self._claims, self._workers, self._out)
        homes = dict.fromkeys(LANES, process)
        for lane, most in lanes.items():
            homes[lane] = Crowd(lane, most, self._claims, self._workers, self._out)
        self.placement.lanes = {lane for lane, home in homes.items() if home is self.placement}
        return homes

    # -- what is asked ----------------------------------------------------------------

    def is_running(self, id: int, attempt: int) -> bool:
        """Whether that attempt of a call is being executed, or about to be."""
        call = self._current(id, attempt)
        return call is not None and call.state is RUNNING

    def title_of(self, id: int) -> str:
        """What people call that call, while it is kept."""
        call = self._find(id)
        return call.title if call is not None else f"call {id}"

    def is_assigned(self, id: int) -> bool:
        """Whether a worker has that call."""
        call = self._find(id)
        return call is not None and call.state is RUNNING

    def _current(self, id: int, attempt: int) -> Call | None:
        """The call, if ``attempt`` is the one that counts."""
        call = self._find(id)
        return call if call is not None and call.attempt == attempt else None

    def find(self, id: int) -> Call | None:
        """A call; where ended ones are not kept, one that has not ended."""
        return self._find(id)

    def worker(self, id: int) -> Worker | None:
        """A worker that is here."""
        return self._workers.get(id)

    def workers(self) -> list[Worker]:
        """All workers that are here."""
        return list(self._workers.values())

    def unmet(self) -> list[str]:
        """What tasks need that nobody has, each a sentence."""
        needs = [(each.name, each.recipe.resources) for each in self.graph.families.values()]
        missing = [(name, self._claims.missing(need)) for name, need in needs]
        return [f"{name} needs {lacking}" for name, lacking in missing if lacking]

    def missing(self, call: Call) -> str | None:
        """What a call needs that nobody has."""
        return self._claims.missing(call.recipe.resources)

    def lacking(self, call: Call) -> list[str]:
        """The resources of which too little is free for a call just now."""
        return self._claims.lacking(call.recipe.resources)

    def parked_at(self, call: Call) -> str | None:
        """The limit that keeps a ready call, for people."""
        return self._limits.why(call)

    def closed_to(self, call: Call, now: float) -> str | None:
        """The limit that would keep a ready call, too, for people."""
        return self._limits.closed_to(call, now)

    def wakes(self, call: Call) -> float:
        """When a sleeping call is tried again."""
        return self._wakings[call.id]

    def home_of(self, call: Call) -> Home:
        """Who gives it to a worker."""
        return self._homes[call.recipe.lane]

    def wait_of(self, call: Call) -> Wait | None:
        """For what a running call waits, if it does."""
        worker = self._workers.get(call.worker or 0)
        return worker.waits.get(call.id) if worker is not None else None

    def running(self) -> int:
        """How many calls run that do not wait, one a worker where they come one by one."""
        one_by_one = self.placement.running()
        return one_by_one + sum(
            worker.running for worker in self._workers.values() if worker.home is not self.placement
        )

    def wanted_slots(self) -> float:
        """How many slots this run has work for: one at least while any call is in a worker."""
        wanted = self.placement.wanted_slots() if self._starts else self.placement.busy_cpu
        in_workers = any(worker.calls for worker in self._workers.values())
        ready = self._starts and any(home.ready.count for home in self._busy_homes)
        return max(wanted, 1.0) if in_workers or ready else wanted

    @property
    def slots_here(self) -> int:
        """How many of the slots are this machine's."""
        return int(self._claims.slots_here)

    def wanted_lanes(self) -> list[str]:
        """The lanes, beside that of processes, that this run has calls for."""
        return sorted(
            home.lane
            for home in self._busy_homes
            if home is not self.placement
            and ((self._starts and home.ready.count)
                 or any(worker.calls for worker in home.workers.values()))
        )  # fmt: skip

    @property
    def _starts(self) -> bool:
        """Whether what is ready may start: when a run stops, that is teardown alone."""
        return bool(self.stopping) or not self.paused

    @property
    def borrows(self) -> bool:
        """Whether a server lends this run what machines have of resources."""
        return self._claims.borrows

    def demand(self) -> Demand:
        """What is needed of what a server lends."""
        needs = []
        for home in self._busy_homes:
            ready = home.ready.in_order() if self._starts else []
            calls = [*_at_work(home), *((each.first, len(each.calls)) for each in ready)]
            for call, number in calls:
                if need := need_of(
                    call.recipe.resources, number,
                    one_by_one=not home.begins_at_once, submitted=call.parent is not None,
                ):  # fmt: skip
                    needs.append(need)
        is_idle = self._starts and all(home.is_idle() for home in self._busy_homes)
        ready_calls = (call for home in self._busy_homes for call in home.ready)
        is_stuck = is_idle and self._claims.is_stuck(ready_calls)
        stuck = self._given_up + 1 if is_stuck else 0
        return Demand(needs, self._claims.held_by_those_that_wait(), stuck)

    def returned(self) -> Lot:
        """What goes back to the server."""
        return self._claims.returned()

    def lent(self, name: str) -> tuple[float, float] | None:
        """How much of a resource a server lends this run, and of how much, where that is not
        all of it."""
        return self._claims.lent(name)

    def spare(self) -> Worker | None:
        """The idle worker to which a small call would go if it came now; None: it would wait."""
        if self.over or self.stopping or self.paused or self._limits.parked_count:
            return None
        return self.placement.spare()

    # -- small steps ------------------------------------------------------------------

    def reserve(self) -> int:
        """The id of a call that is to come."""
        self._made += 1
        return self._made - 1

    def _new_call(
        self,
        recipe: Recipe,
        index: Any,
        family: Any,
        parent: Call | None = None,
        key: bytes = b"",
        id: int | None = None,
    ) -> Call:
        call = Call(self.reserve() if id is None else id, recipe, index, family, parent, key)
        if self._keep:
            self.calls.append(call)
        else:
            self._open[call.id] = call
        self._live += 1
        return call

    def _new_calls(self, recipe: Recipe, positions: range, family: Any) -> list[Call]:
        """The same for each of these positions: often very many."""
        made = [Call(id, recipe, at, family) for id, at in enumerate(positions, self._made)]
        self._made += len(made)
        if self._keep:
            self.calls += made
        else:
            self._open.update((call.id, call) for call in made)
        self._live += len(made)
        return made

    def _find(self, id: int) -> Call | None:
        if not self._keep:
            return self._open.get(id)
        return self.calls[id] if 0 <= id < len(self.calls) else None

    def _announce(self) -> None:
        if self.graph.created:
            self._out.append(m.CallsAdded(self.graph.created, self.graph.to_come))
            self.graph.created = []

    def _consider_again(self, calls: list[Call]) -> None:
        """They are next in their queues."""
        for call in reversed(calls):
            self._ready[call.recipe.lane].put_back([call])

    def _take_out(self, call: Call) -> None:
        """A ready call is not going to start."""
        if not (call.recipe.limits and self._limits.give_up(call)):
            self._ready[call.recipe.lane].discard(call)

    # -- what the layers above do -----------------------------------------------------

    def _make_handlers(self) -> dict[type, Callable[[Any], None]]:
        """What is done for each kind of event."""
        raise NotImplementedError

    def _end(self, call: Call, state: str) -> None:
        """The one way into a final state."""
        raise NotImplementedError

    def _cancel(self, call: Call, reason: str) -> None:
        """Cancel a call, queued or running, unless it has ended."""
        raise NotImplementedError

    def _follow(self) -> None:
        """What follows from ended calls, until nothing more does."""
        raise NotImplementedError

    def _judge(self, call: Call) -> None:
        """A failure, or a cancelled call, that nobody tolerates: what does it mean for the run?"""
        raise NotImplementedError

    def _hold(
        self, call: Call, payload: tuple[bytes | None, tuple[bytes, ...]], items: Any
    ) -> None:
        """The function returned futures: the call ends when they do, and holds no worker."""
        raise NotImplementedError


def _at_work(home: Home) -> Iterable[tuple[Call, int]]:
    """A call of each recipe of which calls hold resources and do not wait, and how many do."""
    calls: dict[int, Call] = {}
    numbers: Counter[int] = Counter()
    for worker in home.workers.values():
        for call in worker.calls.values():
            if call.units and call.id not in worker.waits:
                calls[call.recipe.id] = call
                numbers[call.recipe.id] += 1
    return [(call, numbers[id]) for id, call in calls.items()]


def _no_keys(call: Call) -> Keys:
    raise LookupError("nobody here can tell the keys of its limits")
