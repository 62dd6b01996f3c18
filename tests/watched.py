"""Stand-ins for what observers watch, and for what they write to."""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass, field
from typing import Any

from taskrun.messages import AttemptEnded
from taskrun.model import Failure
from taskrun.reporting.terminal import Terminal


@dataclass
class Recipe:
    name: str
    retries: int | None = None
    flags: int = 0


@dataclass
class Call:
    id: int
    name: str
    state: str = "running"
    failure: Failure | None = None
    cause: Any = None
    parent: Any = None
    tolerated: bool = False
    attempt: int = 1
    label: str | None = None
    began: float | None = 0.0
    retries: int | None = None
    recipe: Recipe = field(init=False)

    def __post_init__(self) -> None:
        self.recipe = Recipe(re.split(r"[\[#]", self.name)[0], self.retries)

    @property
    def title(self) -> str:
        return self.label or self.name


@dataclass
class Plan:
    tasks: list[Recipe]
    targets: frozenset[str] = frozenset()
    file: str | None = "tasks.py"


@dataclass
class Run:
    plan: Plan


def run_of(*names: str) -> Run:
    return Run(Plan([Recipe(name) for name in names], frozenset(names[-1:])))


def error(
    message: str = "bad row", kind: str = "error", type_name: str = "ValueError", line: int = 7
) -> Failure:
    traceback = (
        "Traceback (most recent call last):\n"
        f'  File "tasks.py", line {line}, in fetch\n'
        f'    raise ValueError("{message}")\n'
        f"{type_name}: {message}\n"
    )
    return Failure(kind, type_name, message, traceback)


def attempt(
    call: Call,
    outcome: str = "value",
    failure: Failure | None = None,
    *,
    number: int = 1,
    seconds: float = 1.2,
    again: float | None = None,
    began: float = 1_700_000_000.25,
) -> AttemptEnded:
    return AttemptEnded(call, number, outcome, failure, began, seconds, 1, again)


def end(
    observer: Any, call: Call, state: str = "ok", failure: Failure | None = None, **how: Any
) -> None:
    """An attempt of ``call`` ends, and the call with it."""
    outcome = {"ok": "value", "failed": "error", "skipped": "skip"}.get(state, "cancelled")
    call.failure = failure
    observer.attempt_ended(attempt(call, outcome, failure, **how), "w1")
    call.state = state
    observer.call_ended(call)


class Pages:
    """A terminal that is none: what was written is in ``out`` and ``err``."""

    def __init__(self, **environ: str) -> None:
        self._out, self._err = io.BytesIO(), io.BytesIO()
        self.terminal = Terminal(self._out, self._err, environ)

    @property
    def out(self) -> str:
        return self._out.getvalue().decode("utf-8", "surrogateescape")

    @property
    def err(self) -> str:
        return self._err.getvalue().decode("utf-8", "surrogateescape")


class Screen:
    """The little of a terminal that taskrun uses: ``\\r``, ``\\n``, clear to the end, colours.

    ``lines`` are the lines that have scrolled by, ``bottom`` is the line of the cursor.
    """

    TOKEN = re.compile(r"\r|\n|\x1b\[K|\x1b\[[0-9;]*m|[^\r\n\x1b]+")

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.bottom = ""
        self._column = 0
        self._held = b""

    def feed(self, data: bytes) -> None:
        # Hold back what may be the start of a character or of an escape sequence.
        data = self._held + data
        cut = max(data.rfind(b"\n"), data.rfind(b"K"), data.rfind(b"\r")) + 1
        self._held = data[cut:]
        text = data[:cut].decode()
        matches = self.TOKEN.findall(text)
        assert "".join(matches) == text, f"more than this terminal knows: {text!r}"
        for token in matches:
            self._token(token)

    def finish(self) -> None:
        self.feed(b"\x1b[K")

    def _token(self, token: str) -> None:
        if token == "\n":
            self.lines.append(self.bottom)
            self.bottom = ""
        elif token == "\x1b[K":
            self.bottom = self.bottom[: self._column]
        elif token[0] not in "\r\x1b":
            self.bottom = self.bottom[: self._column].ljust(self._column) + token
            self._column += len(token)
        if token in "\r\n":
            self._column = 0


def read_until_closed(fd: int, screen: Screen) -> None:
    """Feed a pty's master side to ``screen`` until the other side is closed."""
    while True:
        try:
            data = os.read(fd, 65536)
        except OSError:  # Linux says EIO at the end of a pty
            data = b""
        if not data:
            return screen.finish()
        screen.feed(data)
