"""Listening for peers of our own."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from taskrun.addresses import Address, Tls, prepare_unix, secured, shown
from taskrun.authkey import check_length
from taskrun.errors import UsageError
from taskrun.reactor import Reactor
from taskrun.telling import tell_traceback
from taskrun.transport.gate import HANDSHAKE_TIMEOUT, MOST_GREETING, Admitted, Gate
from taskrun.transport.peer import Peer

if TYPE_CHECKING:
    from taskrun.transport.tls import Certificates, Security


def _no_notice(text: str) -> None:
    """Nobody wants to know."""


def listen(
    address: Address,
    key: bytes,
    reactor: Reactor,
    on_peer: Callable[[Peer], object],
    *,
    tls: Certificates | None = None,
    insecure_plain: bool = False,
    notice: Callable[[str], object] = _no_notice,
    report: Callable[[], object] = tell_traceback,
    timeout: float = HANDSHAKE_TIMEOUT,
    most_greeting: int = MOST_GREETING,
) -> Listener:
    """Listen at ``address``; whoever proves the key becomes a Peer.

    Loopback and Unix sockets are plain, everything else is TLS, with the certificate of
    ``tls`` (see :func:`open_door`), unless ``insecure_plain`` is said.
    ``notice`` gets a line for each peer that is turned away; ``report`` is called in an
    ``except`` block where ``on_peer`` raises, or what it has the Peer call for a frame.
    ``timeout``: seconds for the handshake as a whole.  Raises UsageError for an address or a
    key that cannot be used.
    """
    check_length(key, "the authkey")

    def on_admitted(admitted: Admitted) -> None:
        on_peer(peer_of(reactor, admitted, report))

    gate = Gate(
        key, reactor, on_admitted, stock=False, notice=notice, report=report,
        timeout=timeout, most_greeting=most_greeting,
    )  # fmt: skip
    return Listener(gate, open_door(gate, address, tls, insecure_plain=insecure_plain))


def peer_of(reactor: Reactor, admitted: Admitted, report: Callable[[], object]) -> Peer:
    """The Peer of a connection that was let in with a role of our own."""
    assert admitted.role is not None
    return Peer(reactor, admitted.socket, admitted.name, admitted.role, admitted.rest, report)


Roles = Mapping[bytes, Callable[[Peer], object]]
"""role -> what gets the Peers that have it."""


class Listener:
    """A listening address; ``address`` is the one that was found where the port was 0."""

    def __init__(self, gate: Gate, address: Address) -> None:
        self._gate = gate
        self.address = address
        _listeners.add(self)

    def close(self) -> None:
        """Listen no more, and let go of those that have not proved the key yet."""
        self._gate.close()
        _listeners.discard(self)

    def _leave_to_parent(self) -> None:
        self._gate.leave_to_parent()


def open_door(
    gate: Gate, address: Address, files: Certificates | None = None, *, insecure_plain: bool = False
) -> Address:
    """Have a gate listen there, from now on; the address with its port.

    ``files``: the certificate to show, by default what the environment says, or one that
    is made now.  ``insecure_plain``: do without TLS, wherever that is.  Raises UsageError.
    """
    address = address if insecure_plain else secured(address)
    security = _security(files) if isinstance(address, Tls) else None
    try:
        if isinstance(address, str):
            prepare_unix(address)
        door = gate.add(address, security)
    except OSError as error:
        raise UsageError(f"cannot listen on {shown(address)}: {error.strerror}") from None
    if isinstance(address, str):
        os.chmod(address, 0o600)
    gate.start(door)
    return door.address


def _security(files: Certificates | None) -> Security:
    from taskrun.transport import tls

    return tls.for_listening(tls.Certificates.from_environment() if files is None else files)


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for listener in list(_listeners):
        listener._leave_to_parent()
    _listeners.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
