"""Calls that make calls, and wait for them; and the calls that come from outside."""

from __future__ import annotations

from typing import Any

from taskrun import messages as m
from taskrun.calls import CANCELLED, FAILED, FINAL, HELD, OK, RUNNING, WAITING, Call
from taskrun.core.attempts import Attempts
from taskrun.core.workforce import Wait, Worker
from taskrun.model import Encoded, Failure, Recipe


class Children(Attempts):
    """The layer that knows whose child a call is."""

    def on_submitted(self, event: m.Submitted) -> None:
        parent = self._current(event.parent, event.attempt)
        if parent is None or parent.state is not RUNNING:
            return
        if parent.children is None:
            parent.children = {}
        new = []
        for key, recipe, blob, keys in event.calls:
            known = parent.children.get(key)
            if known is not None and not self._is_spent(known, parent):
                known.generation = parent.attempt  # a retry takes over what is there
                continue
            call = self._submitted(recipe, parent, key, blob)
            call.generation = parent.attempt
            parent.children[key] = call
            new.append((call, keys))
        self._announce()
        for call, keys in new:
            self._depend(call, parent, keys)
            self._admit(call)

    def _is_spent(self, child: Call, parent: Call) -> bool:
        """Whether a retried parent's child ended without a value in an earlier attempt: it is
        made anew, or the retry could not help."""
        if child.generation == parent.attempt or child.state not in FINAL or child.state is OK:
            return False
        note_refused(child)  # the parent's earlier attempt has answered for it
        self.graph.release(child)
        return True

    def on_fed(self, event: m.Fed) -> None:
        calls = [self._submitted(event.recipe, None, b"", blob) for blob in event.arguments]
        for call, label in zip(calls, event.labels, strict=False):
            call.label = label
        self._announce()
        for call in calls:
            self._admit(call)
        self._feeding = self._feeding and not event.last

    def _submitted(
        self, recipe: Recipe, parent: Call | None, key: bytes, blob: Any, id: int | None = None
    ) -> Call:
        ordinal = self._ordinals.get(recipe.id, 0)
        self._ordinals[recipe.id] = ordinal + 1
        call = self._new_call(recipe, ordinal, None, parent, key, id)
        call.blob = blob
        call.users = 1  # the parent, or whoever fed it, may ask for the value
        self.graph.created.append(call)
        return call

    def _depend(self, call: Call, holder: Call, keys: tuple[bytes, ...]) -> None:
        """``call`` needs the values of these futures, which ``holder`` holds."""
        if not keys:
            return
        call.inputs = {}
        for key in keys:
            used = _find_child(holder, key)
            if used is None:
                continue  # whoever decodes the arguments will miss it and say so
            call.inputs[key] = used
            used.users += 1
            if used.state not in FINAL:
                call.needs += 1
                used.dependants = used.dependants or []
                used.dependants.append(call)
            elif used.state is not OK and not (call.recipe.always and call.state is WAITING):
                self.graph.doomed.append((call, used))

    def _admit(self, call: Call) -> None:
        """A submitted call joins the run."""
        missing = self._claims.missing(call.recipe.resources)
        lacking = None if self.growing else missing
        if self.stopping and not call.teardown:
            self._end(call, CANCELLED)
        elif lacking:
            call.failure = Failure(
                "blocked", "CallBlocked", f"{call.title} needs {lacking}: nobody here has it"
            )
            self._end(call, FAILED)
        elif not call.needs:
            self.graph.ready.append(call)

    def on_waiting(self, event: m.Waiting) -> None:
        worker = self._workers.get(event.worker)
        call = self._current(event.call, event.attempt)
        if worker is None or call is None or call.worker != event.worker:
            return
        self._has_begun(call)
        before = worker.waits.get(call.id) if m.ALSO in event.keys else None
        if before is not None:
            before.any_of = False  # it is over when all its threads have what they wait for
        wait = before or worker.home.wait(worker, call, event.any_of)
        wait.hosts = m.OUTSIDE in event.keys
        wait.outside = wait.hosts or m.OUTSIDE_ALONE in event.keys
        for key in event.keys:
            if key in (m.OUTSIDE, m.OUTSIDE_ALONE, m.ALSO):
                continue
            child = _find_child(call, key)
            if child is None:
                self._refuse_stranger(worker, call, key)
                continue
            wait.watch(child)
        for child in [child for child in wait.pending.values() if child.state in FINAL]:
            self._deliver(wait, child)
        if not wait.pending and not wait.outside:
            wait.over = True
        if call.recipe.limits:
            self._limits.consider_again(call)
        worker.home.go_on(wait)

    def _refuse_stranger(self, worker: Worker, call: Call, key: bytes) -> None:
        failure = Failure(
            "blocked", "CallBlocked", f"{call.title} waits for a future of another call"
        )
        self._out.append(m.Deliver(worker.id, {key: failure}, call.id))

    def on_resumed(self, event: m.Resumed) -> None:
        worker = self._workers.get(event.worker)
        call = self._current(event.call, event.attempt)
        if worker is not None and call is not None:
            worker.home.resumed(worker, call)

    def _deliver(self, wait: Wait, child: Call) -> None:
        """``child`` has ended, and a waiting attempt is told."""
        wait.ended(child)
        if child.state is not OK:
            note_refused(child)
        outcome = child.value if child.state is OK else child.ended_as()
        self._out.append(m.Deliver(wait.worker.id, {child.key: outcome}, wait.call.id))

    def on_cancel_child(self, event: m.CancelChild) -> None:
        parent = self._current(event.parent, event.attempt)
        if parent is not None and parent.children and event.key in parent.children:
            self._cancel_for_parent(parent.children[event.key], "its parent cancelled it")

    def _cancel_for_parent(self, child: Call, reason: str) -> None:
        if child.state not in FINAL:
            note_refused(child)
            self._cancel(child, reason)

    def _hold(
        self, call: Call, payload: tuple[bytes | None, tuple[bytes, ...]], items: Any
    ) -> None:
        """The function returned futures: the call ends when they do, and holds no worker."""
        if any(_find_child(call, key) is None for key in payload[1]):
            said = f"{call.title} returned a future of another call"
            failure = Failure("error", "ResultError", said)
            self._attempt_failed(call, failure, "error", retryable=False)
            return
        call.value = (payload, items)
        self._attempt_ended(call, "value", None, None)
        self._put_down(call)
        self.graph.let_inputs_go(call)
        call.state = HELD
        call.worker = None
        call.needs = 0
        self._depend(call, call, payload[1])
        if not call.needs:
            self.graph.ready.append(call)

    def _link(self, call: Call) -> None:
        """All futures in a held value have ended well: put their values in."""
        values = {key: child.value for key, child in (call.inputs or {}).items()}
        payload, items = call.value
        call.value = _linked(payload, values)
        if items is not None:
            linked = [_linked(item, values) if item[1] else item[0] for item in items]
            self._take_items(call, self._yielded.pop(call.id, 0), linked)
        self._end(call, OK)

    def _let_children_go(self, parent: Call) -> None:
        """A call that submitted others has ended: nobody asks for their values any more."""
        children, parent.children = parent.children or {}, None
        for child in children.values():
            self.graph.release(child)
            if parent.state is OK and child.generation != parent.attempt:
                reason = "its parent was retried and did not ask for it again"
                self._cancel_for_parent(child, reason)
        for child in children.values():
            # What the parent was told of, and has failed in turn, is judged with the parent.
            told = child.refused and parent.state is FAILED
            if child.is_to_blame and not child.tolerated and not told:
                self._judge(child)


def _find_child(holder: Call, key: bytes) -> Call | None:
    """A call by the key of its future, which ``holder`` or one above it has."""
    above: Call | None = holder
    while above is not None:
        if above.children is not None and key in above.children:
            return above.children[key]
        above = above.parent
    return None


def note_refused(child: Call) -> None:
    """Its parent knows that ``child`` did not succeed: what follows is up to the parent."""
    child.refused = True
    if child.cause is not None:
        child.cause.refused = True


def _linked(encoded: Any, values: dict[bytes, Encoded]) -> Encoded:
    """An encoded value with futures in it, now that these have values."""
    blob, keys = encoded
    if blob is None:
        return values[keys[0]]
    return (blob, {key: values[key] for key in keys})
