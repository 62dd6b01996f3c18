"""Addresses: how they are written, and the Unix sockets of this user's runs."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Any, Final, NamedTuple

from taskrun.errors import UsageError


class Tls(NamedTuple):
    """A host and a port where TLS is spoken."""

    host: str
    port: int


Address = Any
"""The path of a Unix socket, (host, port) without TLS, or Tls."""

_LONGEST_PATH: Final = 100  # bytes, of those that we make
_MOST_OF_PATH: Final = 107  # bytes that a Unix socket's path has room for
_MOST_OF_PORT: Final = 5  # digits
SERVED: Final = "serve-"
"""How the names of the sockets of a server's runs begin; its pid comes next."""
_PREFIX: Final = "run-"
_PRIVATE: Final = "private"
_SUFFIX: Final = ".sock"
_LOOPBACK_NAMES: Final = ("localhost", "::1")


# -- how they are written -------------------------------------------------------------


def parse(text: str, *, insecure_plain: bool = False, to_listen: bool = False) -> Address:
    """``HOST:PORT``, ``tls://HOST:PORT`` or ``unix:PATH``.

    A bare HOST:PORT is plain exactly where HOST, as written, is this machine itself, and
    TLS everywhere else; with ``insecure_plain`` it is plain everywhere.  Port 0 is any that
    is free, and only ``to_listen``.  Raises UsageError for what is no address.
    """
    if text.startswith(("unix:", "/")):
        path = text.removeprefix("unix:")
        _check_path(path, _LONGEST_PATH if to_listen else _MOST_OF_PATH)
        return path
    found = host_and_port(text.removeprefix("tls://").removeprefix("tcp://"))
    if found is None:
        raise UsageError(f"an address is HOST:PORT, tls://HOST:PORT or unix:PATH, not {text!r}")
    if found[1] == 0 and not to_listen:
        raise UsageError(f"{text}: nobody can be reached at port 0; say the one that the other "
                         "side is listening on")  # fmt: skip
    if text.startswith("tls://"):
        return Tls(*found)
    return found if insecure_plain else secured(found)


def may_be_address(text: str) -> bool:
    """Whether an address may be meant, though it is perhaps a wrong one, and not a name."""
    return ":" in text or "/" in text


def host_and_port(text: str) -> tuple[str, int] | None:
    """The parts of ``HOST:PORT``, or None where it is not that."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and port.isdecimal() and len(port) <= _MOST_OF_PORT and int(port) < 65536):
        return None
    return (host, int(port)) if _is_host(host) else None


def _is_host(text: str) -> bool:
    """Whether a host may be called so: no other scheme's address is, nor is ``a..b``."""
    if not text or " " in text or "/" in text or not text.isprintable():
        return False
    try:
        text.encode("idna")  # as whoever looks it up does: no part is empty, or too long
    except UnicodeError:
        return False
    return True


def _check_path(path: str, longest: int) -> None:
    if not path:
        raise UsageError("unix: is an address only with the PATH of a socket behind it")
    if len(os.fsencode(path)) > longest:
        raise UsageError(f"unix:{path}: a socket's path has at most {longest} bytes")


def secured(address: Address) -> Address:
    """An address by which nothing leaves this machine in plain."""
    if isinstance(address, Tls) or not isinstance(address, tuple) or is_loopback(address[0]):
        return address
    return Tls(*address[:2])


def is_exposed(address: Address) -> bool:
    """Whether what is said at an address crosses the network in plain."""
    return secured(address) is not address


def from_afar(address: Address | None) -> Address | None:
    """What others have to dial to reach a listening ``address``; None: only this machine can."""
    if not isinstance(address, tuple) or is_loopback(address[0]):
        return None
    host, port = address[:2]
    host = socket.getfqdn() if host in ("0.0.0.0", "::") else host
    return Tls(host, port) if isinstance(address, Tls) else (host, port)


def is_loopback(host: str) -> bool:
    """Whether a host, as written, is this machine itself."""
    parts = host.split(".")
    return host in _LOOPBACK_NAMES or (
        len(parts) == 4
        and parts[0] == "127"
        and all(part.isdecimal() and int(part) < 256 for part in parts)
    )


def shown(address: Address) -> str:
    """An address, as it is written."""
    if isinstance(address, tuple):
        host, port = address[:2]
        form = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return f"tls://{form}" if isinstance(address, Tls) else form
    return f"unix:{address}"


def is_served(path: str) -> bool:
    """Whether a Unix socket is of a run of a server: others reach that by the server."""
    return os.path.basename(path).startswith(SERVED)


def prepare_unix(path: str) -> None:
    """See to it that a Unix socket can be made at ``path``, in a folder that is this user's
    alone; one that nobody listens on any more is removed.  Raises UsageError."""
    _check_path(path, _LONGEST_PATH)
    try:
        make_private(os.path.dirname(path) or os.curdir)
    except UsageError as error:
        raise UsageError(
            f"unix:{path} is not in a folder that only you can look into, such as one that "
            f"taskrun makes for it ({error})"
        ) from None
    if not os.path.exists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UsageError(f"unix:{path} is there already, and is no socket")
    if _is_live(path):
        raise UsageError(f"unix:{path}: somebody listens there already")
    _remove(path)


