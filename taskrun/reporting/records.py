"""What a run leaves for programs to read: the job log, and the events of ``--json``.

Both are documented, field by field, in ``docs/events.md``.  Both are written in one
piece per batch: ``soon`` (the reactor's) calls back when the events at hand have all been
seen; without it each record is written at once.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from taskrun.errors import UsageError
from taskrun.messages import AttemptEnded
from taskrun.model import Failure
from taskrun.observers import Observer
from taskrun.reporting import text
from taskrun.reporting.output import Lines
from taskrun.reporting.terminal import Terminal

Soon: TypeAlias = Callable[[Callable[[], None]], object]

VERSION = 1
"""Of the events.  It changes when a field goes or means something else, not when one comes."""

CALLS_PER_EVENT = 1000
LONGEST_MESSAGE = 4000
COLUMNS = (
    "seq", "task", "call", "attempt", "worker", "start", "seconds", "outcome", "message",
)  # fmt: skip


class Batch:
    """Collects records and hands them on in one piece."""

    def __init__(self, write: Callable[[bytes], None], soon: Soon | None) -> None:
        self._write = write
        self._soon = soon
        self._records: list[bytes] = []

    def add(self, record: bytes) -> None:
        self._records.append(record)
        if self._soon is None:
            self.flush()
        elif len(self._records) == 1:
            self._soon(self.flush)

    def flush(self) -> None:
        records, self._records = self._records, []
        if records:
            self._write(b"".join(records))


def began_at(event: AttemptEnded, now: Callable[[], float]) -> float:
    """When an attempt began; reckoned from its end where its worker could not say."""
    return event.began if event.began > 0 else now() - event.seconds


# -- the job log ----------------------------------------------------------------------


class JobLog(Observer):
    """A row per attempt, appended as attempts end; whole at any moment, kill -9 or not.

    Raises UsageError if the file cannot be opened.  What is in it stays until the run starts:
    perhaps none does.  If it cannot be written later, a notice says so once and the run goes
    on without it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        notice: Callable[[str], None],
        soon: Soon | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._path = os.fspath(path)
        self._notice = notice
        self._now = now
        self._rows = 0
        self._fd: int | None = _open_log(self._path)
        self._batch = Batch(self._append, soon)
        self._second = -1
        self._second_text = ""

    def run_started(self, run: Any) -> None:
        if self._fd is not None and stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.ftruncate(self._fd, 0)
        self._append(("\t".join(COLUMNS) + "\n").encode())

    def attempt_ended(self, event: AttemptEnded, worker: str) -> None:
        if self._fd is None:
            return
        self._rows += 1
        call = event.call
        start = self._timestamp(began_at(event, self._now))
        message = _field(event.failure.message) if event.failure is not None else ""
        row = (
            f"{self._rows}\t{_field(call.recipe.name)}\t{_field(call.name)}\t{event.attempt}\t"
            f"{_field(worker)}\t{start}\t{event.seconds:.6f}\t{event.outcome}\t{message}\n"
        )
        self._batch.add(row.encode("utf-8", "backslashreplace"))

    def run_ended(self, status: int, reason: str) -> None:
        self._batch.flush()
        self._close()

    def _timestamp(self, wall: float) -> str:
        second = int(wall)
        if second != self._second:
            self._second = second
            self._second_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._second_text}.{int(wall * 1000) % 1000:03d}Z"

    def _append(self, rows: bytes) -> None:
        if self._fd is None:
            return
        written = 0
        try:
            while written < len(rows):
                written += os.write(self._fd, rows[written:])
        except OSError as error:
            self._cut_torn_row(written - (rows.rfind(b"\n", 0, written) + 1))
            self._close()
            self._notice(
                f"cannot write the job log {self._path}: {error.strerror}; it ends "
                f"here, the run goes on"
            )

    def _cut_torn_row(self, written: int) -> None:
        """Take a part of a row out again; what is no file is with its reader already."""
        assert self._fd is not None
        status = os.fstat(self._fd)
        if written and stat.S_ISREG(status.st_mode):
            os.ftruncate(self._fd, status.st_size - written)

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _open_log(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(f"cannot write the job log {path}: {error.strerror}") from error


def _field(value: str) -> str:
    """``value`` in one field of a row: tabs, newlines and the like written as escapes."""
    if len(value) > LONGEST_MESSAGE:
        value = value[:LONGEST_MESSAGE] + "..."
    if value.isprintable() and "\\" not in value:
        return value
    return text.one_line(value.replace("\\", "\\\\"))


# -- events as NDJSON -----------------------------------------------------------------


class Events(Observer):
    """The run's events on stdout, one JSON object a line; nothing else may go there."""

    def __init__(
        self,
        terminal: Terminal,
        soon: Soon | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        import json  # heavy; only --json needs it

        # allow_nan=False: JSON has no NaN, so one must not slip through unseen.
        encoder = json.JSONEncoder(
            ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str
        )
        self._encode = encoder.encode
        self._escapes = _escapes()
        self._now = now
        self._batch = Batch(lambda lines: terminal.write_lines("stdout", lines), soon)
        self._lines: dict[tuple[int | str, str], Lines] = {}
        self._counts = {"ok": 0, "failed": 0, "skipped": 0, "cancelled": 0}

    # -- what is observed -------------------------------------------------------------

    def run_started(self, run: Any) -> None:
        plan = run.plan
        self._say(
            "run_started",
            file=plan.file,
            targets=sorted(plan.targets),
            tasks=[task.name for task in plan.tasks],
        )

    def calls_added(self, calls: Sequence[Any]) -> None:
        for start in range(0, len(calls), CALLS_PER_EVENT):
            described = [_described(call) for call in calls[start : start + CALLS_PER_EVENT]]
            self._say("calls_added", calls=described)

    def call_began(self, call: Any, attempt: int, worker: str, wall: float) -> None:
        title = call.title
        self._say("call_began", id=call.id, attempt=attempt, worker=worker, began=wall, title=title)

    def output(self, call: Any | None, stream: str, data: bytes, worker: str = "") -> None:
        key = worker if call is None else call.id, stream
        lines = self._lines.get(key)
        if lines is None:
            lines = self._lines[key] = Lines(overwrite=False, cut=b"")
        self._say_output(key, lines.feed(data))

    def output_ended(self, call: Any) -> None:
        for stream in ("stdout", "stderr"):
            key = call.id, stream
            lines = self._lines.pop(key, None)
            if lines is not None:
                self._say_output(key, lines.end())

    def progressed(self, call: Any, done: float, total: float | None) -> None:
        self._say("progress", id=call.id, done=_number(done), total=_number(total))

    def attempt_ended(self, event: AttemptEnded, worker: str) -> None:
        if self._lines:
            self.output_ended(event.call)
        self._say(
            "attempt_ended",
            id=event.call.id,
            attempt=event.attempt,
            outcome=event.outcome,
            worker=worker,
            began=round(began_at(event, self._now), 6),
            seconds=round(event.seconds, 6),
            again=event.again,
            failure=describe_failure(event.failure),
        )

    def call_ended(self, call: Any) -> None:
        state = call.state
        self._counts[state] += 1
        self._say(
            "call_ended",
            id=call.id,
            state=state,
            tolerated=state == "failed" and call.tolerated,
            cause=None if call.cause is None else call.cause.id,
            failure=None if state == "ok" else describe_failure(call.failure),
        )

    def result(self, call: Any, value: str) -> None:
        """A call of ``taskrun map`` has returned something; ``value`` as text."""
        self._say("result", id=call.id, value=value)

    def worker_changed(self, worker: str, what: str) -> None:
        self._say("worker", worker=worker, what=what)

    def notice(self, text: str) -> None:
        self._say("notice", text=text)

    def stopping(self, reason: str) -> None:
        self._say("stopping", reason=reason)

    def run_ended(self, status: int, reason: str) -> None:
        for key, lines in self._lines.items():
            self._say_output(key, lines.end())
        self._lines.clear()
        self._say("run_ended", status=status, reason=reason, counts=dict(self._counts))
        self._batch.flush()

    # -- saying it --------------------------------------------------------------------

    def _say_output(self, key: tuple[int | str, str], block: bytes) -> None:
        if block:
            of, stream = key
            lines = block.decode("utf-8", "backslashreplace")
            id, worker = (None, of) if isinstance(of, str) else (of, None)
            self._say("output", id=id, worker=worker, stream=stream, text=lines)

    def _say(self, event: str, **fields: Any) -> None:
        record = {"v": VERSION, "event": event, "time": round(self._now(), 6), **fields}
        line = self._encode(record)
        if not line.isascii():
            line = line.translate(self._escapes)
        self._batch.add(line.encode() + b"\n")


def _escapes() -> dict[int, str]:
    """What may stand in JSON, but not in every reader's idea of a line or of UTF-8."""
    breaks = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
    surrogates = {code: f"\\\\u{code:04x}" for code in range(0xD800, 0xE000)}
    return {**breaks, **surrogates}


def _described(call: Any) -> dict[str, Any]:
    parent = call.parent
    return {
        "id": call.id,
        "call": call.name,
        "task": call.recipe.name,
        "parent": None if parent is None else parent.id,
    }


def describe_failure(failure: Failure | None) -> dict[str, str] | None:
    """A failure as JSON has it."""
    if failure is None:
        return None
    return {
        "kind": failure.kind,
        "type": failure.type_name,
        "message": failure.message,
        "traceback": failure.traceback,
    }


def _number(value: float | None) -> float | None:
    """A number as JSON has them: neither infinite nor NaN."""
    return None if value is None or value != value or abs(value) == float("inf") else value
