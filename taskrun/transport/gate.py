"""The door of a coordinator: whoever connects comes in with a proof of the authkey.

Until a peer has proved that it has the key, it has so many seconds in all, however it uses
them, and only so many may be at it at a time; beyond that the oldest goes that has taken a
second or more, or the new ones wait.  Taking a connection in never waits for its handshake.

A door is plain or does TLS; that is said where it is made, and never negotiated.  Who comes
with the other form is told what to write instead, and so is whoever listens.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Final

from taskrun import descriptors
from taskrun.addresses import Address, Tls, shown
from taskrun.manager.listening import Listener
from taskrun.manager.protocol import ProtocolError, framed
from taskrun.reactor import Reactor
from taskrun.transport import proof
from taskrun.transport.proof import Answering

if TYPE_CHECKING:
    from taskrun.transport.tls import Secured, Security

HANDSHAKE_TIMEOUT: Final = 10.0  # seconds
MOST_GREETING: Final = 256  # peers in the handshake at a time ...
_FILES_FOR_ONE: Final = 4  # ... and descriptors of this process for each: work needs some, too
_OLD_GREETING: Final = 1.0  # seconds; an honest peer is through in milliseconds
_QUIET: Final = 60.0  # seconds between two notices of the same kind
_MOST_REASONS: Final = 100  # kinds of notices in that time
_NO_DIGITS: Final = str.maketrans("", "", "0123456789")
_READ: Final = 16 * 1024
_UNSENT: Final = 256 * 1024  # bytes that the system takes before it can send them
_CREDENTIALS: Final = struct.Struct("3i")
_TLS_HANDSHAKE: Final = b"\x16"  # the first byte of the first record


@dataclass(frozen=True, slots=True)
class Door:
    """A listening address.  ``security``: what TLS is done with, None where it is plain."""

    listener: Listener
    address: Address
    security: Security | None


@dataclass(frozen=True, slots=True)
class Admitted:
    """A connection that is let in.  ``role`` is what its dialling side says it is, None for
    a client of the standard library; ``rest`` is what it has sent after that."""

    socket: socket.socket
    name: str
    role: bytes | None
    rest: bytes


class Gate:
    """Listens, and lets in whoever has the key.

    ``notice`` gets a line for whatever an honest user would want to know; ``report`` is
    called in an ``except`` block for what should not happen.  ``stock``: clients of the
    standard library may come, too, where there is no TLS.  ``offers`` says which roles may;
    ``keys``: of roles that prove another key than the authkey.
    """

    def __init__(
        self,
        authkey: bytes,
        reactor: Reactor,
        on_admitted: Callable[[Admitted], object],
        *,
        stock: bool,
        notice: Callable[[str], object],
        report: Callable[[], object],
        offers: Callable[[bytes], bool] = bool,
        keys: Mapping[bytes, bytes] | None = None,
        allow_md5: bool = True,
        timeout: float = HANDSHAKE_TIMEOUT,
        most_greeting: int = MOST_GREETING,
    ) -> None:
        self.authkey = authkey
        self.reactor = reactor
        self.stock = stock
        self.allow_md5 = allow_md5
        self.offers = offers
        self.keys = keys
        self.report = report
        self.doors: list[Door] = []
        self._notice = notice
        self._told: dict[str, float] = {}  # reason without numbers -> when it was told last
        self._on_admitted = on_admitted
        self._timeout = timeout
        self._most_greeting = min(most_greeting, descriptors.allowed() / _FILES_FOR_ONE)
        self._greeting: dict[Greeting, float] = {}  # in order of arrival; when it began
        self._timing = False

    def add(self, address: Address | socket.socket, security: Security | None = None) -> Door:
        """A door there, that is still shut; TLS is done with ``security``.  Raises OSError."""
        listener = Listener(address)
        found = listener.address
        door = Door(listener, Tls(*found[:2]) if security is not None else found, security)
        self.doors.append(door)
        return door

    def start(self, door: Door) -> None:
        """Let them come."""

        def on_connection(connection: socket.socket) -> None:
            self._on_connection(connection, door)

        door.listener.start(self.reactor, on_connection, self._has_room)

    def stop_listening(self) -> None:
        """Take no more connections; those in the handshake go on."""
        for door in self.doors:
            door.listener.close()

    def close(self) -> None:
        """Let nobody in any more."""
        self.stop_listening()
        for greeting in list(self._greeting):
            greeting.close()

    def leave_to_parent(self) -> None:
        """In a forked child: the descriptors are the parent's."""
        for door in self.doors:
            door.listener.forget()
        for greeting in self._greeting:
            greeting.socket.close()

    @property
    def is_busy(self) -> bool:
        """Whether anybody is in the handshake."""
        return bool(self._greeting)

    # -- who is at it -----------------------------------------------------------------

    def _has_room(self) -> bool:
        if len(self._greeting) < self._most_greeting:
            return True
        oldest, began = next(iter(self._greeting.items()))
        if monotonic() - began < _OLD_GREETING:
            return False
        oldest.close()
        return True

    def _on_connection(self, connection: socket.socket, door: Door) -> None:
        greeting = Greeting(self, connection, door)
        self._greeting[greeting] = monotonic()
        self._time_greetings()
        try:
            greeting.start()
        except OSError:
            greeting.close()  # it left at once
        except Exception:
            self.report()
            greeting.close()

    def _time_greetings(self) -> None:
        """One timer, for the oldest, does for all."""
        if self._greeting and not self._timing:
            self._timing = True
            oldest = next(iter(self._greeting.values()))
            self.reactor.call_at(oldest + self._timeout, self._end_greetings)

    def _end_greetings(self) -> None:
        self._timing = False
        latest = monotonic() - self._timeout
        for greeting, began in list(self._greeting.items()):
            if began > latest:
                break
            greeting.give_up()
        self._time_greetings()

    def left(self, greeting: Greeting) -> None:
        """It is through with it, in one way or the other."""
        full = len(self._greeting) >= self._most_greeting
        self._greeting.pop(greeting, None)
        if full:
            for door in self.doors:
                door.listener.resume()

    def tell(self, what: str, why: str) -> None:
        """A notice; strangers cannot make us say the same again and again."""
        now = monotonic()
        kind = why.translate(_NO_DIGITS)  # which a stranger may choose
        self._told = {old: when for old, when in self._told.items() if now - when < _QUIET}
        if kind not in self._told and len(self._told) < _MOST_REASONS:
            self._told[kind] = now
            self._notice(f"{what}: {why}")

    def admit(self, admitted: Admitted) -> None:
        """The peer has the key, and knows that we have it."""
        try:
            self._on_admitted(admitted)
        except Exception:
            self.report()
            self.let_go(admitted.socket)

    def let_go(self, connection: socket.socket) -> None:
        """Close a connection that the reactor may be watching."""
        if connection.fileno() >= 0:
            self.reactor.remove_reader(connection.fileno())
            self.reactor.remove_writer(connection.fileno())
            connection.close()


