"""Run a command and measure all that it costs: the whole tree of its processes.

The benchmark process makes itself the reaper of orphans, so that whatever a command
leaves behind (template processes, servers of ``multiprocessing``, workers that outlive
their parent) is waited for here, and its CPU time counted, before a run is over.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import psutil

JOBS = Path(__file__).resolve().parent / "jobs"
PYTHON = sys.executable
TASKRUN = str(Path(PYTHON).parent / "taskrun")
DEADLINE = 120.0
LINGER = 20.0
"""Seconds that a command's other processes may live on after it."""

QUIET = 0.15
"""Cores that others may use in a machine that counts as quiet."""

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


class BenchmarkError(Exception):
    """A command failed, hung, left processes behind, or gave a wrong answer."""


class Unavailable(Exception):
    """What a benchmark compares with is not on this machine."""


@dataclass(frozen=True)
class Sample:
    """What one run of a command took: wall time until it ended, CPU time of its whole tree."""

    seconds: float
    cpu: float
    out: str


@dataclass(frozen=True)
class Benchmark:
    """``ours() / peer()`` must be at least, or at most, ``target``; medians of ``rounds``."""

    name: str
    what: str
    unit: str
    ours: Callable[[], float]
    peer_name: str
    peer: Callable[[], float]
    target: float
    at_least: bool = False
    rounds: int = 5

    def reached(self, ratio: float) -> bool:
        return ratio >= self.target if self.at_least else ratio <= self.target


def adopt_orphans() -> None:
    """Become the parent of every orphan below this process; Linux only."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run(command: list[str], **variables: object) -> Sample:
    """Run ``command`` with environment ``variables`` to the end of its last process.

    Raises BenchmarkError if it fails or is not over within DEADLINE seconds.
    """
    environ = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        pid = _start(command, environ, out, err)
        try:
            status = _wait(pid)
            seconds = time.perf_counter() - started
            _wait_for_the_others()
        except BaseException:
            _end_all()
            raise
        if status:
            raise BenchmarkError(f"{command} ended with {status}\n{_text(out)}{_text(err)}")
        return Sample(seconds, _cpu_since(before), _text(out))


def _start(command: list[str], environ: Mapping[str, str], out: IO[bytes], err: IO[bytes]) -> int:
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, out.fileno(), 1),
        (os.POSIX_SPAWN_DUP2, err.fileno(), 2),
    ]
    return os.posix_spawn(command[0], command, environ, file_actions=actions)


def _wait(pid: int) -> int:
    """The exit code of ``pid``; blocks without polling, which would blur the time."""
    fd = os.pidfd_open(pid)
    try:
        if not select.select([fd], [], [], DEADLINE)[0]:
            raise BenchmarkError(f"not over after {DEADLINE:g} s")
    finally:
        os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _wait_for_the_others() -> None:
    until = time.monotonic() + LINGER
    while _reap():
        if time.monotonic() > until:
            raise BenchmarkError(f"left processes behind: {psutil.Process().children(True)}")
        time.sleep(0.002)


def _reap() -> bool:
    """Take the status of what has ended; False when there are no children any more."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _end_all() -> None:
    """Kill all that was started below this process, and nothing else."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                pass
        _reap()
        time.sleep(0.01)


def _cpu_since(before: resource.struct_rusage) -> float:
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


# -- the two sides of a benchmark -----------------------------------------------------


def taskrun(job: str, *options: str, **variables: object) -> Sample:
    """``taskrun exec`` of ``jobs/JOB.py`` with two workers, everything else as it comes."""
    command = [TASKRUN, "exec", str(JOBS / f"{job}.py"), "-j", "2", *options]
    return run(command, **variables)


def script(job: str, **variables: object) -> Sample:
    """A peer: the Python script ``jobs/JOB.py``."""
    return run([PYTHON, str(JOBS / f"{job}.py")], **variables)


def expect(sample: Sample, answer: object) -> Sample:
    """``sample``, if the answer is the last word that the command has printed."""
    words = sample.out.split()
    if not words or words[-1] != str(answer):
        raise BenchmarkError(f"the answer is not {answer}: {sample.out[-500:]!r}")
    return sample


# -- the machine ----------------------------------------------------------------------


class OthersLoad:
    """How many cores the rest of the machine has used since this was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._busy = _busy()
        self._own = _own()

    def cores(self) -> float:
        others = _busy() - self._busy - (_own() - self._own)
        return max(0.0, others / (time.perf_counter() - self._started))


def wait_until_quiet(patience: float) -> None:
    """Wait, at most ``patience`` seconds, until nothing else is busy on this machine."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        load = OthersLoad()
        time.sleep(0.5)
        if load.cores() < QUIET:
            return


def _busy() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def _own() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def python_version() -> str:
    return f"{sys.implementation.name} {'.'.join(map(str, sys.version_info[:3]))}"


@cache
def ninja_program() -> str:
    """The ninja of the package of that name."""
    done = subprocess.run(
        [PYTHON, "-c", "import ninja; print(ninja.BIN_DIR)"], capture_output=True, check=True
    )
    return str(Path(done.stdout.decode().strip()) / "ninja")
