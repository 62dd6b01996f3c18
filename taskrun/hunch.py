"""Whether it is worth while to wait for what may come in a moment."""

from __future__ import annotations

from typing import Final

_MOST: Final = 64  # times that it is passed over in a row


class Hunch:
    """What was in vain is passed over, twice as many times whenever it was again."""

    __slots__ = ("_left", "_passes")

    def __init__(self) -> None:
        self._passes = self._left = 0

    def __bool__(self) -> bool:
        """Whether to try it this time."""
        if self._left:
            self._left -= 1
            return False
        return True

    def came_true(self) -> None:
        """It was worth while."""
        self._passes = 0

    def was_in_vain(self) -> None:
        """It was not."""
        self._left = self._passes = min(2 * self._passes + 1, _MOST)
