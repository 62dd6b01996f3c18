"""What is executed in a worker of Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from taskrun.workers import chunks, luggage


def execute(
    version: str,
    brief: bytes,
    chunk: bytes,
    files: tuple[str, list[Any]] | None,
    *inputs: Mapping[Any, Any],
) -> tuple[tuple[bytes, bool], Mapping[Any, Any]]:
    """Execute a chunk; gives its records with whether there are values, and the values.

    ``files``: the digest of the run's files, and where they are.
    """
    if files is not None and not luggage.has(files[0]):
        luggage.keep(files[0], ray.get(files[1][0]))
    records, kept = chunks.execute(version, brief, chunk, inputs)
    return (records, bool(kept)), kept
