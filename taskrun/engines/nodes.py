"""The nodes of an engine: other machines that have joined, and their workers.

A node is asked for workers as the local template is, and what its workers say comes as from
a Pipe.  What is different is how it goes away.  A connection that breaks means nothing yet:
the node has its lease to come back, and what was said meanwhile is said then.  When that is
over, the node has ended its calls by itself; only then they may run elsewhere.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from time import monotonic
from typing import Any, Final, Protocol

from taskrun.engines.local import Crew
from taskrun.engines.remote import RemoteLink
from taskrun.errors import UsageError, WireError
from taskrun.network import channels as ch
from taskrun.network.bundles import Bundle
from taskrun.network.conversation import LEAVE, MOST_FRAME, WINDOW, Conversation, Data
from taskrun.network.joining import Hello, Refused, Welcome, answer_frame, read_hello
from taskrun.network.parcels import Parcels
from taskrun.network.relay import Relay
from taskrun.reactor import Reactor
from taskrun.reporting.text import plural
from taskrun.workers.settings import Settings

ROLE: Final = b"node"
LEASE: Final = 15.0  # seconds
UNFIT: Final = "cannot take part"  # is in what is said of a node that is refused
JOINING: Final = 10.0  # seconds for a node to say hello
_MOST_UNREAD: Final = 4 * WINDOW  # bytes; a node that leaves more unread is none


class Peer(Protocol):
    """A connection that has proved the key; see ``transport.peer``."""

    name: str
    closed: bool
    unsent: int

    def limit(self, size: int) -> None: ...

    def listen(
        self, on_frame: Callable[[memoryview], object], on_end: Callable[[str], object]
    ) -> None: ...

    def send(self, *parts: Data) -> None: ...

    def send_first(self, frame: bytes) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


class Nodes:
    """All nodes of an engine.

    ``lease``: seconds that a node may be silent.  ``bundle`` makes what workers need of the
    task file; ``state`` gives the address of the shared state, and its key.
    """

    def __init__(
        self,
        *,
        lease: float = LEASE,
        bundle: Callable[[], Bundle | None] = lambda: None,
        state: Callable[[], tuple[Any, bytes]] | None = None,
    ) -> None:
        self.lease = lease
        self.nodes: dict[str, Node] = {}  # by session
        self._bundle = bundle
        self._state = state
        self._made_bundle: Bundle | None = None
        self._closing = False
        self._limits: Mapping[str, int] | None = None
        self.abandoned = False  # none that is away is waited for

    def start(
        self,
        crew: Crew,
        reactor: Reactor,
        settings: Settings,
        changed: Callable[[], object],
        retire: Callable[[RemoteLink], object],
    ) -> None:
        """From now on nodes may join.  ``changed`` is called when there are more or fewer
        slots, ``retire`` for a worker that is to get no more calls.  Raises UsageError where
        the bundle cannot be made."""
        self.crew = crew
        self.reactor = reactor
        self.changed = changed
        self.retire = retire
        self._made_bundle = self._bundle()
        self._settings = settings

    @property
    def slots(self) -> int:
        """Of all nodes that take calls."""
        return sum(node.slots for node in self.nodes.values() if node.takes)

    def limit(self, slots: Mapping[str, int]) -> None:
        """Use so many slots of the nodes that are named, and none of others, whenever they
        come."""
        self._limits = dict(slots)
        for node in list(self.nodes.values()):
            self.dismiss_if_idle(node)

    def limited(self, offer: ch.Offer) -> int:
        """How many slots of a node that offers this may be used."""
        if self._limits is None:
            return offer.slots
        return min(offer.slots, self._limits.get(offer.name, 0))

    def takers(self) -> list[Node]:
        """The nodes that take calls."""
        return [node for node in self.nodes.values() if node.takes]

    def close(self, deadline: float) -> None:
        """The run is over: tell all nodes, by ``deadline`` (monotonic)."""
        self._closing = True
        told = [node.leave("the run has ended") for node in self.nodes.values()]
        self.nodes.clear()
        self.reactor.run_until(lambda: all(peer is None or peer.closed for peer in told), deadline)

    def dismiss_if_idle(self, node: Node) -> None:
        """Let a node go of which no slot may be used, but not before its last worker has ended:
        until then there may be slots again."""
        is_idle = node.prepared and not node.slots and not node.links
        if is_idle and self.nodes.pop(node.session, None) is not None:
            node.leave("the run has no slot here any more")

    def abandon(self) -> None:
        """From now on no node joins, and none that is away is waited for."""
        self._closing = self.abandoned = True
        for node in list(self.nodes.values()):
            if not node.conversation.is_attached:
                self.lose(node, f"lost with the node {node.name}, which was away at the end")

    # -- joining ----------------------------------------------------------------------

    def accept(self, peer: Peer) -> None:
        """Somebody who has the key says that it is a node."""
        peer.limit(MOST_FRAME)
        timer = self.reactor.call_at(monotonic() + JOINING, peer.close)

        def first(frame: memoryview) -> None:
            timer.cancel()
            self._on_hello(peer, frame)

        peer.listen(first, lambda reason: timer.cancel())

    def _on_hello(self, peer: Peer, frame: memoryview) -> None:
        try:
            hello = read_hello(frame)
        except ValueError as error:
            self._refuse(peer, str(error))
            self.crew.notice(f"the node at {peer.name} {UNFIT}: {error}")
            return
        known = self.nodes.get(hello.session)
        if known is not None:
            self._resume(known, peer, hello)
        elif self._closing:
            self._refuse(peer, "the run is about to end", later=True)
        else:
            self._welcome(peer, hello)

    def _refuse(self, peer: Peer, reason: str, *, later: bool = False) -> None:
        peer.send(answer_frame(Refused(reason, later)))
        peer.finish()

    def _welcome(self, peer: Peer, hello: Hello) -> None:
        session = os.urandom(16).hex()
        node = Node(self, session, hello, self._free_name(hello.offer.name))
        self.nodes[session] = node
        peer.send(answer_frame(Welcome(session, False, 0, self.lease, node.name)))
        node.attach(peer, 0)
        node.say(ch.JOB, pickle.dumps(self._job(), pickle.HIGHEST_PROTOCOL))

    def _resume(self, node: Node, peer: Peer, hello: Hello) -> None:
        received = node.conversation.received
        peer.send(answer_frame(Welcome(node.session, True, received, self.lease, node.name)))
        try:
            node.attach(peer, hello.received)
        except WireError as error:
            peer.finish()
            self.lose(node, f"lost with the node {node.name}: {error}")

    def _free_name(self, wanted: str) -> str:
        taken = {node.name for node in self.nodes.values()}
        names = (wanted if number == 1 else f"{wanted}-{number}" for number in count(1))
        return next(name for name in names if name not in taken)

    def _job(self) -> ch.Job:
        bundle = self._made_bundle
        key = b"" if self._state is None else self._state()[1]
        return ch.Job(
            self._settings._replace(state=None),
            None if bundle is None else bundle.digest,
            None if bundle is None else bundle.file,
            key,
        )

    def bundle_data(self) -> bytes:
        """What a node wants that does not have it."""
        assert self._made_bundle is not None
        return self._made_bundle.data

    def connect_to_state(self) -> socket.socket:
        """A connection to the shared state.  Raises OSError, and BlockingIOError where there is
        no room for one more yet: it may be this very thread that has to let others in."""
        if self._state is None:
            raise ConnectionRefusedError
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.setblocking(False)
            made.connect(self._state()[0])
        except BaseException:
            made.close()
            raise
        return made

    def drain(self, name: str) -> None:
        """Have the node of that name finish what it has, and leave.  Raises UsageError."""
        for node in self.nodes.values():
            if node.name == name:
                node.say(ch.DRAIN, b"")
                return
        names = ", ".join(node.name for node in self.nodes.values())
        here = f"there are {names}" if names else "none has joined"
        raise UsageError(f"there is no node {name!r}: {here}")

    # -- leaving ----------------------------------------------------------------------

    def lose(self, node: Node, how: str) -> None:
        """A node is no more: so are its workers.

        What they had was begun, for all that is known: it was sent, and the node went on
        without us.
        """
        if self.nodes.get(node.session) is not node:
            return
        del self.nodes[node.session]
        links, node.links = node.links, {}
        node.close()
        self.changed()
        for link in links.values():
            link.blameless = True
            if link.assigned:
                self.crew.assume_begun(link)
            else:
                self.retire(link)  # that it is gone is no reason to worry about workers
            self.crew.ended(link, how)


class Node:
    """One node, from its joining to its end; see ``network.channels`` for what is said."""

    def __init__(self, nodes: Nodes, session: str, hello: Hello, name: str) -> None:
        self.session = session
        self.name = name
        self.offer = hello.offer
        self.links: dict[int, RemoteLink] = {}
        self.prepared = self.draining = False
        self._nodes = nodes
        self._peer: Peer | None = None
        self._is_away = False  # and that was said
        self._heard = monotonic()
        self._parcels: Parcels | None = None
        self.conversation = Conversation(self._on_message, on_room=self._on_room)
        self._relay = Relay(nodes.reactor, self.conversation, nodes.connect_to_state)
        self._timer = nodes.reactor.call_at(self._heard + nodes.lease, self._look_at_lease)
        self._handlers: dict[int, Callable[[int, Data], None]] = {
            ch.WANT: lambda key, data: self.say(ch.BUNDLE, nodes.bundle_data()),
            ch.PREPARED: self._on_prepared,
            ch.CALLS: self._on_calls,
            ch.CONTROL: self._on_control,
            ch.ENDED: self._on_ended,
            ch.NOTICE: lambda key, data: self._notice(bytes(data).decode()),
            ch.DRAINING: self._on_draining,
            ch.UNABLE: self._on_unable,
        }

    @property
    def slots(self) -> int:
        """How many workers it may have, but for spare ones."""
        return self._nodes.limited(self.offer)

    @property
    def takes(self) -> bool:
        """Whether it takes calls."""
        return self.prepared and not self.draining and self.slots > 0

    def described(self) -> dict[str, Any]:
        """For ``taskrun status``."""
        state = "draining" if self.draining else "here" if self.prepared else "joining"
        if self._peer is None:
            state = "away"
        workers = sorted(self.links)
        return {
            "node": self.name, "slots": self.slots, "state": state, "workers": workers,
            "tags": list(self.offer.tags), "lanes": self.offer.own_lanes,
            "place": self.offer.name,
        }  # fmt: skip

    @property
    def load(self) -> int:
        """How many workers it has, or was asked for."""
        return len(self.links)

    def say(self, channel: int, data: bytes) -> None:
        """Say something about the node as a whole."""
        self.conversation.send(ch.NODE, channel, data)

    def start(self, workers: list[int], lane: str) -> None:
        """Start these workers."""
        assert self._parcels is not None
        crew = self._nodes.crew
        for worker in workers:
            link = RemoteLink(
                worker, self.name, self.conversation, self._parcels, crew.output, lane,
                self._expect_end,
            )  # fmt: skip
            self.links[worker] = link
            crew.add(link)
        self.say(ch.START, pickle.dumps((workers, lane)))

    # -- the connection ---------------------------------------------------------------

    def attach(self, peer: Peer, received: int) -> None:
        """Go on over this connection.  Raises WireError."""
        self._let_peer_go()
        peer.listen(partial(self._on_frame, peer), partial(self._on_end, peer))
        self._heard = monotonic()
        self._peer = peer
        self.conversation.attach(peer, received)
        if self._is_away:
            self._is_away = False
            self._notice("is back")

    def _on_frame(self, peer: Peer, frame: memoryview) -> None:
        if peer is not self._peer:
            return  # another has taken its place
        self._heard = monotonic()
        if peer.unsent > _MOST_UNREAD:
            self._nodes.lose(self, f"lost with the node {self.name}, which reads nothing")
            return
        if frame and frame[0] == LEAVE:
            reason = bytes(frame[1:]).decode(errors="replace")
            self._nodes.lose(self, f"ended with the node {self.name}: {reason}")
            return
        try:
            self.conversation.take(frame)
        except Exception as error:
            # Whatever it is, it says what no node says.
            self._nodes.lose(self, f"lost with the node {self.name}, which was garbled: {error}")

    def _on_end(self, peer: Peer, reason: str) -> None:
        if peer is self._peer:
            self._peer = None
            self.conversation.detach()
            if self._nodes.abandoned:
                self._nodes.lose(self, f"lost with the node {self.name} at the end: {reason}")
                return
            if not self.conversation.received:
                # It did not wait for its welcome, or has done nothing since: it joins anew.
                self._nodes.lose(self, f"lost with the node {self.name}: {reason}")
                return
            left = max(0.0, self._heard + self._nodes.lease - monotonic())
            self._is_away = True
            self._notice(f"is away ({reason}), and has {left:.0f} s to come back")

    def _look_at_lease(self) -> None:
        lease = self._nodes.lease
        due = self._heard + lease
        if due <= monotonic():
            how = f"lost with the node {self.name}: nothing was heard of it for {lease:g} s"
            self._notice(f"is lost: nothing was heard of it for {lease:g} s")
            self._nodes.lose(self, how)
        else:
            self._timer = self._nodes.reactor.call_at(due, self._look_at_lease)

    def _let_peer_go(self) -> None:
        peer, self._peer = self._peer, None
        self.conversation.detach()
        if peer is not None:
            peer.close()

    def leave(self, reason: str) -> Peer | None:
        """Tell it that this is over; gives the connection, which ends when it knows."""
        self.conversation.leave(reason)
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.finish()
        self.close()
        return peer

    def close(self) -> None:
        """Let go of everything."""
        self._timer.cancel()
        self._let_peer_go()
        self._relay.close()

    # -- what it says -----------------------------------------------------------------

    def _on_message(self, key: int, channel: int, data: Data) -> None:
        handler = self._handlers.get(channel)
        if handler is not None:
            handler(key, data)
        elif channel in (ch.OPEN, ch.PASS, ch.CLOSE):
            self._relay.take(ch.number_of(key), channel, data)
        elif (link := self.links.get(ch.worker_of(key))) is not None:
            link.hear(channel, data)
            if channel == ch.LEDGER:
                self._nodes.crew.look(link)

    def _on_room(self) -> None:
        self._relay.resume()

    def _on_prepared(self, key: int, data: Data) -> None:
        self._parcels = Parcels(self.conversation, bytes(data).decode(), self._is_in_use)
        self.prepared = True
        slots = plural(self.slots, "slot")
        if self.offer.own_lanes:
            slots += f" of the lane {', '.join(self.offer.own_lanes)}"
        self._nodes.crew.worker_changed(self.name, f"joined, {slots}")
        self._notice(f"joined with {slots}")
        self._nodes.changed()
        self._nodes.dismiss_if_idle(self)

    def _is_in_use(self, call: int) -> bool:
        return any(call in link.assigned for link in self.links.values())

    def _on_calls(self, key: int, data: Data) -> None:
        link = self.links.get(ch.worker_of(key))
        if link is not None and link.is_heard:
            self._nodes.crew.hear(link, memoryview(data))

    def _on_control(self, key: int, data: Data) -> None:
        link = self.links.get(ch.worker_of(key))
        if link is not None and link.is_heard:
            self._nodes.crew.hear_control(link, memoryview(data))

    def _on_ended(self, key: int, data: Data) -> None:
        link = self.links.get(ch.worker_of(key))
        if link is None:
            return
        how = link.hear_the_last(data)
        del self.links[link.id]
        try:
            self._nodes.crew.ended(link, how)
        except Exception:
            self.links[link.id] = link  # it is lost with the node, which said what no node says
            raise
        self._nodes.dismiss_if_idle(self)

    def _expect_end(self, link: RemoteLink) -> None:
        """A worker was killed.  A node that never says that it is gone is none."""
        self._nodes.reactor.call_at(
            monotonic() + 2 * self._nodes.lease, lambda: self._end_overdue(link)
        )

    def _end_overdue(self, link: RemoteLink) -> None:
        if self.links.get(link.id) is link:
            self._notice(f"is lost: it did not end w{link.id}")
            self._nodes.lose(self, f"lost with the node {self.name}, which did not end it")

    def _on_draining(self, key: int, data: Data) -> None:
        self.draining = True
        self._notice("takes no more calls, and leaves when it has ended those that it has")
        self._nodes.changed()
        for link in list(self.links.values()):
            self._nodes.retire(link)

    def _on_unable(self, key: int, data: Data) -> None:
        reason = bytes(data).decode()
        self._notice(f"{UNFIT}: {reason}")
        self._nodes.lose(self, f"ended with the node {self.name}: {reason}")

    def _notice(self, text: str) -> None:
        self._nodes.crew.notice(f"node {self.name} {text}")
