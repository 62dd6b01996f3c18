"""Workers that execute many calls at a time: threads, coroutines, greenlets, or an engine's.

Such a worker begins each call when it comes, and is never given more than it has slots for.
So nothing is sent in advance and nothing has to come back.  A call that waits for others
takes no slot meanwhile, so that those for which it waits find one.  When the worker is
lost, so are all the calls in it.
"""

from __future__ import annotations

from taskrun import messages as m
from taskrun.calls import RUNNING, Call
from taskrun.core.claims import Claims
from taskrun.core.ready import Queue, ReadyCalls
from taskrun.core.workforce import Wait, Worker


class Crowd:
    """The workers of one lane, the ready calls of it, and who gets what."""

    begins_at_once = True
    offered = 0

    def __init__(
        self,
        lane: str,
        most_workers: int,
        claims: Claims,
        everyone: dict[int, Worker],
        out: list[m.Command],
    ) -> None:
        """``most_workers``: how many may be asked for, beside those that are ``offered``; 0 where
        they come by themselves."""
        self.lane = lane
        self.ready = ReadyCalls()
        self.workers: dict[int, Worker] = {}
        self._room: dict[int, Worker] = {}  # those that can take more calls
        self._most_workers = most_workers
        self._few: int | None = None  # no more than these can be had
        self._claims = claims
        self._everyone = everyone
        self._out = out
        self._starting = 0

    # -- workers come, report and go --------------------------------------------------

    def join(self, worker: Worker) -> None:
        """A worker can take calls."""
        self._starting = max(0, self._starting - 1)
        id = worker.id
        self._everyone[id] = self.workers[id] = self._room[id] = worker

    def leave(self, id: int) -> Worker | None:
        """A worker is gone; None if it never was ready."""
        worker = self.workers.pop(id, None)
        if worker is None:
            self._starting = max(0, self._starting - 1)
            return None
        del self._everyone[id]
        self._room.pop(id, None)
        for wait in worker.waits.values():
            wait.unwatch()
        return worker

    def retire(self, worker: Worker) -> None:
        """A worker finishes what it has, and is to get no more."""
        worker.retiring = True
        self._room.pop(worker.id, None)
        self.heard(worker, worker.heard)

    def make_do(self, workers: int) -> None:
        """Want no more workers than these, until :meth:`want_all`."""
        self._few = workers

    def want_all(self) -> None:
        """Want as many workers as there may be."""
        self._few = None

    def heard(self, worker: Worker, now: float) -> None:
        """A worker reported something: has it room for more?"""
        worker.heard = now
        self._look_for_room(worker)
        if worker.retiring and not worker.calls and worker.id in self.workers:
            self.leave(worker.id)
            self._out.append(m.StopWorker(worker.id))

    def _look_for_room(self, worker: Worker) -> None:
        if not worker.retiring and worker.running < worker.slots:
            self._room[worker.id] = worker

    def top_up(self, worker: Worker, now: float) -> None:
        """Nothing: :meth:`schedule` gives what there is room for."""

    # -- waiting ----------------------------------------------------------------------

    def wait(self, worker: Worker, call: Call, any_of: bool) -> Wait:
        """A running attempt waits, one of many."""
        worker.end_wait(call)
        wait = worker.waits[call.id] = Wait(worker, call)
        wait.any_of = any_of
        self._look_for_room(worker)
        return wait

    def go_on(self, wait: Wait) -> None:
        """A waiting attempt goes on, if what it waits for is there."""
        if wait.over:
            wait.worker.end_wait(wait.call)

    def resumed(self, worker: Worker, call: Call) -> None:
        """A waiting attempt went on by itself."""
        worker.end_wait(call)

    # -- deciding ---------------------------------------------------------------------

    def schedule(self, now: float) -> None:
        """Assign what there is room for.  Raises claims.Impossible."""
        unmet = self.ready.count - sum(not each.running for each in self._room.values())
        passed_over: list[Queue] = []
        # What better calls wait for, and other runs: lesser ones leave it alone.
        awaited = set(self._claims.awaited)
        while self._room and (queue := self.ready.best(passed_over)) is not None:
            worker = min(self._room.values(), key=_load)
            share = self._share(worker)
            if share <= 0:
                break  # what is left is for the workers that are starting
            needs = self._needs(queue)
            if not needs and not queue.recipe.limits:
                self._assign(worker, self.ready.take(queue, share))
                continue
            call = queue.first
            place, lacking = self._claims.find_place(call, needs, self._by_load())
            if place is None or (call.parent is None and not awaited.isdisjoint(needs)):
                awaited.update(lacking)
                passed_over.append(queue)
                continue
            self.ready.discard(call)
            if not queue.recipe.limits or self._claims.admit(call, now):
                self._claims.take(call, needs, place)
                self._assign(place, [call])
        if unmet > 0:
            self._want_workers(unmet)

    def _by_load(self) -> list[Worker]:
        """Those with room, the least busy last."""
        return sorted(self._room.values(), key=_load, reverse=True)

    def _needs(self, queue: Queue) -> dict[str, float]:
        """What a call holds; slots of ``-j`` are for those that compute."""
        needs = queue.recipe.resources
        return {name: amount for name, amount in needs.items() if name != "cpu"} if needs else needs

    def _share(self, worker: Worker) -> int:
        """How many more calls a worker may be given, so that all get some."""
        room = worker.slots - worker.running
        if len(self.workers) + self._starting < 2:
            return room
        calls = self.ready.count + sum(each.running for each in self.workers.values())
        fair = -(-calls // (len(self.workers) + self._starting))
        return min(room, fair - worker.running)

    def _assign(self, worker: Worker, calls: list[Call]) -> None:
        for call in calls:
            call.state = RUNNING
            call.attempt += 1
            call.worker = worker.id
            worker.calls[call.id] = call
        worker.given += len(calls)
        if worker.running >= worker.slots:
            del self._room[worker.id]
        self._out.append(m.Assign(worker.id, calls))

    def _want_workers(self, wanted: int) -> None:
        """So many calls found no worker that had nothing to do."""
        most = self._most_workers + self.offered
        if self._few is not None:
            most = min(most, self._few)
        have = sum(not worker.retiring for worker in self.workers.values()) + self._starting
        more = min(wanted - self._starting, most - have)
        if more > 0:
            self._starting += more
            self._out.append(m.StartWorkers(more, self.lane))

    def is_idle(self) -> bool:
        """Whether nothing runs here and nothing is about to."""
        return not (self._starting or any(each.running for each in self.workers.values()))


def _load(worker: Worker) -> float:
    return worker.running / worker.slots
