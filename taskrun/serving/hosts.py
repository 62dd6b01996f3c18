"""The nodes of a server, and their way to its runs.

A node says once what it has to offer, and is told in which runs it takes part; see
``taskrun.workers.host``.  For each of them it makes another connection, which is joined to
one to the run's process: frames pass unread, as from any node to any coordinator.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from itertools import count
from time import monotonic
from typing import Any, Final

from taskrun import transport
from taskrun.demand import Amounts
from taskrun.errors import MALFORMED, UsageError
from taskrun.network.channels import Offer
from taskrun.network.joining import Hosting, Refused, answer_frame, read_hello
from taskrun.reactor import Reactor
from taskrun.reporting.text import plural
from taskrun.serving.shares import Shares

NODE: Final = b"node"
JOINING: Final = 10.0  # seconds for a node to say hello
FULL: Final = 256 * 1024  # bytes that wait for one side; then the other one waits, too


def role_of(run: str) -> bytes:
    """The role of a node's connections for a run."""
    return NODE + b"@" + run.encode()


class Host:
    """A node.  ``slots``: how many workers it has for all runs together.  ``lanes``: those that
    these are for, where they are no processes for any calls."""

    def __init__(self, name: str, session: str, offer: Offer) -> None:
        self.name = name
        self.session = session
        self.slots = offer.slots
        self.lanes = offer.own_lanes
        self.resources = offer.resources
        self.tags = list(offer.tags)
        self.draining = False
        self.is_leaving = False  # so it has said
        self.is_away = False  # and that was said
        self.peer: transport.Peer | None = None
        self.heard = monotonic()
        self.takes: dict[str, int] = {}  # run -> slots
        self.parts: set[str] | None = None  # runs of which something is there, if it said so
        self._version = 0  # of what it is to take part in

    def take(self, takes: dict[str, int]) -> None:
        """Have it take part in these runs, and no others."""
        changed, self.takes = takes.keys() != self.takes.keys(), takes
        if changed:
            self._version += 1
            self.parts = None  # until it says what there is from now on
            self.remind()

    def remind(self) -> None:
        """Say in which runs it is to take part, and whether it is to leave."""
        self.tell(take=list(self.takes), version=self._version, drain=self.draining)

    def learn(self, said: dict[str, Any]) -> bool:
        """It says in which runs it takes part; whether that is news."""
        if said.get("version") != self._version:
            return False  # it has not heard the last of us
        before, self.parts = self.parts, set(map(str, said["parts"]))
        return self.parts != before

    def tell(self, **what: Any) -> None:
        """Say so, if it is there."""
        if self.peer is not None:
            self.peer.send(json.dumps(what).encode())

    def described(self) -> dict[str, Any]:
        """For ``taskrun status``."""
        state = "draining" if self.draining else "away" if self.peer is None else "here"
        return {
            "node": self.name, "slots": self.slots, "state": state, "runs": self.takes,
            "tags": self.tags, "lanes": self.lanes,
        }  # fmt: skip


