"""The notes of chunks: what calls have to say, while they are executed on this machine.

A worker writes into a chunk's file the same bytes that it returns in the end (see
``workers.guest``), so what was read here is left out of these.
"""

from __future__ import annotations

import os
import pickle
from typing import Any

from taskrun import messages as m
from taskrun import places
from taskrun.errors import RunError
from taskrun.model import Left
from taskrun.wire import Decoder, header
from taskrun.workers.briefs import path_of


class Sent:
    """A chunk that the engine has.

    ``calls``: those that have not ended, by id.  ``at``: the AT record of the last that
    began; ``began``: the ids of all that did.  ``read``: bytes of its notes that were taken;
    ``silent``: only its end tells more.  ``apart``: it runs in a kept child process.
    """

    def __init__(self, id: int, calls: dict[int, Any], apart: bool, since: float) -> None:
        self.id = id
        self.calls = calls
        self.apart = apart
        self.since = since
        self.handle: Any = None
        self.at: tuple[Any, ...] | None = None
        self.began: set[int] = set()
        self.said: tuple[Any, ...] | None = None
        self.read = 0
        self.silent = self.killed = False
        self.interrupted: set[int] = set()

    def unread(self, records: bytes) -> list[tuple[Any, ...]]:
        """The records of the whole chunk that the notes have not told already."""
        return [pickle.loads(frame) for frame in Decoder().feed(records[self.read :])]

    def begun(self, *, noted: bool) -> tuple[list[Any], list[Any]]:
        """The calls that have begun, and those that have not: all count as begun where
        nothing was noted."""
        calls = list(self.calls.values())
        if not noted:
            return calls, []
        return (
            [call for call in calls if call.id in self.began],
            [call for call in calls if call.id not in self.began],
        )


class Notes:
    """The notes of a run: a file per chunk, in this process's own place (see ``places``), so
    that what a killed coordinator leaves is removed by the next."""

    def __init__(self) -> None:
        """Raises RunError where there is no place for them."""
        try:
            self.path = places.reserve("notes")
        except OSError as error:
            raise RunError(
                f"{error.filename or 'shared memory'}: what calls have to say cannot be written "
                f"there ({error.strerror or error}); TASKRUN_SHM names another folder"
            ) from error

    def read(self, sent: Sent, *, last: bool = False) -> list[tuple[Any, ...]]:
        """What is new in the notes of a chunk, up to what only its end can tell; the ``last``
        time all but that: its worker has died, and there is no such end."""
        if sent.silent and not last:
            return []
        try:
            with open(path_of(self.path, sent.id), "rb") as file:
                file.seek(sent.read)
                data = file.read()
        except FileNotFoundError:
            return []  # it has not begun
        records = []
        for frame in Decoder().feed(data):
            record = pickle.loads(frame)
            sent.silent = _is_for_the_end(sent, record)
            if sent.silent and not last:
                break
            if sent.silent:
                continue
            sent.read += len(header(len(frame))) + len(frame)
            records.append(record)
        return records

    def forget(self, sent: Sent) -> None:
        """The chunk is over."""
        try:
            os.unlink(path_of(self.path, sent.id))
        except FileNotFoundError:
            pass  # it never began

    def close(self) -> None:
        """Remove them all."""
        places.release(self.path)


def _is_for_the_end(sent: Sent, record: tuple[Any, ...]) -> bool:
    """Whether the chunk's end says more of it: what was too long to note; which values stay
    with the engine; why a call in a kept child process was ended."""
    if record[0] != m.ENDED:
        return bool(record[0] == m.SILENT)
    items = record[5] or ()
    return sent.apart or isinstance(record[4], Left) or any(isinstance(i, Left) for i in items)
