"""Calls that may be ended run in a child process that is kept beside the engine's worker.

The worker's thread waits for the child, sees to the call's timeout, and replaces a child that
died.  The child leads a session: what the call started ends with it.  It executes what it is
sent exactly as its parent would, and ends when its parent does.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from time import monotonic, time
from typing import Any, Final, NoReturn

from taskrun import sessions
from taskrun.messages import ENDED, SILENT
from taskrun.model import Failure
from taskrun.wire import READ_SIZE, Decoder, header
from taskrun.workers import guest, house
from taskrun.workers.briefs import Apart, Brief, Chunk, path_of
from taskrun.workers.settings import python_command

GRACE: Final = 2.0  # seconds between interrupt, TERM and KILL
STOPS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)

Attempt = tuple[bytes, int, int]
"""The run (its brief), the call, and which attempt of it."""

Answer = tuple[bytes, dict[Any, Any]]


class Child:
    """A kept child process, seen from the thread that uses it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        code = f"from taskrun.workers.apart import serve; serve({theirs.fileno()}, {os.getpid()})"
        with theirs:
            self._process = subprocess.Popen(
                python_command(code),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._socket = ours
        self.pid = self._process.pid
        self._decoder = Decoder()
        self._frames: deque[memoryview] = deque()

    def send(self, request: tuple[Any, ...]) -> None:
        """Raises OSError where it has ended."""
        data = pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
        self._socket.sendall(header(len(data)) + data)

    def await_beginning(self) -> None:
        """Wait until it can execute what it was sent.  Raises EOFError where it has ended."""
        self.receive(None)

    def receive(self, deadline: float | None) -> Answer | None:
        """Its answer; None when ``deadline`` (monotonic) came first.  Raises EOFError where it
        has ended."""
        while not self._frames:
            left = None if deadline is None else max(0.0, deadline - monotonic())
            if not select.select([self._socket], [], [], left)[0]:
                return None
            self._frames.extend(self._decoder.feed(self._read()))
        answer: Answer = pickle.loads(self._frames.popleft())
        return answer

    def _read(self) -> bytes:
        try:
            data = self._socket.recv(READ_SIZE)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        return data

    def signal(self, number: int) -> None:
        """Signal it; with SIGKILL all that it started."""
        if number == signal.SIGKILL:
            sessions.signal_session(self.pid, number)
        else:
            sessions.send([self.pid], number)

    def end(self) -> str:
        """End it for good; gives how it ended."""
        self._socket.close()
        self.signal(signal.SIGKILL)
        status = self._process.wait()
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"exited with status {status}"


class _Kept(threading.local):
    child: Child | None = None


_kept = _Kept()
_choosing = threading.Lock()
_working: dict[Attempt, Child] = {}
_children: set[Child] = set()


def interrupt(brief: bytes, call: int, attempt: int) -> bool:
    """End a call that a child of this process executes; False where there is none."""
    child = _working.get((brief, call, attempt))
    if child is None:
        return False
    child.signal(signal.SIGINT)
    killer = threading.Timer(GRACE, _kill_if_at_work, [(brief, call, attempt), child])
    killer.daemon = True
    killer.start()
    return True


def interrupt_all(brief: bytes) -> None:
    """End all calls of a run: nobody waits for them any more."""
    for attempt in list(_working):
        if attempt[0] == brief:
            interrupt(*attempt)


def leave() -> None:
    """End the children that execute nothing."""
    with _choosing:
        idle = _children.difference(_working.values())
        _children.difference_update(idle)
    for child in idle:
        child.end()


def _kill_if_at_work(attempt: Attempt, child: Child) -> None:
    if _working.get(attempt) is child:
        child.signal(signal.SIGKILL)


def execute(brief: bytes, work: Chunk, inputs: Sequence[Any]) -> Answer:
    """Have the one call of a chunk executed in this thread's child."""
    assert work.apart is not None
    (record,) = work.calls
    attempt = brief, record[1], record[2]
    began = time()
    with _choosing:
        child = _working[attempt] = _child()
    try:
        child.send((_for_child(brief), work, list(inputs)))
        answer, late = _await(child, work.apart)
    except (OSError, EOFError):
        how = _drop(child)
        failure = Failure(
            "lost",
            "WorkerLost",
            f"the process that executed {work.apart.name} (attempt {record[2]}) {how}",
        )
        return _noted(brief, work.id) + _ended(record, failure, True, began), {}
    except BaseException:  # the engine ends the call by an exception in this thread
        _drop(child)
        raise
    finally:
        _working.pop(attempt, None)
    if late:
        said = _noted(brief, work.id) if answer is None else _without_end(answer[0])
        return said + _time_is_up(record, work.apart, began), {}
    assert answer is not None
    return answer


_for_children: dict[bytes, bytes] = {}


def _for_child(brief: bytes) -> bytes:
    """What a child is told of a run: it executes one call at a time and nothing else."""
    found = _for_children.get(brief)
    if found is None:
        about: Brief = pickle.loads(brief)
        house.end_with(about.coordinator)
        found = _for_children[brief] = pickle.dumps(about._replace(alone=True))
    return found


def _child() -> Child:
    """This thread's child."""
    child = _kept.child
    if child is None or child not in _children:
        child = _kept.child = Child()
        _children.add(child)
    return child


def _drop(child: Child) -> str:
    """A child that is of no use any more; gives how it ended."""
    _children.discard(child)
    return child.end()


def _await(child: Child, apart: Apart) -> tuple[Answer | None, bool]:
    """The child's answer, and whether the time was up; then it may have died of that.

    To start a child and import the task file in it takes time that is not the call's."""
    child.await_beginning()
    deadline = None if apart.timeout is None else monotonic() + apart.timeout
    answer = child.receive(deadline)
    if answer is not None:
        return answer, False
    for number in STOPS:
        child.signal(number)
        try:
            answer = child.receive(monotonic() + GRACE)
        except EOFError:
            _drop(child)
            return None, True
        if answer is not None:
            break
    return answer, True


def _time_is_up(record: tuple[Any, ...], apart: Apart, began: float) -> bytes:
    failure = Failure("timeout", "CallTimeout", f"{apart.name} ran longer than {apart.timeout:g} s")
    return _ended(record, failure, apart.retryable, began)


def _noted(brief: bytes, chunk: int) -> bytes:
    """What a child that died had to say, as far as its notes tell."""
    notes = pickle.loads(brief).notes
    if notes is None:
        return b""
    try:
        with open(path_of(notes, chunk), "rb") as file:
            return _without_end(file.read())
    except FileNotFoundError:
        return b""  # it died before it began


def _without_end(records: bytes) -> bytes:
    """What came before the call's end."""
    kept = []
    for frame in Decoder().feed(records):
        if pickle.loads(frame)[0] in (ENDED, SILENT):
            break
        kept.append(header(len(frame)) + bytes(frame))
    return b"".join(kept)


def _ended(record: tuple[Any, ...], failure: Failure, retryable: bool, began: float) -> bytes:
    told = (ENDED, record[1], record[2], "error", (failure, retryable), None, began,
            time() - began, True)  # fmt: skip
    data = pickle.dumps(told, pickle.HIGHEST_PROTOCOL)
    return header(len(data)) + data


# -- the child ------------------------------------------------------------------------


def serve(fd: int, parent: int) -> NoReturn:
    """Be a kept child: execute what comes on the socket ``fd``, until it ends."""
    sessions.die_with_parent(parent)
    signal.signal(signal.SIGINT, _on_interrupt)
    with socket.socket(fileno=fd) as line:
        os.set_inheritable(fd, False)
        decoder = Decoder()
        while data := line.recv(READ_SIZE):
            for frame in decoder.feed(data):
                _answer(line, *pickle.loads(frame))
    sessions.kill_others()
    os._exit(0)


def _answer(line: socket.socket, brief: bytes, work: Chunk, inputs: Sequence[Any]) -> None:
    """Execute a chunk; say when it begins, and what came of it."""
    executing = guest.guest_of(brief)
    _say(line, None)
    _executing[:] = [executing]
    try:
        answer = executing.execute(work, inputs)
    finally:
        _executing.clear()
    _say(line, answer)


def _say(line: socket.socket, answer: Answer | None) -> None:
    data = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
    line.sendall(header(len(data)) + data)


_executing: list[guest.Guest] = []


def _on_interrupt(number: int, frame: Any) -> None:
    """The call is to end.  Raises Interrupted in it."""
    if not _executing:
        return  # it has ended
    executor = _executing[0].executor
    if executor.running is not None:
        executor.running.interrupt = executor.running.interrupt or "cancelled"
        executor.on_interrupt(number, frame)
