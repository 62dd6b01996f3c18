"""TLS 1.3 by the standard library: contexts, certificates, and sockets that behave.

A coordinator needs no certificate to be made for it: it makes one when it starts, signed by
nobody, whose key it forgets when it ends.  That alone proves nothing to anyone.  What does
is the proof of the authkey, which covers the certificate's fingerprint (see ``proof``).
Certificates of one's own are checked as usual, and the authkey is proved all the same.
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
from dataclasses import dataclass
from typing import Any, Final

from taskrun.errors import UsageError
from taskrun.transport.proof import USE_TLS

_LENGTH: Final = 4  # bytes, before a message
_MOST_TOLD: Final = _LENGTH + len(USE_TLS)
_RECORD: Final = 16 * 1024  # bytes, the most that one read gives
_PIECE: Final = 64 * 1024  # bytes of one write
_PEM_END: Final = "-----END CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files in PEM.  ``cert`` and ``key``: a certificate to show.  ``ca``: who must have
    signed the other side's; for one who dials it must be the host's, too."""

    cert: str | None = None
    key: str | None = None
    ca: str | None = None

    @classmethod
    def from_environment(cls) -> Certificates:
        """As the variables TASKRUN_TLS_CERT, TASKRUN_TLS_KEY and TASKRUN_TLS_CA say."""
        return cls(*(os.environ.get(f"TASKRUN_TLS_{name}") or None for name in _VARIABLES))


_VARIABLES: Final = ("CERT", "KEY", "CA")


@dataclass(frozen=True, slots=True)
class Security:
    """What a listener does TLS with.  ``binding``: SHA-256 of the certificate it shows."""

    context: ssl.SSLContext
    binding: bytes

    def begin(self, connection: socket.socket) -> Secured:
        """The same connection with TLS; the handshake has to be done yet."""
        return _wrapped(self.context, connection, server_side=True)


# -- contexts -------------------------------------------------------------------------


