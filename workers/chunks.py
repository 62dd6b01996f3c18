"""The way in: what an engine that is not ours executes in its workers."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from typing import Any

from taskrun.errors import RunError
from taskrun.workers.briefs import VERSION, Chunk, Part


def execute(
    version: str, brief: bytes, chunk: bytes, inputs: Sequence[Any] = ()
) -> tuple[bytes, dict[Part, Any]]:
    """Execute a pickled Chunk; ``inputs`` are the kept values that its calls take.

    Raises RunError where the two sides do not fit together.
    """
    if version != VERSION:
        raise RunError(
            f"the coordinator has {version}, the engine's worker has {VERSION}: "
            "both must have the same"
        )
    work: Chunk = pickle.loads(chunk)
    if work.apart is not None:
        from taskrun.workers import apart  # needs the parts that start processes

        return apart.execute(brief, work, inputs)
    from taskrun.workers import guest  # imports what executes calls

    return guest.guest_of(brief).execute(work, inputs)


def leave(brief: bytes) -> None:
    """The run is over: finish what it has in this process."""
    from taskrun.workers import guest

    guest.leave(brief)
    apart = sys.modules.get("taskrun.workers.apart")
    if apart is not None:
        apart.leave()
