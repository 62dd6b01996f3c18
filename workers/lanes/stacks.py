"""Where in its code a call is that shares its process with others.

Stacks are taken from outside, by a thread of ours, and nothing is stopped for it: the call
may have gone on when its stack is shown.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from types import AsyncGeneratorType, CoroutineType, FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from traceback import StackSummary

Place: TypeAlias = tuple[FrameType, int]  # and a line number

_STEPS = ("async_generator_asend", "async_generator_athrow", "coroutine_wrapper")
"""Types of what is awaited in the place of a generator or coroutine, in an ``async for`` say."""


def walk_up(frame: FrameType | None) -> list[Place]:
    """A frame, and those that have called it, the outermost first."""
    places = []
    while frame is not None:
        places.append((frame, frame.f_lineno))
        frame = frame.f_back
    return places[::-1]


def walk_awaits(awaited: Any) -> Iterator[Place]:
    """A coroutine that is suspended, and what it awaits, down to what no Python code is."""
    while awaited is not None:
        if type(awaited).__name__ in _STEPS:
            awaited = _behind(awaited)
        frame = _one_of(awaited, "cr_frame", "ag_frame", "gi_frame")
        if frame is not None:
            yield frame, frame.f_lineno
        awaited = _one_of(awaited, "cr_await", "ag_await", "gi_yieldfrom")


def _one_of(thing: Any, *names: str) -> Any:
    return next((getattr(thing, name) for name in names if hasattr(thing, name)), None)


def _behind(step: Any) -> Any:
    """What a step belongs to; only the garbage collector knows."""
    import gc

    found = gc.get_referents(step)
    return next((one for one in found if isinstance(one, AsyncGeneratorType | CoroutineType)), None)


def extract(places: Iterable[Place]) -> StackSummary:
    """What of it is kept when the frames go on."""
    from traceback import StackSummary

    return StackSummary.extract(iter(places), lookup_lines=False)


def text(stack: StackSummary) -> str:
    """A stack as a traceback shows it, without the frames at its ends that are ours or the
    loop's."""
    import traceback

    frames = list(stack)
    foreign = _machinery()
    while frames and frames[0].filename.startswith(foreign):
        del frames[0]
    while frames and frames[-1].filename.startswith(foreign):
        del frames[-1]
    return "".join(traceback.format_list(frames))


def _machinery() -> tuple[str, ...]:
    names = ("taskrun", "taskrun.workers", "asyncio", "gevent", "threading", "contextvars")
    files = [getattr(sys.modules.get(name), "__file__", None) for name in names]
    folders = [os.path.dirname(file) + os.sep if file.endswith("__init__.py") else file
               for file in files if file]  # fmt: skip
    return (*folders, "<string>", "src/gevent/")
