"""What travels to the processes of an engine on other machines: the modules and packages beside
the task file, and the files that ``--bundle`` names.

They come as one archive, known by its content (see ``network.bundles``), once to each machine.
It is unpacked there once as well, into a folder that all runs with these files use.
"""

from __future__ import annotations

import os
import sys

from taskrun.errors import RunError
from taskrun.network.bundles import Cache, cache_folder, holds, unpack

_known: set[str] = set()
_first: tuple[str, str] | None = None
"""The archive whose files are found first, and their folder."""


def has(digest: str) -> bool:
    """Whether the archive is on this machine."""
    if digest not in _known and Cache().find(digest) is not None:
        _known.add(digest)
    return digest in _known


def keep(digest: str, data: bytes) -> None:
    """It has come.  Raises RunError where there is no place for it."""
    try:
        Cache().keep(digest, data)
    except OSError as error:
        raise _no_place(error) from error


def lay_out(digest: str, beside: str) -> str:
    """Have the files found first; gives their folder: ``beside``, where they are the same, else
    one of their own.  Raises RunError."""
    archive = Cache().find(digest)
    if archive is None:
        _known.discard(digest)
        raise RunError(f"the files of the run are not in {Cache().folder} any more: run it again")
    try:
        folder = beside if holds(beside, archive) else _unpacked(archive, digest)
    except OSError as error:
        raise _no_place(error) from error
    _put_first(digest, folder)
    return folder


def _unpacked(archive: str, digest: str) -> str:
    from shutil import rmtree
    from tempfile import mkdtemp

    above = os.path.join(cache_folder(), "files")
    folder = os.path.join(above, digest)
    if os.path.isdir(folder):
        return folder
    os.makedirs(above, mode=0o700, exist_ok=True)
    begun = mkdtemp(dir=above)
    try:
        unpack(archive, begun)
        os.rename(begun, folder)
    except OSError:
        rmtree(begun, ignore_errors=True)
        if not os.path.isdir(folder):  # no other process was faster
            raise
    return folder


def _put_first(digest: str, folder: str) -> None:
    """An engine's process may outlive runs: what it imported for one with other files goes."""
    global _first
    if _first == (digest, folder):
        return
    if _first is not None:
        _forget(_first[1])
    _first = digest, folder
    sys.path.insert(0, folder)


def _forget(folder: str) -> None:
    if folder in sys.path:
        sys.path.remove(folder)
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path is not None and path.startswith(f"{folder}{os.sep}") and name != "__main__":
            del sys.modules[name]


def _no_place(error: OSError) -> RunError:
    return RunError(
        f"{os.uname().nodename} has no place for the files of the run: {error}; "
        "XDG_CACHE_HOME names another folder"
    )
