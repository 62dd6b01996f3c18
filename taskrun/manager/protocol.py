"""The bytes of ``multiprocessing.connection``: frames, and the handshake before them.

A frame is a length and a payload: four bytes, big-endian and signed; -1 announces eight
more, unsigned, for what is longer than 2 GiB.

The handshake is mutual, on every connection, and the server goes first:

    server                              client
    #CHALLENGE# + message         ->
                                  <-    answer: HMAC of the message, with the authkey
    #WELCOME# or #FAILURE#        ->
                                  <-    #CHALLENGE# + message
    answer                        ->
                                  <-    #WELCOME# or #FAILURE#

From Python 3.12 on a message names a digest, ``{sha256}`` and forty random bytes, and the
answer repeats the name.  Before that a message was twenty random bytes, and whatever it
was, the answer was the bare HMAC-MD5 of it.  So one message suits all clients, and the
form of the answer says which they are.  The HMAC covers the name: nobody in between can
change it.  A bare MD5 answer may be refused with ``allow_md5=False``.

With TLS the handshake is another one: see ``taskrun.transport``.

Nothing here reads or writes.  Until the peer has proved that it knows the key, at most 256
bytes of it are kept, and none are interpreted as anything but the handshake.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable

CHALLENGE = b"#CHALLENGE#"
WELCOME = b"#WELCOME#"
FAILURE = b"#FAILURE#"
LONGEST_GREETING = 256  # bytes of one message of the handshake

MANAGER = b"manager"
GUEST = b"guest"  # a process of another engine: it has a key of its own, and gets to the state
"""The role (see ``taskrun.transport.proof``) in which one is dialled by TLS for what the
standard library's clients get without."""

DIGESTS = {b"md5", b"sha256", b"sha384", b"sha3_256", b"sha3_384"}
_LONGEST_NAME = max(map(len, DIGESTS))
_RANDOM_BYTES = 40
_MD5_SIZE = 16
_BARE_MESSAGES = (16, 20)  # bytes of a message that names no digest

_SHORT = struct.Struct("!i")
_LONG = struct.Struct("!Q")
_LARGEST_SHORT = 0x7FFFFFFF


class ProtocolError(Exception):
    """Raised for what no peer may send; ``last_words`` may be sent before closing."""

    def __init__(self, message: str, last_words: bytes = b"") -> None:
        super().__init__(message)
        self.last_words = last_words


class Refused(ProtocolError):
    """Raised when the peer does not know the key, or claims to in a way we do not accept."""


def header(size: int) -> bytes:
    """What announces a payload of ``size`` bytes."""
    return _SHORT.pack(size) if size <= _LARGEST_SHORT else _SHORT.pack(-1) + _LONG.pack(size)


def framed(payload: bytes | memoryview) -> bytes:
    """The payload behind its length."""
    size = len(payload)
    return (_SHORT.pack(size) if size <= _LARGEST_SHORT else header(size)) + payload


def announced(data: bytes | bytearray) -> tuple[int, int] | None:
    """(where the payload begins, its size), or None while the length is not all there."""
    if len(data) < 4:
        return None
    (size,) = _SHORT.unpack_from(data)
    if size >= 0:
        return 4, size
    if size != -1:
        raise ProtocolError(f"a frame of {size} bytes was announced")
    if len(data) < 12:
        return None
    return 12, _LONG.unpack_from(data, 4)[0]


class Frames:
    """Bytes in, in pieces of any size; one payload after the other out.

    A payload longer than ``limit`` is never collected: ``pop`` then says None, and
    ``oversized`` how long it claims to be.  ``rest`` gives back what has been fed.
    """

    __slots__ = ("limit", "oversized", "pending")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.oversized: int | None = None
        self.pending: bytearray | None = None  # fed and not popped; if nothing is, None

    def feed(self, data: bytes) -> None:
        if self.pending is None:
            self.pending = bytearray(data)
        else:
            self.pending += data

    def pop(self) -> bytes | None:
        """The next payload that is wholly there.  Raises ProtocolError."""
        buffer = self.pending
        found = announced(buffer) if buffer is not None else None
        if buffer is None or found is None:
            return None
        start, size = found
        if size > self.limit:
            self.oversized = size
            return None
        end = start + size
        if len(buffer) < end:
            return None
        payload = bytes(memoryview(buffer)[start:end])
        if len(buffer) == end:
            self.pending = None
        else:
            del buffer[:end]
        return payload

    def rest(self) -> bytearray:
        """Everything that was fed and not popped; it is forgotten here."""
        rest, self.pending = self.pending or bytearray(), None
        return rest


