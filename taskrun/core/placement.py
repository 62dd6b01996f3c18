"""Which ready call goes to which worker.

Small calls are sent in batches, as many as take a few milliseconds, so that the cost of
a message is shared.  That a call waits behind a long one while another worker is idle
is prevented from the other end: when a worker is idle and nothing is ready, those that
have calls in advance and have been silent for a moment are asked to give half back.

A running call may wait for calls that it submitted.  Its worker is then *lent*: its slot
is free for a spare worker, up to four workers a slot.  Past that, the waiting worker
itself runs, nested, a call that its waiting call needs.  Every call that waits, in a
worker or beneath another in a worker's stack, waits for one that it needs; needs have no
cycle, so something can always go on.

That does not hold for a call that waits for something *outside*, a queue say: whatever is
nested on top of it may wait in turn for what only the one below would do.  So such waits
get spare workers of their own, as long as there are not very many of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

from taskrun import bunch
from taskrun import messages as m
from taskrun.calls import HELD, READY, RUNNING, WAITING, Call
from taskrun.core.claims import Claims
from taskrun.core.ready import Queue, ReadyCalls
from taskrun.core.timers import Timers
from taskrun.core.workforce import DEFAULT_CPU, Wait, Worker
from taskrun.model import LANES, Recipe

BATCH_SECONDS = 0.004  # how much work a worker is given in advance
BATCH_CALLS = 1024
LONG = 0.05  # calls longer than this are not sent in advance: a round trip is < 1 % of them
SILENT = 0.002  # a worker silent for so long gives calls back when another is idle
OVERDUE = 0.1  # ... and in any case, and says what it is doing: people want to know
HOSTS = 64  # workers, or as many as the others if these are more, for calls that wait outside
SEARCH = 10_000  # calls looked at to find one that a waiting worker can run itself


class Placement:
    """The workers that execute one call at a time, the ready calls, and who gets what."""

    lane = "process"
    begins_at_once = False
    offered = 0

    def __init__(
        self,
        slots: int,
        spare_factor: int,
        ahead: bool,
        claims: Claims,
        timers: Timers,
        everyone: dict[int, Worker],
        out: list[m.Command],
    ) -> None:
        """``ahead``: whether workers are given calls in advance.  ``everyone``: the workers of
        all lanes; ``out`` takes the commands."""
        self.slots = slots
        self.ready = ReadyCalls()
        self.workers: dict[int, Worker] = {}
        self.busy_cpu = 0.0
        self.out = out
        self.lanes: Collection[str] = LANES  # whose calls are executed here
        self.standing = 0  # so many workers are wanted even while there is nothing to do
        self.most_calls: int | None = None  # that a worker executes before it is replaced
        self._spare_factor = spare_factor
        self._gives_ahead = ahead
        self._claims = claims
        self._everyone = everyone
        self._timers = timers
        self._idle: dict[int, Worker] = {}
        # Those with calls in advance that were not asked to give back, longest silent first.
        self._ahead: OrderedDict[int, Worker] = OrderedDict()
        self._starting = 0
        self._starting_on: set[str] = set()  # one where only that machine will do
        self._look_at: float | None = None
        self._now = 0.0
        self._few: int | None = None  # no more workers than these can be had

    # -- workers come, report and go --------------------------------------------------

    @property
    def _most_workers(self) -> int:
        most = max(1, self.slots * self._spare_factor)
        return most if self._few is None else min(most, self._few)

    def join(self, worker: Worker) -> None:
        """A worker can take calls."""
        self._starting = max(0, self._starting - 1)
        self._starting_on.discard(worker.node)
        id = worker.id
        self._everyone[id] = self.workers[id] = self._idle[id] = worker

    def leave(self, id: int) -> Worker | None:
        """A worker is gone; None if it never was ready."""
        worker = self.workers.pop(id, None)
        if worker is None:
            self._starting = max(0, self._starting - 1)
            self._starting_on.clear()  # it may have been one of these
            return None
        del self._everyone[id]
        self._idle.pop(id, None)
        self._ahead.pop(id, None)
        self._occupy(worker, 0.0)
        for wait in worker.waits.values():
            wait.unwatch()
        return worker

    def retire(self, worker: Worker) -> None:
        """A worker finishes what it has, and is to get no more."""
        worker.retiring = True
        self.reclaim(worker, worker.ahead + 1)
        self.heard(worker, worker.heard)

    def make_do(self, workers: int) -> None:
        """Want no more workers than these, until :meth:`want_all`."""
        self._few = workers

    def want_all(self) -> None:
        """Want as many workers as there may be."""
        self._few = None

    def heard(self, worker: Worker, now: float) -> None:
        """A worker reported something: does it still have work?"""
        worker.heard = now
        calls, waits = len(worker.calls), len(worker.waits)
        if calls - waits > 1 or (calls > waits and worker.ahead):
            self._ahead[worker.id] = worker
            self._ahead.move_to_end(worker.id)
        else:
            self._ahead.pop(worker.id, None)
        if calls > waits:
            return
        self._occupy(worker, 0.0)
        worker.lent = waits > 0
        if not waits and self._has_done_enough(worker):
            self.leave(worker.id)
            self.out.append(m.StopWorker(worker.id))
            return
        if not waits:
            self._idle[worker.id] = worker
        self._go_on(worker)  # perhaps a nested call ended, and the one below it can go on

    def _has_done_enough(self, worker: Worker) -> bool:
        return worker.retiring or (self.most_calls is not None and worker.given >= self.most_calls)

    def _occupy(self, worker: Worker, cpu: float) -> None:
        """What runs in ``worker`` takes so much of the slots."""
        if cpu != worker.cpu:
            # Rounded, so that what is left of a sum of fractions keeps no call from a slot.
            self.busy_cpu = round(self.busy_cpu + cpu - worker.cpu, 6)
            worker.cpu = cpu

    # -- waiting ----------------------------------------------------------------------

    def wait(self, worker: Worker, call: Call, any_of: bool) -> Wait:
        """A running attempt waits: its slot is free."""
        wait = worker.waits.get(call.id)
        if wait is None:
            wait = worker.waits[call.id] = Wait(worker, call)
        elif wait.over:
            wait.unwatch()  # it went on before a nested call could begin
            wait.over = False
        wait.any_of = any_of
        self._ahead.pop(worker.id, None)
        # Another call may be on its way to it: a nested one, which begins now, or one that
        # was sent in advance and comes back.
        worker.lent = len(worker.calls) == len(worker.waits)
        if worker.lent:
            self._occupy(worker, 0.0)
        return wait

    def go_on(self, wait: Wait) -> None:
        """A waiting attempt goes on, if it can."""
        self._go_on(wait.worker)

    def _go_on(self, worker: Worker) -> None:
        """The innermost waiting attempt goes on, if what it waits for is there and no
        nested call is on top of it."""
        if worker.lent and worker.innermost.over:
            self._resume(worker, worker.innermost)

    def resumed(self, worker: Worker, call: Call) -> None:
        """A waiting attempt went on by itself."""
        if worker.waits and worker.innermost.call is call:
            self._resume(worker, worker.innermost)

    def _resume(self, worker: Worker, wait: Wait) -> None:
        """The innermost waiting attempt of a lent worker goes on.

        It does not wait for its slot to come back: for a moment one call more than slots
        may run, until the spare worker that took the slot has ended its call.
        """
        worker.end_wait(wait.call)
        worker.lent = False
        self._occupy(worker, _cpu(wait.call.recipe))

    # -- deciding ---------------------------------------------------------------------

    def schedule(self, now: float) -> None:
        """Assign what can be assigned.  Raises claims.Impossible."""
        self._now = now
        if self.standing:
            self._replace_the_gone()
        if self.ready.count:
            self._dispatch()
        if self.ready.count:
            self._want_workers()
        if self._idle and self._ahead and self.busy_cpu + DEFAULT_CPU <= self.slots:
            self._feed_the_idle()

    def _replace_the_gone(self) -> None:
        wanted = min(self.standing, self._most_workers)
        missing = wanted - len(self.workers) - self._starting
        if missing > 0:
            self._starting += missing
            self.out.append(m.StartWorkers(missing))

    def _dispatch(self) -> None:
        """Give ready calls to idle workers, best first."""
        passed_over: list[Queue] = []
        # What better calls wait for, and other runs: lesser ones leave it alone.
        awaited = set(self._claims.awaited)
        while self._idle and (queue := self.ready.best(passed_over)) is not None:
            cpu = _cpu(queue.recipe)
            if cpu and self.busy_cpu + cpu > self.slots:
                break  # nothing overtakes: a call that needs many slots gets its turn
            worker = None
            if not queue.plain:
                call, needs = queue.first, queue.recipe.resources
                worker, lacking = self._claims.find_place(call, needs, self._idle.values())
                # A submitted call overtakes: who waits for it may hold what is awaited.
                awaited_here = call.parent is None and not awaited.isdisjoint(needs)
                if worker is None and not lacking:
                    self._want_worker_on(self._claims.able(needs), cpu)
                if worker is None or awaited_here:
                    awaited.update(lacking)
                    passed_over.append(queue)
                    continue
                if queue.recipe.limits and not self._admit(call):
                    continue
            worker = self._take_idle(worker)
            self._assign(worker, queue, self._left_to(worker, self._share(queue)), cpu)

    def _want_worker_on(self, nodes: set[str], cpu: float) -> None:
        """Only these machines have what a ready call needs, and no worker there is idle: start
        one where there is a slot for it."""
        if nodes & self._starting_on:
            return
        node = max(nodes, key=self._claims.free_slots)
        if self._claims.free_slots(node) >= cpu:
            self._starting_on.add(node)
            self._starting += 1
            self.out.append(m.StartWorkers(1, node=node))

    def _take_idle(self, worker: Worker | None) -> Worker:
        """An idle worker, the one that is meant or the one that was at work last."""
        if worker is None:
            return self._idle.popitem()[1]
        return self._idle.pop(worker.id)

    def spare(self) -> Worker | None:
        """The idle worker that would get the next call at once."""
        if not self._idle or self.ready.count or self.busy_cpu + DEFAULT_CPU > self.slots:
            return None
        return next(reversed(self._idle.values()))

    def sent(self, worker: Worker, call: Call, now: float) -> None:
        """A spare worker has got this call already."""
        self._now = now
        del self._idle[worker.id]
        self._hand_over(worker, [call], _cpu(call.recipe))

    def _admit(self, call: Call) -> bool:
        """Whether its limits let ``call`` pass; otherwise it is parked, and ready no more."""
        self.ready.discard(call)
        if not self._claims.admit(call, self._now):
            return False
        self.ready.put_back([call])
        return True

    def is_idle(self) -> bool:
        """Whether nothing runs here and nothing is about to: what is ready cannot start."""
        return not (self.busy_cpu or self._starting)

    def _share(self, queue: Queue) -> int:
        """How many calls a worker may be given at once, so that all get some."""
        return max(1, min(self._depth(queue), len(queue.calls) // max(1, 2 * self.slots)))

    def _left_to(self, worker: Worker, count: int) -> int:
        """How many of ``count`` calls the worker may still be given in its life."""
        most = self.most_calls
        return count if most is None else min(count, most - worker.given)

    def _depth(self, queue: Queue) -> int:
        """How many calls of ``queue`` a worker may have, the running one included."""
        mean = queue.mean
        if mean is None or mean > LONG or not queue.plain or not self._gives_ahead:
            return 1
        return min(BATCH_CALLS, 2 + int(BATCH_SECONDS / max(mean, 1e-6)))

    def top_up(self, worker: Worker, now: float) -> None:
        """A worker that is at work may get more calls in advance."""
        if not self.ready.count or not worker.calls or worker.waits or worker.retiring:
            return
        if self.busy_cpu > self.slots:
            return  # a call was resumed beyond the slots: somebody has to run dry
        queue = self.ready.best()
        if queue is None or not queue.plain or worker.calls[next(reversed(worker.calls))].units:
            return
        room = min(self._depth(queue) - len(worker.calls), self._share(queue))
        room = self._left_to(worker, room)
        if room > 0:
            self._now = now
            self._assign(worker, queue, room, worker.cpu)

    def _assign(self, worker: Worker, queue: Queue, count: int, cpu: float) -> None:
        calls = self.ready.take(queue, count)
        self._hand_over(worker, calls, cpu)
        if bunch.are_many(worker.calls):
            self._ahead[worker.id] = worker
            self._ahead.move_to_end(worker.id)
            self._check_later(worker, self._now + OVERDUE)
        self.out.append(m.Assign(worker.id, calls))

    def _hand_over(self, worker: Worker, calls: list[Call], cpu: float) -> None:
        """The first of them takes ``cpu`` of the slots, and the resources it needs."""
        for call in calls:
            call.state = RUNNING
            call.attempt += 1
            call.worker = worker.id
            worker.calls[call.id] = call
        worker.given += len(calls)
        if not self.ready.queue(calls[0].recipe).plain:
            self._claims.take(calls[0], calls[0].recipe.resources, worker)
        self._occupy(worker, cpu)
        worker.heard = self._now

    def _want_workers(self) -> None:
        """Ready calls are left over: start workers, or let waiting ones run some."""
        queue = self.ready.best()
        assert queue is not None
        # A call that needs many slots may find others beside it: workers for slots of one cpu.
        cpu = min(_cpu(queue.recipe), DEFAULT_CPU)
        room = int((self.slots - self.busy_cpu) / cpu) if cpu else self.ready.count
        have = len(self.workers) + self._starting
        free = min(self.ready.count, room) - len(self._idle) - self._starting
        most = self._most_workers
        if free > 0 and have >= most:
            most += self._for_those_that_wait_outside()
        more = min(free, most - have)
        if not (self.slots or have):
            more = 1  # for the slots that may come: the engine knows why there are none
        if more > 0:
            self._starting += more
            self.out.append(m.StartWorkers(more))
        elif room and have >= most and not self._idle and not self._starting:
            self._nest()

    def _for_those_that_wait_outside(self) -> int:
        """How many more workers may be had for their sake."""
        if self._spare_factor <= 1 or self._few is not None:
            return 0
        waiting = sum(worker.lent and worker.innermost.hosts for worker in self.workers.values())
        return min(waiting, max(HOSTS, self._most_workers))

    # -- nesting ----------------------------------------------------------------------

    def _nest(self) -> None:
        """All spare workers wait: let them run calls that they wait for themselves."""
        # Where least is below first: what is below cannot go on before what comes on top ends.
        for worker in sorted(reversed(self.workers.values()), key=lambda each: len(each.waits)):
            if not self.ready.count or self.busy_cpu >= self.slots:
                return
            if not worker.lent or worker.innermost.over:
                continue
            wait = worker.innermost
            call = self._ready_below(wait.pending.values(), worker)
            if call is None and wait.hosts:
                call = next((call for call in self.ready if self._fits(call, worker)), None)
            if call is not None and (not call.recipe.limits or self._admit(call)):
                self._assign_nested(worker, call)

    def _ready_below(self, calls: Iterable[Call], place: Worker) -> Call | None:
        """A ready call that one of ``calls`` is or needs, directly or not, and that can be
        executed in ``place``."""
        seen: set[int] = set()
        stack = list(calls)
        while stack and len(seen) < SEARCH:
            call = stack.pop()
            if call.id in seen:
                continue
            seen.add(call.id)
            ours = call.recipe.lane in self.lanes
            if call.state is READY and ours and self._fits(call, place):
                return call
            if call.state in (WAITING, HELD) and call.inputs:
                stack.extend(call.inputs.values())
            elif call.state is RUNNING and (worker := self._everyone.get(call.worker or 0)):
                wait = worker.waits.get(call.id)
                stack.extend(wait.pending.values() if wait else ())
        return None

    def _fits(self, call: Call, place: Worker) -> bool:
        recipe = call.recipe
        fits = self.busy_cpu + _cpu(recipe) <= self.slots
        return fits and not self._claims.keep_out(call, place, self._now)

    def _assign_nested(self, worker: Worker, call: Call) -> None:
        self.ready.discard(call)
        worker.lent = False
        self._hand_over(worker, [call], _cpu(call.recipe))
        self.out.append(m.Assign(worker.id, [call], nested=True))

    # -- taking back ------------------------------------------------------------------

    def _feed_the_idle(self) -> None:
        """Workers are idle and no call is ready: ask those that have calls in advance and
        have been silent for a while to give back half of them."""
        askable = len(self._idle)
        while askable and self._ahead:
            worker = next(iter(self._ahead.values()))
            due = worker.heard + SILENT
            if due > self._now:
                if self._look_at is None:
                    self._look_at = due
                    self._timers.at(due, self._look_again)
                return
            del self._ahead[worker.id]  # until it is heard of again
            self.reclaim(worker, (worker.ahead + 1) // 2)
            askable -= 1

    def _look_again(self) -> None:
        self._look_at = None  # the scheduler goes on to schedule()

    def _check_later(self, worker: Worker, when: float) -> None:
        if not worker.checked:
            worker.checked = True
            self._timers.at(when, lambda: self._check(worker, when))

    def _check(self, worker: Worker, now: float) -> None:
        """A batch should be over by now: which of its calls takes longer than expected, and
        has something ended before it that is not told yet?  What waits behind it does so no
        longer: those that were to come first may be the long ones."""
        worker.checked = False
        if self.workers.get(worker.id) is not worker or worker.ahead < 1:
            return
        due = worker.heard + OVERDUE
        if due <= now:
            self.reclaim(worker, worker.ahead)
        else:
            self._check_later(worker, due)

    def reclaim(self, worker: Worker, count: int) -> None:
        """Ask a worker to give back up to ``count`` calls, and to say what it is doing."""
        self.out.append(m.Reclaim(worker.id, count))

    def wanted_slots(self) -> float:
        """What the calls that run, and those that could if there were slots, take of them."""
        ahead = sum(max(0, worker.ahead) for worker in self.workers.values())
        return self.busy_cpu + ahead + self.ready.count

    def running(self) -> int:
        """How many workers are at work."""
        return len(self.workers) - len(self._idle)


def _cpu(recipe: Recipe) -> float:
    return recipe.resources.get("cpu", DEFAULT_CPU)
