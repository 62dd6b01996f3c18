"""Processes by session: every worker leads one, and all that its calls start is in it.

On Linux the members are read from /proc.  Elsewhere only the worker's own process group
is known, which is what most programs started by a task stay in.

A resource tracker (of multiprocessing, or of loky) is spared: when all who use it have ended,
it removes the semaphores, shared memory and folders that they have left, and ends.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final, NamedTuple

LINUX: Final = sys.platform == "linux"
CLEANING: Final = 2.0  # seconds that resource trackers have when all else has ended
_PATIENCE: Final = 5.0  # seconds after which what cannot even be killed is left alone
_TRACKER: Final = re.compile(
    rb"\0from ([\w.]+\.)?(multiprocessing|loky\.backend)\.resource_tracker import main"
)  # its command line
_THREADS: Final = 17  # the word of /proc/PID/stat, behind the name, that says how many there are
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


_adopting: int | None = None  # this process, if it has called adopt_orphans()


class Process(NamedTuple):
    """A living process."""

    pid: int
    parent: int
    session: int


def processes() -> Iterator[Process]:
    """All living processes; on Linux only, elsewhere none."""
    if not LINUX:
        return
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                line = file.read()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile, or is hidden from us
        process = _living(int(name), line)
        if process is not None:
            yield process


def _living(pid: int, line: bytes) -> Process | None:
    # The name, in brackets, may contain anything, brackets too.
    words = line[line.rindex(b")") + 2 :].split(None, _THREADS + 1)
    state, parent, _, session = words[:4]
    # Its main thread may have ended and the others not yet: then what it has started is its own.
    if state == b"X" or (state == b"Z" and int(words[_THREADS]) < 2):
        return None
    return Process(pid, int(parent), int(session))


def has_ended(pid: int) -> bool:
    """Whether a process is known to have ended, though perhaps not to its parent (Linux)."""
    if not LINUX:
        return False
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return _living(pid, file.read()) is None
    except (FileNotFoundError, ProcessLookupError):
        return True
    except PermissionError:
        return False


def members(session: int) -> list[int]:
    """The processes of a session, its leader included."""
    return [process.pid for process in processes() if process.session == session]


def is_tracker(pid: int) -> bool:
    """Whether a process is a resource tracker (Linux)."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return _TRACKER.search(file.read(4096)) is not None
    except OSError:
        return False  # it has ended, or this system does not tell


def others() -> list[int]:
    """The session of this process, which leads it, without itself and resource trackers."""
    own = os.getpid()
    return [pid for pid in members(own) if pid != own and not is_tracker(pid)]


def kill_others() -> None:
    """Kill the session of this process, but for itself; what was forked meanwhile, too."""
    until = time.monotonic() + _PATIENCE
    while send(others(), signal.SIGKILL) and time.monotonic() < until:
        pass  # to look takes its time


def send(pids: Iterable[int], number: int) -> int:
    """Signal each process; gives how many there were to be signalled."""
    reached = 0
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue  # it has ended, or it is another user's now
        reached += 1
    return reached


def signal_session(session: int, number: int) -> None:
    """Signal all processes of a session but resource trackers; with SIGKILL also those forked
    meanwhile."""
    if not LINUX:
        try:
            os.killpg(session, number)
        except (ProcessLookupError, PermissionError):
            pass  # nothing of it is left
        return
    seen: set[int] = set()
    while found := set(members(session)) - seen:
        send((pid for pid in found if not is_tracker(pid)), number)
        seen |= found
        if number != signal.SIGKILL:
            return


def die_with_parent(parent: int) -> None:
    """Have this process killed when ``parent``, its parent, ends (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before we asked


def adopt_orphans() -> None:
    """Become the parent of all descendants that lose theirs (Linux)."""
    global _adopting
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _adopting = os.getpid()


def below(but: Callable[[Process], bool] = lambda child: False) -> list[int]:
    """The processes below this one (Linux): its children, ``but`` for some, theirs, and the
    sessions of its children."""
    own = os.getpid()
    found = list(processes())
    children = {process.pid for process in found if process.parent == own and not but(process)}
    return [
        process.pid
        for process in found
        if process.pid in children or process.session in children or process.parent in children
    ]


def end_adopted(templates: Collection[int]) -> None:
    """Kill what this process has adopted, if it is one that does: its children in other
    sessions, with all below them, but for the ``templates`` that live.

    What was below a template is in another session.  So is what the user's own code has started
    here in one (``start_new_session=True``); nobody can tell that from the rest, and it goes too.
    """
    if _adopting != os.getpid():
        return
    session = os.getsid(0)

    def is_own(child: Process) -> bool:
        return child.session == session or child.pid in templates

    began = time.monotonic()
    # What dies leaves its children to us: again, until none is left.
    while (left := below(is_own)) and (passed := time.monotonic() - began) < _PATIENCE:
        send((pid for pid in left if passed > CLEANING or not is_tracker(pid)), signal.SIGKILL)
        time.sleep(0.005)


def _prctl(option: int, value: int) -> None:
    if LINUX:
        import ctypes  # slow to import; the coordinator does it while the template starts

        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
