"""What the template and its workers are told when they start, and how they are started."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Final, NamedTuple

from taskrun.places import Place

FORK = "fork"  # as forkserver, from a template that is itself a fork of the user's process
FORKSERVER = "forkserver"
SPAWN = "spawn"

# -- between the coordinator and the template -----------------------------------------
#
# Framed as on a Pipe, each message one pickled tuple; the first to the template is
# (Settings,).

# To the template; the descriptors of START come with it.
START: Final = "start"  # (START, Birth)
SIGNAL: Final = "signal"  # (SIGNAL, worker, signal number, whole session)
QUIT: Final = "quit"  # (QUIT, seconds between TERM and KILL)
LEASE: Final = "lease"  # (LEASE, until)   end by yourself then, by the clock of lease_clock()

# To the coordinator:
UP: Final = "up"  # (UP, None | (message, traceback))   the task file was imported, or not
STARTED: Final = "started"  # (STARTED, worker, pid)
EXITED: Final = "exited"  # (EXITED, worker, exit status; negative: a signal)

FINISH_SECONDS: Final = 3.0  # for what per_worker() made, when the worker ends

SLOTS: Final = {"process": 1, "thread": 32, "async": 10_000, "green": 10_000}
"""How many calls a worker of each lane executes at a time."""

_THREADS_OF_LIBRARIES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class Settings(NamedTuple):
    """What is the same for all workers of a run.

    ``module`` and ``file``: the task file, None where there is none.  ``set_by_user``: task
    name -> the parameters that ``-p`` set.  ``coordinator``: its pid.  ``state``: the address
    of its shared state, and the key.  ``pool``: what the workers of a Pool are told.
    ``blobs``: where large data go (see ``taskrun.places``); the worker's own number is added.
    ``grace``: seconds that an interrupted call has to end, where it is one of many.
    """

    argv: list[str]
    path: list[str]
    cwd: str | None
    module: str | None
    file: str | None
    environment: dict[str, str]
    start_method: str
    set_by_user: dict[str, frozenset[str]]
    node: str
    coordinator: int
    state: tuple[Any, bytes] | None = None
    pool: Any = None
    blobs: Place = Place((), "")
    grace: float = 2.0

    @property
    def captured(self) -> bool:
        """Whether what workers write is taken, and does not go where their parent writes."""
        return self.pool is None or bool(self.pool.captured)


class Birth(NamedTuple):
    """What one worker is told.

    ``token`` marks the ends of calls in its output.  ``lane``: how it executes calls, up to
    ``slots`` of them at a time.  The descriptors come separately: call Pipe, control Pipe,
    stdout, stderr, ledger.
    """

    worker: int
    token: bytes
    lane: str = "process"
    slots: int = 1


class Preloaded(NamedTuple):
    """How importing the task file went: ``failure`` is None, or (message, traceback)."""

    failure: tuple[str, str] | None


def place_of(settings: Settings, worker: int) -> Place:
    """Where a worker puts large data."""
    folders, maker = settings.blobs
    return Place(folders, f"{maker}.w{worker}")


def apply(settings: Settings) -> None:
    """Take over the coordinator's arguments, module path, folder and environment."""
    os.environ.update(settings.environment)
    if settings.cwd is not None:
        try:
            os.chdir(settings.cwd)
        except OSError:
            pass  # the folder was deleted; the coordinator goes on in it as well
    if settings.file is not None and settings.module is not None:
        from taskrun.loading import keep_the_librarys

        keep_the_librarys(settings.file, settings.module)
    sys.path[:] = settings.path
    sys.argv[:] = settings.argv


def preload(settings: Settings) -> Preloaded:
    """Import the task file; a failure is kept, for the calls that need it."""
    if settings.pool is not None:
        from taskrun.pooling import remote

        remote.prepare(settings.pool, settings.file)
    if settings.file is None or settings.module is None:
        return Preloaded(None)
    from taskrun.errors import LoadError
    from taskrun.loading import import_file

    try:
        import_file(settings.file, settings.module)
    except LoadError as error:
        return Preloaded((str(error), error.traceback_text))
    except KeyboardInterrupt:
        return Preloaded((f"{settings.file} raised KeyboardInterrupt while it was imported", ""))
    if "taskrun.state" in sys.modules:
        import taskrun.state.remote  # noqa: F401 - once, and not in every worker
    return Preloaded(None)


def environment_additions(environ: dict[str, str]) -> dict[str, str]:
    """What workers get set that the user has not: one thread a call in numeric libraries."""
    return {name: "1" for name in _THREADS_OF_LIBRARIES if name not in environ}


def lease_clock() -> float:
    """Seconds on a clock that all processes of this machine share, and that goes on while the
    machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def python_command(code: str) -> list[str]:
    """This interpreter with its options, about to run ``code``.

    ``-c`` puts the working folder first on ``sys.path``; that is undone before anything is
    imported, so that no file there can stand in for a module of ours or of Python's.
    """
    flags = sys.flags
    options = ["-" + "O" * flags.optimize] if flags.optimize else []
    if flags.isolated:
        options.append("-I")
    else:
        options += ["-E"] * bool(flags.ignore_environment) + ["-s"] * bool(flags.no_user_site)
    options += ["-S"] * bool(flags.no_site) + ["-B"] * bool(flags.dont_write_bytecode)
    # In a folder that was deleted, Python 3.13.0 fails to import socket if it is on the path.
    options += ["-P"] * (not _is_somewhere())
    options += [f"-W{option}" for option in sys.warnoptions]
    for name, value in sys._xoptions.items():
        options.append(f"-X{name}" if value is True else f"-X{name}={value}")
    clean = "import sys; sys.path[:] = [p for p in sys.path if p]; "
    return [sys.executable, *options, "-c", clean + code]


def _is_somewhere() -> bool:
    """Whether the working directory is still there."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True
