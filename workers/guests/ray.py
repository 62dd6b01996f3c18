"""What is executed in a worker of Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taskrun.workers import chunks


def execute(
    version: str, brief: bytes, chunk: bytes, *inputs: Mapping[Any, Any]
) -> tuple[tuple[bytes, bool], Mapping[Any, Any]]:
    """Execute a chunk; gives its records with whether there are values, and the values."""
    records, kept = chunks.execute(version, brief, chunk, inputs)
    return (records, bool(kept)), kept
