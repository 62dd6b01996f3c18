"""Dialling a coordinator, on a reactor or while the caller waits."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from taskrun.addresses import Address, Tls, is_loopback, secured, shown
from taskrun.authkey import check_length
from taskrun.errors import DialError, WireError
from taskrun.manager.protocol import ProtocolError
from taskrun.reactor import Reactor, Timer
from taskrun.transport import proof
from taskrun.transport.gate import acknowledge, prepare
from taskrun.transport.peer import Peer
from taskrun.transport.proof import Asking
from taskrun.wire import READ_SIZE, Decoder, header

if TYPE_CHECKING:
    import ssl

    from taskrun.transport.tls import Certificates, Secured

DIAL_TIMEOUT: Final = 10.0  # seconds
_JOINED: Final = 64 * 1024  # shorter parts are copied into one write
_AGAIN: Final = 0.01  # seconds until one asks for a place in a full queue again

OnOpen = Callable[[socket.socket, bytes], object]
OnFailure = Callable[[DialError], object]


def dial(
    address: Address,
    key: bytes,
    reactor: Reactor,
    role: bytes,
    on_peer: Callable[[Peer], object],
    on_failure: OnFailure,
    *,
    timeout: float = DIAL_TIMEOUT,
    tls: Certificates | None = None,
    insecure_plain: bool = False,
) -> Dialling:
    """Connect, prove the key, and hand over a Peer; all on the reactor.

    Of ``on_peer`` and ``on_failure`` one is called, once, later, at the latest after
    ``timeout`` seconds; none of them after ``close()`` of what this returns.
    Loopback and Unix sockets are dialled in plain, everything else by TLS, unless
    ``insecure_plain`` is said; ``tls`` is by default what the environment says.
    Raises UsageError for a key that is too short, or a certificate that cannot be used.
    """
    check_length(key, "the authkey")

    def on_open(connection: socket.socket, rest: bytes) -> None:
        on_peer(Peer(reactor, connection, shown(address), role, rest))

    route = Route.to(address, tls, insecure_plain=insecure_plain)
    return Dialling(route, key, reactor, role, on_open, on_failure, timeout)


@dataclass(frozen=True, slots=True)
class Route:
    """Where to, and how.  ``context``: what TLS is done with, None where it is plain."""

    address: Address
    context: ssl.SSLContext | None

    @classmethod
    def to(
        cls, address: Address, files: Certificates | None = None, *, insecure_plain: bool = False
    ) -> Route:
        """Raises UsageError for certificates that cannot be used."""
        address = address if insecure_plain else secured(address)
        if not isinstance(address, Tls):
            return cls(address, None)
        from taskrun.transport import tls

        files = tls.Certificates.from_environment() if files is None else files
        return cls(address, tls.for_dialling(files))


class Dialling:
    """An attempt to connect: to the first of the host's addresses that answers."""

    def __init__(
        self,
        route: Route,
        key: bytes,
        reactor: Reactor,
        role: bytes,
        on_open: OnOpen,
        on_failure: OnFailure,
        timeout: float,
    ) -> None:
        self.address = route.address
        self._context = route.context
        self._key = key
        self._reactor = reactor
        self._role = role
        self._on_open = on_open
        self._on_failure = on_failure
        self._socket: socket.socket | None = None
        self._asking: Asking | None = None
        self._last: OSError | None = None
        self._over = False
        self._targets: deque[tuple[int, Any]] = deque()
        self._deadline = monotonic() + timeout
        self._timer = reactor.call_at(self._deadline, self._on_timeout)
        self._patience: Timer | None = None  # with one of several targets, or a full queue
        reactor.call_soon(self._look_up)
        _diallings.add(self)

    # -- where to ---------------------------------------------------------------------

    def _look_up(self) -> None:
        if isinstance(self.address, str):
            self._targets.append((socket.AF_UNIX, self.address))
            self._try_next()
            return
        try:
            self._targets.extend(_targets(self.address, socket.AI_NUMERICHOST))
            self._try_next()
        except OSError:  # it is a name: the system may take its time to find it
            try:
                threading.Thread(target=self._ask_for_name, name="look up", daemon=True).start()
            except RuntimeError as error:  # the system gives us no more threads
                self._fail(f"cannot be looked up: {error}", retry=True)

    def _ask_for_name(self) -> None:
        """On a thread of its own."""
        try:
            found = _targets(self.address, 0)
        except OSError as error:
            failure = error
            self._reactor.post(lambda: self._on_nowhere(failure))
            return
        self._reactor.post(lambda: self._on_found(found))

    def _on_found(self, found: list[tuple[int, Any]]) -> None:
        if not self._over:
            self._targets.extend(found)
            self._try_next()

    def _on_nowhere(self, error: OSError) -> None:
        self._fail(f"cannot be found: {error.strerror or error}", retry=True)

    # -- the connection ---------------------------------------------------------------

    def _try_next(self) -> None:
        if self._over:
            return
        if not self._targets:
            assert self._last is not None
            self._fail(f"cannot be reached: {self._last.strerror or self._last}", retry=True)
            return
        family, target = self._targets.popleft()
        try:
            self._socket = made = socket.socket(family, socket.SOCK_STREAM)
            prepare(made)
            begun = made.connect_ex(target)
            if begun == errno.EAGAIN and family == socket.AF_UNIX:
                self._ask_again(target)
                return
            if begun not in (0, errno.EINPROGRESS):
                raise OSError(begun, os.strerror(begun))
        except OSError as error:
            self._on_unreachable(error)
            return
        self._reactor.add_writer(made.fileno(), self._on_connected)
        if self._targets:
            # A network may swallow what goes there: the others have their share of the time.
            now = monotonic()
            share = (self._deadline - now) / (len(self._targets) + 1)
            self._patience = self._reactor.call_at(now + share, self._on_silence)

    def _ask_again(self, path: str) -> None:
        """The queue of a Unix socket is full, and nothing says when there is room."""
        self._drop()
        self._targets.append((socket.AF_UNIX, path))
        self._patience = self._reactor.call_at(monotonic() + _AGAIN, self._try_next)

    def _on_silence(self) -> None:
        self._on_unreachable(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    def _on_unreachable(self, error: OSError) -> None:
        self._last = error
        self._drop()
        self._try_next()

    def _on_connected(self) -> None:
        assert self._socket is not None
        self._be_patient()
        self._reactor.remove_writer(self._socket.fileno())
        failed = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            self._on_unreachable(OSError(failed, os.strerror(failed)))
            return
        if self._context is not None:
            self._begin_tls(self._context)
            return
        self._reactor.add_reader(self._socket.fileno(), self._on_readable)
        self._ask(proof.PLAIN)

    # -- TLS --------------------------------------------------------------------------

    def _begin_tls(self, context: ssl.SSLContext) -> None:
        from taskrun.transport import tls

        assert self._socket is not None
        try:
            self._socket = secured = tls.begin_dialling(context, self._socket, self.address[0])
        except OSError as error:
            self._on_unreachable(error)
            return
        self._reactor.add_reader(secured.fileno(), lambda: self._shake_hands(secured))
        self._shake_hands(secured)

    def _shake_hands(self, secured: Secured) -> None:
        from taskrun.transport import tls

        try:
            if tls.is_sent_off(secured):
                self._fail("did not wait until TLS had begun", retry=True)
                return
            waits_for = tls.shake_hands(secured)
        except OSError as error:
            self._break(error)
            return
        if waits_for == "write":
            self._reactor.add_writer(secured.fileno(), lambda: self._shake_hands(secured))
            return
        self._reactor.remove_writer(secured.fileno())
        if waits_for == "done":
            self._reactor.add_reader(secured.fileno(), self._on_readable)
            self._ask(tls.fingerprint(secured))

    def _break(self, error: OSError) -> None:
        if self._context is None:
            self._fail(f"broke the connection: {error.strerror or error}", retry=True)
            return
        from taskrun.transport import tls

        if tls.is_plain(error):
            self._fail(f"does not speak TLS: {_plain_form(self.address)}", retry=False)
        else:
            self._fail(tls.explained(error), retry=tls.may_pass(error))

    # -- the proof --------------------------------------------------------------------

    def _ask(self, binding: bytes) -> None:
        self._asking = Asking(self._key, self._role, binding)
        self._send()

    def _on_readable(self) -> None:
        assert self._socket is not None and self._asking is not None
        try:
            acknowledge(self._socket)
            data = self._socket.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(error)
            return
        if not data:
            self._fail("closed the connection before it had proved its key", retry=True)
            return
        try:
            self._asking.feed(data)
        except ProtocolError as error:
            self._refuse(error)
            return
        self._send()
        if self._asking.done:
            self._open()

    def _send(self) -> None:
        assert self._socket is not None and self._asking is not None
        data = self._asking.take_outgoing()
        try:
            if data and self._socket.send(data) < len(data):
                self._fail("takes nothing", retry=True)
        except OSError as error:
            self._break(error)

    def _open(self) -> None:
        if self._over:
            return
        assert self._socket is not None and self._asking is not None
        opened, self._socket = self._socket, None
        self._reactor.remove_reader(opened.fileno())
        self._over = True
        self._timer.cancel()
        self._on_open(opened, self._asking.rest())

    # -- failing ----------------------------------------------------------------------

    def _on_timeout(self) -> None:
        reached = "does not answer" if self._asking is not None else "cannot be reached in time"
        self._fail(reached, retry=True)

    def _refuse(self, error: ProtocolError) -> None:
        if isinstance(error, proof.SpeaksTls):
            self._fail(f"speaks TLS: write {shown(Tls(*self.address[:2]))}", retry=False)
        else:
            self._fail(_TEXTS.get(type(error), "does not speak taskrun's protocol")
                       .format(error), retry=False)  # fmt: skip

    def _fail(self, what: str, *, retry: bool) -> None:
        if not self._over:
            self.close()
            self._on_failure(DialError(f"{shown(self.address)} {what}", retry=retry))

    def _be_patient(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _drop(self) -> None:
        self._be_patient()
        if self._socket is not None:
            self._reactor.remove_reader(self._socket.fileno())
            self._reactor.remove_writer(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """Give up; nothing is called any more."""
        self._over = True
        self._timer.cancel()
        self._drop()

    def _leave_to_parent(self) -> None:
        """In a forked child: the connection is the parent's."""
        if self._socket is not None:
            self._socket.close()


_diallings: weakref.WeakSet[Dialling] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for dialling in list(_diallings):
        dialling._leave_to_parent()
    _diallings.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)

_TEXTS: dict[type, str] = {
    proof.WrongKey: "does not accept this authkey, or does not have it: both sides need the same",
    proof.NotOffered: "has nothing for a {}: it may be of another version, or another command's",
    proof.Foreign: "is not a coordinator of taskrun",
}


def _plain_form(address: Address) -> str:
    """What to do about a listener without TLS."""
    if is_loopback(address[0]):
        return f"write {shown((address[0], address[1]))}"
    return (
        "it was started with --insecure-plain, which has to be said here as well (in Python "
        "insecure_plain=True), or is not taskrun's"
    )


def _targets(address: Address, flags: int) -> list[tuple[int, Any]]:
    """Raises OSError."""
    host, port = address[:2]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except UnicodeError:  # a part of the name is empty, or too long
        raise socket.gaierror(socket.EAI_NONAME, "no host can have this name") from None
    return [(family, target) for family, _, _, _, target in found]


# -- while the caller waits -----------------------------------------------------------


def open_socket(
    route: Route, key: bytes, role: bytes, timeout: float
) -> tuple[socket.socket, bytes]:
    """A connection past the handshake, and what was received after that; it blocks.
    Raises DialError."""
    reactor = Reactor()
    opened: list[tuple[socket.socket, bytes]] = []
    failed: list[DialError] = []
    dialling = Dialling(
        route, key, reactor, role,
        lambda connection, rest: opened.append((connection, rest)), failed.append, timeout,
    )  # fmt: skip
    try:
        reactor.run_until(lambda: bool(opened or failed))
    finally:
        dialling.close()
        reactor.close()
    if failed:
        raise failed[0]
    opened[0][0].setblocking(True)
    return opened[0]


def dial_blocking(
    address: Address,
    key: bytes,
    role: bytes,
    timeout: float = DIAL_TIMEOUT,
    *,
    tls: Certificates | None = None,
    insecure_plain: bool = False,
) -> Wire:
    """Connect and prove the key, as :func:`dial` does.  Raises DialError and UsageError."""
    check_length(key, "the authkey")
    route = Route.to(address, tls, insecure_plain=insecure_plain)
    connection, rest = open_socket(route, key, role, timeout)
    return Wire(connection, shown(route.address), rest)


class Wire:
    """A connection for code that waits: frames in and out.  Not for use after a fork."""

    def __init__(self, connection: socket.socket, name: str, rest: bytes = b"") -> None:
        self.name = name
        self._socket = connection
        self._pid = os.getpid()
        self._decoder = Decoder()
        self._frames: deque[memoryview] = deque(self._decoder.feed(rest) if rest else ())

    def fileno(self) -> int:
        """To wait for it together with others; but see :meth:`ready`."""
        return self._socket.fileno()

    def ready(self, timeout: float | None = 0) -> bool:
        """Whether :meth:`recv` would find something, within ``timeout`` seconds."""
        # With TLS this may be more than the system knows of.
        if self._frames or getattr(self._socket, "pending", int)():
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def send(self, *parts: bytes | memoryview) -> None:
        """Send one frame made of the parts.  Raises OSError where the other end is gone."""
        self._check_process()
        start = header(sum(len(part) for part in parts))
        if sum(len(part) for part in parts) < _JOINED:
            self._socket.sendall(b"".join((start, *parts)))
            return
        self._socket.sendall(start)
        for part in parts:
            self._socket.sendall(part)

    def recv(self, timeout: float | None = None) -> memoryview:
        """The next frame.  Raises EOFError where the other end is gone, TimeoutError when
        the time is up (what has come by then is kept), WireError for what is no frame."""
        self._check_process()
        deadline = None if timeout is None else monotonic() + timeout
        while not self._frames:
            left = None if deadline is None else max(0.0, deadline - monotonic())
            if not self.ready(left):
                raise TimeoutError(f"nothing from {self.name} in time")
            self._read()
        return self._frames.popleft()

    def _read(self) -> None:
        """What is there; with TLS, that may be nothing yet."""
        self._socket.setblocking(False)
        try:
            data = self._socket.recv(READ_SIZE)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        finally:
            self._socket.setblocking(True)
        if not data:
            raise EOFError(f"{self.name} closed the connection")
        self._frames.extend(self._decoder.feed(data))

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise WireError(f"the connection to {self.name} belongs to the parent process")

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
