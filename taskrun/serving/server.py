"""The server: runs come and go, and share what there is.

The main flow is :meth:`Server.run`.  The server itself executes nothing and imports nothing
of its users': every run has a process of its own (see ``runs``).  What there is to be shared
are the slots of this machine and those of the nodes that have joined (see ``hosts``), and
what these machines have of resources (see ``lending``); whenever a run or a node comes or
goes, they are dealt anew.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from time import monotonic
from typing import Any, Final

from taskrun import telling, transport
from taskrun.demand import HERE, Amounts
from taskrun.errors import MALFORMED, UsageError
from taskrun.model import nearest
from taskrun.network.bundles import digest_of
from taskrun.network.joining import check_versions
from taskrun.reactor import Reactor, Timer
from taskrun.reporting.text import one_line
from taskrun.roles import STATE_OF_RUN, STEER
from taskrun.serving import talk
from taskrun.serving.hosts import NODE, Hosts, relay, role_of, turn_away
from taskrun.serving.kept import Follower
from taskrun.serving.lending import Lending
from taskrun.serving.lent import LentPool
from taskrun.serving.looking import Look, machines, running
from taskrun.serving.processes import LOST
from taskrun.serving.runs import ENDED, GRACE, RUNNING, WAITING, ServedRun, Submission
from taskrun.serving.shares import Shares, Wish, deal, numbers
from taskrun.serving.states import States
from taskrun.signals import Signals
from taskrun.state.service import Service
from taskrun.steering import drained

REMEMBERED: Final = 20  # runs that have ended, with their output
GOODBYE: Final = 1.0  # seconds that those who follow have to take the last words
ENDING: Final = 2.0  # seconds after which nothing is left of a run whose process was killed
ANSWER_SECONDS: Final = 8.0  # that the process of a run has to answer
_WITH_RUN: Final = ("explain", "stack", "tell", "pause", "unpause")


class Server:
    """A coordinator that stays.

    ``slots``: how many workers this machine has for all runs together, and ``resources`` what
    else.  ``service``: where it listens, and the state that all its runs can reach.  ``say``
    writes a line for people.  ``lease``: seconds that a node may be silent.
    """

    def __init__(
        self,
        reactor: Reactor,
        slots: int,
        resources: Amounts,
        make_service: Callable[..., Service],
        say: Callable[[str], object],
        lease: float,
    ) -> None:
        self.runs: dict[str, ServedRun | LentPool] = {}
        self.status: int | None = None
        self._reactor = reactor
        self._slots = slots
        self._resources = resources
        self._lending = Lending()
        self._next_turn: Timer | None = None
        self._say = say
        self._began = time.time()
        self._numbers = count(1)
        self._clients: list[Client] = []
        self._service = make_service(reactor, is_running=lambda call, attempt: False, notice=say)
        self._lease = lease
        self._of_lanes: Shares = {}
        self._hosts = Hosts(reactor, self.deal, say, lease, frozenset((HERE,)))
        self._service.roles[NODE] = self._hosts.accept
        self._service.roles[STEER] = self._on_steering
        self._service.roles[talk.SUBMIT] = self._on_client
        states = States(reactor, self.find_run, lambda: self._service.authkey)
        self._service.roles[STATE_OF_RUN] = states.accept

    # -- the main flow ----------------------------------------------------------------

    def run(self) -> int:
        """Serve until a signal comes; gives the exit status.  Raises UsageError where it
        cannot listen."""
        before = signal.signal(signal.SIGCHLD, lambda number, frame: self._reactor.post(self._reap))
        try:
            with Signals(self._reactor, self._on_signal):
                self._service.start()
                try:
                    self._reactor.run_until(lambda: self.status is not None)
                    self._end_runs()
                finally:
                    self._service.close()
        finally:
            signal.signal(signal.SIGCHLD, before)
            self._reactor.close()
        assert self.status is not None
        return self.status

    def _on_signal(self, number: int) -> None:
        if self.status is not None:
            for run in self.live():
                run.kill()
            return
        self.status = 0
        if self.live():
            self._say("ends its runs, then itself; again to do so at once")

    def _end_runs(self) -> None:
        for run in self.live():
            run.interrupt(signal.SIGTERM)
        if not self._reactor.run_until(lambda: not self.live(), monotonic() + GRACE):
            for run in self.live():
                run.kill()
            self._reactor.run_until(lambda: not self.live(), monotonic() + GRACE)
        told = [client.peer for client in self._clients]
        self._reactor.run_until(lambda: all(peer.closed for peer in told), monotonic() + GOODBYE)

    def _reap(self) -> None:
        for run in list(self.runs.values()):
            try:
                run.look()
            except Exception:  # whatever is wrong with this one, the others go on
                telling.tell_traceback()

    # -- runs -------------------------------------------------------------------------

    def live(self) -> list[ServedRun | LentPool]:
        """The runs that have not ended, in order of arrival."""
        return [run for run in self.runs.values() if run.state != ENDED]

    def _submit(self, submission: Submission) -> ServedRun:
        name = f"r{next(self._numbers)}"
        try:
            run = ServedRun(
                name,
                submission,
                self._reactor,
                self._service.authkey,
                self._on_run_end,
                self.deal,
                self._lending.ledger.take_back,
                self._lease,
                self._resources,
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"the files of the run cannot be laid out: {error}") from None
        self.runs[name] = run
        self._service.roles[role_of(name)] = lambda peer: relay(
            peer, run.address, self._service.authkey, self._reactor
        )
        self._say(f"{name} {run.file} submitted")
        self.deal()
        if run.state == WAITING:
            why = "there is none until a node joins that has one"  # those of one lane have none
            if self._slots or self._hosts.places():
                why = "others have all of them"
            run.say(f"{name} waits for a slot: {why}")
        return run

    def _on_run_end(self, run: ServedRun | LentPool) -> None:
        self._say(f"{run.name} {run.file} ended with status {run.status}")
        self._service.roles[role_of(run.name)] = partial(turn_away, run.name)
        self._service.roles.pop(talk.line_of(run.name), None)
        self._lending.forget(run.name)
        if run.status == LOST:  # its workers die with it, but not at once
            self._reactor.call_at(monotonic() + ENDING, partial(self._let_go, run.name, HERE))
        else:
            self._lending.ledger.let_go(run.name, HERE)
        ended = [run for run in self.runs.values() if run.state == ENDED]
        for old in ended[:-REMEMBERED]:
            del self.runs[old.name]
            del self._service.roles[role_of(old.name)]
        self.deal()

    def _let_go(self, run: str, place: str) -> None:
        """Nothing of an ended run is left there."""
        self._lending.ledger.let_go(run, place)
        self.deal()

    def lend(self, peer: transport.Peer, asked: dict[str, Any]) -> LentPool:
        """Have a Pool take part as one more run.  Raises UsageError, and what reading what it
        asks raises."""
        try:
            check_versions(asked)
        except ValueError as error:
            raise UsageError(str(error)) from None
        name = f"p{next(self._numbers)}"
        jobs = None if asked["jobs"] is None else max(1, int(asked["jobs"]))
        assert self._service.address is not None
        try:
            pool = LentPool(
                name, str(asked["who"]), jobs, peer, self._reactor, self._service.address,
                self._service.authkey, self._slots, self._on_run_end,
            )  # fmt: skip
        except OSError as error:
            raise UsageError(f"its key cannot be written: {error.strerror}") from None
        self.runs[name] = pool
        self._service.roles[role_of(name)] = pool.take_node
        self._service.roles[talk.line_of(name)] = pool.take_line
        peer.send(talk.said(run=name, lease=self._lease))
        self._say(f"{name} {pool.file} came")
        self.deal()
        peer.send(talk.said(dealt=pool.slots))
        return pool

    def deal(self) -> None:
        """Share what there is among those who are there."""
        if self.status is not None:
            return
        places = {HERE: self._slots, **self._hosts.places()}
        live = self.live()
        # With more runs that want a slot than slots, the last ones wait until they can have one.
        started = [run for run in live if run.state == RUNNING]
        waiting = [run for run in live if run.state == WAITING]
        takers = [run for run in started if run.wants != 0]
        room = max(0, sum(places.values()) - len(takers))
        chosen = [*started, *waiting[:room]]
        wishes = {run.name: Wish(run.jobs, run.wants) for run in chosen}
        pins = self._lend(chosen, places, numbers(sum(places.values()), wishes, {}))
        wishes = {run: wish.without(self._lending.idle(run)) for run, wish in wishes.items()}
        dealt = deal(places, wishes, {run.name: run.shares for run in started}, pins)
        of_lanes = self._deal_lanes(started)
        for run in chosen:
            if run.state == RUNNING:
                run.share(dealt[run.name], of_lanes.get(run.name, {}))
            elif run.state == WAITING:
                run.start(dealt[run.name])
        self._hosts.tell({run: {**of, **of_lanes.get(run, {})} for run, of in dealt.items()})
        for name, loan in self._lending.loans():
            self.find_run(name).control.tell_loan(loan)

    def _deal_lanes(self, runs: Sequence[ServedRun | LentPool]) -> Shares:
        """Share the slots that are for calls of one lane alone among the runs that have such
        calls, in equal parts: how many calls each of these executes at a time is another
        matter."""
        dealt: Shares = {}
        for lane, places in self._hosts.of_lanes().items():
            wishes = {run.name: Wish() for run in runs if lane in run.lanes}
            before = {name: self._of_lanes.get(name, {}) for name in wishes}
            for name, share in deal(places, wishes, before).items():
                dealt.setdefault(name, {}).update(share)
        self._of_lanes = dealt
        return dealt

    def _lend(
        self, runs: Sequence[ServedRun | LentPool], slots: dict[str, int], number: dict[str, int]
    ) -> Shares:
        """Share out what there is beside slots; gives where runs need some of these for it."""
        self._collect()
        stocks = {HERE: self._resources, **self._hosts.stocks()}
        demands = {run.name: run.demand for run in runs if run.demand is not None}
        pins = self._lending.deal(stocks, slots, number, demands, monotonic())
        if self._next_turn is not None:
            self._next_turn.cancel()
        due = self._lending.due
        self._next_turn = None if due is None else self._reactor.call_at(due, self.deal)
        return pins

    def _collect(self) -> None:
        """What runs had on nodes that have ended is free when nothing of them is left there."""
        ledger, live = self._lending.ledger, {run.name for run in self.live()}
        for run in set(ledger.runs()) - live:
            for place in ledger.places(run):
                if place != HERE and self._hosts.is_rid_of(run, place):
                    ledger.let_go(run, place)

    def find(self, name: str) -> ServedRun | LentPool:
        """The run of that name.  Raises UsageError."""
        if name in self.runs:
            return self.runs[name]
        near = nearest(name, list(self.runs))
        hint = f"did you mean {near}?" if near else "taskrun status shows those that are"
        raise UsageError(f"there is no run {name!r} here (any more); {hint}")

    def find_run(self, name: str) -> ServedRun:
        """The same, where it has to be one that is executed here.  Raises UsageError."""
        run = self.find(name)
        if isinstance(run, LentPool):
            raise UsageError(f"{name} is a Pool of somebody else's: it can only be cancelled here")
        return run

    def _only_run(self, do: str) -> ServedRun:
        """The run that is meant where none is named.  Raises UsageError."""
        found = [run for run in self.live() if isinstance(run, ServedRun)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise UsageError("no run is alive here; taskrun status shows those that have ended")
        names = ", ".join(run.name for run in found)
        raise UsageError(
            f"here are several runs, {names}: say which one, taskrun {do} [ADDRESS] RUN ..."
        )

    # -- those who submit and follow --------------------------------------------------

    def _on_client(self, peer: transport.Peer) -> None:
        self._clients = [client for client in self._clients if not client.peer.closed]
        client = Client(self, peer)
        self._clients.append(client)
        peer.listen(client.on_frame, client.on_end)

    def submit_from(self, asked: dict[str, Any], bundle: memoryview) -> ServedRun:
        """Begin what a client asks for.  Raises UsageError, and what reading it raises."""
        if digest_of(bundle) != asked["digest"]:
            raise UsageError("the bundle that came is not the one that was announced")
        jobs = None if asked["jobs"] is None else max(1, int(asked["jobs"]))
        words = tuple(map(str, asked["words"]))
        return self._submit(Submission(str(asked["file"]), words, jobs, bytes(bundle)))

    # -- those who look and steer -----------------------------------------------------

    def _on_steering(self, peer: transport.Peer) -> None:
        peer.listen(lambda frame: self._on_request(peer, bytes(frame)), lambda reason: None)

    def _on_request(self, peer: transport.Peer, frame: bytes) -> None:
        try:
            request = json.loads(frame)
            answer = self._answer(peer, request)
        except UsageError as error:
            peer.send(_json(error=str(error)))
        except MALFORMED:
            peer.send(_json(error="this server does not know what that asks"))
        else:
            if answer is not None:
                peer.send(_json(ok=answer))

    def _answer(self, peer: transport.Peer, request: dict[str, Any]) -> Any:
        """The answer; None: it comes later, from the processes of runs."""
        do, name = str(request["do"]), request.get("run")
        if name is not None:
            self._ask(peer, self.find_run(str(name)), request)
            return None
        if do in _WITH_RUN:
            self._ask(peer, self._only_run(do), request)
            return None
        if do == "status":
            Look(list(self.runs.values()), self._reactor, partial(self._describe_to, peer))
            return None
        if do == "cancel":
            run = self.find(str(request["call"]))
            if run.state == ENDED:
                raise UsageError(f"{run.name} has ended, with status {run.status}")
            run.cancel()
            return {"run": run.name, "text": f"{run.name} is being stopped"}
        if do == "drain":
            host = self._hosts.find(str(request["node"]))
            self._hosts.drain(host)
            return drained(host.name)
        raise ValueError(do)

    def _describe_to(self, peer: transport.Peer, runs: list[dict[str, Any]]) -> None:
        nodes = [host.described() for host in self._hosts.hosts.values()]
        answer = {
            "server": True, "pid": os.getpid(), "seconds": round(time.time() - self._began, 3),
            "slots": self._slots + sum(self._hosts.places().values()), "runs": runs,
            "nodes": machines(runs, self._slots, nodes), "running": running(runs),
        }  # fmt: skip
        peer.send(_json(ok=answer))

    def _ask(self, peer: transport.Peer, run: ServedRun, request: dict[str, Any]) -> None:
        """Have the run's own process answer.  Of a run whose process is not there (any more) is
        said that it is gone: who watches it need not ask again."""
        if run.state == WAITING:
            raise UsageError(f"{run.name} is waiting")
        if run.state == ENDED:
            peer.send(_json(error=f"{run.name} has ended", gone=True))
            return

        asked: transport.Peer | None = None

        def on_open(opened: transport.Peer) -> None:
            nonlocal asked
            asked = opened
            opened.listen(lambda frame: answer(bytes(frame)), lambda reason: refuse(gone=True))
            opened.send(json.dumps({**request, "run": None}).encode())

        def answer(frame: bytes) -> None:
            timer.cancel()
            dialling.close()
            if asked is not None:
                asked.close()
            peer.send(frame)

        def refuse(*, gone: bool = False) -> None:
            why = f"{run.name} does not answer: it may be starting, or ending"
            answer(_json(error=why, gone=gone))

        dialling = transport.dial(
            run.address, self._service.authkey, self._reactor, STEER, on_open,
            lambda error: refuse(gone=True),
        )  # fmt: skip
        timer = self._reactor.call_at(monotonic() + ANSWER_SECONDS, refuse)


class Client:
    """One who submits a run, or follows one, or has a Pool."""

    def __init__(self, server: Server, peer: transport.Peer) -> None:
        self._server = server
        self.peer = peer
        self._asked: dict[str, Any] | None = None  # of a submission, whose bundle is to come
        self._run: ServedRun | None = None
        self._pool: LentPool | None = None
        self._follower: Follower | None = None

    def on_frame(self, frame: memoryview) -> None:
        """It says something."""
        try:
            self._take(frame)
        except UsageError as error:
            self._refuse(str(error))
        except MALFORMED:
            self._refuse("this server does not know what that asks: is it of the same version?")

    def _take(self, frame: memoryview) -> None:
        if self._pool is not None:
            if talk.heard(frame)["do"] == "close":
                self._pool.end(0)
        elif self._run is not None:
            if talk.heard(frame)["do"] == "interrupt":
                self._run.interrupt()
        elif self._asked is not None:
            if not frame or frame[0] != talk.BUNDLE:
                raise ValueError
            self._follow(self._server.submit_from(self._asked, frame[1:]))
        else:
            said = talk.heard(frame)
            if said["do"] == "submit":
                self._asked = said
            elif said["do"] == "attach":
                self._follow(self._server.find_run(str(said["run"])))
            elif said["do"] == "lend":
                self._pool = self._server.lend(self.peer, said)
            else:
                raise ValueError

    def _follow(self, run: ServedRun) -> None:
        self._run = run
        self.peer.send(talk.said(run=run.name))
        self._follower = run.follow(self.peer)

    def _refuse(self, reason: str) -> None:
        self.peer.send(talk.said(error=reason))
        self.peer.finish()
        self.on_end(reason)  # of one that is finished nothing more is heard

    def on_end(self, reason: str) -> None:
        """It is gone, which changes nothing for a run; a Pool is gone with it."""
        if self._pool is not None:
            self._pool.end()
        if self._run is not None and self._follower is not None:
            self._run.leave(self._follower)


def _json(**what: Any) -> bytes:
    return json.dumps(what).encode()


def tell(text: str) -> None:
    """Write a line for people."""
    telling.tell(one_line(text))
