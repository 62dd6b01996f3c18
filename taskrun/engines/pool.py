"""Own workers: on this machine, over Pipes, and on the nodes that have joined.

    perform(command) --frames--> worker --frames--> post(event)

The engine adds no policy: it carries out what the core says, and says what happened.  What
it must get right is how a worker ends.  Everything that the worker had sent is read first,
then what it had ended and not sent is taken from its ledger; only then is it reported lost,
with the one attempt that it was in.  Nothing else of it is lost, and nothing comes twice.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import count
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Final

from taskrun import blobs, bunch, places
from taskrun import messages as m
from taskrun.engines.links import PROCESS, Link, PipeLink
from taskrun.engines.local import Local
from taskrun.engines.nursery import Launch
from taskrun.engines.records import Records
from taskrun.engines.silence import Silence
from taskrun.errors import WireError
from taskrun.model import Failure, Recipe
from taskrun.observers import Observer
from taskrun.places import Place
from taskrun.reactor import Reactor
from taskrun.workers.settings import (
    FORKSERVER,
    Settings,
    environment_additions,
    place_of,
)

if TYPE_CHECKING:
    from taskrun.engines.nodes import Node, Nodes  # only where others may join

LONG: Final = 0.5  # seconds after which a call is known to run, whether anybody asked or not
FINISH: Final = 4.0  # seconds that a worker has to end by itself when it is told to quit
STUCK: Final = 1.0  # seconds, beyond twice the grace, that a worker of many calls has
SPARE: Final = 4  # workers a slot, where calls lend theirs
FEW: Final = 5  # workers in a row that may end before they are of any use

_engines = count(1)  # of this process


class PoolEngine:
    """An ``Engine`` of worker processes; see ``engines.base``.

    ``module`` and ``file``: the task file, if there is one.  ``start_method``: how a worker
    is made, ``forkserver`` or ``spawn``.  ``grace``: seconds between interrupt, TERM and
    KILL.  ``recipe_ids``: shared with the core.  ``constants``: task name -> the values that
    ``-p`` set.  ``environment``: variables for the workers, beside those that this process
    has.  ``nodes``: other machines that may join; then ``slots`` is how many workers this
    one has, but for spare ones.
    """

    def __init__(
        self,
        *,
        module: str | None = None,
        file: str | None = None,
        start_method: str = FORKSERVER,
        grace: float = 2.0,
        recipe_ids: Iterator[int] | None = None,
        constants: Mapping[str, dict[str, Any]] | None = None,
        environment: Mapping[str, str] | None = None,
        state: Callable[[], tuple[Any, bytes]] | None = None,
        slots: int = 1,
        nodes: Nodes | None = None,
    ) -> None:
        self._module, self._file = module, file
        self._start_method = start_method
        self._grace = grace
        self.hurries = False  # at the end: threads of workers are not waited for
        self._recipe_ids = recipe_ids or count(1)
        self._constants = constants or {}
        self._environment = environment
        self._state = state
        self._slots = slots
        self.nodes = nodes
        self._unplaced: list[tuple[int, str]] = []  # workers, while there is no place for them
        self._missing: set[str] = set()  # lanes that none of the nodes has, as was told
        self._local: Local | None = None
        self._links: dict[int, Link] = {}
        self._worker_ids = count(1)
        self._asking = False
        self._unflushed: list[Link] = []
        self._closing = False
        self._failed_starts = 0
        self._told_of_few = False
        self._stack_callbacks: dict[int, Callable[[str], None]] = {}
        self._tokens = count(1)
        self._performers: dict[type, Callable[[Any], None]] = {
            m.StartWorkers: self._start_workers,
            m.StopWorker: self._stop_worker,
            m.Assign: self._assign,
            m.Reclaim: self._reclaim,
            m.Interrupt: self._interrupt,
            m.Deliver: self._deliver,
        }

    # -- Engine -----------------------------------------------------------------------

    def start(self, reactor: Reactor, post: Callable[[m.Event], None], observer: Observer) -> None:
        """See ``engines.base``.  Raises RunError where no process can be started."""
        self._reactor = reactor
        self._silence = Silence(reactor, self.look)
        self._observer = observer
        self._post_to = post
        self._records = Records(self._post, observer, self._recipe_ids, self._constants)
        self._notice = observer.notice
        self._blobs = self._begin_blobs(self._notice)
        self._settings = settings = self._make_settings()
        self._local = Local(self, reactor, settings, self._launch())
        if self.nodes is not None:
            self.nodes.start(self, reactor, settings, self._on_capacity, self._retire)
            if not self._slots:
                observer.notice("no calls are executed here (-j 0): waiting for nodes to join")
        if self._slots:
            self._local.open()

    def perform(self, command: m.Command) -> None:
        """See ``engines.base``."""
        self._performers[type(command)](command)

    def kill(self) -> None:
        """See ``engines.base``."""
        for link in self._links.values():
            link.signal(signal.SIGKILL)

    def close(self, deadline: float) -> None:
        """See ``engines.base``.  QUIT for the idle, TERM for the busy, KILL for the rest."""
        local = self._local
        if local is None or self._closing:
            return
        places.end(self._notice)
        self._closing = True
        if self.nodes is not None:
            self.nodes.abandon()
        local.abandon(min(deadline, monotonic() + 1.0))
        for link in self._links.values():
            if link.assigned or not link.ready:
                link.signal(signal.SIGTERM)
            else:
                link.queue((m.QUIT, not self.hurries))
                link.flush()
        left = max(0.0, deadline - monotonic())
        self._run_until(self._all_ended, deadline - left / 4)
        local.quit(min(self._grace, left / 8))
        if not self._run_until(lambda: local.is_gone, deadline):
            local.kill()
        if self.nodes is not None:
            self.nodes.close(max(deadline, monotonic() + 1.0))
        for link in list(self._links.values()):
            self._let_go(link)

    def _all_ended(self) -> bool:
        """Whether nobody is left who is worth waiting for."""
        assert self._local is not None
        far = [link for link in self._links.values() if link.node]
        near = len(self._links) > len(far) and not self._local.is_gone
        # A node ends those that are about to start when it is told that all is over.
        return not near and not any(link.ready for link in far)

    def stack(self, worker: int, callback: Callable[[str], None], call: int | None = None) -> None:
        """Ask a worker where its call is, or its main thread; ``callback`` gets the text."""
        token = next(self._tokens)
        self._stack_callbacks[token] = callback
        self._links[worker].tell_control((m.STACK, token, call))

    def set_slots(self, slots: int, of_nodes: Mapping[str, int]) -> None:
        """From now on have so many workers here, and at most so many on the nodes that are
        named.  Those that are too many end the calls that they have, and take no more.

        Raises RunError where no process can be started.
        """
        assert self._local is not None
        self._slots = slots
        if slots and self._local.is_gone and not self._closing:
            self._local.open()
        if self.nodes is not None:
            self.nodes.limit(of_nodes)
        self._on_capacity()
        self._retire_excess(self._local.links.values(), slots, (PROCESS,))
        for node in self.nodes.nodes.values() if self.nodes is not None else ():
            lanes = node.offer.own_lanes or (PROCESS,)
            self._retire_excess(node.links.values(), node.slots, lanes)

    def _retire_excess(self, links: Collection[Link], slots: int, lanes: Collection[str]) -> None:
        """Those that are at no call go first.  ``lanes``: whose workers take the slots; others
        are beside them, as long as there are any."""
        staying = [link for link in links if not (link.retiring or link.stopping)
                   and (link.lane in lanes or not slots)]  # fmt: skip
        staying.sort(key=lambda link: bool(link.assigned))
        for link in staying[: max(0, len(staying) - slots)]:
            self._retire(link)

    # -- commands ---------------------------------------------------------------------

    def _start_workers(self, command: m.StartWorkers) -> None:
        if not self._asking:
            self._asking = True
            self._later(LONG, self._ask_for_the_long)
        assert self._local is not None
        workers = [next(self._worker_ids) for _ in range(command.count)]
        if self.nodes is None:
            self._local.start(workers, command.lane)
            return
        for worker in workers:
            if command.node is None:
                self._start_somewhere(worker, command.lane)
            else:
                self._start_on(worker, command.lane, command.node)

    def _start_on(self, worker: int, lane: str, node: str) -> None:
        """Start a worker on that machine."""
        assert self.nodes is not None and self._local is not None
        takers = {taker.name: taker for taker in self.nodes.takers()}
        place: Local | Node | None = takers.get(node) if node else self._local
        if place is None:
            self._soon(m.WorkerLost(worker, f"not started: {node} has left", None))
        else:
            place.start([worker], lane)

    def _start_somewhere(self, worker: int, lane: str) -> None:
        """Start a worker where there is a slot for it: here first; else, where calls lend
        theirs, where least is going on."""
        nodes, local = self.nodes, self._local
        assert nodes is not None and local is not None
        able = [node for node in nodes.takers() if lane in node.offer.lanes]
        for node in able:
            if not node.offer.processes and node.load < node.slots:
                node.start([worker], lane)
                return
        places: list[tuple[Local | Node, int]] = [(node, node.slots) for node in able]
        if self._slots:
            places.insert(0, (local, self._slots))
        if self._slots and local.load < self._slots:
            local.start([worker], lane)
            return
        place, slots = min(places, key=lambda place: place[0].load / place[1], default=(None, 0))
        if place is None:
            self._unplaced.append((worker, lane))  # nodes may come
            self._say_what_is_missing(lane)
        elif place.load >= SPARE * slots and lane == PROCESS:
            self._soon(m.WorkerLost(worker, "not started: no machine has room", None))
        else:
            place.start([worker], lane)

    def _on_capacity(self) -> None:
        """There are more slots, or fewer."""
        takers = self.nodes.takers() if self.nodes is not None else []
        cpus = {node.name: node.slots * node.offer.processes for node in takers}
        offers = {node.name: {**node.offer.resources, "cpu": cpus[node.name]} for node in takers}
        lanes: Counter[str] = Counter()
        for node in takers:
            if not node.offer.processes:
                lanes.update(dict.fromkeys(node.offer.lanes, node.slots))
        self._missing.difference_update(*[node.offer.lanes for node in takers])
        places = {node.name: node.offer.name for node in takers}
        self._post(m.Capacity(self._slots + sum(cpus.values()), offers, lanes, places))
        unplaced, self._unplaced = self._unplaced, []
        for worker, lane in unplaced:
            self._start_somewhere(worker, lane)

    def _say_what_is_missing(self, lane: str) -> None:
        """Nodes are here, and none of them executes calls of this lane."""
        assert self.nodes is not None
        if lane not in self._missing and self.nodes.takers():
            self._missing.add(lane)
            self._notice(f"no node executes calls of the lane {lane}: they wait for one that does")

    def _retire(self, link: Link) -> None:
        """A worker gets no more calls, since its node leaves, or has fewer slots."""
        link.retiring = True
        self._post(m.Retiring(link.id))

    def _stop_worker(self, command: m.StopWorker) -> None:
        link = self._links.get(command.worker)
        if link is not None:
            link.stopping = True
            link.queue((m.QUIT, True))
            self._flush_soon(link)
            self._later(FINISH, lambda: self._force_to_stop(link, signal.SIGTERM))

    def _force_to_stop(self, link: Link, number: signal.Signals) -> None:
        if link.id in self._links:
            link.signal(number)
            self._later(self._grace, lambda: self._force_to_stop(link, signal.SIGKILL))

    def _assign(self, command: m.Assign) -> None:
        link = self._links.get(command.worker)
        if link is None:
            return  # it is lost, which the core is about to hear
        kind = m.NESTED if command.nested else m.CALL
        assigned, known, queue = link.assigned, link.known, link.queue
        for call in command.calls:
            recipe = call.recipe
            if recipe.id not in known:
                link.teach(recipe)
            id = call.id
            assigned[id] = call
            queue((kind, id, call.attempt, recipe.id, call.index, call.arguments(), call.units))
        self._flush_soon(link)
        self._look_when_silent(link)

    def _deliver(self, command: m.Deliver) -> None:
        link = self._links.get(command.worker)
        if link is not None:
            link.queue((m.DELIVER, command.call, command.outcomes))
            self._flush_soon(link)

    def _reclaim(self, command: m.Reclaim) -> None:
        link = self._links.get(command.worker)
        if link is not None:
            self._flush(link)  # what is asked back must be there
            link.tell_control((m.REPORT, command.count))

    def _interrupt(self, command: m.Interrupt) -> None:
        link = self._links.get(command.worker)
        if link is None or command.call not in link.assigned:
            return  # it has ended, which the core is about to hear
        self._flush(link)
        link.tell_control((m.INTERRUPT, command.call, command.attempt, command.reason))
        if link.is_shared:
            self._expect_an_answer(link, command)
        elif command.call not in link.escalations:
            # It is killed only where it is what runs: a call that has not begun, or waits for
            # a nested one, is no reason to kill another.  Its time begins when it runs.
            runs = link.executing == (command.call, command.attempt)
            self._escalate_later(link, command, signal.SIGTERM if runs else None)

    def _expect_an_answer(self, link: Link, command: m.Interrupt) -> None:
        """Such a worker ends the call, or gives it up, by itself, unless it is stuck."""
        if command.call not in link.escalations:
            link.escalations[command.call] = self._later(
                2 * self._grace + STUCK, lambda: self._end_stuck(link, command)
            )

    def _end_stuck(self, link: Link, command: m.Interrupt) -> None:
        self.look(link)
        if link.id in self._links and command.call in link.assigned:
            link.rejected = "stopped, because a call in it let no other run, nor be interrupted"
            link.signal(signal.SIGKILL)

    def _escalate_later(
        self, link: Link, command: m.Interrupt, number: signal.Signals | None
    ) -> None:
        timer = self._later(self._grace, lambda: self._escalate(link, command, number))
        link.escalations[command.call] = timer

    def _escalate(self, link: Link, command: m.Interrupt, number: signal.Signals | None) -> None:
        self.look(link)
        if link.id not in self._links or command.call not in link.assigned:
            return
        after: signal.Signals | None = None
        attempt = command.call, command.attempt
        if link.executing == attempt:
            after = signal.SIGTERM if number is None else signal.SIGKILL
            if number is not None:
                link.signal(number, attempt)
        elif link.is_idle:  # nor does it queue the call: that was refused
            link.rejected = "stopped, because it did not say how an interrupted call ended"
            link.signal(signal.SIGKILL)
        self._escalate_later(link, command, after)

    # -- sending ----------------------------------------------------------------------

    def at_hand(self, worker: int, recipe: Recipe) -> PipeLink | None:
        """A worker of this machine that has nothing to do and knows a task; see ``trips``."""
        link = self._links.get(worker)
        if type(link) is not PipeLink or link.assigned or link.rejected or link.stopping:
            return None
        return link if recipe.id in link.known else None

    def forget(self, recipe: int) -> None:
        """Have no worker keep a task of which no calls are left, with all that came with it."""
        for link in self._links.values():
            if link.forget(recipe):
                self._flush_soon(link)

    def take(self, link: Link, records: list[Any]) -> None:
        """Take records of a worker; it is stopped where they are none."""
        try:
            self._records.take(link, records)
        except WireError as error:
            self.reject(link, f"what it sent could not be read: {error}")

    def _flush_soon(self, link: Link) -> None:
        """Send at the end of this turn: what one event leads to goes out as one frame."""
        if not self._unflushed:
            self._reactor.call_soon(self._flush_all)
        self._unflushed.append(link)

    def _flush_all(self) -> None:
        links, self._unflushed = self._unflushed, []
        for link in links:
            self._flush(link)

    def _flush(self, link: Link) -> None:
        if link.id not in self._links:
            return
        for record, error in link.flush():
            if record[0] in (m.CALL, m.NESTED):
                self._reactor.call_soon(partial(self._refuse, link, record, error))

    def _refuse(self, link: Link, record: tuple[Any, ...], error: Exception) -> None:
        """A call that cannot be sent ends with the reason why."""
        call = link.assigned.pop(record[1], None)
        if call is not None:
            message = f"the arguments of {call.name} cannot be pickled: {error}"
            failure = Failure("error", "ArgumentError", message)
            report = (record[1], record[2], "error", (failure, False), None, -1.0, 0.0, False)
            self._post(m.Finished(link.id, [report]))

    # -- what workers say -------------------------------------------------------------

    def add(self, link: Link) -> None:
        """See ``engines.local.Crew``."""
        self._links[link.id] = link

    def hear(self, link: Link, frame: memoryview) -> bool:
        """See ``engines.local.Crew``."""
        was_ready = link.ready
        try:
            self._records.take(link, link.intake.frame(frame))
        except WireError as error:
            self.reject(link, f"what it sent could not be read: {error}")
            return False
        if link.retiring and link.ready and not was_ready:
            self._retire(link)  # it was about to start when its node said that it leaves
        if link.ready and not was_ready:
            self._failed_starts = 0
        if link.ready and self._local is not None:
            self._local.proven()
        self._look_when_silent(link)
        return True

    def _look_when_silent(self, link: Link) -> None:
        # A node looks into the ledgers of its own workers, and tells of what it finds.
        if not link.node and bunch.are_many(link.assigned):
            self._silence.broken(link)

    def hear_control(self, link: Link, frame: memoryview) -> None:
        """See ``engines.local.Crew``."""
        try:
            for record in pickle.loads(frame):
                if record[0] == m.STACK_IS:
                    self._stack_callbacks.pop(record[1])(record[2])
        except Exception as error:
            self.reject(link, f"what it sent could not be read: {error}")

    def reject(self, link: Link, why: str) -> None:
        """See ``engines.local.Crew``."""
        link.rejected = link.rejected or f"stopped, because {why}"
        link.stop_listening()
        link.signal(signal.SIGKILL)

    def output(self, call: Any, stream: str, data: bytes, worker: str) -> None:
        """See ``engines.local.Crew``."""
        self._observer.output(call, stream, data, worker)

    def worker_changed(self, name: str, what: str) -> None:
        """See ``engines.local.Crew``."""
        self._observer.worker_changed(name, what)

    def notice(self, text: str) -> None:
        """See ``engines.local.Crew``."""
        self._observer.notice(text)

    def give_up(self, reason: str) -> None:
        """See ``engines.local.Crew``."""
        self._post(m.GiveUp(reason))

    def _ask_for_the_long(self) -> None:
        """Have workers tell when the calls began that people wait for."""
        for link in self._links.values():
            if link.is_shared:
                if link.assigned and link.ready:
                    link.tell_control((m.REPORT, None))
                continue
            executing = link.executing
            if executing is not None and executing == link.seen != link.asked:
                link.asked = executing
                link.tell_control((m.REPORT, None))
            link.seen = executing
        if not self._closing:
            self._later(LONG, self._ask_for_the_long)

    def look(self, link: Link) -> bool:
        """See ``engines.local.Crew``."""
        if link.id not in self._links or link.rejected:
            return False
        try:
            records = link.look()
        except WireError:
            return False  # caught in the middle of a change; it comes over the Pipe
        if records:
            self._records.take(link, records)
        return bool(records)

    # -- the end of a worker ----------------------------------------------------------

    def ended(self, link: Link, how: str) -> None:
        """See ``engines.local.Crew``: first all that it had ended, then itself."""
        try:
            for records in link.read_the_last():
                self._records.take(link, records)
        except WireError as error:
            link.rejected = link.rejected or f"stopped, because what it sent was garbled: {error}"
        executing = link.executing
        link.read_the_last_output()
        reason = link.rejected or how
        if executing is not None:
            self._observer.output_ended(link.assigned[executing[0]])
            if how == "exited with status 0":
                reason = f"{how} in the middle of the call"
        elif link.is_shared and link.assigned:
            if len(link.assigned) > 1:
                reason = f"{reason}, with {len(link.assigned)} calls in it"
            for call in link.assigned.values():
                self._observer.output_ended(call)
        last_output = link.last_output
        expected = self._closing or link.stopping
        self._observer.worker_changed(link.name, f"{'ended' if expected else 'lost'}, {reason}")
        self._let_go(link)
        if not link.ready and not link.blameless:
            self.not_started(link.id, reason, link.lane, last_output, denied=link.denied)
        elif link.assigned or not link.stopping:
            self._post(m.WorkerLost(link.id, reason, executing, last_output, link.lane))

    def _let_go(self, link: Link) -> None:
        del self._links[link.id]
        self._silence.forget(link)
        link.close()
        blobs.forget(place_of(self._settings, link.id))

    def assume_begun(self, link: Link) -> None:
        """See ``engines.local.Crew``."""
        for call in list(link.assigned.values()):
            self._post(m.Began(link.id, call.id, call.attempt, time()))

    def not_started(
        self,
        worker: int,
        reason: str,
        lane: str = PROCESS,
        last_output: str = "",
        *,
        denied: bool = False,
    ) -> None:
        """See ``engines.local.Crew``."""
        crew = [link for link in self._links.values() if link.lane == lane]
        of_use = sum(link.ready for link in crew)
        if denied and crew:
            self._make_do(len(crew), reason, lane)
        elif self._failed_starts < FEW:
            self._failed_starts += 1
        elif of_use:
            self._failed_starts = 0
            self._make_do(of_use, reason, lane)
        else:
            said = f"; the last said:\n{last_output.rstrip()}" if last_output else ""
            self._soon(m.GiveUp(f"workers end before they can take a call ({reason}){said}"))
            return
        self._soon(m.WorkerLost(worker, reason, None, last_output, lane))

    def _make_do(self, workers: int, reason: str, lane: str) -> None:
        """The run goes on with the workers that there are, or are about to be."""
        self._soon(m.NoMoreWorkers(lane, workers))
        if not self._told_of_few:
            self._told_of_few = True
            why = reason.removeprefix("not started: ")
            self._notice(f"some workers cannot be started ({why}): the others do their part")

    # -- small things -----------------------------------------------------------------

    def _post(self, event: m.Event) -> None:
        if not self._closing:
            self._post_to(event)

    def _soon(self, event: m.Event) -> None:
        self._reactor.call_soon(lambda: self._post(event))

    def _later(self, seconds: float, callback: Callable[[], None]) -> Any:
        return self._reactor.call_at(monotonic() + seconds, callback)

    def _run_until(self, predicate: Callable[[], bool], deadline: float) -> bool:
        return self._reactor.run_until(predicate, deadline)

    def _launch(self) -> Launch | None:
        """How a template is started; None: the usual way."""
        return None

    def _begin_blobs(self, notice: Callable[[str], object] | None) -> Place:
        """Where the workers of this engine, which is one of several, put large data."""
        own = places.begin(notice)
        return Place(own.folders, f"e{next(_engines)}")

    def _make_settings(self) -> Settings:
        try:
            cwd = os.getcwd()
        except FileNotFoundError:
            cwd = None  # it was deleted; the template starts in it all the same
        additions = environment_additions(dict(os.environ))
        return Settings(
            argv=sys.argv[:],
            path=sys.path[:],
            cwd=cwd,
            module=self._module,
            file=self._file,
            environment={**additions, **(self._environment or {})},
            start_method=self._start_method,
            set_by_user={task: frozenset(values) for task, values in self._constants.items()},
            node="local",
            coordinator=os.getpid(),
            grace=self._grace,
            state=None if self._state is None else self._state(),
            blobs=self._blobs,
        )
