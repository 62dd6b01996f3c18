"""Threads that a call starts work for it: what they ask and print is their call's.

New threads begin without context variables, so this one is handed on to them, and with each
thing that is given to a pool of threads: such a pool may be everybody's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from taskrun.workers.lanes.calls import RUNNING, LaneRunning

Found = Callable[[], LaneRunning | None]


def follow_calls(found: Found) -> None:
    """From now on threads know their call; ``found`` gives that of the code which asks."""
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    def start_for_call(thread: threading.Thread) -> None:
        running = found()
        if running is not None and not running.making:
            thread.run = partial(_run_for, running, thread.run)  # type: ignore[method-assign]
        start(thread)

    def submit_for_call(
        pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        return submit(pool, _run_for, found(), function, *args, **kwargs)

    threading.Thread.start = start_for_call  # type: ignore[assignment, method-assign]
    ThreadPoolExecutor.submit = submit_for_call  # type: ignore[assignment, method-assign]


def _run_for(
    running: LaneRunning | None, function: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    token = RUNNING.set(running)
    try:
        return function(*args, **kwargs)
    finally:
        RUNNING.reset(token)