def for_listening(files: Certificates) -> Security:
    """With the certificate of ``files``, or one that is made now.  Raises UsageError."""
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    # A ticket would lie unread at a client that only sends, and look like a message.
    context.num_tickets = 0
    if files.ca is not None:
        _load_ca(context, files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    if _has_certificate(files):
        assert files.cert is not None
        return Security(context, _load_certificate(context, files.cert, files.key))
    import tempfile

    with tempfile.TemporaryDirectory(prefix="taskrun-") as folder:  # of mode 0700
        from taskrun.transport.certificates import make

        return Security(context, _load_certificate(context, *make(folder)))


def for_dialling(files: Certificates) -> ssl.SSLContext:
    """What checks the other side's certificate by ``files.ca``, if that is given; else only
    the authkey counts.  Raises UsageError."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    if files.ca is not None:
        _load_ca(context, files.ca)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if _has_certificate(files):
        assert files.cert is not None
        _load_certificate(context, files.cert, files.key)
    return context


def begin_dialling(context: ssl.SSLContext, connection: socket.socket, host: str) -> Secured:
    """The same connection with TLS; the handshake has to be done yet."""
    name = host if context.check_hostname else None
    return _wrapped(context, connection, server_side=False, server_hostname=name)


def fingerprint(connection: Secured) -> bytes:
    """SHA-256 of the certificate that the other side has shown."""
    certificate = connection.getpeercert(binary_form=True)
    assert certificate is not None, "a listener with TLS shows one"
    return hashlib.sha256(certificate).digest()


def _context(protocol: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.sslsocket_class = Secured
    return context


def _wrapped(context: ssl.SSLContext, connection: socket.socket, **options: Any) -> Secured:
    wrapped = context.wrap_socket(connection, do_handshake_on_connect=False, **options)
    assert isinstance(wrapped, Secured)
    return wrapped


def _has_certificate(files: Certificates) -> bool:
    if files.key is not None and files.cert is None:
        raise UsageError("--tls-key goes with --tls-cert: name the certificate, too")
    return files.cert is not None


def _load_ca(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError:
        raise UsageError(f"--tls-ca {path}: there is no certificate in PEM in it") from None
    except OSError as error:
        raise UsageError(f"--tls-ca {path} cannot be read: {error.strerror}") from None


def _load_certificate(context: ssl.SSLContext, cert: str, key: str | None) -> bytes:
    """Have it shown; its SHA-256."""
    where = f"--tls-cert {cert}" + (f" with --tls-key {key}" if key is not None else "")
    try:
        context.load_cert_chain(cert, key, password=lambda: _refuse_password(where))
        with open(cert) as file:
            text = file.read()
        # The first one is shown as our own; the others sign it.
        pem = text[text.index("-----BEGIN CERTIFICATE-----") :]
        pem = pem[: pem.index(_PEM_END) + len(_PEM_END)]
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest()
    except (ssl.SSLError, ValueError):
        raise UsageError(f"{where}: this is no certificate in PEM with its key") from None
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror}") from None


def _refuse_password(where: str) -> str:
    raise UsageError(f"{where}: the key is locked by a password; name one that is not")


# -- sockets --------------------------------------------------------------------------


class Secured(ssl.SSLSocket):
    """A TLS connection that can be used wherever a socket is.

    When it would block it says so as others do, and it is used by one thread at a time.
    A read of 16 KiB or more takes the whole of a TLS record, so that nothing is left that
    the system does not know of; :meth:`pending` tells those who read less.
    """

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        if flags:
            return self._look(buflen, flags)
        try:
            return super().recv(min(buflen, _RECORD))  # see wire.READ_SIZE
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        try:
            return super().recv_into(buffer, nbytes, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def send(self, data: Any, flags: int = 0) -> int:
        """As a socket's; where it blocks, the same bytes have to be sent next."""
        try:
            # What has been encrypted of a long piece when there is no more room cannot be
            # told: the shorter the piece, the less is to be kept for another try.
            return super().send(memoryview(data)[:_PIECE], flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def _look(self, size: int, flags: int) -> bytes:
        """With MSG_PEEK: whether there is anything, encrypted or not, or the end."""
        assert flags & socket.MSG_PEEK, "nothing else can be done beneath TLS"
        return b"\0" if self.pending() else socket.socket.recv(self, size, flags)

    def shutdown(self, how: int) -> None:
        # The one of SSLSocket goes on in plain, for whoever is just about to send.
        socket.socket.shutdown(self, how)


def shake_hands(connection: Secured) -> str:
    """Go on with the handshake: ``"done"``, or ``"read"`` or ``"write"`` for what it waits
    for.  Raises OSError; see :func:`explained`."""
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        return "read"
    except ssl.SSLWantWriteError:
        return "write"
    return "done"


def is_sent_off(connection: Secured) -> bool:
    """Whether a listener with TLS, where that has not begun in time, says that it is needed:
    this process, or its machine, stood still.  Raises OSError."""
    try:
        told = socket.socket.recv(connection, _MOST_TOLD, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    return told[_LENGTH:].startswith(USE_TLS)


# -- what went wrong ------------------------------------------------------------------

_NO_RECORD: Final = ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL")
_OLDER: Final = ("UNSUPPORTED_PROTOCOL", "PROTOCOL_VERSION", "NO_PROTOCOLS_AVAILABLE")


def explained(error: OSError) -> str:
    """What a failed handshake means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"shows a certificate that --tls-ca does not vouch for: {error.verify_message}"
    reason = getattr(error, "reason", None) or ""
    if any(name in reason for name in _OLDER):
        return "does not speak TLS 1.3, and nothing older is used"
    if "CERTIFICATE_REQUIRED" in reason or "PEER_DID_NOT_RETURN" in reason:
        return "requires a certificate of the other side: see --tls-cert"
    if "UNKNOWN_CA" in reason or "BAD_CERTIFICATE" in reason:
        return "does not accept the certificate of the other side"
    if isinstance(error, ssl.SSLError) and reason:
        return f"does not speak TLS as it should: {reason.lower().replace('_', ' ')}"
    return f"broke the connection: {error.strerror or error}"


def is_plain(error: OSError) -> bool:
    """Whether the other side has sent something that is no record of TLS."""
    return getattr(error, "reason", None) in _NO_RECORD


def may_pass(error: OSError) -> bool:
    """Whether another try may go better."""
    return not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLEOFError)
