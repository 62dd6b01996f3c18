"""The Manager server: listens, and knows everybody who is connected.

Everything here runs on the thread of the reactor, but for what says otherwise.  No peer can
end the server or another peer's connection: whatever goes wrong with one ends that one.

Who connects goes through the gate first (see ``taskrun.transport.gate``).  Clients of the
standard library come from there without TLS, by its own handshake; with TLS, and from
taskrun, by that of ``taskrun.transport.proof``, in the role MANAGER.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from taskrun.addresses import Tls
from taskrun.manager import protocol
from taskrun.manager.administration import Administration
from taskrun.manager.hosting import Handover
from taskrun.manager.listening import Address, Listener
from taskrun.manager.objects import Objects, Registry
from taskrun.manager.peer import Peer
from taskrun.manager.promoted import Promoted
from taskrun.reactor import Reactor, waiting_loop
from taskrun.transport.gate import HANDSHAKE_TIMEOUT, MOST_GREETING, Admitted, Gate
from taskrun.transport.listening import Roles, open_door, peer_of
from taskrun.weakly import living

if TYPE_CHECKING:
    from taskrun.transport.tls import Certificates

SERIALIZERS = ("pickle", "tls", "xmlrpclib")


def print_traceback() -> None:
    """The default of ``report``: what went wrong goes to stderr."""
    traceback.print_exc(file=sys.stderr)


def no_notice(text: str) -> None:
    """The default of ``notice``: nobody wants to know."""


class Server:
    """A Manager server on a reactor.

    ``registry`` is that of a manager class: typeid -> (callable, exposed,
    method_to_typeid, proxytype).  ``address`` is a (host, port), the path of a Unix socket,
    or None for a path of its own; ``listen`` adds more.  It serves from :meth:`start` until
    :meth:`close`.

    ``serializer`` is the standard library's name for how it is spoken to; ``"tls"`` are
    pickles over TLS.  ``roles`` gets the connections of other roles than MANAGER.
    ``keys`` may have one for the role GUEST, whose connections get to the named state only.

    ``on_shutdown`` is called when a client asks the server to end; without it that is
    refused.  ``report`` is called in an ``except`` block for what should not happen.
    ``sessions`` takes over the connections whose first request is for the named state:
    the socket, that request, and what was received after it.  ``notice`` gets a line for
    each who is turned away.
    """

    def __init__(
        self,
        registry: Registry,
        address: Address,
        authkey: bytes,
        reactor: Reactor,
        *,
        serializer: str = "pickle",
        on_shutdown: Callable[[], object] | None = None,
        handshake_timeout: float = HANDSHAKE_TIMEOUT,
        most_greeting: int = MOST_GREETING,
        allow_md5: bool = True,
        report: Callable[[], object] = print_traceback,
        sessions: Callable[[socket.socket, Any, bytes], object] | None = None,
        notice: Callable[[str], object] = no_notice,
        roles: Roles | None = None,
        keys: Mapping[bytes, bytes] | None = None,
    ) -> None:
        if not isinstance(authkey, bytes):
            raise TypeError(f"the authkey is {type(authkey).__name__}, not bytes")
        if serializer not in SERIALIZERS:
            raise ValueError(f"no serializer {serializer!r}: there are {', '.join(SERIALIZERS)}")
        self.authkey = bytes(authkey)
        self.reactor = reactor
        self.plain = serializer != "xmlrpclib"  # else every connection gets a thread
        self.report = report
        self.sessions = sessions
        self.objects = Objects(registry, self._later, self._watch)
        self.administration = Administration(self.objects, on_shutdown)
        self._roles = {} if roles is None else roles
        self._keys = {} if keys is None else keys
        self._gate = Gate(
            self.authkey, reactor, self._on_admitted, stock=True, notice=notice, report=report,
            offers=self._offers, keys=self._keys,
            allow_md5=allow_md5, timeout=handshake_timeout, most_greeting=most_greeting,
        )  # fmt: skip
        self._peers: set[Peer] = set()
        self._promoted: set[Promoted] = set()
        self._watched: dict[int, int] = {}  # process -> pidfd
        self._started = self._closed = False
        if serializer == "tls":
            address = Tls(*address)
        self.address: Address = self.listen(address)

    # -- beginning and ending ---------------------------------------------------------

    @property
    def listeners(self) -> list[Listener]:
        return [door.listener for door in self._gate.doors]

    def listen(self, address: Address) -> Address:
        """Listen there too; the address with the port or path that was chosen."""
        if isinstance(address, Tls):
            # Tokens travel with this to clients that do not know our types.
            return tuple(self.open(address))
        door = self._gate.add(address)
        if self._started:
            self._gate.start(door)
        return door.address

    def open(
        self, address: Address, files: Certificates | None = None, *, insecure_plain: bool = False
    ) -> Address:
        """Listen there too, by the rules of the network (see :func:`open_door`).  Raises
        UsageError."""
        return open_door(self._gate, address, files, insecure_plain=insecure_plain)

    def start(self) -> None:
        """Take connections.  The reactor has to be run by somebody."""
        self._started = True
        _servers.add(self)
        for door in self._gate.doors:
            self._gate.start(door)

    def stop_listening(self) -> None:
        """Take no more connections; those that there are go on."""
        self._gate.stop_listening()

    def close(self) -> None:
        """End all connections, and let go of everything."""
        if self._closed:
            return
        self._closed = True
        _servers.discard(self)
        self._gate.close()
        for peer in list(self._peers):
            peer.close()
        for promoted in list(self._promoted):
            promoted.shut()
        for pid in list(self._watched):
            self._unwatch(pid)

    # -- connections ------------------------------------------------------------------

    @property
    def has_clients(self) -> bool:
        """Whether anybody is connected, but for those that ``sessions`` has taken over."""
        return bool(self._peers or self._promoted or self._gate.is_busy)

    def _offers(self, role: bytes) -> bool:
        # Without a key of their own, guests would prove the authkey.
        guests = role == protocol.GUEST and role in self._keys
        return guests or role == protocol.MANAGER or role in self._roles

    def _on_admitted(self, admitted: Admitted) -> None:
        take = None if admitted.role is None else self._roles.get(admitted.role)
        if take is not None:
            take(peer_of(self.reactor, admitted, self.report))
            return
        peer = Peer(self, admitted.socket, guest=admitted.role == protocol.GUEST)
        self._peers.add(peer)
        peer.start(admitted.rest)

    def on_closed(self, peer: Peer) -> None:
        """The peer is gone."""
        self._peers.discard(peer)

    # -- connections with a thread ----------------------------------------------------

    def promote(self, handover: Handover) -> None:
        """Have a connection served by a thread from now on."""
        promoted = Promoted(self, handover)
        self._promoted.add(promoted)
        try:
            promoted.start()
        except RuntimeError:  # the system gives us no more threads
            self.report()
            self._promoted.discard(promoted)
            handover.socket.close()

    def on_thread_ended(self, promoted: Promoted) -> None:
        """On any thread."""
        self._promoted.discard(promoted)

    # -- proxies of our own objects ---------------------------------------------------

    def rebuild_proxy(self, make: Any, token: Any, serializer: str, kwds: dict[str, Any]) -> Any:
        """The proxy that somebody sends us.  One of our own objects is known by its name,
        by whatever address it was reached; it is kept while the proxy lives here, and
        nobody is dialled.  On any thread but the loop's."""
        if self.objects.find(token.id) is None:
            from multiprocessing.managers import RebuildProxy  # type: ignore[attr-defined]

            return RebuildProxy(make, token, serializer, kwds)
        kwds = {**kwds, "incref": False, "manager_owned": True}
        kwds.setdefault("authkey", self.authkey)
        proxy = make(token, serializer, **kwds)
        self.objects.keep_while(proxy, token.id)
        return proxy

    def _later(self, callback: Callable[[], object]) -> None:
        """On any thread, at any time; also when a proxy is collected after the end."""
        if not self._closed:
            self.reactor.post(callback)

    # -- processes that hold references -----------------------------------------------

    def _watch(self, pid: int) -> None:
        if self._closed or pid in self._watched or not hasattr(os, "pidfd_open"):
            return
        try:
            found = os.pidfd_open(pid)
        except ProcessLookupError:
            self.objects.release_process(pid)  # so soon
            return
        except OSError:
            return  # no descriptor left, or no such call: its references are its own affair
        self._watched[pid] = found
        self.reactor.add_reader(found, lambda: self._on_death(pid))

    def _on_death(self, pid: int) -> None:
        self._unwatch(pid)
        self.objects.release_process(pid)

    def _unwatch(self, pid: int) -> None:
        found = self._watched.pop(pid)
        self.reactor.remove_reader(found)
        os.close(found)

    # -- forks ------------------------------------------------------------------------

    def _leave_to_parent(self) -> None:
        """In a forked child: its copies of our sockets would keep connections open that
        we close."""
        self._gate.leave_to_parent()
        for peer in self._peers:
            peer.socket.close()
        for promoted in self._promoted:
            promoted.socket.close()
        for found in self._watched.values():
            os.close(found)


_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def loop_here() -> Reactor | None:
    """The loop of a server, where this thread is in the middle of a turn of it, or may hold
    what that loop waits for."""
    here, mine = threading.get_ident(), waiting_loop()
    loops = (server.reactor for server in living(_servers))
    return next((loop for loop in loops if loop is mine or loop.thread == here), None)


def _after_fork_in_child() -> None:
    for server in living(_servers):
        server._leave_to_parent()
    _servers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
