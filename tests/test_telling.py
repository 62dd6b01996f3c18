"""Lines on stderr, whatever that is just now."""

from __future__ import annotations

import io
import sys

import pytest

from taskrun.telling import tell


class Written:
    """A program's own stderr, of which print() asks no more than this."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        """There is nothing to be flushed."""


class Cell(Written):
    """A notebook's: it has a number, which is that of the terminal behind it."""

    def fileno(self) -> int:
        return 2


@pytest.mark.parametrize("kind", [Written, Cell])
def test_lines_go_to_the_stderr_that_a_program_has_put_there(
    kind: type[Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = kind()
    monkeypatch.setattr(sys, "stderr", own)
    tell("a line")
    assert own.text == "taskrun: a line\n"


def test_a_stderr_that_was_closed_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    for name in ("stderr", "__stderr__"):
        monkeypatch.setattr(sys, name, closed)
        tell("a line")
