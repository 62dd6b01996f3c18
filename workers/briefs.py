"""What a process that belongs to another engine is told of a run, and of the calls in it."""

from __future__ import annotations

import sys
from typing import Any, Final, NamedTuple

from taskrun.blobs import Shared

VERSION: Final = "taskrun {}, Python {}.{}".format(
    sys.modules["taskrun"].__version__,
    *sys.version_info[:2],
)

Part = tuple[int, int | None]
"""A call, and which of its value's items; None: the value itself."""


class TaskFile(NamedTuple):
    """A task file: the module that it is imported as, where it is, and what is in it."""

    module: str
    path: str
    source: bytes


class Brief(NamedTuple):
    """What is the same for all chunks of a run.

    ``run`` is its random name.  ``file``: None where there is none.  ``folder``: the working
    folder, where it is ours to say.  ``notes``: how the paths of the notes begin, ``keep``: whether
    large values stay with the engine.  ``alone``: the process executes nothing but one chunk
    at a time.  ``coordinator``: its pid, where the processes are on its machine, and to end
    with it.  ``state``: the addresses of the shared state, and a key that is for this run only.
    ``bundle``: the digest of the files that have travelled, and the task file's name among them.
    """

    run: str
    engine: str
    path: list[str]
    file: TaskFile | None
    folder: str | None
    environment: dict[str, str]
    set_by_user: dict[str, frozenset[str]]
    notes: str | None
    keep: bool
    alone: bool
    coordinator: int | None
    state: tuple[tuple[Any, ...], bytes] | None = None
    bundle: tuple[str, str] | None = None


class Apart(NamedTuple):
    """A call that runs in a kept child process: it may be ended.

    ``timeout`` is in seconds; ``retryable``: whether it is tried again when these are over.
    """

    name: str
    timeout: float | None
    retryable: bool


class Chunk(NamedTuple):
    """Some calls: TASK records of what they are calls of, and CALL records."""

    id: int
    recipes: list[tuple[Any, ...]]
    calls: list[tuple[Any, ...]]
    apart: Apart | None = None


def path_of(notes: str, chunk: int) -> str:
    """Where the notes of a chunk are, of a run whose notes begin so."""
    return f"{notes}-{chunk}"


def size_of(encoded: Any) -> int:
    """Bytes of a pickle; 0 for what is none."""
    if type(encoded) is bytes:
        return len(encoded)
    if type(encoded) is Shared:
        return sum(map(len, (*encoded.stream, *encoded.buffers)))  # type: ignore[arg-type]
    return 0
