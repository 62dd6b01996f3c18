"""Proving to each other that both sides have the authkey, without saying it.

Every listening address begins in the way of ``multiprocessing.connection``, so that on a
plain one the standard library's clients are served too; our own give themselves away by
their first message, which is sent without waiting for anything:

    listening side                       dialling side
    #CHALLENGE# + question        ->
                                  <-     #TASKRUN1# + role + nonce
                                  <-     proof
    #WELCOME# + proof             ->     (or #FAILURE#)

A proof is an HMAC-SHA256 over the question, the nonce, the role, and the fingerprint of
the TLS certificate that its sender sees; each side's has a label of its own, so that
neither can be sent back.  Somebody in the middle who ends TLS shows another certificate
than the coordinator's, and what the dialling side proves then is of no use to the
coordinator, nor the other way round.  The dialling side goes first: the coordinator
computes nothing for strangers but one HMAC.

The HMAC's key is derived from the authkey as the *message* of an HMAC under a fixed label.
The standard library's handshake gives away HMACs with the authkey as the *key*, of
messages that others choose: none of these is ever a key or a proof here.

Nothing here reads or writes.  Until the proof, at most 256 bytes of a message are kept, and
none are interpreted as anything but the handshake.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Mapping
from typing import Final

from taskrun.manager import protocol
from taskrun.manager.protocol import (
    CHALLENGE,
    FAILURE,
    LONGEST_GREETING,
    WELCOME,
    Frames,
    ProtocolError,
    Refused,
    framed,
)

HELLO: Final = b"#TASKRUN1#"
USE_TLS: Final = b"#TLS#"
"""What a listener with TLS tells a client without, before it closes."""
NO_SUCH_ROLE: Final = b"#ROLE#"
"""What a listener tells one who has the key, but wants what is not to be had there."""
LONGEST_ROLE: Final = 64  # bytes
PLAIN: Final = b"plain"
"""Stands for the certificate's fingerprint where there is no TLS."""

_LABEL: Final = b"taskrun transport 1: authkey"
_DIALLER: Final = b"taskrun transport 1: proof of the dialling side"
_LISTENER: Final = b"taskrun transport 1: proof of the listening side"
_NONCE_BYTES: Final = 32
_PROOF_BYTES: Final = 32


class WrongKey(Refused):
    """Raised where the other side does not have our key, or we do not have its."""


class SpeaksTls(Refused):
    """Raised where we do without TLS what the other side does with it."""


class WithoutTls(Refused):
    """Raised where the other side begins TLS and we are plain."""


class NotOffered(Refused):
    """Raised where the listening side has nothing for the role of the dialling side."""


class Foreign(Refused):
    """Raised where the other side is something else than taskrun."""


def _proof(authkey: bytes, label: bytes, question: bytes, nonce: bytes, role: bytes,
           binding: bytes) -> bytes:  # fmt: skip
    key = hmac.digest(_LABEL, authkey, "sha256")
    fields = (label, question, nonce, role, binding)
    return hmac.digest(key, b"".join(framed(field) for field in fields), "sha256")


