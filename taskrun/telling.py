"""Lines on stderr by what goes on whether or not anybody can read them.

Its disk may be full, its reader may have left, its terminal may be gone, and it may have been
closed from the beginning.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress


def tell(text: str) -> None:
    """Write a line for people, if that can be written."""
    write(f"taskrun: {text}\n")


def tell_traceback() -> None:
    """The same, in an ``except`` block, for what should not happen."""
    write(traceback.format_exc())


def write(text: str) -> None:
    """Write lines as they are, if they can be written."""
    stream = sys.stderr
    if stream is None:
        return
    is_ours = stream is sys.__stderr__
    with suppress(OSError, ValueError):  # a ValueError where it is closed
        if not is_ours:  # but a program's own, or a notebook's: it may be no file's
            stream.write(text)
            stream.flush()
            return
        # Not through its buffer: what cannot be written stays there, and Python ends with
        # status 120 where it cannot be written at the end either.
        stream.flush()
        rest = text.encode(stream.encoding, "backslashreplace")
        while rest:
            rest = rest[os.write(stream.fileno(), rest) :]