# -- the two halves of the handshake --------------------------------------------------


class Question:
    """A challenge of ours, and the check of its answer."""

    __slots__ = ("message",)

    def __init__(self) -> None:
        self.message = b"{sha256}" + os.urandom(_RANDOM_BYTES)

    @property
    def greeting(self) -> bytes:
        return framed(CHALLENGE + self.message)

    def check(self, authkey: bytes, answer: bytes, allow_md5: bool = True) -> None:
        """Raises Refused unless ``answer`` proves the key."""
        digest, code = _split(answer)
        if not digest and len(answer) == _MD5_SIZE and allow_md5:
            digest, code = b"md5", answer
        if not digest:
            raise Refused("the answer to the challenge has no form that is accepted")
        if not hmac.compare_digest(_code(authkey, self.message, digest), code):
            raise Refused("the peer does not have the key")


def answer_to(authkey: bytes, message: bytes) -> bytes:
    """What proves to the sender of ``message`` that we have the key."""
    digest, _ = _split(message)
    if digest:
        return b"{%s}%s" % (digest, _code(authkey, message, digest))
    if len(message) in _BARE_MESSAGES:
        return _code(authkey, message, b"md5")
    raise Refused("the challenge has no form that is known")


def _split(message: bytes) -> tuple[bytes, bytes]:
    """(digest name, the rest); an empty name where the message has none."""
    name, curly, _ = message[1 : _LONGEST_NAME + 2].partition(b"}")
    if not message.startswith(b"{") or not curly or name not in DIGESTS:
        return b"", message
    return name, message[len(name) + 2 :]


def _code(authkey: bytes, message: bytes, digest: bytes) -> bytes:
    try:
        return hmac.digest(authkey, message, digest.decode())
    except ValueError as error:  # MD5 where the system forbids it
        raise Refused(f"{digest.decode()} is not available here: {error}") from None


class ServerHandshake:
    """The server's side, one message in and at most one out.  The client proves itself
    first: nothing is computed from what an unknown peer chose."""

    __slots__ = ("_allow_md5", "_answered", "_authkey", "_proved", "_question", "done")

    def __init__(self, authkey: bytes, allow_md5: bool = True) -> None:
        self._authkey = authkey
        self._allow_md5 = allow_md5
        self._question = Question()
        self._proved = False
        self._answered = False
        self.done = False

    def open(self) -> bytes:
        """What to send first."""
        return self._question.greeting

    @property
    def question(self) -> bytes:
        """The message of our challenge: random, and never used twice."""
        return self._question.message

    def receive(self, message: bytes) -> bytes:
        """What to send next, perhaps nothing.  Raises ProtocolError."""
        if not self._proved:
            return self._on_answer(message)
        if not self._answered:
            return self._on_challenge(message)
        if message != WELCOME:
            raise Refused("the client did not accept our answer")
        self.done = True
        return b""

    def _on_answer(self, answer: bytes) -> bytes:
        try:
            self._question.check(self._authkey, answer, self._allow_md5)
        except Refused as refused:
            raise Refused(str(refused), framed(FAILURE)) from None
        self._proved = True
        return framed(WELCOME)

    def _on_challenge(self, message: bytes) -> bytes:
        if not message.startswith(CHALLENGE):
            raise Refused("a challenge was expected")
        message = message[len(CHALLENGE) :]
        if hmac.compare_digest(message, self._question.message):
            raise Refused("the client sent our own challenge back")
        self._answered = True
        return framed(answer_to(self._authkey, message))


# The challenges that clients in this process are waiting for answers to.  A server without
# the key could have one answered by us on a second connection, and use that answer.
_asked: set[bytes] = set()


def greet(authkey: bytes, send: Callable[[bytes], object], receive: Callable[[int], bytes]) -> None:
    """The client's side of the handshake, over functions that send and receive a payload
    (``receive`` takes the longest size to accept).  Raises Refused."""
    message = receive(LONGEST_GREETING)
    if not message.startswith(CHALLENGE):
        raise Refused("the server did not begin with a challenge")
    message = message[len(CHALLENGE) :]
    if message in _asked:
        raise Refused("the server sent a challenge of our own back")
    send(answer_to(authkey, message))
    if receive(LONGEST_GREETING) != WELCOME:
        raise Refused("the server does not accept our key")
    question = Question()
    _asked.add(question.message)
    try:
        send(CHALLENGE + question.message)
        question.check(authkey, receive(LONGEST_GREETING))
    except Refused:
        send(FAILURE)
        raise
    finally:
        _asked.discard(question.message)
    send(WELCOME)