class Hosts:
    """All nodes of a server.

    ``changed`` is called when there are more or fewer of them; ``lease``: seconds that one may
    be silent; ``taken`` are names that no node can have.
    """

    def __init__(
        self,
        reactor: Reactor,
        changed: Callable[[], object],
        say: Callable[[str], object],
        lease: float,
        taken: frozenset[str],
    ) -> None:
        self.hosts: dict[str, Host] = {}  # by name
        self._reactor = reactor
        self._changed = changed
        self._say = say
        self._lease = lease
        self._taken = taken

    def places(self) -> dict[str, int]:
        """The slots of those that take calls, by name."""
        return {host.name: host.slots for host in self._takers() if not host.lanes}

    def of_lanes(self) -> dict[str, dict[str, int]]:
        """lane -> the slots of those that take calls of that lane alone, by name."""
        found: dict[str, dict[str, int]] = {}
        for host in self._takers():
            for lane in host.lanes:
                found.setdefault(lane, {})[host.name] = host.slots
        return found

    def stocks(self) -> dict[str, Amounts]:
        """What those have beside slots that take calls, by name."""
        return {host.name: host.resources for host in self._takers() if not host.lanes}

    def _takers(self) -> list[Host]:
        return [host for host in self.hosts.values() if not host.draining]

    def is_rid_of(self, run: str, name: str) -> bool:
        """Whether nothing of an ended run is left on the node of that name."""
        host = self.hosts.get(name)
        if host is None:
            return True  # so it has ended its calls
        return host.parts is not None and run not in host.parts and run not in host.takes

    def tell(self, shares: Shares) -> None:
        """Have each take part in the runs that have slots of it."""
        for name, host in self.hosts.items():
            host.take({run: of[name] for run, of in shares.items() if of.get(name)})

    def find(self, name: str) -> Host:
        """The node of that name.  Raises UsageError."""
        if name in self.hosts:
            return self.hosts[name]
        here = f"there are {', '.join(self.hosts)}" if self.hosts else "none has joined"
        raise UsageError(f"there is no node {name!r}: {here}")

    def drain(self, host: Host) -> None:
        """Have it end the calls that it has, and leave."""
        self._on_draining(host)
        host.remind()

    # -- joining ----------------------------------------------------------------------

    def accept(self, peer: transport.Peer) -> None:
        """Somebody who has the key says that it is a node."""
        timer = self._reactor.call_at(monotonic() + JOINING, peer.close)

        def first(frame: memoryview) -> None:
            timer.cancel()
            self._on_hello(peer, frame)

        peer.listen(first, lambda reason: timer.cancel())

    def _on_hello(self, peer: transport.Peer, frame: memoryview) -> None:
        try:
            hello = read_hello(frame)
        except ValueError as error:
            peer.send(answer_frame(Refused(str(error), False)))
            peer.finish()
            self._say(f"the node at {peer.name} cannot take part: {error}")
            return
        host = self._known(hello.session)
        if host is None:
            name = self._free_name(hello.offer.name)
            host = self.hosts[name] = Host(name, os.urandom(16).hex(), hello.offer)
            lane = f" of the lane {', '.join(host.lanes)}" if host.lanes else ""
            self._say(f"node {name} joined with {plural(host.slots, 'slot')}{lane}")
            self._watch(host)
        self._attach(host, peer)
        self._changed()

    def _known(self, session: str) -> Host | None:
        return next((host for host in self.hosts.values() if host.session == session), None)

    def _free_name(self, wanted: str) -> str:
        names = (wanted if number == 1 else f"{wanted}-{number}" for number in count(1))
        return next(name for name in names if name not in self._taken | self.hosts.keys())

    def _attach(self, host: Host, peer: transport.Peer) -> None:
        if host.peer is not None:
            host.peer.close()
        elif host.is_away:
            host.is_away = False
            self._say(f"node {host.name} is back")
        host.peer, host.heard = peer, monotonic()
        peer.send(answer_frame(Hosting(host.name, host.session, True)))
        peer.listen(partial(self._on_frame, host, peer), partial(self._on_end, host, peer))

    # -- what it says -----------------------------------------------------------------

    def _on_frame(self, host: Host, peer: transport.Peer, frame: memoryview) -> None:
        if peer is not host.peer:
            return
        host.heard = monotonic()
        try:
            said = json.loads(bytes(frame))
            draining, has_news = said.get("draining"), host.learn(said)
        except MALFORMED as error:
            self._lose(host, f"says what no node says: {error}")
            return
        if draining:
            host.is_leaving = True
            self._on_draining(host)
        host.remind()  # every answer says it all: none is missed for long
        if has_news:
            self._changed()

    def _on_draining(self, host: Host) -> None:
        if not host.draining:
            host.draining = True
            self._say(f"node {host.name} takes no more calls, and leaves")
            self._changed()

    def _on_end(self, host: Host, peer: transport.Peer, reason: str) -> None:
        if peer is not host.peer:
            return
        host.peer = None
        if host.is_leaving:
            self._lose(host, "has left")
        else:
            host.is_away = True
            self._say(f"node {host.name} is away: {reason}")

    def _watch(self, host: Host) -> None:
        due = host.heard + self._lease
        if self.hosts.get(host.name) is not host:
            return
        if due <= monotonic():
            self._lose(host, f"is lost: nothing was heard of it for {self._lease:g} s")
        else:
            self._reactor.call_at(due, lambda: self._watch(host))

    def _lose(self, host: Host, how: str) -> None:
        if self.hosts.get(host.name) is host:
            del self.hosts[host.name]
            if host.peer is not None:
                host.peer.close()
            self._say(f"node {host.name} {how}")
            self._changed()


# -- a node's connection for one run ---------------------------------------------------


def relay(
    near: transport.Peer,
    path: str,
    key: bytes,
    reactor: Reactor,
    *,
    role: bytes = NODE,
    first: bytes | None = None,
    refuse: Callable[[], object] | None = None,
) -> None:
    """Join a connection to one of that role to the run's process, which listens at ``path``.

    ``first``: a frame that came already.  ``refuse`` is called where there is nobody; without
    it the connection is closed: a node comes again.
    """

    def on_open(far: transport.Peer) -> None:
        if first is not None:
            far.send(first)
        join(near, far)

    transport.dial(path, key, reactor, role, on_open, lambda error: (refuse or near.close)())


def turn_away(run: str, peer: transport.Peer) -> None:
    """Tell a node that was away when the run ended."""
    peer.send(answer_frame(Refused(f"{run} has ended", False)))
    peer.finish()


def join(near: transport.Peer, far: transport.Peer) -> None:
    """From now on, what one of them says goes to the other."""
    _pass_on(near, far)
    _pass_on(far, near)


def _pass_on(source: transport.Peer, target: transport.Peer) -> None:
    def on_frame(frame: memoryview) -> None:
        target.send(frame)
        if target.unsent > FULL:
            source.pause()

    target.on_drained = source.resume
    source.listen(on_frame, lambda reason: target.finish())
