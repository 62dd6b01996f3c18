"""Lines on stderr by what goes on whether or not anybody can read them.

Its disk may be full, its reader may have left, its terminal may be gone, and it may have been
closed from the beginning.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress


def tell(text: str) -> None:
    """Write a line for people, if that can be written."""
    _write(f"taskrun: {text}\n")


def tell_traceback() -> None:
    """The same, in an ``except`` block, for what should not happen."""
    _write(traceback.format_exc())


def _write(text: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()
