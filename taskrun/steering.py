"""What others may ask of a live run, from any terminal: how it goes, why, and to change it.

Requests come by the run's own addresses, from whoever has proved the key, as one JSON
object a frame: ``{"do": "status"}``, ``{"do": "cancel", "call": "fetch[3]"}``.  The answer is
``{"ok": {...}}`` or ``{"error": "..."}``.  What people read of an answer is its ``text``; the rest
is described in ``docs/cli.md``.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Protocol

from taskrun import messages as m
from taskrun.calls import FAILED, FINAL, READY, RUNNING, Call, both_names
from taskrun.core.explain import explain
from taskrun.core.workforce import worker_name
from taskrun.demand import Loan
from taskrun.errors import MALFORMED, StateError, UsageError
from taskrun.model import nearest
from taskrun.reporting.records import describe_failure

if TYPE_CHECKING:
    from taskrun.core.scheduler import Scheduler
    from taskrun.core.workforce import Worker
    from taskrun.model import Plan
    from taskrun.observers import Observers
    from taskrun.reactor import Reactor
    from taskrun.transport import Peer

STACK_SECONDS: Final = 5.0  # that a worker has to say where it is
MOST_SHOWN: Final = 1000  # running calls that a status lists
RARELY: Final = 20  # a status costs at most this fraction of the loop's time
WHOLE_RUN: Final = "run"
MOST_REQUEST: Final = 16 * 1024 * 1024  # bytes
_FRAME: Final = re.compile(r'^  File "(.*)", line (\d+), in (.*)\n(?:    (.*)\n)?', re.MULTILINE)


class Steered(Protocol):
    """A run, as far as it can be steered.  ``began``: wall clock.  ``on_event`` is called
    after each event, if it is set."""

    core: Scheduler
    engine: Any
    observer: Observers
    plan: Plan
    reactor: Reactor
    began: float
    on_event: Callable[[], None] | None

    def post(self, event: m.Event) -> None:
        """Have the core take an event."""

    def tell(self, call: int, message: Any) -> None:
        """Send a message to a call."""

    def cancel(self) -> None:
        """Stop in order, and at once the second time, as Ctrl-C does."""


class Steering:
    """Answers for one run; all on the loop's thread."""

    def __init__(self, run: Steered) -> None:
        self._run = run
        self._core = run.core
        self._counted: tuple[float, float, list[dict[str, Any]]] | None = None
        self._last = (time.monotonic(), 0)
        self._rate: float | None = None
        self._do: dict[str, Callable[[dict[str, Any], Callable[[Any], None]], None]] = {
            "status": self._status,
            "explain": self._explain,
            "stack": self._stack,
            "cancel": self._cancel,
            "tell": self._tell,
            "pause": self._pause,
            "unpause": self._unpause,
            "slots": self._slots,
            "lend": self._lend,
            "drain": self._drain,
        }

    def admit(self, peer: Peer) -> None:
        """Somebody with the key wants to ask."""
        peer.limit(MOST_REQUEST)
        peer.listen(lambda frame: self._on_request(peer, bytes(frame)), lambda reason: None)

    def _on_request(self, peer: Peer, frame: bytes) -> None:
        def answer(value: Any) -> None:
            if not peer.closed:
                peer.send(json.dumps({"ok": value}).encode())

        try:
            request = json.loads(frame)
            if request.get("run") is not None:
                raise UsageError(
                    f"there is no run {request['run']!r} here: this is one run, and no server; an "
                    "address, if one is meant, is HOST:PORT"
                )
            if request["do"] == "wants":
                self._tell_wants(peer, request, answer)
            else:
                self._do[request["do"]](request, answer)
        except UsageError as error:
            peer.send(json.dumps({"error": str(error)}).encode())
        except MALFORMED:
            peer.send(json.dumps({"error": "this run does not know what that asks"}).encode())

    # -- looking ----------------------------------------------------------------------

    def _status(self, request: dict[str, Any], answer: Callable[[Any], None]) -> None:
        run, core = self._run, self._core
        tasks = self._count()
        done = sum(task["done"] for task in tasks)
        total = sum(task["total"] for task in tasks)
        rate = self._measure(done)
        nodes = self._nodes()
        answer(
            {
                "pid": os.getpid(),
                "file": run.plan.file,
                "seconds": round(time.time() - run.began, 3),
                "paused": core.paused,
                "stopping": core.stopping,
                "slots": core.placement.slots,
                "slots_here": core.slots_here,
                "done": done,
                "total": total,
                "rate": rate,
                "eta": round((total - done) / rate, 1) if rate else None,
                "tasks": tasks,
                "running": [self._running(*each) for each in self._first_running()],
                "nodes": [node.described() for node in nodes.nodes.values()] if nodes else [],
                "workers": [self._worker(worker) for worker in core.workers()],
            }
        )

    def _count(self) -> list[dict[str, Any]]:
        """How many calls of each task are in which state; not counted anew all the time."""
        now = time.monotonic()
        if self._counted is not None and now < self._counted[1]:
            return self._counted[2]
        tasks: dict[str, dict[str, Any]] = {}
        for call in self._core.calls:
            if call.placeholder:
                continue
            name = call.recipe.name
            counts = tasks.get(name)
            if counts is None:
                counts = tasks[name] = {"task": name, "total": 0, "done": 0, "running": 0,
                                        "ready": 0, "failed": 0}  # fmt: skip
            counts["total"] += 1
            state = call.state
            if state in FINAL:
                counts["done"] += 1
                counts["failed"] += state is FAILED
            elif state is RUNNING:
                counts["running"] += 1
            elif state is READY:
                counts["ready"] += 1
        for family, growth in self._core.graph.growing.items():
            tasks[family.name]["total"] += growth.end - growth.next
        took = time.monotonic() - now
        self._counted = (now, now + RARELY * took, list(tasks.values()))
        return self._counted[2]

    def _measure(self, done: int) -> float | None:
        """Calls a second, since somebody asked last."""
        now = time.monotonic()
        since, before = self._last
        if before == 0 and done:
            self._rate = done / max(time.time() - self._run.began, 0.001)
            self._last = (now, done)
        elif now - since >= 0.5:
            self._rate = (done - before) / (now - since)
            self._last = (now, done)
        return None if self._rate is None else round(self._rate, 3)

    def _worker(self, worker: Worker) -> dict[str, Any]:
        return {
            "worker": worker.name, "node": worker.node, "pid": worker.pid,
            "lane": worker.home.lane, "calls": worker.running,
        }  # fmt: skip

    def _first_running(self) -> Iterable[tuple[Worker, Call]]:
        shown = 0
        for worker in self._core.workers():
            for call in worker.calls.values():
                if shown < MOST_SHOWN:
                    shown += 1
                    yield worker, call

    def _running(self, worker: Worker, call: Call) -> dict[str, Any]:
        wait = self._core.wait_of(call)
        return {
            "call": call.name,
            "label": call.label,
            "attempt": call.attempt,
            "worker": worker.name,
            "since": call.wall or None,
            "waits": wait is not None,
            "begun": call.began is not None,
        }

    def _explain(self, request: dict[str, Any], answer: Callable[[Any], None]) -> None:
        call = self._find(request["call"])
        why = self._why(call)
        answer(
            {
                **self._described(call),
                "why": why,
                "cause": None if call.cause is None else call.cause.name,
                "failure": describe_failure(call.failure),
                "text": explain(self._core, call, time.monotonic(), why),
            }
        )

    def _why(self, call: Call) -> str:
        """Why it takes part in the run."""
        if call.parent is not None:
            return f"submitted by {call.parent.title}"
        return self._run.plan.reasons.get(call.recipe.name, "one argument of taskrun map")

    def _described(self, call: Call) -> dict[str, Any]:
        """What programs want to know of a call."""
        return {
            "call": call.name,
            "label": call.label,
            "task": call.recipe.name,
            "state": call.state,
            "attempt": call.attempt,
            "worker": None if call.worker is None else self._name_of_worker(call.worker),
            "since": call.wall or None,
        }

    def _name_of_worker(self, id: int) -> str:
        worker = self._core.worker(id)
        return worker_name(id, "" if worker is None else worker.node)

    def _stack(self, request: dict[str, Any], answer: Callable[[Any], None]) -> None:
        call = self._find(request["call"])
        if call.state is not RUNNING or call.worker is None:
            raise UsageError(f"{call.title} is not running: it is {call.state}")
        ask = getattr(self._run.engine, "stack", None)
        if ask is None:
            raise UsageError("this engine cannot look into its workers")
        described, name = self._described(call), self._name_of_worker(call.worker)
        answered: list[str] = []

        def tell(stack: str | None, text: str) -> None:
            if not answered:
                answered.append(text)
                frames = None if stack is None else _frames(stack)
                answer({**described, "frames": frames, "text": text})

        def give_up() -> None:
            tell(None, f"{name} does not answer: C code may hold the interpreter's lock\n")

        def on_stack(stack: str) -> None:
            where = stack or "in no code of the task's just now\n"
            tell(stack, f"{both_names(call.name, call.label)} on {name}:\n{where}")

        self._run.reactor.call_at(time.monotonic() + STACK_SECONDS, give_up)
        ask(call.worker, on_stack, call.id)

    # -- changing ---------------------------------------------------------------------

    def _cancel(self, request: dict[str, Any], answer: Callable[[Any], None]) -> None:
        if request["call"] == WHOLE_RUN:
            self._run.cancel()
            answer({"run": None, "text": "the run is being stopped"})
            return
        call = self._find(request["call"])
        if call.state in FINAL:
            raise UsageError(f"{call.title} has ended: it is {call.state}")
        self._run.observer.notice(f"taskrun cancel: {call.title}")
        self._run.post(m.CancelCalls((call.id,), "taskrun cancel"))
        answer({**self._described(call), "text": f"{call.title} is cancelled"})

    def _tell(self, request: dict[str, Any], answer: Callable[[Any], None]) -> None:
        call = self._find(request["call"])
        try:
            self._run.tell(call.id, request["message"])
        except StateError:
            raise UsageError(f"{call.title} hears nothing more: it is {call.state}") from None
        answer({**self._described(call), "text": f"{call.title} is told"})

    def _pause(self, request: dict[str, Any], answer: Callable[[Any], None]) -> None:
        self._set_paused(True)
        answer({"paused": True, "text": "nothing new starts until taskrun unpause"})

    def _unpause(self, request: dict[str, Any], answer: Callable[[Any], None]) -> None:
        self._set_paused(False)
        answer({"paused": False, "text": "the run goes on"})

    def _set_paused(self, paused: bool) -> None:
        if paused != self._core.paused:
            self._run.observer.notice("paused: taskrun unpause goes on" if paused else "goes on")
            self._run.post(m.Pause(paused))

    def _slots(self, request: dict[str, Any], answer: Callable[[Any], None]) -> None:
        """A server says what it leaves to this run."""
        nodes = {str(node): int(slots) for node, slots in request["nodes"].items()}
        self._run.engine.set_slots(int(request["slots"]), nodes)
        answer("so be it")

    def _lend(self, request: dict[str, Any], answer: Callable[[Any], None]) -> None:
        """A server lends resources, or wants some back."""
        self._run.post(m.Lent(Loan(*request["loan"])))
        answer("so be it")

    def _tell_wants(
        self, peer: Peer, request: dict[str, Any], answer: Callable[[Any], None]
    ) -> None:
        """A server wants to know, from now on, what this run has work for."""
        from taskrun.wanting import Wanting  # only runs of a server are asked

        self._run.on_event = Wanting(self._core, self._run.reactor, peer).look
        answer("so be it")

    def _drain(self, request: dict[str, Any], answer: Callable[[Any], None]) -> None:
        nodes = self._nodes()
        if nodes is None:
            raise UsageError("this run has no nodes: it was started without --listen")
        nodes.drain(str(request["node"]))
        answer(drained(str(request["node"])))

    def _nodes(self) -> Any:
        return getattr(self._run.engine, "nodes", None)

    # -- which call -------------------------------------------------------------------

    def _find(self, name: str) -> Call:
        """The call of that name or label.  Raises UsageError."""
        titled = None
        for call in self._core.calls:
            if call.recipe.name[:1] == name[:1] and call.name == name:
                return call
            if call.label == name and (titled is None or titled.state in FINAL):
                titled = call
        if titled is not None:
            return titled
        raise UsageError(f"there is no call {name!r} in this run; {self._hint(name)}")

    def _hint(self, name: str) -> str:
        family = self._core.graph.families.get(name.partition("[")[0])
        if family is not None and not family.calls:
            needed = [axis.source for axis in family.axes if axis.source is not None]
            open_ = [f"{source.name} ({source.open} open)" for source in needed if source.open]
            return f"{family.name} has no calls" + (
                f" yet: it waits for the items of {', '.join(open_)}" if open_ else ""
            )
        near = nearest(name, [call.name for call in self._core.calls[:10_000]])
        hint = f"did you mean {near!r}?" if near else "taskrun status shows what runs"
        return f"{hint} (a label is known once its call has begun)"


def drained(node: str) -> dict[str, Any]:
    """The answer to who has a node leave."""
    text = f"{node} takes no more calls, and leaves when it has ended its own"
    return {"node": node, "text": text}


def _frames(stack: str) -> list[dict[str, Any]]:
    """The frames of a stack that is written as Python does it, the outermost first."""
    return [
        {"file": file, "line": int(line), "function": function, "source": source}
        for file, line, function, source in _FRAME.findall(stack)
    ]
