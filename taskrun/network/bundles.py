"""The files that workers on another machine need: one archive, known by its content.

Of the folder in which the task file is: the modules beside it, the packages beside it with
all that is in them (of those without ``__init__.py`` the modules), and the data files that
``--bundle`` names.  The same files make the same archive, byte by byte; so a node that has had
it once needs it no more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Final, NamedTuple

from taskrun.errors import UsageError

MOST_BYTES: Final = 256 * 1024 * 1024
UNUSED: Final = 30 * 24 * 3600.0  # seconds that a node keeps a bundle that no run has
_WHEN: Final = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can say
_LEFT_OUT: Final = frozenset("__pycache__ node_modules build dist venv env site-packages".split())
_MODULES: Final = (".py", ".so")
_MOST_LOOKED_AT: Final = 10_000  # files, where modules are looked for
_SUFFIXES_LEFT_OUT: Final = (".pyc", ".pyo", ".egg-info", ".dist-info", "~")


class Bundle(NamedTuple):
    """An archive: ``digest`` is that of ``data``; ``file`` is the task file's place in it."""

    digest: str
    data: bytes
    file: str


def make_bundle(file: str, patterns: Sequence[str] = (), folder: str | None = None) -> Bundle:
    """The bundle of a task file; ``folder``: what is in that one travels, where it is not the
    file's own but one above it.  Raises UsageError where it becomes too large, where a
    pattern names nothing, and where a file cannot be read."""
    try:
        return _make(os.path.realpath(file), patterns, folder)
    except OSError as error:
        raise UsageError(
            f"{error.filename or file} cannot travel to other machines: {error.strerror or error}"
        ) from None
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{error.object!r} cannot travel to other machines: its name is not in UTF-8"
        ) from None


def _make(file: str, patterns: Sequence[str], folder: str | None) -> Bundle:
    import io
    import zipfile  # heavy, and only where nodes are expected

    folder = folder or os.path.dirname(file)
    own = os.path.relpath(file, folder)
    names = {own, *_code(folder), *_matching(folder, patterns)}
    _check_size(folder, names)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for name in sorted(names):
            path = os.path.join(folder, name)
            entry = zipfile.ZipInfo(name, _WHEN)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o700 if os.access(path, os.X_OK) else 0o600) << 16
            with open(path, "rb") as content:
                opened.writestr(entry, content.read())
    data = archive.getvalue()
    return Bundle(digest_of(data), data, own)


def digest_of(data: bytes | memoryview) -> str:
    """What an archive is known by."""
    return blake2b(data, digest_size=32).hexdigest()


