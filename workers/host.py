"""A node of a server: takes part in several runs at a time, with a supervisor for each.

The server says in which runs this node is to take part.  For each of them a process is forked
that is the node of that run and of no other: it dials the server by a role that names the run,
and the server passes on what it and the run's process say to each other.  So a run's part in
this node has a lease of its own; a connection that breaks, even a server that is gone for a
moment, ends nothing here before that is over.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable
from functools import partial
from time import monotonic
from typing import Any, Final, NoReturn

from taskrun import sessions
from taskrun.errors import MALFORMED, DialError, TaskrunError, WireError
from taskrun.network.channels import Offer
from taskrun.network.joining import Answer, Hello, Hosting, hello_frame, read_answer
from taskrun.reactor import Reactor, Timer
from taskrun.signals import NUMBERS, Signals
from taskrun.telling import tell_traceback

BEAT: Final = 1.0  # seconds
SILENCE: Final = 7.5  # seconds without an answer, after which the connection is given up
AGAIN: Final = 0.5  # seconds before the server is dialled again, or a supervisor started again
_GOODBYE: Final = 1.0  # seconds for the server to take the last words

Dial = Callable[[Callable[[Any], object], Callable[[DialError], object]], object]


class Host:
    """This machine's part in all runs of a server.

    ``peer`` is the connection over which the server gave ``hosting`` as its answer; ``dial``
    makes another one.  ``take_part(run, offer)`` is the supervisor for a run: it is called in
    a process of its own, and gives its exit status.  ``idle_exit``: seconds without a run that
    wants this node after which it leaves by itself.
    """

    def __init__(
        self,
        reactor: Reactor,
        peer: Any,
        hosting: Hosting,
        offer: Offer,
        dial: Dial,
        take_part: Callable[[str, Offer], int],
        say: Callable[[str], object],
        idle_exit: float | None = None,
    ) -> None:
        self._reactor = reactor
        self._idle_exit = idle_exit
        self._busy_at = monotonic()
        self._hosting = hosting
        self._offer = offer
        self._dial = dial
        self._take_part = take_part
        self._say = say
        self._parts: dict[str, int] = {}  # run -> pid
        self._ending: set[str] = set()  # runs whose supervisors were told to leave
        self._wanted: set[str] = set()
        self._version: int | None = None  # of that, which the server has told last
        self._former: set[int] = set()  # supervisors for runs of a server that is gone
        self._peer: Any = None
        self._heard = monotonic()
        self._leaving = self._over = False
        self._status = 0
        self._attach(peer)

    # -- the main flow ----------------------------------------------------------------

    def run(self) -> int | None:
        """Take part until told to leave; gives the exit status, or None where there is no
        server any more, but something else that wants a node."""
        self._say(f"joined a server as {self._hosting.name}")
        before = signal.signal(signal.SIGCHLD, lambda *_: self._reactor.post(self._reap))
        try:
            with Signals(self._reactor, self._on_signal):
                self._beat()
                self._reactor.run_until(lambda: self._over)
                self._end_parts()
                self._say_goodbye()
        finally:
            signal.signal(signal.SIGCHLD, before)
        return self._status if self._leaving else None

    def _on_signal(self, number: int) -> None:
        """The first one: finish what runs, then leave.  The second: at once."""
        if self._leaving:
            self._status, self._over = 128 + number, True
        else:
            self._leave()

    def _leave(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._say("leaves when it has ended the calls that it has; again to leave at once")
            self._tell({"draining": True})
            self._wanted.clear()
            self._adjust()

    def _end_parts(self) -> None:
        """They end with us; let them say so."""
        for pid in self._parts.values():
            sessions.send([pid], signal.SIGTERM)
            sessions.send([pid], signal.SIGINT)
        deadline = monotonic() + 4 * _GOODBYE
        if not self._reactor.run_until(lambda: not self._parts, deadline):
            sessions.send(self._parts.values(), signal.SIGKILL)

    def _say_goodbye(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.finish()
            self._reactor.run_until(lambda: peer.closed, monotonic() + _GOODBYE)
            peer.close()

    # -- the server -------------------------------------------------------------------

    def _attach(self, peer: Any) -> None:
        self._peer = peer
        self._heard = monotonic()
        peer.listen(partial(self._on_frame, peer), partial(self._on_end, peer))

    def _tell(self, what: dict[str, Any]) -> None:
        if self._peer is not None:
            self._peer.send(json.dumps(what).encode())

    def _report(self) -> None:
        """Say that we are here, and what of which runs."""
        self._tell({"version": self._version, "parts": list(self._parts)})

    def _beat(self) -> None:
        if self._peer is not None and monotonic() - self._heard > SILENCE:
            self._peer.close()
            self._on_end(self._peer, f"no answer for {SILENCE:g} s")
        self._report()
        self._look_if_idle()
        self._later(BEAT, self._beat)

    def _look_if_idle(self) -> None:
        now = monotonic()
        if self._leaving or self._parts or (self._wanted and self._peer is not None):
            self._busy_at = now
        elif self._idle_exit is not None and now - self._busy_at > self._idle_exit:
            self._say(f"had nothing to do for {self._idle_exit:g} s")
            self._leave()

    def _on_frame(self, peer: Any, frame: memoryview) -> None:
        if peer is not self._peer:
            return
        self._heard = monotonic()
        try:
            said = json.loads(bytes(frame))
            wanted = set(map(str, said.get("take", self._wanted)))
            version = said.get("version", self._version)
        except MALFORMED as error:
            peer.close()
            self._on_end(peer, f"it says what no server says: {error}")
            return
        if not self._leaving:
            self._wanted = wanted
            self._adjust()
        if version != self._version:
            self._version = version
            self._report()
        if said.get("drain"):
            self._leave()

    def _on_end(self, peer: Any, reason: str) -> None:
        if peer is self._peer and not self._over:
            self._peer = None
            self._say(f"lost the connection to the server: {reason}")
            self._later(AGAIN, self._connect)

    def _connect(self) -> None:
        if not self._over:
            self._dial(self._on_peer, self._on_failure)

    def _on_failure(self, error: DialError) -> None:
        if error.retry:
            self._later(AGAIN, self._connect)
        else:
            self._say(str(error))
            self._over = True

    def _on_peer(self, peer: Any) -> None:
        timer = self._later(SILENCE, lambda: self._on_no_answer(peer, timer))
        peer.listen(
            partial(self._on_answer, peer, timer), lambda reason: self._on_no_answer(peer, timer)
        )
        peer.send(hello_frame(Hello(self._offer, self._hosting.session, 0)))

    def _on_no_answer(self, peer: Any, timer: Timer) -> None:
        """It does not answer, or is gone."""
        timer.cancel()
        peer.close()
        self._later(AGAIN, self._connect)

    def _on_answer(self, peer: Any, timer: Timer, frame: memoryview) -> None:
        timer.cancel()
        try:
            answer: Answer | None = read_answer(frame)
        except WireError:
            answer = None
        if not isinstance(answer, Hosting):
            peer.close()
            self._over = True  # what is there now is no server
            return
        if answer.session == self._hosting.session:
            self._say("is back at the server")
        else:
            self._say(f"joined a server as {answer.name}")
            self._wanted.clear()  # its runs are others
            self._version = None
            self._former.update(self._parts.values())
            self._adjust()
        self._hosting = answer
        self._attach(peer)
        if self._leaving:
            self._tell({"draining": True})

    # -- the runs ---------------------------------------------------------------------

    def _adjust(self) -> None:
        """Start the supervisors that are missing, and have those leave that are of no use to this
        server.  One of a run that has no slot here any more is let go by the run, when its last
        call here has ended: by then it may have slots here again."""
        # Without the server none of them could do anything; and what calls hold that go on for
        # another server, this one does not know.
        if self._peer is not None and not self._former:
            for run in sorted(self._wanted - self._parts.keys()):
                self._start(run)
        for run, pid in self._parts.items():
            if (self._leaving or pid in self._former) and run not in self._ending:
                self._ending.add(run)
                sessions.send([pid], signal.SIGTERM)
        if self._leaving and not self._parts:
            self._over = True

    def _start(self, run: str) -> None:
        parent = os.getpid()
        # One that came to the child before it has let go of our handlers would be lost.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
        try:
            pid = os.fork()
            if pid == 0:
                self._be(run, parent, before)
        except OSError as error:
            self._say(f"no process can be started for {run}: {error.strerror}")
            self._later(AGAIN, self._adjust)
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._parts[run] = pid

    def _be(self, run: str, parent: int, mask: Iterable[int]) -> NoReturn:
        """In the child: be the supervisor for this run, and end."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, *NUMBERS):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.setsid()
            sessions.die_with_parent(parent)
            status = self._take_part(run, self._offer_to_runs())
        except TaskrunError as error:
            self._say(f"{run}: {error}")
        except BaseException:
            tell_traceback()
        finally:
            os._exit(status)

    def _offer_to_runs(self) -> Offer:
        offer = self._offer._replace(name=self._hosting.name)
        # A server lends what machines have that take any calls: a run is not to count on the rest.
        return offer if offer.processes else offer._replace(resources={})

    def _reap(self) -> None:
        for run, pid in list(self._parts.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self._parts[run]
                self._former.discard(pid)
                self._ending.discard(run)
                self._report()
                self._later(AGAIN, self._adjust)  # it may be wanted again
        if self._leaving and not self._parts:
            self._over = True

    def _later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        return self._reactor.call_at(monotonic() + seconds, callback)
