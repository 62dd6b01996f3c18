"""A certificate for as long as a coordinator runs, made by somebody who knows how to."""

from __future__ import annotations

import os
from typing import Final

from taskrun.errors import UsageError

_DAYS: Final = 3650
_NAME: Final = "taskrun"
_OPENSSL_SECONDS: Final = 30


def make(folder: str) -> tuple[str, str]:
    """A new self-signed certificate and its key, as two files in ``folder``.  Raises
    UsageError where there is nothing to make them with."""
    cert, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
    try:
        by_cryptography(cert, key)
    except ImportError:
        by_openssl(cert, key)
    return cert, key


def by_cryptography(cert: str, key: str) -> None:
    """Raises ImportError where that package is not installed."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=_DAYS))
        .sign(private, hashes.SHA256())
    )
    _write(cert, made.public_bytes(serialization.Encoding.PEM))
    _write(
        key,
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def _write(path: str, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def by_openssl(cert: str, key: str) -> None:
    """Raises UsageError where that command is not there, or fails."""
    import subprocess

    command = (
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-nodes", "-sha256", "-days", str(_DAYS), "-subj", f"/CN={_NAME}",
        "-out", cert, "-keyout", key,
    )  # fmt: skip
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_OPENSSL_SECONDS
        )
    except FileNotFoundError:
        raise UsageError(
            "TLS needs a certificate, and there is nothing here to make one: install "
            "taskrun[network] (the package cryptography) or the openssl command, or name one by "
            "--tls-cert and --tls-key"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"the openssl command made no certificate: {error}") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise UsageError(
            f"the openssl command made no certificate: {said}; install taskrun[network] (the "
            "package cryptography) instead"
        )
