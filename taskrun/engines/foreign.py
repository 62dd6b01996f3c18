"""Engines that are not ours: to the core, one worker with many slots.

    Assign --> backlog --chunks--> host ... some process: workers.guest --records--> events

The host (``hosts.Host``: Dask, Ray, an executor) carries chunks and keeps large values; all
that has to do with calls is done here, once for all of them.  A call that was assigned waits
in the backlog, from which it can be taken back, until the host has room.

What a chunk has to say comes when it is done, or as it happens from its notes: the same
bytes, of which so many were read already.  Where a worker dies, the notes tell which call
it was in: that one is lost, those before it have ended, those behind it were not begun.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from time import monotonic
from typing import Any, Final

from taskrun import blobs, sessions
from taskrun import messages as m
from taskrun.engines.chunking import Backlog, goes_alone, split_at_inputs
from taskrun.engines.hosts import Broken, Host, Lost, Refused, Result, Returned, Terms, Withdrawn
from taskrun.engines.kept import Keeping
from taskrun.engines.notes import Notes, Sent
from taskrun.engines.records import Records
from taskrun.errors import RunError
from taskrun.model import Failure
from taskrun.network.bundles import Bundle
from taskrun.observers import Observer
from taskrun.reactor import Reactor
from taskrun.workers.briefs import Apart, Brief, Chunk, TaskFile
from taskrun.workers.settings import environment_additions

WORKER: Final = 1
ASSIGNED: Final = 1024  # calls per thread of the host that may be in the backlog or on their way
LOOK: Final = 0.1  # seconds between looks at the notes of chunks that take long
PULSE: Final = 0.5  # seconds between questions whether the engine is there
FEW: Final = 5  # chunks in a row that may be lost before a call of theirs began


class ForeignEngine:
    """An ``Engine`` on a host; see ``engines.base``.

    ``module`` and ``file``: the task file, if there is one.  ``grace``: seconds between
    interrupt, TERM and KILL.  ``recipe_ids``: shared with the core.  ``constants``: task
    name -> the values that ``-p`` set.  ``state``: gives the addresses of the shared state,
    and a key for this run.  ``bundle``: gives the files that other machines need.
    """

    id = WORKER
    name = f"w{WORKER}"
    node = ""
    lane = "process"
    slots = 0  # calls that may be in the backlog or on their way

    def __init__(
        self,
        host: Host,
        *,
        module: str | None = None,
        file: str | None = None,
        grace: float = 2.0,
        recipe_ids: Iterator[int] | None = None,
        constants: Mapping[str, dict[str, Any]] | None = None,
        state: Callable[[], tuple[tuple[Any, ...], bytes]] | None = None,
        bundle: Callable[[], Bundle | None] | None = None,
    ) -> None:
        self.ready = False
        self.assigned: dict[int, Any] = {}
        self.escalations: dict[int, Any] = {}
        self.bunch: tuple[int, int, float] | None = None
        self._host = host
        self._module, self._file = module, file
        self._grace = grace
        self._recipe_ids = recipe_ids or count(1)
        self._constants = constants or {}
        self._state = state
        self._make_bundle = bundle if host.far else None
        self._bundle: Bundle | None = None
        self._threads = 0
        self._backlog = Backlog()
        self._sent: dict[int, Sent] = {}
        self._where: dict[int, Sent] = {}  # call -> the chunk it went with
        self._chunks = count(1)
        self._keeping = Keeping(host)
        self._tasks: dict[int, tuple[Any, ...]] = {}  # recipe -> its TASK record
        self._brief: bytes | None = None
        self._opening: threading.Thread | None = None
        self._notes: Notes | None = None
        self._about_to_send = self._looking = self._closed = False
        self._in_vain = 0
        self._performers: dict[type, Callable[[Any], None]] = {
            m.StartWorkers: lambda command: None,
            m.StopWorker: lambda command: None,
            m.Assign: self._assign,
            m.Reclaim: self._reclaim,
            m.Interrupt: self._interrupt,
            m.Deliver: lambda command: None,
        }

    # -- Engine -----------------------------------------------------------------------

    def start(self, reactor: Reactor, post: Callable[[m.Event], None], observer: Observer) -> None:
        """See ``engines.base``.  The host is opened in a thread: Ctrl-C works meanwhile."""
        self._reactor = reactor
        self._observer = observer
        self._post_to = post
        self._records = Records(self._post, observer, self._recipe_ids, self._constants)
        self._notes = Notes() if self._host.here else None
        self._bundle = self._make_bundle() if self._make_bundle is not None else None
        self._brief = pickle.dumps(self._make_brief())
        self._opening = threading.Thread(target=self._open, name="taskrun engine", daemon=True)
        self._opening.start()

    def perform(self, command: m.Command) -> None:
        """See ``engines.base``."""
        self._performers[type(command)](command)

    def kill(self) -> None:
        """See ``engines.base``."""
        self._backlog.clear()
        for sent in self._sent.values():
            self._host.cancel(sent.handle)
            self._signal(sent, signal.SIGKILL)

    def close(self, deadline: float) -> None:
        """See ``engines.base``.  Values that somebody will still ask for are brought here."""
        if self._closed or self._opening is None:
            return
        self._closed = True
        self._opening.join(max(0.0, deadline - monotonic()))
        if self.ready:
            self._keeping.bring_home()
        if self._sent:
            self.kill()
        try:
            self._host.close(self._brief if self.ready else None, deadline)
        except Exception as error:  # the calls have ended: what came of them is told all the same
            said = f"{type(error).__name__}: {error}"
            self._observer.notice(f"{self._host.name} did not end as it should: {said}")
        if self._notes is not None:
            self._notes.close()

    # -- the host ---------------------------------------------------------------------

    def _open(self) -> None:
        try:
            threads = self._host.open(self._bundle)
        except RunError as error:
            self._reactor_post(partial(self._give_up, str(error)))
        except Exception as error:
            said = f"{self._host.name} cannot be started: {type(error).__name__}: {error}"
            self._reactor_post(partial(self._give_up, said))
        else:
            self._reactor_post(partial(self._opened, threads))

    def _reactor_post(self, callback: Callable[[], None]) -> None:
        """From any thread, at any time; not after the run."""
        if not self._closed:
            self._reactor.post(callback)

    def _opened(self, threads: int) -> None:
        self.ready = True
        self._threads = threads
        self.slots = threads * ASSIGNED
        self._observer.worker_changed(self.name, f"{self._host.name}, {threads} at a time")
        self._post(m.WorkerReady(WORKER, os.getpid(), slots=self.slots))
        self._later(PULSE, self._feel_the_pulse)

    def _feel_the_pulse(self) -> None:
        gone = self._host.is_gone()
        if gone is not None:
            self._give_up(gone)
        elif not self._closed:
            self._later(PULSE, self._feel_the_pulse)

    def _give_up(self, reason: str) -> None:
        self._post(m.GiveUp(reason))

    # -- sending ----------------------------------------------------------------------

    def _assign(self, command: m.Assign) -> None:
        for call in command.calls:
            self.assigned[call.id] = call
            lacking = self._host.missing(call.recipe.resources)
            if lacking is None:
                self._backlog.add(call)
            else:
                self._refuse_soon(call, f"needs {lacking}: nobody on {self._host.name} has it")
        self._send_soon()

    def _refuse_soon(self, call: Any, why: str) -> None:
        failure = Failure("blocked", "CallBlocked", f"{call.name} {why}")
        self._soon(lambda: self._end(call, failure, retryable=False))

    def _send_soon(self) -> None:
        if not self._about_to_send:
            self._about_to_send = True
            self._reactor.call_soon(self._send_what_there_is_room_for)

    def _send_what_there_is_room_for(self) -> None:
        self._about_to_send = False
        while self._backlog.count and len(self._sent) <= 2 * self._threads and not self._closed:
            calls = self._backlog.take(self._threads)
            arguments = [self._keeping.take(call.arguments()) for call in calls]
            calls, rest = split_at_inputs(calls, [bool(places) for _, places in arguments])
            for call in rest:
                self._backlog.add(call)
            self._send(calls, arguments[: len(calls)])

    def _send(self, calls: list[Any], arguments: list[tuple[Any, list[Any]]]) -> None:
        first = calls[0].recipe
        id = next(self._chunks)
        records = [
            (m.CALL, call.id, call.attempt, call.recipe.id, call.index, args, call.units)
            for call, (args, _) in zip(calls, arguments, strict=True)
        ]
        apart = None
        if goes_alone(first):
            apart = Apart(calls[0].name, first.timeout, first.retry_timeouts)
        chunk = Chunk(id, [self._task(first)], records, apart)
        sent = Sent(id, {call.id: call for call in calls}, apart is not None, monotonic())
        self._sent[id] = sent
        self._where.update(dict.fromkeys(sent.calls, sent))
        with blobs.far():
            data = pickle.dumps(chunk, pickle.HIGHEST_PROTOCOL)
        sent.handle = self._host.submit(
            self._brief or b"",
            data,
            arguments[0][1],
            Terms(first.priority, first.resources),
            lambda result: self._reactor_post(partial(self._on_result, sent, result)),
        )
        self._look_later()

    def _task(self, recipe: Any) -> tuple[Any, ...]:
        record = self._tasks.get(recipe.id)
        if record is None:
            record = self._tasks[recipe.id] = (
                m.TASK, recipe.id, recipe.name, recipe.reference, recipe.blob, recipe.names,
                recipe.constants, recipe.flags,
            )  # fmt: skip
        return record

    def _reclaim(self, command: m.Reclaim) -> None:
        back = self._backlog.give_back(command.count)
        self._soon(lambda: self._give_back(back))

    def _give_back(self, calls: list[tuple[int, int]]) -> None:
        for id, _ in calls:
            self.assigned.pop(id, None)
            self._where.pop(id, None)
        self._post(m.GaveBack(WORKER, calls))

    # -- what comes back --------------------------------------------------------------

    def _on_result(self, sent: Sent, result: Result) -> None:
        if self._sent.pop(sent.id, None) is None:
            return
        if isinstance(result, Returned):
            self._in_vain = 0
            self._take(sent, sent.unread(result.records), result.place)
            self._end_all(sent, Lost("did not say how the call ended"))
        elif isinstance(result, Broken):
            self._give_up(result.reason)
        else:
            self._read_notes(sent, last=True)
            self._end_all(sent, result)
        if self._notes is not None:
            self._notes.forget(sent)
        if self._backlog.count:
            self._send_soon()

    def _take(self, sent: Sent, records: list[tuple[Any, ...]], place: Any) -> None:
        """Post what records say; what was written comes first."""
        told = []
        for record in records:
            kind = record[0]
            if kind == m.AT:
                sent.at = record
                sent.began.add(record[1])
            elif kind == m.OUTPUT:
                self._observer.output(self.assigned.get(record[1]), record[3], record[4])
            elif kind == m.ENDED:
                told.append(self._ended(sent, record, place))
            else:
                told.append(record)
        if told:
            self._records.take(self, told)

    def _ended(self, sent: Sent, record: tuple[Any, ...], place: Any) -> tuple[Any, ...]:
        call = sent.calls.pop(record[1], None)
        self._where.pop(record[1], None)
        if call is not None:
            self._backlog.learn(call.recipe.id, record[7])
        return self._keeping.leave(record, place)

    def _end_all(self, sent: Sent, result: Result) -> None:
        """The rest of a chunk whose worker is gone, or that was never executed."""
        if not sent.calls:
            return
        if isinstance(result, Lost):
            begun, back = sent.begun(noted=self._notes is not None)
            self._count_in_vain(begun, result)
            for call in begun:
                self._end(call, self._lost(call, result), retryable=True)
            if back:
                self._give_back([(call.id, call.attempt) for call in back])
            return
        for call in list(sent.calls.values()):
            if isinstance(result, Withdrawn):
                self._end_cancelled(call)
            elif isinstance(result, Refused):
                failure = Failure("error", "EngineError", f"{call.name}: {result.reason}")
                self._end(call, failure, retryable=False)

    def _count_in_vain(self, begun: list[Any], result: Lost) -> None:
        self._in_vain = 0 if begun else self._in_vain + 1
        if self._in_vain > FEW:
            self._give_up(
                f"the workers of {self._host.name} end before they can begin a call: "
                f"the last one {result.reason}"
            )

    def _lost(self, call: Any, result: Lost) -> Failure:
        said = f"the worker that executed {call.name} (attempt {call.attempt}) {result.reason}"
        return Failure("lost", "WorkerLost", said)

    def _end_cancelled(self, call: Any) -> None:
        self._end(
            call,
            Failure("cancelled", "CallCancelled", f"{call.name} was cancelled"),
            retryable=False,
        )

    def _end(self, call: Any, failure: Failure, *, retryable: bool) -> None:
        """Report that a call ended, other than by what its worker says."""
        if self.assigned.pop(call.id, None) is not call:
            return
        sent = self._where.pop(call.id, None)
        if sent is not None:
            sent.calls.pop(call.id, None)
        timer = self.escalations.pop(call.id, None)
        if timer is not None:
            timer.cancel()
        began, seconds = -1.0, 0.0
        if sent is not None and sent.at is not None and sent.at[1] == call.id:
            began = sent.at[3]
        report = (call.id, call.attempt, "error", (failure, retryable), None, began, seconds, False)
        self._post(m.Finished(WORKER, [report]))

    def read_output_of(self, call: int, attempt: int) -> None:
        """See ``records.Source``: it came before the end."""

    # -- notes ------------------------------------------------------------------------

    def _look_later(self) -> None:
        if self._notes is not None and not self._looking:
            self._looking = True
            self._later(LOOK, self._look)

    def _look(self) -> None:
        self._looking = False
        latest = monotonic() - LOOK
        for sent in list(self._sent.values()):
            if sent.since <= latest and self._read_notes(sent):
                self._say_began(sent)
        if self._sent:
            self._look_later()

    def _read_notes(self, sent: Sent, *, last: bool = False) -> bool:
        """Take what is new in a chunk's notes; whether there was anything."""
        if self._notes is None:
            return False
        records = self._notes.read(sent, last=last)
        self._take(sent, records, None)
        return bool(records)

    def _say_began(self, sent: Sent) -> None:
        """People want to know what takes long, and timeouts run from here."""
        if sent.at is not None and sent.at[1] in sent.calls and sent.said != sent.at[1:3]:
            sent.said = sent.at[1:3]
            self._post(m.Began(WORKER, sent.at[1], sent.at[2], sent.at[3]))

    # -- interrupts -------------------------------------------------------------------

    def _interrupt(self, command: m.Interrupt) -> None:
        call = self.assigned.get(command.call)
        if call is None:
            return  # it has ended, which the core is about to hear
        if self._backlog.remove(call):
            self._soon(lambda: self._end_cancelled(call))
            return
        sent = self._where.get(call.id)
        if sent is None or call.id in self.escalations:
            return
        sent.interrupted.add(call.id)
        if sent.interrupted.issuperset(sent.calls):
            self._soon(lambda: self._end_chunk(sent))
        self.escalations[call.id] = self._later(self._grace, lambda: self._escalate(call, sent))

    def _end_chunk(self, sent: Sent) -> None:
        """All calls of a chunk are to end."""
        if sent.id not in self._sent or not sent.calls:
            return
        if sent.apart:
            self._read_notes(sent)
            if not sent.calls:
                return  # it has ended just now
            (call,) = sent.calls.values()
            if self._signal(sent, signal.SIGINT):
                return
            if self._host.interrupt(self._brief or b"", call.id, call.attempt):
                return
        self._host.cancel(sent.handle)

    def _escalate(self, call: Any, sent: Sent) -> None:
        """It did not end by itself: its process is ended, where it has one of its own; else
        the run goes on without it."""
        self.escalations.pop(call.id, None)
        if call.id not in self.assigned:
            return
        if self._may_kill(sent) and self._signal(sent, signal.SIGKILL):
            self.escalations[call.id] = self._later(self._grace, lambda: self._escalate(call, sent))
            sent.killed = True
            return
        self._observer.notice(f"{call.name} is still running on {self._host.name}: it has no "
                              "timeout= and no cancellable=True")  # fmt: skip
        self._end_cancelled(call)

    def _may_kill(self, sent: Sent) -> bool:
        if sent.killed or not self._host.here:
            return False
        self._read_notes(sent)
        at_stake = [sent] if sent.apart or self._host.isolated else self._sent.values()
        return all(one.interrupted.issuperset(one.calls) for one in at_stake)

    def _signal(self, sent: Sent, number: int) -> bool:
        """Signal the process that executes a chunk, if it is known and not this one."""
        pid = sent.at[4] if sent.at is not None and sent.at[1] in sent.calls else None
        if not self._host.here or pid is None or pid == os.getpid():
            return False
        if sent.apart and number == signal.SIGKILL:
            sessions.signal_session(pid, number)
            return True
        return bool(sessions.send([pid], number))

    # -- small things -----------------------------------------------------------------

    def _post(self, event: m.Event) -> None:
        if not self._closed:
            self._post_to(event)

    def _soon(self, callback: Callable[[], None]) -> None:
        self._reactor.call_soon(callback)

    def _later(self, seconds: float, callback: Callable[[], None]) -> Any:
        return self._reactor.call_at(monotonic() + seconds, callback)

    def _task_file(self) -> TaskFile | None:
        if self._file is None or self._module is None:
            return None
        with open(self._file, "rb") as file:
            return TaskFile(self._module, os.path.abspath(self._file), file.read())

    def _make_brief(self) -> Brief:
        here = self._host.here
        own = here and self._host.alone
        return Brief(
            run=os.urandom(8).hex(),
            engine=self._host.name,
            path=[os.path.abspath(path) for path in sys.path],
            file=self._task_file(),
            folder=os.getcwd() if own else None,
            environment=environment_additions(dict(os.environ)) if own else {},
            set_by_user={task: frozenset(values) for task, values in self._constants.items()},
            notes=None if self._notes is None else self._notes.path,
            keep=self._host.keeps,
            alone=self._host.alone,
            coordinator=os.getpid() if here else None,
            state=None if self._state is None else self._state(),
            bundle=None if self._bundle is None else (self._bundle.digest, self._bundle.file),
        )
