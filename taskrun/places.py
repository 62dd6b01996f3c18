"""Where a process puts files of shared memory, and who removes them.

Each coordinator has a folder, named so that others can tell whether it lives:

    /dev/shm/taskrun-1000-data/4711-85213-4026531836/e1.w2-17
             user              pid, start, namespace  maker and number

and a second one on disk, for when the memory is full.  Its workers write there as well.
What a process leaves behind is removed when it exits or, where it is killed, by its template
or by the next that begins.
"""

from __future__ import annotations

import atexit
import itertools
import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

_KEPT_FREE: Final = 1 / 16  # of the shared memory
_SHORT: Final = 80  # bytes of a folder's path; there are 107 for that of a socket in it


class Place(NamedTuple):
    """Where a process puts its blobs: folders, the best first (none: large data stay in their
    pickles), and how the files' names begin."""

    folders: tuple[str, ...]
    maker: str


# -- where ----------------------------------------------------------------------------

_settled: Place | None = None
_own: tuple[int, Place] | None = None
_notice: Callable[[str], object] | None = None
_complained = False


def begin(notice: Callable[[str], object] | None = None) -> Place:
    """In a coordinator: remove what dead ones left, and give the place of this process.

    ``notice`` is called, once, with what keeps large data out of the shared memory; without
    it there is a warning.
    """
    global _notice
    _notice = notice
    found = own()
    sweep_around(found)
    return found


def end(notice: Callable[[str], object] | None) -> None:
    """What :func:`begin` was given is not there any more."""
    global _notice
    if _notice is notice:
        _notice = None


def own() -> Place:
    """The place whose blobs this process owns."""
    global _own
    pid = os.getpid()
    if _own is None or _own[0] != pid:
        _own = pid, Place(tuple(map(_own_folder, _roots())), "c")
    return _own[1]


def is_own_place(place: Place) -> bool:
    """Whether it is :func:`own`'s, which then has been asked for it; opens no file."""
    return _own == (os.getpid(), place)


def _own_folder(root: str) -> str:
    pid = os.getpid()
    return f"{root}/taskrun-{os.getuid()}-data/{pid}-{_start_of(pid)}-{_namespace()}"


def is_settled() -> bool:
    """Whether this is a worker."""
    return _settled is not None


def settle(settled: Place) -> None:
    """In a worker: put blobs there, if the coordinator is a process of this machine."""
    global _settled
    _settled = Place(tuple(filter(_is_live, settled.folders)), settled.maker)


def current() -> Place:
    """Where this process puts the blobs of what it sends to its coordinator, or as one."""
    return _thread.place or _settled or own()


class _Thread(threading.local):
    place: Place | None = None


_thread = _Thread()


@contextmanager
def nowhere() -> Iterator[None]:
    """While it lasts, what this thread pickles has its large data in it."""
    before, _thread.place = _thread.place, Place((), "")
    try:
        yield
    finally:
        _thread.place = before


def _roots() -> tuple[str, ...]:
    memory = os.environ.get("TASKRUN_SHM") or "/dev/shm"
    disk = (os.environ.get("TMPDIR") or "/tmp").rstrip("/")
    return (memory.rstrip("/"), disk) if os.path.isdir(memory) else (disk,)


def is_own(path: str) -> bool:
    here = _own is not None and _own[0] == os.getpid()
    return here and os.path.dirname(path) in own().folders


