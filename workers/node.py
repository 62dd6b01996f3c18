"""A node: joins the cores of this machine to a coordinator; ``taskrun worker`` is this.

    dial, join, work while the coordinator is there, and again

The node holds a *lease*.  It tells the coordinator at short intervals that it is alive, and
each answer extends the lease, counted from the moment at which the node asked.  So the node
knows that the lease is over before the coordinator does, and has ended all calls when the
coordinator lets them run elsewhere.  Until then a broken connection changes nothing: calls
go on, and what they say is kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Final

from taskrun.errors import DialError, UsageError, WireError
from taskrun.network import channels as ch
from taskrun.network.conversation import LEAVE, Conversation
from taskrun.network.joining import Hello, Hosting, Refused, Welcome, hello_frame, read_answer
from taskrun.reactor import Reactor, Timer
from taskrun.signals import Signals
from taskrun.workers.jobs import QUIT_GRACE, Work
from taskrun.workers.settings import lease_clock

ROLE: Final = b"node"
FIRST_WAIT: Final = 0.1  # seconds before a coordinator is dialled again ...
LONGEST_WAIT: Final = 1.0  # ... doubled each time up to this
UNABLE_WAIT: Final = 1.0  # seconds until a machine that could not take part tries again ...
LONGEST_UNABLE: Final = 60.0  # ... doubled each time up to this
MOST_BEAT: Final = 2.5  # seconds between beats at most
_BEATS: Final = 6  # so many go into a lease
_EARLIER: Final = 1.0  # seconds before the end of the lease at which calls are ended ...
_EARLIER_PART: Final = 0.1  # ... or so much of it, if that is less
_TICK: Final = 0.25  # seconds
_GOODBYE: Final = 1.0  # seconds for the coordinator to take the last words
DIAL_SECONDS: Final = 5.0


class Node:
    """The supervisor of this machine's workers.

    ``dial(on_peer, on_failure)`` connects to the coordinator; ``close()`` of what it returns
    gives that up.  ``address``: as messages say it.  ``say`` writes a line for people.
    ``idle_exit``: seconds without anything to do after which it leaves by itself.  ``once``: it
    is there for one run, and leaves with it.
    """

    def __init__(
        self,
        reactor: Reactor,
        offer: ch.Offer,
        dial: Callable[[Callable[[Any], object], Callable[[DialError], object]], Any],
        *,
        address: str = "",
        say: Callable[[str], object] = lambda text: None,
        idle_exit: float | None = None,
        once: bool = False,
    ) -> None:
        self.status: int | None = None
        self.server: tuple[Any, Hosting] | None = None
        """Where a server was found: the connection to it, and what it said."""
        self._reactor = reactor
        self._offer = offer
        self._dial = dial
        self._address = address
        self._say = say
        self._idle_exit = idle_exit
        self._once = once
        self._busy_at = monotonic()
        self._wait = FIRST_WAIT
        self._unable_wait = UNABLE_WAIT
        self._said_waiting = False
        self._session: Session | None = None
        # On the way to a coordinator is at most one of these three.
        self._retry: Timer | None = None
        self._dialling: Any = None
        self._greeted: Any = None  # a peer that has not answered yet
        self._leaving = False
        self._is_away = False  # and that was said
        self._error: UsageError | None = None

    # -- the main flow ----------------------------------------------------------------

    def run(self) -> int:
        """Serve until told to leave, or until a server is found; gives the exit status.
        Raises UsageError where the coordinator will never take this node."""
        with Signals(self._reactor, self._on_signal):
            self._connect()
            self._later(_TICK, self._tick)
            self._reactor.run_until(lambda: self.status is not None)
            self._end_session("it was told to leave", QUIT_GRACE)
        if self._error is not None:
            raise self._error
        assert self.status is not None
        return self.status

    def _later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        return self._reactor.call_at(monotonic() + seconds, callback)

    # -- connecting -------------------------------------------------------------------

    def _connect(self) -> None:
        if self.status is None:
            self._dialling = self._dial(self._on_peer, self._on_failure)

    def _connect_later(self) -> None:
        wait = self._wait * random.uniform(0.8, 1.2)
        self._wait = min(2 * self._wait, LONGEST_WAIT)
        self._retry = self._later(wait, self._connect)

    def _stop_connecting(self) -> None:
        """Nothing comes any more of what has been begun."""
        if self._retry is not None:
            self._retry.cancel()
        for under_way in (self._dialling, self._greeted):
            if under_way is not None:
                under_way.close()
        self._greeted = None

    def _on_failure(self, error: DialError) -> None:
        if not error.retry:
            self._fail(str(error))
            return
        if not self._said_waiting and self._session is None:
            self._said_waiting = True
            self._say(f"waiting for a coordinator at {self._address}: {error}")
        self._connect_later()

    def _fail(self, text: str) -> None:
        self._error = UsageError(text)
        self.status = self._error.exit_status

    def _on_peer(self, peer: Any) -> None:
        session = self._session
        name, received = ("", 0) if session is None else (session.id, session.talk.received)
        self._greeted = peer
        timer = self._later(DIAL_SECONDS, lambda: self._on_silence(peer))
        sent = lease_clock()
        peer.listen(
            partial(self._on_answer, peer, sent, timer), lambda reason: self._on_silence(peer)
        )
        peer.send(hello_frame(Hello(self._offer, name, received)))

    def _on_silence(self, peer: Any) -> None:
        """It does not answer, or is gone."""
        if self._greeted is peer:
            self._greeted = None
            peer.close()
            self._connect_later()

    def _on_answer(self, peer: Any, sent: float, timer: Timer, frame: memoryview) -> None:
        timer.cancel()
        self._greeted = None
        try:
            answer = read_answer(frame)
        except WireError as error:
            peer.close()
            self._fail(str(error))
            return
        if isinstance(answer, Welcome):
            self._on_welcome(peer, answer, sent)
            return
        if isinstance(answer, Hosting):
            self.server, self.status = (peer, answer), 0
            peer.pause()  # what it says next is for whoever goes on
            return
        peer.close()
        self._on_refused(answer)

    def _on_refused(self, refused: Refused) -> None:
        if refused.later:
            self._connect_later()
        else:
            self._fail(f"{self._address} does not take this node: {refused.reason}")

    def _on_welcome(self, peer: Any, welcome: Welcome, sent: float) -> None:
        self._wait = FIRST_WAIT
        self._said_waiting = False
        session = self._session
        if session is None or not welcome.resumed or session.id != welcome.session:
            peer.pause()  # what it says meanwhile is for the new session
            self._end_session("it has another session", 0.0)
            if self.status is not None:
                return
            session = self._session = Session(self, self._reactor, welcome)
            self._busy_at = monotonic()
            self._say(f"joined {self._address} as {welcome.name}")
        elif self._is_away:
            self._say(f"is back at {self._address}")
        self._is_away = False
        session.attach(peer, welcome.received, sent)
        if self._leaving:
            session.drain()

    # -- a session --------------------------------------------------------------------

    def connection_lost(self, reason: str) -> None:
        """The session goes on, and the coordinator is dialled again."""
        self._is_away = True
        self._say(f"lost the connection to {self._address}: {reason}")
        self._connect_later()

    def session_over(self, reason: str, grace: float) -> None:
        """The coordinator, or the end of the lease, has ended the session."""
        self._unable_wait = UNABLE_WAIT
        self._say(reason)
        self._end_session(reason, grace)
        if self._leaving or self._once:
            self.status = 0
        else:
            self._connect_later()

    def unable(self, reason: str) -> None:
        """This machine could not do its part in the session; later it may."""
        wait = self._unable_wait * random.uniform(0.8, 1.2)
        self._unable_wait = min(2 * self._unable_wait, LONGEST_UNABLE)
        self._say(f"cannot take part: {reason}; tries again in {wait:.0f} s")
        self._end_session(reason, 0.0)
        if self._leaving:
            self.status = 0
        self._retry = self._later(wait, self._connect)

    def _end_session(self, reason: str, grace: float) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._stop_connecting()  # whoever were reached so would be told of that session
            session.close(reason, grace)

    # -- leaving ----------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        """The first one: finish what runs, then leave.  The second: at once."""
        if self._leaving or self._session is None:
            self.status = 0 if not self._leaving else 128 + number
            return
        self.leave()

    def leave(self) -> None:
        """Finish what runs, then leave."""
        if self._leaving or self._session is None:
            return
        self._leaving = True
        if not self._once:  # else its host says so
            self._say("leaves when it has ended the calls that it has; again to leave at once")
        self._session.drain()

    def _tick(self) -> None:
        if self.status is not None:
            return  # somebody else goes on with the reactor
        session = self._session
        if session is not None and session.work.was_busy():
            self._busy_at = monotonic()
        idle = monotonic() - self._busy_at
        if self._leaving and session is not None and not session.work.count:
            self.status = 0
        elif self._idle_exit is not None and idle > self._idle_exit and not self._leaving:
            self._say(f"had nothing to do for {self._idle_exit:g} s")
            if session is None:
                self.status = 0
            else:
                self._leaving = True
                session.drain()
        self._later(_TICK, self._tick)


class Session:
    """This node's part in one run: a conversation, a lease, and the work."""

    def __init__(self, node: Node, reactor: Reactor, welcome: Welcome) -> None:
        self.id = welcome.session
        self._node = node
        self._reactor = reactor
        self._lease = welcome.lease
        self._earlier = min(_EARLIER, _EARLIER_PART * welcome.lease)
        self._until = 0.0
        self._peer: Any = None
        self._answered = monotonic()
        self._over = self._draining = False
        self.talk = Conversation(self._on_message, on_echo=self._on_echo, on_room=self._on_room)
        self.work = Work(reactor, self.talk, welcome.name, self._on_unable)
        self._beat()
        self._watch()

    # -- the connection ---------------------------------------------------------------

    def attach(self, peer: Any, received: int, asked: float) -> None:
        """Go on over this connection, which was asked for at a time."""
        if self._peer is not None:
            self._peer.close()
        self._peer = peer
        self._answered = monotonic()
        self._on_echo(asked)
        peer.listen(partial(self._on_frame, peer), partial(self._on_end, peer))
        try:
            self.talk.attach(peer, received)
        except WireError as error:
            self._end(f"the coordinator said what cannot be: {error}", 0.0)

    def _on_frame(self, peer: Any, frame: memoryview) -> None:
        if peer is not self._peer or self._over:
            return
        if frame and frame[0] == LEAVE:
            self._end(bytes(frame[1:]).decode(errors="replace"), QUIT_GRACE)
            return
        try:
            self.talk.take(frame)
        except Exception as error:
            # Whatever it is, it says what no coordinator says.
            self._end(f"the coordinator said what cannot be: {error}", 0.0)

    def _on_end(self, peer: Any, reason: str) -> None:
        if peer is self._peer:
            self._peer = None
            self.talk.detach()
            if not self._over:
                self._node.connection_lost(reason)

    # -- the lease --------------------------------------------------------------------

    def _beat(self) -> None:
        if self._over:
            return
        pause = min(MOST_BEAT, self._lease / _BEATS)
        if self._peer is not None and monotonic() - self._answered > self._lease / 2:
            # It may be half open: then the other side has never heard of its end.
            peer, self._peer = self._peer, None
            self.talk.detach()
            peer.close()
            self._node.connection_lost(f"no answer for {self._lease / 2:g} s")
        self.talk.beat(lease_clock())
        self._reactor.call_at(monotonic() + pause, self._beat)

    def _on_echo(self, stamp: float) -> None:
        self._answered = monotonic()
        self._until = max(self._until, stamp + self._lease - self._earlier)
        self.work.hold(self._until)

    def _watch(self) -> None:
        if self._over:
            return
        left = self._until - lease_clock()
        if self._until and left <= 0:
            self._end(f"no coordinator for {self._lease:g} s", 0.0)
            return
        self._reactor.call_at(monotonic() + max(0.01, min(left, _TICK)), self._watch)

    # -- the work ---------------------------------------------------------------------

    def _on_message(self, key: int, channel: int, data: Any) -> None:
        if channel == ch.DRAIN:
            self._node.leave()
        else:
            self.work.take(key, channel, data)

    def _on_room(self) -> None:
        self.work.on_room()

    def _on_unable(self, reason: str) -> None:
        # Later: whoever noticed is in the middle of something that ends with the session.
        self._reactor.call_soon(lambda: None if self._over else self._node.unable(reason))

    def drain(self) -> None:
        """Take no more calls."""
        if not self._draining:
            self._draining = True
            self.talk.send(ch.NODE, ch.DRAINING, b"")

    def _end(self, reason: str, grace: float) -> None:
        if not self._over:
            self._node.session_over(reason, grace)

    def close(self, reason: str, grace: float) -> None:
        """End all that belongs to it, and say why."""
        self._over = True
        self.work.end(grace)  # what is left to be said of calls is said
        self.talk.leave(reason)
        peer, self._peer = self._peer, None
        self.talk.detach()
        if peer is not None:
            peer.finish()
            self._reactor.run_until(lambda: peer.closed, monotonic() + _GOODBYE)
            peer.close()