class Greeting:
    """One connection, until it is let in or turned away."""

    __slots__ = ("_answering", "_door", "_gate", "name", "socket")

    def __init__(self, gate: Gate, connection: socket.socket, door: Door) -> None:
        self._gate = gate
        self._door = door
        self.socket = connection
        self.name = "somebody"
        self._answering: Answering | None = None

    def start(self) -> None:
        """Begin.  Raises OSError where it is gone already."""
        self.name = name_of(self.socket)
        prepare(self.socket)
        if self.socket.family == socket.AF_UNIX and not _is_ours(self.socket):
            self.turn_away("it belongs to another user")
        elif self._door.security is not None:
            self._gate.reactor.add_reader(self.socket.fileno(), self._on_first_byte)
        else:
            self._gate.reactor.add_reader(self.socket.fileno(), self._on_readable)
            self._ask(proof.PLAIN)

    # -- TLS --------------------------------------------------------------------------

    def _on_first_byte(self) -> None:
        """Who speaks TLS begins with a handshake; others are told to."""
        try:
            first = self.socket.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            first = b""
        if first == _TLS_HANDSHAKE:
            self._begin_tls()
        elif first:
            self.turn_away("it does not speak TLS", self._use_tls())
        else:
            self.close()

    def _use_tls(self) -> bytes:
        """What a client without TLS, of ours or not, shows its user."""
        form = shown(self._door.address)
        return framed(proof.USE_TLS + f" this address speaks TLS: {form}".encode())

    def _begin_tls(self) -> None:
        assert self._door.security is not None
        reactor = self._gate.reactor
        reactor.remove_reader(self.socket.fileno())
        try:
            self.socket = secured = self._door.security.begin(self.socket)
        except OSError:
            self.close()  # it is gone already
            return
        reactor.add_reader(secured.fileno(), lambda: self._shake_hands(secured))
        self._shake_hands(secured)

    def _shake_hands(self, secured: Secured) -> None:
        from taskrun.transport import tls

        reactor = self._gate.reactor
        try:
            waits_for = tls.shake_hands(secured)
        except OSError as error:
            self.turn_away(f"it {tls.explained(error)}")
            return
        if waits_for == "write":
            reactor.add_writer(secured.fileno(), lambda: self._shake_hands(secured))
            return
        reactor.remove_writer(secured.fileno())
        if waits_for == "done":
            assert self._door.security is not None
            reactor.add_reader(secured.fileno(), self._on_readable)
            try:
                self._ask(self._door.security.binding)
            except OSError:
                self.close()  # it left

    # -- the proof --------------------------------------------------------------------

    def _ask(self, binding: bytes) -> None:
        gate = self._gate
        self._answering = Answering(
            gate.authkey, binding, stock=gate.stock and binding == proof.PLAIN,
            offers=gate.offers, keys=gate.keys, allow_md5=gate.allow_md5,
        )  # fmt: skip
        self._send(self._answering.take_outgoing())

    def _on_readable(self) -> None:
        try:
            acknowledge(self.socket)
            data = self.socket.recv(_READ)
            if data:
                self._feed(data)
            else:
                self.close()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._on_broken(error)
        except Exception:
            self._gate.report()
            self.close()

    def _on_broken(self, error: OSError) -> None:
        if self._door.security is None:
            self.close()  # it left
            return
        from taskrun.transport import tls

        if tls.may_pass(error):
            self.close()
        else:
            self.turn_away(f"it {tls.explained(error)}")

    def _feed(self, data: bytes) -> None:
        assert self._answering is not None
        try:
            self._answering.feed(data)
            self._send(self._answering.take_outgoing())
        except ProtocolError as error:
            self.turn_away(str(error), error.last_words)
            return
        if self._answering.done:
            self._gate.left(self)
            self._gate.reactor.remove_reader(self.socket.fileno())
            self._gate.admit(
                Admitted(self.socket, self.name, self._answering.role, self._answering.rest())
            )

    def _send(self, data: bytes) -> None:
        # There is room for these few bytes, unless the peer does not read at all.
        if data and self.socket.send(data) < len(data):
            raise ConnectionAbortedError

    # -- leaving ----------------------------------------------------------------------

    def turn_away(self, why: str, last_words: bytes = b"") -> None:
        """End it, and tell both sides why."""
        self._gate.tell(f"turned away {self.name} at {shown(self._door.address)}", why)
        try:
            self._send(last_words)
        except OSError:
            pass  # it does not listen
        self.close()

    def give_up(self) -> None:
        """Its time is over."""
        if self._door.security is not None and self._answering is None:
            # A client of the standard library waits for us to begin, and shows what it gets.
            self.turn_away("it said nothing: TLS is expected there", self._use_tls())
        else:
            self.turn_away("it has not proved the authkey in time")

    def close(self) -> None:
        self._gate.left(self)
        self._gate.let_go(self.socket)


def prepare(connection: socket.socket) -> None:
    """What we want of each connection."""
    connection.setblocking(False)
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What waits for a slow line waits with us, where heartbeats can overtake it.
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
        # A machine that has lost its power says nothing; its connection ends all the same,
        # within a minute where the system lets us say so.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def acknowledge(connection: socket.socket) -> None:
    """A client that sends two small messages in a row waits for the first to be
    acknowledged; the system delays that by 40 ms, unless told otherwise again and again."""
    if connection.family != socket.AF_UNIX and hasattr(socket, "TCP_QUICKACK"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def name_of(connection: socket.socket) -> str:
    """Who is at the other end, as messages say it."""
    if connection.family != socket.AF_UNIX:
        return shown(connection.getpeername()[:2])
    found = connection.getpeername() or connection.getsockname()
    return shown(os.fsdecode(found))


def _is_ours(connection: socket.socket) -> bool:
    """Whether the process at the other end of a Unix socket is this user's, or root's."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True  # the folder of the socket lets in nobody else
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(found)[1] in (os.geteuid(), 0)