def complain(trouble: str) -> None:
    global _complained
    if _complained:
        return
    _complained = True
    said = f"{trouble}: it takes a slower way; TASKRUN_SHM names another folder in memory"
    if _notice is not None:
        _notice(said)
        return
    try:
        warnings.warn(said, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # an error, where the user wants that; but the data do travel
        print(f"taskrun: {said}", file=sys.stderr)


# -- files ---------------------------------------------------------------------------

_numbers = itertools.count(1)


def write(folder: str, maker: str, view: memoryview) -> str:
    """Write a new file, and give its path.

    Raises OSError where there is no room, or no folder that is this user's alone."""
    fd, path = _created(folder, maker)
    try:
        # Pages, not bytes: what is written past the end of a memory file system is noticed.
        room = os.fstatvfs(fd)
        if (room.f_bavail - room.f_blocks * _KEPT_FREE) * room.f_frsize < len(view):
            raise OSError(28, "no room is left")
        done = 0
        while done < len(view):
            done += os.write(fd, view[done:])
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
    return path


def reserve(maker: str) -> str:
    """A new, empty file of this process; what begins with its path and a dash is removed with it.

    Raises OSError where there is no folder that is this user's alone."""
    return _reserved_in(own().folders, maker)


def reserve_for_socket(maker: str) -> str:
    """As :func:`reserve`, at a path that a socket may have, wherever TMPDIR is."""
    folders = (*own().folders, _own_folder("/tmp"))
    return _reserved_in(tuple(each for each in folders if len(os.fsencode(each)) < _SHORT), maker)


def _reserved_in(folders: tuple[str, ...], maker: str) -> str:
    sweep_around(Place(folders, maker))
    *others, last = folders
    for folder in others:
        try:
            return _reserved(folder, maker)
        except OSError:
            pass  # the next one
    return _reserved(last, maker)


def _reserved(folder: str, maker: str) -> str:
    fd, path = _created(folder, maker)
    os.close(fd)
    return path


def release(path: str) -> None:
    """Remove what :func:`reserve` gave, what begins with it, and the folder if that is all."""
    folder, name = os.path.split(path)
    remove_made(Place((folder,), name), but=())
    _unlink(path)
    try:
        os.rmdir(folder)
        os.rmdir(os.path.dirname(folder))
    except OSError:
        pass  # there is more in it


def _created(folder: str, maker: str) -> tuple[int, str]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(10_000):
        path = f"{folder}/{maker}-{next(_numbers)}"
        try:
            return os.open(path, flags, 0o600), path
        except FileNotFoundError:
            _make_folder(folder)
        except FileExistsError:
            pass  # made by a process that this one was forked from
    raise FileExistsError(17, "no name is free", folder)


def _make_folder(folder: str) -> None:
    """The folder, and the user's that it is in.  Raises PermissionError where that is not
    this user's alone."""
    above = os.path.dirname(folder)
    for made in (above, folder):
        try:
            os.mkdir(made, 0o700)
        except FileExistsError:
            pass
    found = os.lstat(above)
    private = stat.S_ISDIR(found.st_mode) and not stat.S_IMODE(found.st_mode) & 0o077
    if not private or found.st_uid != os.getuid():
        raise PermissionError(13, f"{above} is not private")


# -- what is left behind --------------------------------------------------------------


def remove_made(left: Place, but: Collection[str]) -> None:
    """Remove what was made there, but not these paths."""
    for folder in left.folders:
        for name in _names(folder):
            path = f"{folder}/{name}"
            if name.startswith(f"{left.maker}-") and path not in but:
                _unlink(path)


def sweep_around(place: Place) -> None:
    """Remove the folders beside this place whose processes have ended."""
    for folder in place.folders:
        _sweep(os.path.dirname(folder))


def _sweep(base: str) -> None:
    for name in _names(base):
        pid, _, namespace = _parts(name)
        if pid.isdigit() and namespace == _namespace() and not _is_live(name):
            _remove_folder(f"{base}/{name}")


def _is_live(folder: str) -> bool:
    """Whether the process whose folder this is can be seen from here."""
    pid, start, namespace = _parts(os.path.basename(folder))
    return namespace == _namespace() and _start_of(int(pid)) == start


def _parts(name: str) -> tuple[str, str, str]:
    pid, _, rest = name.partition("-")
    start, _, namespace = rest.partition("-")
    return pid, start, namespace


@atexit.register
def leave() -> None:
    """Remove the folders of this process, which is about to end."""
    if _own is not None and _own[0] == os.getpid():
        for folder in _own[1].folders:
            _remove_folder(folder)


def _remove_folder(folder: str) -> None:
    try:
        for name in os.listdir(folder):
            _unlink(f"{folder}/{name}")
        os.rmdir(folder)
        os.rmdir(os.path.dirname(folder))
    except OSError:
        pass  # it is gone, or another process has just made something there


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []  # nothing of ours


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass  # another process tidied up


def _start_of(pid: int) -> str:
    """When a process started, as the kernel counts; "" where it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "" if sys.platform == "linux" else _is_there(pid)
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def _is_there(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # another user's
    return "0"


def _namespace() -> str:
    """Which processes a pid is one of: containers may share a folder and not their pids."""
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return "0"
