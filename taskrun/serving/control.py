"""The server's connection to the process of a run: to tell it its slots and what it is lent,
to ask it how it goes, and to hear what it has work for."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Final

from taskrun import transport
from taskrun.demand import Demand, Loan, Lot, demand_from
from taskrun.errors import MALFORMED
from taskrun.reactor import Reactor, Timer
from taskrun.roles import STEER

AGAIN: Final = 0.05  # seconds before a process that is starting is dialled again
PATIENCE: Final = 1.0  # seconds for which a run wants less before that counts

Answer = Callable[[Any], object]


class Control:
    """``address`` is the path of the process's socket, ``key`` what both prove.

    ``wants``: how many slots the run has work for; None while that is not known.  ``lanes``:
    those of its calls, beside that of processes.  Each grows at once, and shrinks when there has
    been less for a while: to give slots up costs workers.
    ``demand``: what it needs of resources; None before it has said so, and when it is gone.
    ``on_wants`` is called when one of these is another, ``on_back`` with what the run gives back,
    before that, ``on_open`` when there is a connection.
    """

    def __init__(
        self,
        reactor: Reactor,
        address: str,
        key: bytes,
        on_open: Callable[[], object],
        on_wants: Callable[[], object],
        on_back: Callable[[Lot], object],
    ) -> None:
        self.wants: int | None = None
        self.lanes: frozenset[str] = frozenset()
        self.demand: Demand | None = None
        self._reactor = reactor
        self._address = address
        self._key = key
        self._on_open = on_open
        self._on_wants = on_wants
        self._on_back = on_back
        self._said: tuple[int | None, frozenset[str]] = (None, frozenset())  # the last that it said
        self._peer: transport.Peer | None = None
        self._dialling: transport.Dialling | None = None
        self._asked: deque[Answer] = deque()  # who gets the next answers
        self._settling: Timer | None = None
        self._closed = False

    def open(self) -> None:
        """Connect, as soon as the process listens."""
        if not self._closed:
            self._dialling = transport.dial(
                self._address, self._key, self._reactor, STEER, self._on_peer,
                lambda error: self._reactor.call_at(monotonic() + AGAIN, self.open),
            )  # fmt: skip

    def close(self) -> None:
        """Let go of it."""
        self._closed = True
        if self._dialling is not None:
            self._dialling.close()
        if self._settling is not None:
            self._settling.cancel()
        if self._peer is not None:
            self._peer.close()
        self._on_end("closed")

    def tell_slots(self, here: int, nodes: Mapping[str, int]) -> None:
        """How many slots it has, from now on."""
        self.ask({"do": "slots", "slots": here, "nodes": dict(nodes)}, _nothing)

    def tell_loan(self, loan: Loan) -> None:
        """What it is lent, from now on."""
        self.ask({"do": "lend", "loan": loan}, _nothing)

    def ask(self, request: Mapping[str, Any], answer: Answer) -> None:
        """Ask something that is answered at once: ``answer`` gets it, or None where there is
        none."""
        if self._peer is None:
            answer(None)
            return
        self._asked.append(answer)
        self._peer.send(json.dumps(request).encode())

    # -- what comes -------------------------------------------------------------------

    def _on_peer(self, peer: transport.Peer) -> None:
        self._peer = peer
        peer.listen(self._on_frame, self._on_end)
        self.ask({"do": "wants"}, _nothing)
        self._on_open()

    def _on_frame(self, frame: memoryview) -> None:
        try:
            said = json.loads(bytes(frame))
            wants, answer = said.get("wants"), said.get("ok")
            if isinstance(wants, int):
                lanes = frozenset(map(str, said["lanes"]))
                self._on_demand(demand_from(said["demand"]), said["back"])
        except MALFORMED:
            wants, answer = None, None  # what no process of ours says is no answer
        if isinstance(wants, int):
            self._on_said(wants, lanes)
        elif self._asked:
            self._asked.popleft()(answer)

    def _on_end(self, reason: str) -> None:
        self._peer = self.demand = None
        asked, self._asked = self._asked, deque()
        for answer in asked:
            answer(None)

    # -- how much it wants ------------------------------------------------------------

    def _on_demand(self, demand: Demand, back: Lot) -> None:
        self._on_back(back)
        if back or demand != self.demand:
            self.demand = demand
            self._on_wants()

    def _on_said(self, wants: int, lanes: frozenset[str]) -> None:
        self._said = wants, lanes
        self._count(max(wants, self.wants or 0), lanes | self.lanes)
        if self._said == (self.wants, self.lanes):
            self._settle()
        elif self._settling is None:
            self._settling = self._reactor.call_at(monotonic() + PATIENCE, self._settle)

    def _settle(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        self._count(*self._said)

    def _count(self, wants: int | None, lanes: frozenset[str]) -> None:
        if (self.wants, self.lanes) != (wants, lanes):
            self.wants, self.lanes = wants, lanes
            self._on_wants()


def _nothing(answer: Any) -> None:
    """It is as it should be."""
