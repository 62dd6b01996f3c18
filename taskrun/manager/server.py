"""The Manager server: listens, and knows everybody who is connected.

Everything here runs on the thread of the reactor, but for what says otherwise.  No peer can
end the server or another peer's connection: whatever goes wrong with one ends that one.

Until a peer has proved that it has the key, it has so many seconds in all, and only so many
may be at it at a time; beyond that the oldest goes that has taken a second or more, or the
new ones wait.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any

from taskrun.manager.administration import Administration
from taskrun.manager.hosting import Handover
from taskrun.manager.listening import Address, Listener
from taskrun.manager.objects import Objects, Registry
from taskrun.manager.peer import Peer
from taskrun.manager.promoted import Promoted
from taskrun.reactor import Reactor

HANDSHAKE_TIMEOUT = 10.0  # seconds
MOST_GREETING = 256  # peers in the handshake at a time
_OLD_GREETING = 1.0  # seconds; an honest peer is through in milliseconds


def print_traceback() -> None:
    """The default of ``report``: what went wrong goes to stderr."""
    traceback.print_exc(file=sys.stderr)


class Server:
    """A Manager server on a reactor.

    ``registry`` is that of a manager class: typeid -> (callable, exposed,
    method_to_typeid, proxytype).  ``address`` is a (host, port), the path of a Unix socket,
    or None for a path of its own; ``listen`` adds more.  It serves from :meth:`start` until
    :meth:`close`.

    ``on_shutdown`` is called when a client asks the server to end; without it that is
    refused.  ``report`` is called in an ``except`` block for what should not happen.
    ``sessions`` takes over the connections whose first request is for the named state:
    the socket, that request, and what was received after it.
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
    ) -> None:
        if not isinstance(authkey, bytes):
            raise TypeError(f"the authkey is {type(authkey).__name__}, not bytes")
        if serializer not in ("pickle", "xmlrpclib"):
            raise ValueError(f"no serializer {serializer!r}: there are pickle and xmlrpclib")
        self.authkey = bytes(authkey)
        self.reactor = reactor
        self.allow_md5 = allow_md5
        self.plain = serializer == "pickle"  # else every connection gets a thread
        self.report = report
        self.sessions = sessions
        self.objects = Objects(registry, self._later, self._watch)
        self.administration = Administration(self.objects, on_shutdown)
        self._handshake_timeout = handshake_timeout
        self._most_greeting = most_greeting
        self._greeting: dict[Peer, float] = {}  # in order of arrival; when it began
        self._peers: set[Peer] = set()
        self._promoted: set[Promoted] = set()
        self._watched: dict[int, int] = {}  # process -> pidfd
        self.listeners: list[Listener] = []
        self._started = self._closed = self._timing = False
        self.address: Address = self.listen(address)

    # -- beginning and ending ---------------------------------------------------------

    def listen(self, address: Address) -> Address:
        """Listen there too; the address with the port or path that was chosen."""
        listener = Listener(address)
        self.listeners.append(listener)
        if self._started:
            self._start(listener)
        return listener.address

    def start(self) -> None:
        """Take connections.  The reactor has to be run by somebody."""
        self._started = True
        _servers.add(self)
        for listener in self.listeners:
            self._start(listener)

    def _start(self, listener: Listener) -> None:
        listener.start(self.reactor, self._on_connection, self._has_room)

    def stop_listening(self) -> None:
        """Take no more connections; those that there are go on."""
        for listener in self.listeners:
            listener.close()

    def close(self) -> None:
        """End all connections, and let go of everything."""
        if self._closed:
            return
        self._closed = True
        _servers.discard(self)
        self.stop_listening()
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
        return bool(self._peers or self._promoted)

    def _has_room(self) -> bool:
        if len(self._greeting) < self._most_greeting:
            return True
        oldest, began = next(iter(self._greeting.items()))
        if monotonic() - began < _OLD_GREETING:
            return False
        oldest.close()
        return True

    def _on_connection(self, connection: socket.socket) -> None:
        try:
            peer = Peer(self, connection)
            self._peers.add(peer)
            self._greeting[peer] = monotonic()
            self._time_greetings()
            peer.start()
        except Exception as error:
            if not isinstance(error, OSError):  # that is a peer who left at once
                self.report()
            connection.close()
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        for peer in [peer for peer in self._peers if peer.socket is connection]:
            self.on_closed(peer)

    def _time_greetings(self) -> None:
        """One timer, for the oldest, does for all."""
        if self._greeting and not self._timing:
            self._timing = True
            oldest = next(iter(self._greeting.values()))
            self.reactor.call_at(oldest + self._handshake_timeout, self._end_greetings)

    def _end_greetings(self) -> None:
        self._timing = False
        latest = monotonic() - self._handshake_timeout
        for peer, began in list(self._greeting.items()):
            if began > latest:
                break
            peer.close()
        self._time_greetings()

    def on_authenticated(self, peer: Peer) -> None:
        """The peer has the key, and knows that we have it."""
        full = len(self._greeting) >= self._most_greeting
        self._greeting.pop(peer, None)
        if full:
            for listener in self.listeners:
                listener.resume()

    def on_closed(self, peer: Peer) -> None:
        """The peer is gone."""
        self._peers.discard(peer)
        self._greeting.pop(peer, None)

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
        for listener in self.listeners:
            listener.forget()
        for peer in self._peers:
            peer.socket.close()
        for promoted in self._promoted:
            promoted.socket.close()
        for found in self._watched.values():
            os.close(found)


_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for server in list(_servers):
        server._leave_to_parent()
    _servers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
