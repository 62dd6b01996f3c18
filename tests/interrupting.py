"""Code that is interrupted where a signal handler, the garbage collector or another thread
may interrupt it: at every step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class Broken(BaseException):
    """For an interruption to raise: what it interrupts ends there."""


def at_each_step(action: Callable[[], object], interruption: Callable[[], object]) -> int:
    """Do ``action`` again and again, each time with ``interruption`` in the middle of it, one
    line of Python code later; gives how many there were."""
    steps = 0
    while interrupted_at(steps, action, interruption):
        steps += 1
    return steps


def interrupted_at(
    step: int, action: Callable[[], object], interruption: Callable[[], object]
) -> bool:
    """The same for one step; False where there are not so many."""
    left = step

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == -1:
                sys.settrace(None)
                interruption()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Broken:
        pass
    finally:
        sys.settrace(before)
    return left < 0


def broken_off_at(step: int, action: Callable[[], object]) -> bool:
    """Have ``action`` broken off where the handler of a signal may raise: where a function
    begins, or has ended; False where there are not so many."""
    left = step

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal left
        if event in ("call", "return", "c_return"):
            left -= 1
            if left == -1:
                sys.setprofile(None)
                raise Broken

    sys.setprofile(profile)
    try:
        action()
    except Broken:
        pass
    finally:
        sys.setprofile(None)
    return left < 0
