"""Connections between taskrun's processes, wherever they are: who is let in, and how.

- ``proof`` is the handshake in which both sides prove the authkey, without any input or
  output;
- ``gate`` listens, and lets in whoever has the key;
- ``dialling`` is the other side, on a reactor or while the caller waits;
- ``peer`` is a connection on a reactor, once both have the other's proof.

Unix sockets and loopback are plain; everything else is TLS 1.3 (see ``taskrun.addresses``).
"""

from __future__ import annotations

from taskrun.transport.dialling import Dialling, Wire, dial, dial_blocking
from taskrun.transport.listening import Listener, listen
from taskrun.transport.peer import Peer

__all__ = ["Dialling", "Listener", "Peer", "Wire", "dial", "dial_blocking", "listen"]