# -- this user's runs -----------------------------------------------------------------


def runtime_folder() -> str:
    """Where the sockets of this user's runs are."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given and len(given) < _LONGEST_PATH - 30 and os.path.isdir(given):
        return os.path.join(given, "taskrun")
    base = os.environ.get("TMPDIR") or "/tmp"
    base = base if len(base) < _LONGEST_PATH - 40 else "/tmp"
    return os.path.join(base, f"taskrun-{os.getuid()}")


def make_private(folder: str) -> None:
    """Make a folder that is this user's alone.  Raises UsageError where it is not."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made: {error.strerror}") from None
    check_private(folder)


def check_private(folder: str) -> None:
    """Raises UsageError where somebody else could put sockets into ``folder``."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{folder} is not a folder: remove it")
    if status.st_uid != os.getuid():
        raise UsageError(f"the folder {folder} belongs to another user")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise UsageError(f"the folder {folder} is open to others: its mode has to be 700")


def listen_for_run() -> socket.socket:
    """A listening Unix socket for a run of this process.  Raises UsageError."""
    folder = runtime_folder()
    make_private(folder)
    _remove_dead(folder)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _bind(made, folder)
        made.listen(4096)
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise UsageError(f"no socket can be made in {folder}: {error.strerror}") from None
    return made


def listen_at(path: str) -> socket.socket:
    """A listening Unix socket at ``path``.  Raises UsageError."""
    prepare_unix(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(path)
        os.chmod(path, 0o600)
        made.listen(4096)
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise UsageError(f"cannot listen on unix:{path}: {error.strerror}") from None
    return made


def _bind(made: socket.socket, folder: str) -> None:
    number = 0
    while True:  # a process may have several runs, one after the other or at a time
        name = f"{_PREFIX}{os.getpid()}{f'-{number}' if number else ''}{_SUFFIX}"
        path = os.path.join(folder, name)
        try:
            made.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            number += 1
        else:
            os.chmod(path, 0o600)
            return


def live_runs() -> list[str]:
    """The socket paths of this user's runs that live; those of dead ones are removed."""
    folder = runtime_folder()
    try:
        check_private(folder)
        _remove_dead(folder)
        return [path for path in _sockets(folder) if _is_live(path)]
    except FileNotFoundError:
        return []


def remove_of(pid: int) -> None:
    """Remove the sockets of a process that has ended.  Raises OSError where there is no folder
    for them."""
    for path in _sockets(runtime_folder()):
        if _pid_in(path) == str(pid) and not _is_live(path):
            _remove(path)


def _remove_dead(folder: str) -> None:
    for path in _sockets(folder, (_PREFIX, SERVED)):
        # One whose process is there may be about to listen.
        if not _has_process(path) and not _is_live(path):
            _remove(path)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass  # there was none, or another run tidied up


def _sockets(folder: str, prefixes: str | tuple[str, ...] = _PREFIX) -> list[str]:
    return [
        os.path.join(folder, name)
        for name in sorted(os.listdir(folder))
        if name.startswith(prefixes) and name.endswith(_SUFFIX)
    ]


def _pid_in(path: str) -> str:
    return os.path.basename(path).removesuffix(_SUFFIX).split("-")[1]


def _has_process(path: str) -> bool:
    """Whether there is a process with the pid in the name; a quick look, not the truth."""
    try:
        os.kill(int(_pid_in(path)), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _is_live(path: str) -> bool:
    """Whether somebody listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # it is there, and busy
        return True


def find(text: str | None = None, *, insecure_plain: bool = False) -> Address:
    """The address that is meant: what is written, else ``TASKRUN_ADDRESS``, else this user's
    only live run.  ``insecure_plain`` is that of :func:`parse`.  Raises UsageError."""
    text = text or os.environ.get("TASKRUN_ADDRESS")
    if text:
        return parse(text, insecure_plain=insecure_plain)
    runs = live_runs()
    if len(runs) == 1:
        return runs[0]
    if not runs:
        raise UsageError("no run of yours is alive on this machine: say the ADDRESS of one")
    listed = "".join(f"\n  {shown(path)}" for path in runs)
    raise UsageError(f"several runs of yours are alive: say the ADDRESS of one of{listed}")


# -- where that folder cannot be used -------------------------------------------------


def listen_privately() -> socket.socket:
    """A listening Unix socket that nobody looks for; where this process is killed, the next
    one removes it.  Raises OSError."""
    from taskrun import places

    path = places.reserve_for_socket(_PRIVATE)
    os.unlink(path)  # the name is what was wanted
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(path)
        os.chmod(path, 0o600)
        made.listen(4096)
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made


def forget_private(path: str | None) -> None:
    """Remove the socket of :func:`listen_privately`, if ``path`` is one's."""
    if path is not None and os.path.basename(path).startswith(f"{_PRIVATE}-"):
        from taskrun import places

        places.release(path)
