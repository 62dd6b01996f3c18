"""Sets of what lives elsewhere."""

from __future__ import annotations

from typing import TypeVar
from weakref import WeakSet

T = TypeVar("T")


def living(found: WeakSet[T]) -> list[T]:
    """What is in there now.  Other threads may add to it meanwhile: a WeakSet is walked through
    by Python code, and then says that it changed."""
    while True:
        try:
            return list(found)
        except RuntimeError:
            continue
