"""How numbers, names and failures read: pure functions, shared by all that people see.

Nothing here knows of a terminal; colour is asked of a ``Paint``, which may be colourless.
"""

from __future__ import annotations

import re
from binascii import crc32
from collections.abc import Iterable

from taskrun.model import Failure

Captured = list[tuple[str, str]]
"""What a call wrote, in order: (``stdout`` or ``stderr``, whole lines of text)."""

LONGEST = 20_000
"""Characters that are shown of a failure's start, and as many of its end."""

WIDEST = 40
"""Columns of a table that are for names; longer ones push aside what follows them."""

RESET = "\x1b[0m"
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "bad": "1;31"}
_TAG_STYLES = (
    "36",
    "33",
    "32",
    "35",
    "34",
    "96",
    "93",
    "92",
    "95",
    "94",
)  # no red: it means failed

# Escape sequences that move the cursor or change the terminal; colours (final byte m) may stay.
_UNTAMED = re.compile(
    rb"(?:\x1b\[|\xc2\x9b)[0-?]*[ -/]*[@-ln-~]"  # CSI, all but SGR
    rb"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC, DCS, SOS, PM, APC
    rb"|\x1b(?!\[)[ -/]*[0-~]"  # two-character escapes: reset, save the cursor, charsets
    rb"|[\x08\x0b-\x0f]"  # backspace, moves, and shifts to another character set
    rb"|\xc2[\x80-\x9f]"  # one-character forms of sequences, as some terminals take them
)


class Paint:
    """Puts colour around text, or does not."""

    __slots__ = ("enabled",)

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __call__(self, style: str, text: str) -> str:
        return f"\x1b[{_STYLES[style]}m{text}{RESET}" if self.enabled and text else text

    def tag(self, task: str, text: str) -> str:
        """``text`` in the colour that belongs to the task of this name, in every run."""
        if not self.enabled:
            return text
        code = _TAG_STYLES[crc32(encode(task)) % len(_TAG_STYLES)]
        return f"\x1b[{code}m{text}{RESET}"


# -- numbers --------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """``12 ms``, ``1.3 s``, ``2 min 5 s``, ``1 h 3 min``."""
    if seconds < 0.0995:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 59.95 else rough(seconds)


def rough(seconds: float) -> str:
    """A duration without decimals: ``5 s``, ``2 min 5 s``, ``1 h 3 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def rate(per_second: float) -> str:
    """``1250/s``, ``3.2/s``, ``0.5/min``."""
    if per_second >= 100:
        return f"{per_second:.0f}/s"
    return f"{per_second:.1f}/s" if per_second >= 1 else f"{per_second * 60:.1f}/min"


def plural(count: int, noun: str) -> str:
    """``1 call``, ``20,001 calls``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count:,} times"


# -- text -----------------------------------------------------------------------------


def encode(text: str) -> bytes:
    """``text`` as bytes; undecodable bytes that it was made from come out as they were."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        return text.encode("utf-8", "backslashreplace")


def decode(data: bytes) -> str:
    """The text in ``data``; :func:`encode` gives the same bytes back."""
    return data.decode("utf-8", "surrogateescape")


def one_line(text: str) -> str:
    """``text`` with newlines and all else that is not printable written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, width: int) -> str:
    """``text``, its middle left out where it is longer than ``width``."""
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def columns(text: str) -> int:
    """How many columns of a terminal ``text`` takes: two for wide characters, none for marks."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    wide = sum(east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(combining, text)))


def padded(text: str, width: int) -> str:
    """``text`` and the spaces that fill ``width`` columns."""
    return text + " " * (width - columns(text))


def title_of(call: object) -> str:
    """A call's title (label or name), fit to stand in a line."""
    return one_line(str(getattr(call, "title", call)))


def named(names: Iterable[str], total: int, limit: int = 4) -> str:
    """``fetch[4], fetch[9], ...``: the first of ``total`` names."""
    shown = list(names)[:limit]
    return ", ".join([*shown, "..."] if total > len(shown) else shown)


def indent(text: str, by: str = "  ") -> str:
    return "".join(f"{by}{line}\n" for line in text.rstrip("\n").split("\n"))


def clip(text: str, head: int, tail: int) -> str:
    """``text`` without the lines between its first ``head`` and its last ``tail``."""
    lines = text.rstrip("\n").split("\n")
    if len(lines) <= head + tail + 1:
        return text
    left_out = f"... {plural(len(lines) - head - tail, 'line')} left out ..."
    return "\n".join([*lines[:head], left_out, *lines[-tail:]])


def tame(block: bytes) -> bytes:
    """Whole lines, fit for a terminal: colours stay and end with their line, but nothing
    moves the cursor."""
    if b"\x1b" not in block and _UNTAMED.search(block) is None:
        return block
    reset = encode(RESET)
    lines = _UNTAMED.sub(b"", block).removesuffix(b"\n").split(b"\n")
    return b"".join(
        line + (reset if b"\x1b" in line and not line.endswith(reset) else b"") + b"\n"
        for line in lines
    )


# -- failures -------------------------------------------------------------------------


def failure_text(failure: Failure) -> str:
    """The traceback of a failure, or what else is known of it; of bounded length."""
    text = failure.traceback.strip("\n") or f"{failure.type_name}: {failure.message}"
    if len(text) > 2 * LONGEST:
        left_out = f"\n... {len(text) - 2 * LONGEST:,} characters left out ...\n"
        text = text[:LONGEST] + left_out + text[-LONGEST:]
    return clip(text, 100, 100)


def attempt_text(attempt: int, seconds: float, worker: str) -> str:
    """``attempt 2, 1.2 s, w1``: which attempt it was, how long it took, and where."""
    parts = [f"attempt {attempt}"] if attempt > 1 else []
    return ", ".join([*parts, duration(seconds), *([worker] if worker else [])])


def same_failure(task: str, failure: Failure) -> int:
    """Equal for calls of one task that failed in the same place with the same exception,
    whatever its message; without a traceback, for messages that differ in numbers only."""
    frames = [line for line in failure.traceback.splitlines() if 'File "' in line]
    what = "" if frames else re.sub(r"\d+", "#", failure.headline)
    return hash((task, failure.kind, failure.type_name, what, *frames))
