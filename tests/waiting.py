"""Waiting for what comes in its own time, and not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 30.0


def until(holds: Callable[[], object]) -> None:
    """Come back when that holds; an AssertionError where it does not in ``SECONDS``."""
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)
