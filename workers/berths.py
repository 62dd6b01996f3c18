"""The workers of a node, at the node: what comes from them is passed on unopened.

Only the ledgers are looked at: which attempt a worker is in, and what it has ended and not
sent.  All that a worker wrote goes out before the frame that may tell of its end, since the
coordinator cannot read it up to the mark as it does from a Pipe.
"""

from __future__ import annotations

import pickle
import signal
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from taskrun.engines.capture import Attempt
from taskrun.engines.links import PROCESS, Link, PipeLink
from taskrun.engines.local import Local
from taskrun.engines.silence import Silence
from taskrun.errors import WireError
from taskrun.network import channels as ch
from taskrun.network.conversation import Conversation, Data
from taskrun.network.parcels import Shelf
from taskrun.reactor import Reactor
from taskrun.workers.settings import Settings

TOLD: Final = 0.2  # seconds between two looks at what workers are in
FULL: Final = 16 * 1024 * 1024  # bytes that wait for the coordinator; then workers do, too
_ATTEMPT_MASK: Final = 0xFFFF  # as much of an attempt's number as a ledger holds


class Berth(PipeLink):
    """One worker; ``say(channel, data)`` tells the coordinator something of it, and calls
    ``said``."""

    def __init__(
        self,
        worker: int,
        reactor: Reactor,
        emit: Callable[..., None],
        told: Callable[[int, int], None],
        lane: str,
        conversation: Conversation,
        said: Callable[[], object],
    ) -> None:
        self._conversation = conversation
        self._said = said
        self._key = ch.of_worker(worker)
        self._copied: tuple[int, int] = (0, 0)  # generation and length of the last copy
        self._told_moment = self._seen_moment = 0
        self.waiting: deque[tuple[list[int], memoryview]] = deque()  # frames, for values
        super().__init__(worker, reactor, emit, told, lane)

    def _emit(self, to: Attempt | None, stream: str, data: bytes) -> None:
        self.say(ch.OUTPUT, pickle.dumps((to, stream, data), pickle.HIGHEST_PROTOCOL))

    def say(self, channel: int, data: Data) -> None:
        """Tell the coordinator, behind all that was told of this worker."""
        self._conversation.send(self._key, channel, data)
        self._said()

    def pass_on(self, frame: Data) -> None:
        """A frame came from its call Pipe."""
        self.wires.outputs.drain()
        self.say(ch.CALLS, frame)

    def tell_moment(self) -> bool:
        """Say what it is in, if that has changed; gives whether it has."""
        moment = self.moment
        if moment == self._told_moment:
            return False
        self._told_moment = moment
        self.say(ch.MOMENT, ch.WORD.pack(moment))
        return True

    def was_busy(self) -> bool:
        """Whether it is executing a call, or has since this was asked last."""
        before, self._seen_moment = self._seen_moment, self.moment
        return self._seen_moment != before or not self.is_idle

    def tell_unsent(self) -> bool:
        """Say what it has ended and not sent, if that is more than before; whether it is.

        All frames before these records are in the Pipe by now, and must come first.
        """
        copied = self.wires.ledger.copy()
        if copied is None:
            return False  # it was sent just now
        generation, data = copied
        if not data or (generation, len(data)) == self._copied:
            return False
        self._copied = generation, len(data)
        self._pass_on_the_rest()
        self.wires.outputs.drain()
        self.say(ch.LEDGER, ch.GENERATION.pack(generation) + data)
        return True

    def _pass_on_the_rest(self) -> None:
        reader = self.wires.reader
        while not (reader.at_end or self.rejected):
            for frame in reader.read():
                self.pass_on(frame)
            if reader.drained:
                break

    def tell_the_end(self, how: str) -> None:
        """Its process has ended: pass on what it left, then say so."""
        try:
            self._pass_on_the_rest()
        except WireError as error:
            self.rejected = f"stopped, because what it sent was garbled: {error}"
        ledger = self.wires.ledger
        self.wires.outputs.read_the_last(ledger.executing)
        last = (self.rejected or how, ledger.moment, ledger.copy(), self.denied)
        self.say(ch.ENDED, pickle.dumps(last, pickle.HIGHEST_PROTOCOL))

    def is_in(self, call: int, attempt: int) -> bool:
        """Whether it is executing this attempt just now."""
        return self.wires.ledger.executing == (call, attempt & _ATTEMPT_MASK)