class Answering:
    """The listening side: bytes in; ``outgoing`` and, in the end, ``role`` out.

    ``binding`` is the SHA-256 of our certificate, or PLAIN.  With ``stock`` clients of the
    standard library are let in too, with the role ``None``.  ``offers`` says which roles
    may come.
    """

    __slots__ = (
        "_authkey", "_binding", "_claimed", "_frames", "_keys", "_nonce", "_offers", "_stock",
        "_with_stock", "done", "outgoing", "role",
    )  # fmt: skip

    def __init__(
        self,
        authkey: bytes,
        binding: bytes,
        *,
        stock: bool,
        offers: Callable[[bytes], bool] = bool,
        allow_md5: bool = True,
        keys: Mapping[bytes, bytes] | None = None,
    ) -> None:
        """``keys``: of roles that prove another key than the authkey."""
        self._authkey = authkey
        self._keys = keys or {}
        self._binding = binding
        self._with_stock = stock
        self._offers = offers
        self._stock = protocol.ServerHandshake(authkey, allow_md5)
        self._frames = Frames(LONGEST_GREETING)
        self._nonce: bytes | None = None
        self._claimed = b""
        self.role: bytes | None = None
        self.done = False
        self.outgoing = self._stock.open()

    def feed(self, data: bytes) -> None:
        """Take bytes of the peer.  Raises ProtocolError, whose last words are to be sent."""
        if self._binding == PLAIN and not self._frames.pending and data[:2] == b"\x16\x03":
            raise WithoutTls("it begins with TLS")
        self._frames.feed(data)
        while not self.done:
            message = self._frames.pop()
            if self._frames.oversized is not None:
                raise ProtocolError(f"{self._frames.oversized} bytes before the proof of the key")
            if message is None:
                return
            self._receive(message)

    def rest(self) -> bytes:
        """What came after the handshake."""
        return bytes(self._frames.rest())

    def take_outgoing(self) -> bytes:
        """What is to be sent; it is forgotten here."""
        outgoing, self.outgoing = self.outgoing, b""
        return outgoing

    def _receive(self, message: bytes) -> None:
        if self._nonce is not None:
            self._check(message)
        elif message.startswith(HELLO):
            self._claimed, self._nonce = _parse_hello(message)
        elif self._with_stock:
            self._receive_stock(message)
        else:
            raise Foreign("it does not speak taskrun's protocol", framed(FAILURE))

    def _receive_stock(self, message: bytes) -> None:
        self.outgoing += self._stock.receive(message)
        self.done = self._stock.done

    def _check(self, proof: bytes) -> None:
        assert self._nonce is not None
        transcript = (self._stock.question, self._nonce, self._claimed, self._binding)
        key = self._keys.get(self._claimed, self._authkey)
        expected = _proof(key, _DIALLER, *transcript)
        if not hmac.compare_digest(expected, proof):
            raise WrongKey("it does not have the authkey", framed(FAILURE))
        if not self._offers(self._claimed):
            role = self._claimed.decode(errors="replace")
            raise NotOffered(f"there is nothing here for a {role}", framed(NO_SUCH_ROLE))
        self.outgoing += framed(WELCOME + _proof(key, _LISTENER, *transcript))
        self.role = self._claimed
        self.done = True


def _parse_hello(message: bytes) -> tuple[bytes, bytes]:
    role, nonce = message[len(HELLO) : -_NONCE_BYTES], message[-_NONCE_BYTES:]
    if not (0 < len(role) <= LONGEST_ROLE and len(nonce) == _NONCE_BYTES):
        raise ProtocolError("its first message is cut off")
    return role, nonce


class Asking:
    """The dialling side: bytes in; ``outgoing`` out, until it is ``done``.

    ``binding`` is the SHA-256 of the certificate that we were shown, or PLAIN.
    """

    __slots__ = ("_authkey", "_binding", "_frames", "_nonce", "_question", "_role",
                 "done", "outgoing")  # fmt: skip

    def __init__(self, authkey: bytes, role: bytes, binding: bytes) -> None:
        assert 0 < len(role) <= LONGEST_ROLE, "a role is short, and not nothing"
        self._authkey = authkey
        self._role = role
        self._binding = binding
        self._nonce = os.urandom(_NONCE_BYTES)
        self._question: bytes | None = None
        self._frames = Frames(LONGEST_GREETING)
        self.done = False
        self.outgoing = framed(HELLO + role + self._nonce)

    def feed(self, data: bytes) -> None:
        """Take bytes of the other side.  Raises Refused, or ProtocolError."""
        self._frames.feed(data)
        while not self.done:
            message = self._frames.pop()
            if self._frames.oversized is not None:
                raise Foreign("it does not speak taskrun's protocol")
            if message is None:
                return
            self._receive(message)

    def rest(self) -> bytes:
        """What came after the handshake."""
        return bytes(self._frames.rest())

    def take_outgoing(self) -> bytes:
        """What is to be sent; it is forgotten here."""
        outgoing, self.outgoing = self.outgoing, b""
        return outgoing

    def _receive(self, message: bytes) -> None:
        if message.startswith(USE_TLS):
            raise SpeaksTls("it speaks TLS only")
        if self._question is None:
            self._answer(message)
        else:
            self._check(message)

    def _answer(self, message: bytes) -> None:
        if not message.startswith(CHALLENGE):
            raise Foreign("it does not speak taskrun's protocol")
        self._question = message[len(CHALLENGE) :]
        self.outgoing += framed(self._prove(_DIALLER))

    def _check(self, message: bytes) -> None:
        if message == FAILURE:
            raise WrongKey("it does not accept our authkey")
        if message == NO_SUCH_ROLE:
            raise NotOffered(self._role.decode(errors="replace"))
        proof = message[len(WELCOME) :]
        if not message.startswith(WELCOME) or len(proof) != _PROOF_BYTES:
            raise Foreign("it does not speak taskrun's protocol")
        if not hmac.compare_digest(self._prove(_LISTENER), proof):
            raise WrongKey("it does not have our authkey")
        self.done = True

    def _prove(self, label: bytes) -> bytes:
        assert self._question is not None
        return _proof(self._authkey, label, self._question, self._nonce, self._role, self._binding)
