"""End to end: taskrun as people start it, in a process of its own, with a deadline.

A run is known by a variable in its environment, which every process of it inherits and none
can take off: so all that a run started is found, whoever has adopted it meanwhile.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

HEAD = """
from taskrun import *
import os, signal, sys, threading, time

def mark(name, text="1"):
    with open(name, "w") as file: file.write(text)

def doze():
    for _ in range(3000): time.sleep(0.1)
"""
"""What every task file of these tests begins with.

``doze``: a signal that comes just before a long sleep, in this process, does not end it.
"""

TOKEN = "RUN_OF_A_TEST"
STEP = 0.01  # seconds between looks at what cannot be waited for
TASKRUN = str(Path(sys.executable).with_name("taskrun"))
GONE = 2.0  # seconds after which nothing of a run may be left


# -- processes of a run ---------------------------------------------------------------


def processes_of(token: str) -> list[psutil.Process]:
    """All living processes of a run; a zombie has ended."""
    return [process for process in psutil.process_iter() if _belongs(process, token)]


def _belongs(process: psutil.Process, token: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(process.environ().get(TOKEN) == token)
    except psutil.Error:
        return False


def wait_until(
    holds: Callable[[], Any], deadline: float = 20.0, what: str = "it did not happen"
) -> Any:
    """Wait until ``holds()`` gives something true, and give that."""
    end = time.monotonic() + deadline
    while not (found := holds()):
        assert time.monotonic() < end, f"{what} within {deadline:g} s"
        time.sleep(STEP)
    return found


def until_it_is_full(stream: IO[bytes]) -> None:
    """Until a pipe, or a terminal, that nobody reads takes nothing more."""
    wait_until(lambda: not select.select([], [stream], [], 0)[1])


# -- a run that has ended -------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status, what it wrote, how long it took."""

    status: int
    out: str
    err: str
    seconds: float = 0.0

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of ``--json``; fails where stdout holds anything else."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def calls(self) -> dict[str, dict[str, Any]]:
        """Of ``--json``: the name of each call -> its ``call_ended``."""
        names = {
            call["id"]: call["call"]
            for event in self.events
            if event["event"] == "calls_added"
            for call in event["calls"]
        }
        return {names[e["id"]]: e for e in self.events if e["event"] == "call_ended"}

    @property
    def states(self) -> dict[str, str]:
        """Of ``--json``: the name of each call -> how it ended."""
        return {name: event["state"] for name, event in self.calls.items()}

    def failure(self, call: str) -> dict[str, str]:
        """Of ``--json``: what a call failed with: kind, type, message, traceback."""
        failure: dict[str, str] = self.calls[call]["failure"]
        return failure

    def check(self, status: int = 0) -> Ended:
        """This, if it ended with ``status`` and without any traceback of ours."""
        assert self.status == status, f"exit status {self.status}\n{self.err}\n{self.out[-4000:]}"
        ours = f'File "{Path(__file__).parent.parent}/'
        # What is said of a thread that a call has started shows who runs it.
        said = [line for line in self.err.splitlines() if " | " not in line]
        assert not any(ours in line for line in said), self.err
        return self


# -- a run that goes on ---------------------------------------------------------------