class Berths:
    """All workers of a node for one run: an ``engines.local.Crew``.

    ``unable`` is called where no more workers can be had.
    """

    def __init__(
        self,
        reactor: Reactor,
        conversation: Conversation,
        settings: Settings,
        shelf: Shelf,
        unable: Callable[[str], object],
    ) -> None:
        self._reactor = reactor
        self._conversation = conversation
        self._shelf = shelf
        self._unable = unable
        self._berths: dict[int, Berth] = {}
        self._silence = Silence(reactor, self._look)
        self._paused = self._closed = False
        self.local = Local(self, reactor, settings, make_link=self._make)
        self._telling = reactor.call_at(monotonic() + TOLD, self._tell_moments)
        self._handlers: dict[int, Callable[[Berth, memoryview], None]] = {
            ch.CALLS: self._on_calls,
            ch.NEEDING: self._on_needing,
            ch.CONTROL: lambda berth, data: berth.send_control(data),
            ch.SIGNAL: self._on_signal,
        }

    def _make(
        self,
        worker: int,
        reactor: Reactor,
        emit: Callable[..., None],
        told: Callable[[int, int], None],
        lane: str,
    ) -> Berth:
        return Berth(worker, reactor, emit, told, lane, self._conversation, self._pause_if_full)

    @property
    def count(self) -> int:
        """How many workers there are, or are about to be."""
        return self.local.load

    def was_busy(self) -> bool:
        """Whether any of them is executing a call, or has since this was asked last."""
        return any([berth.was_busy() for berth in self._berths.values()])

    # -- from the coordinator ---------------------------------------------------------

    def take(self, worker: int, channel: int, data: Data) -> None:
        """A message for a worker came."""
        berth = self._berths.get(worker)
        handler = self._handlers.get(channel)
        if handler is None:
            raise WireError(f"the coordinator speaks on the unknown channel {channel}")
        if berth is not None:
            handler(berth, memoryview(data))

    def _on_calls(self, berth: Berth, frame: memoryview) -> None:
        if berth.waiting:
            berth.waiting.append(([], frame))
        else:
            self._send(berth, frame)

    def _on_needing(self, berth: Berth, data: memoryview) -> None:
        berth.waiting.append(ch.unpack_needs(data))
        self._send_waiting(berth)

    def value_came(self) -> None:
        """Calls may have waited for it."""
        for berth in self._berths.values():
            self._send_waiting(berth)

    def _send_waiting(self, berth: Berth) -> None:
        while berth.waiting and self._shelf.has(berth.waiting[0][0]):
            self._send(berth, berth.waiting.popleft()[1])

    def _send(self, berth: Berth, frame: memoryview) -> None:
        berth.send_calls(frame)
        self._silence.broken(berth)

    def _on_signal(self, berth: Berth, data: memoryview) -> None:
        number, call, attempt = ch.SIGNALLED.unpack(data)
        if call < 0 or berth.is_in(call, attempt):
            berth.signal(number)

    # -- the ledgers ------------------------------------------------------------------

    def _look(self, berth: Berth) -> bool:
        try:
            return berth.tell_unsent()
        except WireError as error:
            self.reject(berth, f"what it sent could not be read: {error}")
            return False

    def _tell_moments(self) -> None:
        if self._closed:
            return
        for berth in list(self._berths.values()):
            if berth.tell_moment():
                self._look(berth)  # it may have ended something long after it was heard of
        self._telling = self._reactor.call_at(monotonic() + TOLD, self._tell_moments)

    # -- engines.local.Crew -----------------------------------------------------------

    def add(self, link: Link) -> None:
        assert isinstance(link, Berth)
        self._berths[link.id] = link

    def hear(self, link: Link, frame: memoryview) -> bool:
        assert isinstance(link, Berth)
        link.pass_on(frame)
        self._silence.broken(link)
        return True

    def hear_control(self, link: Link, frame: memoryview) -> None:
        self._conversation.send(ch.of_control(link.id), ch.CONTROL, frame)

    def look(self, link: Link) -> bool:
        assert isinstance(link, Berth)
        return self._look(link)

    def reject(self, link: Link, why: str) -> None:
        link.rejected = link.rejected or f"stopped, because {why}"
        link.stop_listening()
        link.signal(signal.SIGKILL)

    def ended(self, link: Link, how: str) -> None:
        assert isinstance(link, Berth)
        del self._berths[link.id]
        self._silence.forget(link)
        link.tell_the_end(how)
        link.close()

    def assume_begun(self, link: Link) -> None:
        """The ledgers say it."""

    def not_started(
        self,
        worker: int,
        reason: str,
        lane: str = PROCESS,
        last_output: str = "",
        *,
        denied: bool = False,
    ) -> None:
        last = pickle.dumps((reason, 0, None, denied))
        self._conversation.send(ch.of_worker(worker), ch.ENDED, last)

    def output(self, call: Any, stream: str, data: bytes, worker: str) -> None:
        """A Berth passes on what its worker wrote itself."""

    def worker_changed(self, name: str, what: str) -> None:
        """The coordinator says it."""

    def notice(self, text: str) -> None:
        self._conversation.send(ch.NODE, ch.NOTICE, text.encode())

    def give_up(self, reason: str) -> None:
        self._unable(reason)

    # -- too much to say --------------------------------------------------------------

    def _pause_if_full(self) -> None:
        if self._conversation.waiting > FULL and not self._paused:
            self._paused = True
            for berth in self._berths.values():
                berth.wires.pause()

    def on_room(self) -> None:
        """The conversation has room again."""
        if self._paused:
            self._paused = False
            for berth in self._berths.values():
                berth.wires.resume()

    # -- ends -------------------------------------------------------------------------

    def close(self) -> None:
        """All workers have ended, or are about to: let go of them."""
        self._closed = True
        self._telling.cancel()
        for berth in self._berths.values():
            berth.close()
        self._berths.clear()
        self._silence.close()