def _code(folder: str) -> Iterator[str]:
    """The modules in ``folder``, and all files of the packages in it."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_left_out(entry.name, folder):
                continue
            # Not the entry's own methods: they raise for a link that leads to itself.
            if os.path.isfile(entry.path) and entry.name.endswith(_MODULES):
                yield entry.name
            elif os.path.isdir(entry.path):
                yield from _package(folder, entry.name)


def _package(folder: str, name: str) -> Iterator[str]:
    """The files of the package ``name``; none where that is a folder of something else."""
    try:
        inside = os.listdir(os.path.join(folder, name))
    except PermissionError:
        return  # no task can import it either
    if "__init__.py" in inside:
        yield from _files(folder, name)
    elif name.isidentifier() and _holds_modules(os.path.join(folder, name)):
        # A package all the same, but one among whose modules anything else may lie, too.
        yield from (each for each in _files(folder, name) if each.endswith(_MODULES))


def _holds_modules(path: str) -> bool:
    """Whether there are modules in a folder, or in those below it that can be packages; one with
    very many other files is taken for data."""
    left = _MOST_LOOKED_AT
    for above, folders, files in os.walk(path, followlinks=True):
        if any(name.endswith(_MODULES) for name in files):
            return True
        left -= len(files)
        if left < 0:
            break
        folders[:] = [name for name in _inner(above, folders) if name.isidentifier()]
    return False


def _files(folder: str, below: str) -> Iterator[str]:
    """All files below ``folder/below``, as names below ``folder``; those of folders that are
    links, too."""
    for path, folders, files in os.walk(os.path.join(folder, below), followlinks=True):
        folders[:] = _inner(path, folders)
        for name in files:
            full = os.path.join(path, name)
            if not _is_left_out(name) and os.path.isfile(full):
                yield os.path.relpath(full, folder)


def _inner(path: str, folders: Iterable[str]) -> Iterator[str]:
    """Those of the ``folders`` in ``path`` that are gone into."""
    for name in folders:
        if not _is_left_out(name, path) and not _leads_back(os.path.join(path, name)):
            yield name


def _leads_back(path: str) -> bool:
    """Whether a folder is a link to one of those on the way to it: there would be no end."""
    return os.path.islink(path) and any(os.path.samefile(path, above) for above in _way_to(path))


def _way_to(path: str) -> Iterator[str]:
    """The folders that a path goes through, from the last to the root."""
    path, above = os.path.abspath(path), os.path.dirname(os.path.abspath(path))
    while above != path:
        yield above
        path, above = above, os.path.dirname(above)


def _is_left_out(name: str, folder: str = "") -> bool:
    """Caches, what version control keeps, and virtual environments."""
    if name.startswith(".") or name in _LEFT_OUT or name.endswith(_SUFFIXES_LEFT_OUT):
        return True
    return bool(folder) and os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))


def _matching(folder: str, patterns: Sequence[str]) -> Iterator[str]:
    """The files that ``patterns`` name; of a folder that is named, all."""
    if not patterns:
        return
    from glob import glob

    for pattern in patterns:
        if os.path.isabs(pattern) or ".." in pattern.split("/"):
            raise UsageError(f"--bundle {pattern}: only what is beside the task file can travel")
        found = glob(pattern, root_dir=folder, recursive=True)
        if not found:
            raise UsageError(f"--bundle {pattern}: there is no such file in {folder}")
        for name in found:
            path = os.path.join(folder, name)
            if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
                raise UsageError(f"--bundle {pattern}: {path} is neither a file nor a folder")
            yield from _files(folder, name) if os.path.isdir(path) else (name,)


def naming(file: str, patterns: Iterable[str]) -> Iterator[str]:
    """The patterns that name any file: in a copy of what they name, the others name nothing."""
    folder = os.path.dirname(os.path.realpath(file))
    return (pattern for pattern in patterns if any(_matching(folder, [pattern])))


def _check_size(folder: str, names: Iterable[str]) -> None:
    sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in names}
    if sum(sizes.values()) > MOST_BYTES:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        listed = ", ".join(f"{name} ({sizes[name] / 1e6:.0f} MB)" for name in largest)
        raise UsageError(
            f"the files that other machines need have {sum(sizes.values()) / 1e6:.0f} MB, and at "
            f"most {MOST_BYTES / 1e6:.0f} MB can travel; the largest are {listed}"
        )


# -- at a node ------------------------------------------------------------------------


class Cache:
    """The bundles that this user's nodes have had, one file each.  When a file was written
    last says when it was used last; those that nobody has used for long are removed."""

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder or os.path.join(cache_folder(), "bundles")

    def find(self, digest: str) -> str | None:
        """The path of a bundle, if it is here, and whole."""
        path = self._path(digest)
        try:
            with open(path, "rb") as file:
                if digest_of(file.read()) != digest:
                    return None
        except FileNotFoundError:
            return None  # it is fetched
        with suppress(OSError):  # in a folder that can only be read nothing is removed, either
            os.utime(path)
        return path

    def keep(self, digest: str, data: bytes | memoryview) -> str:
        """Keep a bundle; gives its path.  Raises ValueError where it is another one, OSError
        where there is no room."""
        if digest_of(data) != digest:
            raise ValueError("the bundle that came is not the one that was announced")
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        path = self._path(digest)
        begun = f"{path}.{os.getpid()}"
        try:
            with open(begun, "wb", opener=_private) as file:
                file.write(data)
            os.replace(begun, path)
        except OSError:
            if os.path.exists(begun):
                os.unlink(begun)
            raise
        self._remove_unused()
        return path

    def _remove_unused(self) -> None:
        """Those of long ago, and what somebody who was killed had begun to write then."""
        since = time.time() - UNUSED
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):  # another node was faster
                    if entry.stat().st_mtime < since:
                        os.unlink(entry.path)

    def _path(self, digest: str) -> str:
        if not digest.isalnum():
            raise ValueError("that is no digest")
        return os.path.join(self.folder, f"{digest}.zip")


def unpack(path: str, folder: str) -> None:
    """Put the files of a bundle into ``folder``.  Raises OSError where there is no room,
    ValueError where it is no bundle."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                made = archive.extract(entry, folder)
                os.chmod(made, entry.external_attr >> 16 & 0o777)
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever a broken archive is to those who read it
        raise ValueError(f"that is no bundle: {error}") from None


def holds(folder: str, path: str) -> bool:
    """Whether the files of a bundle are in ``folder``, and the same."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            try:
                with open(os.path.join(folder, name), "rb") as file:
                    if file.read() != archive.read(name):
                        return False
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                return False
    return True


def cache_folder() -> str:
    """Where this user's caches of taskrun are."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "taskrun")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
