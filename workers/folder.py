"""The working directory: a call that changes it does so for itself only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# A directory may be one to work in and still not to be listed.
_FLAGS: Final = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY


class Folder:
    """The directory in which every call begins: the one that was current when this was made.

    Held by a descriptor, so it may be renamed, or removed, meanwhile.
    """

    def __init__(self) -> None:
        """Raises OSError where there is none, or no descriptor for it."""
        self._fd = os.open(".", _FLAGS)

    def restore(self) -> None:
        """A call has ended: go back, wherever it went."""
        os.fchdir(self._fd)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """A nested call begins here, too; the one that waits for it goes on where it was."""
        here = os.open(".", _FLAGS)
        try:
            os.fchdir(self._fd)
            yield
        finally:
            os.fchdir(here)
            os.close(here)

    def close(self) -> None:
        """Let go of the descriptor."""
        os.close(self._fd)
