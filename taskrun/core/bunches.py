"""Calls that are bunches: their items end one by one, and what has not begun can be cut off."""

from __future__ import annotations

from taskrun import messages as m
from taskrun.bunch import Bunch
from taskrun.calls import CANCELLED, FINAL, OK, READY, RUNNING, Call
from taskrun.core.children import Children
from taskrun.core.workforce import Worker
from taskrun.model import Recipe


class Bunches(Children):
    """The layer that knows of the items of bunches; see ``bunch``."""

    def on_items(self, event: m.Items) -> None:
        """Items have ended; with the last of them so has the call."""
        call = self._current(event.call, event.attempt)
        if call is None or call.state is not RUNNING or call.worker != event.worker:
            return
        bunch: Bunch = call.blob
        worker = self._workers[event.worker]
        if call.ending and bunch.left == 1:
            _leave(worker, call)
            self._interrupted(call)
        else:
            self._out.append(m.ItemsEnded(call.recipe, bunch, bunch.done, event, worker.pid))
            bunch.done += len(event.values)
            call.wall = event.wall
            call.seconds += sum(event.seconds)
            self._end_if_done(worker, call)
        worker.home.heard(worker, self._now)
        self._follow()
        if not self.paused:
            worker.home.top_up(worker, self._now)

    def _end_if_done(self, worker: Worker, call: Call) -> None:
        if call.blob.left:
            return
        ready = self._ready[call.recipe.lane]
        queue = ready.queue(call.recipe)
        if queue.learn(call.seconds):
            ready.move_up(queue)
        _leave(worker, call)
        self._put_down(call)
        self._end(call, OK)

    def on_sent(self, event: m.Sent) -> None:
        """A bunch went to a spare worker before it was in the books."""
        call = self._submitted(event.recipe, None, b"", event.bunch, event.call)
        self._announce()
        self.placement.sent(self._workers[event.worker], call, self._now)

    # -- what was cut off -------------------------------------------------------------

    def _cut_off(self, worker: Worker, id: int, attempt: int, count: int) -> None:
        """A worker returned the last items of a bunch."""
        call = worker.calls.get(id)
        if call is not None and call.attempt == attempt:
            self._go_on_with(call, call.blob.cut(count))
            self._end_if_done(worker, call)

    def _lost(self, call: Call, event: m.WorkerLost, inner: Call | None) -> None:
        """Only the item is lost that was executed."""
        if type(call.blob) is Bunch and call.blob.left > 1:
            self._go_on_with(call, call.blob.cut(call.blob.left - 1))
        super()._lost(call, event, inner)

    def _go_on_with(self, call: Call, rest: Bunch) -> None:
        """What was cut off is a call of its own, and next in its queue."""
        if self.stopping:
            rest.unwanted = list(rest.tokens)
        if self._weed(call.recipe, rest):
            new = self._submitted(call.recipe, None, b"", rest)
            self._announce()
            new.state = READY
            self._consider_again([new])

    # -- cancelling -------------------------------------------------------------------

    def on_cancel_items(self, event: m.CancelItems) -> None:
        """Items are unwanted."""
        call = self._find(event.call)
        if call is None or call.state in FINAL:
            return
        call.blob.unwanted += event.tokens
        if call.state is RUNNING:
            self._cancel_begun(call)
        elif call.state is READY:
            self._take_out(call)
            if self._weed(call.recipe, call.blob):
                self._consider_again([call])
            else:
                self._end(call, CANCELLED)

    def _weed(self, recipe: Recipe, bunch: Bunch) -> bool:
        """Drop the unwanted items of a bunch that no worker has; False: none is left."""
        if bunch.unwanted and (dropped := bunch.weed()):
            self._out.append(m.ItemsCancelled(recipe, bunch, dropped))
        return bunch.left > 0

    def _cancel_begun(self, call: Call) -> None:
        """A worker is in a bunch with unwanted items.  What has not begun has to come back
        first: an interrupt must not meet another item."""
        bunch: Bunch = call.blob
        if bunch.is_last_unwanted():
            self._cancel(call, "it was asked for")
        elif bunch.left > 1 and call.worker is not None:
            self._out.append(m.Reclaim(call.worker, bunch.left))


def has_begun(call: Call) -> bool:
    """Whether an attempt that was lost had begun; of a bunch only its worker's ledger tells."""
    return call.began is not None and type(call.blob) is not Bunch


def _leave(worker: Worker, call: Call) -> None:
    worker.calls.pop(call.id, None)
    worker.end_wait(call)