@dataclass
class Running:
    """A run that was started; ``out`` and ``err`` are the lines that came so far."""

    process: subprocess.Popen[bytes]
    token: str
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    _came: threading.Condition = field(default_factory=threading.Condition)
    _readers: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        for file, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err)):
            if file is not None:
                self._readers.append(threading.Thread(target=self._read, args=(file, lines)))
                self._readers[-1].start()

    def _read(self, file: IO[bytes], lines: list[str]) -> None:
        for line in file:
            with self._came:
                lines.append(line.decode(errors="backslashreplace"))
                self._came.notify_all()

    def await_line(self, text: str, *, err: bool = False, deadline: float = 20.0) -> str:
        """Wait for a line with ``text`` in it."""
        lines = self.err if err else self.out

        def found() -> str | None:
            return next((line for line in lines if text in line), None)

        with self._came:
            assert self._came.wait_for(found, deadline), f"no {text!r} in {self.out} {self.err}"
        return found() or ""

    def await_file(self, path: Path, deadline: float = 20.0) -> str:
        """Wait for a file with something in it, and give that."""

        def content() -> str:
            status = self.process.poll()
            text = path.read_text() if path.is_file() else ""
            assert text or status is None, f"it ended with {status}"
            return text

        try:
            return str(wait_until(content, deadline, f"no {path.name}"))
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.commands()}, {self.out}, {self.err}") from None

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the coordinator, or to its foreground process group."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def processes(self) -> list[psutil.Process]:
        """All processes of the run."""
        return processes_of(self.token)

    def others(self) -> list[psutil.Process]:
        """All processes of the run but the coordinator."""
        return [process for process in self.processes() if process.pid != self.process.pid]

    def commands(self) -> list[str]:
        """The command lines of all processes of the run."""
        return [_described(process) for process in self.processes()]

    def parents(self) -> dict[psutil.Process, int]:
        """All processes of the run but the coordinator, each with its parent's pid."""
        found = {}
        for process in self.others():
            try:
                found[process] = process.ppid()
            except psutil.NoSuchProcess:
                pass  # it has ended just now
        return found

    def end(self, deadline: float = 30.0) -> Ended:
        """Wait for its end, after which nothing of it may be left."""
        status = self.process.wait(deadline)
        seconds = time.monotonic() - self.began
        self.assert_gone()
        for reader in self._readers:
            reader.join(deadline)
        return Ended(status, "".join(self.out), "".join(self.err), seconds)

    def assert_gone(self, within: float = GONE) -> None:
        """Nothing of it is left, ``within`` seconds from now."""
        end = time.monotonic() + within
        while left := self.processes():
            assert time.monotonic() < end, f"left: {[_described(process) for process in left]}"
            time.sleep(STEP)

    def kill(self) -> None:
        """End all that is left of it."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass  # it has ended just now
        self.process.wait(10)
        for reader in self._readers:
            reader.join(10)
        for file in (self.process.stdin, self.process.stdout, self.process.stderr):
            if file is not None:
                file.close()


def _described(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"{process.pid}"


# -- starting runs --------------------------------------------------------------------


class Runs:
    """Starts runs in a folder, and ends what is left of them in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Running] = []

    def write(self, source: str, name: str = "tasks.py", *, head: str = HEAD) -> Path:
        """Write a task file, or another one beside it."""
        path = self.folder / name
        path.write_text(head + textwrap.dedent(source), encoding="utf-8")
        return path

    def start(
        self,
        *words: str,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = subprocess.PIPE,
        stderr: int | IO[bytes] | None = subprocess.PIPE,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        program: Sequence[str] = (TASKRUN,),
        **options: Any,
    ) -> Running:
        """Start ``taskrun WORDS``, or another ``program``."""
        token = uuid.uuid4().hex
        process = subprocess.Popen(
            [*program, *words],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd or self.folder,
            env={**environment(), **(env or {}), TOKEN: token},
            **{"start_new_session": True, **options},
        )
        self._started.append(Running(process, token))
        return self._started[-1]

    def run(self, *words: str, deadline: float = 30.0, input: bytes = b"", **how: Any) -> Ended:
        """Start ``taskrun WORDS`` and wait for its end."""
        if not input:
            return self.start(*words, **how).end(deadline)
        running = self.start(*words, stdin=subprocess.PIPE, **how)
        assert running.process.stdin is not None
        try:
            running.process.stdin.write(input)
            running.process.stdin.close()
        except BrokenPipeError:
            pass  # it has read as much as it wanted to
        return running.end(deadline)

    def exec(self, source: str, *words: str, **how: Any) -> Ended:
        """Write ``source`` to tasks.py and run ``taskrun exec tasks.py WORDS``."""
        return self.run("exec", str(self.write(source)), *words, **how)

    def start_exec(self, source: str, *words: str, **how: Any) -> Running:
        """Write ``source`` to tasks.py and start ``taskrun exec tasks.py WORDS``."""
        return self.start("exec", str(self.write(source)), *words, **how)

    def json(self, source: str, *words: str, **how: Any) -> Ended:
        """As ``exec``, with ``--json``."""
        return self.exec(source, "--json", *words, **how)

    def script(self, source: str, *words: str, **how: Any) -> Ended:
        """Write ``source`` to script.py and run it with Python."""
        path = self.write(source, "script.py", head="")
        return self.run(*words, program=(sys.executable, str(path)), **how)

    def close(self) -> None:
        """End what is left of all runs."""
        for running in self._started:
            running.kill()


_CHANGING = ("COLUMNS", "NO_COLOR", "PYTHONUNBUFFERED")


def environment() -> dict[str, str]:
    """This process's variables, without those that would change a run."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TASKRUN_", "PYTEST_")) and name not in _CHANGING
    }


def started(folder: Path) -> Iterator[Runs]:
    """For a fixture: runs in a folder, all ended in the end."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # these tests are a background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    runs = Runs(folder)
    try:
        yield runs
    finally:
        runs.close()


def lines_of(text: str, call: str) -> list[str]:
    """The lines of ``--output line`` that are a call's, without its name."""
    tag = f"{call} | "
    return [line.removeprefix(tag) for line in text.splitlines() if line.startswith(tag)]


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""The exit status of a run that a signal has ended."""
