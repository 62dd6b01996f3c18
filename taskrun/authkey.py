"""The authkey: what somebody must know to talk to a coordinator.

It comes from the file that is named, from the one that ``TASKRUN_AUTHKEY_FILE`` names, from
``TASKRUN_AUTHKEY``, or from a file of this user's, which is made at first use.  It is never
part of a message, and never passed on in the environment.
"""

from __future__ import annotations

import codecs
import os
import stat
from typing import Final

from taskrun.errors import UsageError

SHORTEST: Final = 16  # bytes
LONGEST: Final = 4096  # bytes of a key file; a longer one is another file
_VARIABLE: Final = "TASKRUN_AUTHKEY"
_taken: dict[str, bytes] = {}  # what was in the environment


def authkey(file: str | None = None) -> bytes:
    """The key.  Raises UsageError, with the path and the reason."""
    take_from_environment()
    named = file or os.environ.get("TASKRUN_AUTHKEY_FILE")
    if named:
        return _checked(_read(named), named)
    if _VARIABLE in _taken:
        return _checked(_taken[_VARIABLE], _VARIABLE)
    path = own_file()
    try:
        return _checked(_read(path), path)
    except FileNotFoundError:
        return _made(path)


def given(key: bytes | str | os.PathLike[str] | None) -> bytes:
    """The key that a program names: by itself, or by the path of a file with it; without
    one, that which is always looked for.  Raises UsageError.

    A str may be either, and is a path where there is such a file.  Where there is none, it may
    be the key itself, and is shown to nobody.
    """
    if isinstance(key, bytes):
        return key
    if isinstance(key, str) and not os.path.lexists(key):
        text = key.strip().encode()
        check_length(text, "the authkey that was given, which is no file's path,")
        return text
    return authkey(None if key is None else os.fspath(key))


def for_guests(key: bytes, run: bytes) -> bytes:
    """A key for the processes of another engine, and for one run only: it says nothing about
    ``key``, and means nothing to other runs.  The authkey is the message, as in
    ``taskrun.transport.proof``, and for the same reason."""
    import hmac  # few runs need it

    return hmac.digest(b"taskrun guests of run " + run, key, "sha256").hex().encode()


def made_file(file: str | None = None) -> str:
    """The path of the key file: the one that is meant, or that ``TASKRUN_AUTHKEY_FILE``
    names, or this user's own.  It is made if it is not there.  Raises UsageError."""
    path = file or os.environ.get("TASKRUN_AUTHKEY_FILE") or own_file()
    if os.path.lexists(path):
        _checked(_read(path), path)
    else:
        _made(path)
    return path


def take_from_environment() -> None:
    """See to it that no child inherits the key."""
    text = os.environ.pop(_VARIABLE, None)
    if text is not None:
        _taken[_VARIABLE] = os.fsencode(text).strip()


def own_file() -> str:
    """Where this user's key is."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(folder, "taskrun", "authkey")


def _check_home(path: str) -> None:
    """Raises UsageError where this user's own file would be in a home that is not there: what
    is made there then, nobody looks for."""
    home = os.path.expanduser("~")
    if not os.environ.get("XDG_CONFIG_HOME") and not os.path.isdir(home):
        raise UsageError(
            f"the authkey file {path} cannot be made: there is no home folder {home}; set HOME, "
            "or name another file with --authkey-file"
        )


def _read(path: str) -> bytes:
    """The key in a file; FileNotFoundError only for this user's own."""
    try:
        # Whoever opens a pipe waits for who writes to it.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _check_file(path, os.fstat(fd))
            data = os.read(fd, LONGEST + 1)
        finally:
            os.close(fd)
        if len(data) > LONGEST:
            raise UsageError(
                f"the authkey file {path} has more than {LONGEST} bytes: that is no key"
            )
        return data.removeprefix(codecs.BOM_UTF8).strip()  # some editors begin with one
    except FileNotFoundError:
        if os.path.islink(path):
            raise UsageError(
                f"the authkey file {path} is a link to {os.readlink(path)}, where no file is: put "
                "the key there, or remove the link"
            ) from None
        if path == own_file():
            raise
        raise UsageError(
            f"there is no authkey file {path}: copy it from the other machine, or make one by "
            f"taskrun key --authkey-file {path}"
        ) from None
    except OSError as error:
        raise UsageError(f"the authkey file {path} cannot be read: {error.strerror}") from None


def _check_file(path: str, status: os.stat_result) -> None:
    """Raises UsageError where others could read the key, or put another in its place."""
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"the authkey file {path} is no regular file")
    # A file that somebody else gave us may be for a group that we are in.
    own = status.st_uid == os.getuid()
    if status.st_mode & (stat.S_IRWXO | (stat.S_IRWXG if own else 0)):
        raise UsageError(f"the authkey file {path} can be read by others: chmod 600 {path}")
    for name in (path, os.path.realpath(path)):  # a link can be replaced, and where it leads
        _check_folder(os.path.dirname(name) or os.curdir)


def check_length(key: bytes, what: str) -> None:
    """Raises UsageError for a key that could be guessed."""
    if not key:
        raise UsageError(f"{what} is empty, and needs at least {SHORTEST} bytes")
    if len(key) < SHORTEST:
        raise UsageError(f"{what} has {len(key)} bytes, and needs at least {SHORTEST}")


def _checked(key: bytes, source: str) -> bytes:
    check_length(key, f"the authkey in {source}")
    return key


def _make_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        os.makedirs(os.path.dirname(os.path.abspath(folder)), exist_ok=True)
        os.makedirs(folder, mode=0o700, exist_ok=True)
    _check_folder(folder)


def _check_folder(folder: str) -> None:
    """Raises UsageError where others could put another file in the place of the key's."""
    status = os.stat(folder)
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise UsageError(
            f"the folder {folder} of the authkey file can be changed by others: chmod 700 {folder}"
        )


def _made(path: str) -> bytes:
    """A new key, in a file that is complete as soon as it is there."""
    key = os.urandom(32).hex().encode()
    begun = f"{path}.{os.getpid()}"
    if path == own_file():
        _check_home(path)
    try:
        _make_folder(os.path.dirname(path) or os.curdir)
        fd = os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(key + b"\n")
            os.link(begun, path)  # of all who do this at the same time, one succeeds
        except FileExistsError:
            pass
        finally:
            os.unlink(begun)
    except OSError as error:
        raise UsageError(
            f"the authkey file {path} cannot be made: {error.strerror}; name another one with "
            "--authkey-file"
        ) from None
    return _checked(_read(path), path)
