"""What a worker has ended, and what it is in, in memory that outlives it.

A worker keeps the records that it has not sent yet in a small memory that it shares with
the coordinator, and beside them which attempt it is executing.  A SIGKILL at any instant
leaves both as they are: the coordinator reads from there what had ended, and knows what
had not.

The rules that make this exact:

- One word says how much of the data is valid, and is stored after the data.
- The record of an outcome is there before "executing" moves on.
- The data and their *generation* number are sent together, as one frame, straight from
  here; then the length is set to zero, and only then the generation is counted up.  So
  it is known which records of a frame were seen here before, and which here were sent.

Each word is written by one side only, in one store of eight bytes.

The data are the middle of one pickle, a list: what is put in front of the first record and
behind the last makes any number of them one pickle.  That takes a protocol in which what a
record refers to is said by numbers of its own, not counted from the pickle's beginning: 3.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
from collections.abc import Sequence
from typing import Any, Final, Protocol

from taskrun.errors import WireError

SIZE: Final = 256 * 1024
STREAMS: Final = ("stdout", "stderr")

# The words of the header, by number.  The generation comes last, so that it and the data
# are one piece, which is sent as one frame.
_EXECUTING: Final = 0
_LENGTH: Final = 1
_TAKEN: Final = 2  # and 3: of the worker's stdout and stderr
_GENERATION: Final = 7
_FRAME: Final = _GENERATION * 8
_DATA: Final = _FRAME + 8

_WORD = struct.Struct("=Q")

_PROTOCOL: Final = 3
_HEAD: Final = pickle.PROTO + bytes([_PROTOCOL]) + pickle.EMPTY_LIST + pickle.MARK
_TAIL: Final = pickle.APPENDS + pickle.STOP
_RECORDS: Final = _DATA + len(_HEAD)
_END: Final = _RECORDS + SIZE
_ALL: Final = _END + len(_TAIL)

# "Executing", from the lowest bit: how often the attempt went on after a nested call (12
# bits), its number (16; both wrap around), its call plus 1 (35), and whether it is over.
_RESUMED_MASK: Final = (1 << 12) - 1
_ATTEMPT_MASK: Final = (1 << 16) - 1
_CALL_MASK: Final = (1 << 35) - 1
_OVER: Final = 1 << 63

Executing = tuple[int, int]


class Ledger:
    """Both ends' view of the shared memory; see the module's own text."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, _ALL)  # keeps a descriptor of its own
        self._words = memoryview(self._map)[:_DATA].cast("Q")
        self._view = memoryview(self._map)
        self._map[_DATA:_RECORDS] = _HEAD
        self.used = 0

    def close(self) -> None:
        """Unmap it."""
        self._words.release()
        self._view.release()
        self._map.close()

    # -- the worker's side ------------------------------------------------------------

    def begin(self, call: int, attempt: int, resumed: int = 0) -> None:
        """From now on this attempt is being executed, for the ``resumed + 1``-th time."""
        self._words[_EXECUTING] = (
            (call + 1) << 28 | (attempt & _ATTEMPT_MASK) << 12 | resumed & _RESUMED_MASK
        )

    def end(self) -> None:
        """Nothing is being executed."""
        self._words[_EXECUTING] |= _OVER

    def append(self, record: bytes) -> bool:
        """Keep a record, made by :func:`dumps`; False where there is no room."""
        start = _RECORDS + self.used
        end = start + len(record)
        if end > _END:
            return False
        self._map[start:end] = record
        self.used = used = end - _RECORDS
        self._words[_LENGTH] = used  # valid from here on
        return True

    def frame(self) -> memoryview:
        """Everything that is kept, as the frame in which it is sent."""
        end = _RECORDS + self.used
        self._map[end : end + len(_TAIL)] = _TAIL
        return self._view[_FRAME : end + len(_TAIL)]

    def frame_of(self, record: tuple[Any, ...]) -> bytes:
        """The frame of a record that is too large to be kept; the ledger must be empty."""
        generation = self._words[_GENERATION]
        return _WORD.pack(generation) + pickle.dumps([record], pickle.HIGHEST_PROTOCOL)

    def clear(self) -> None:
        """The frame was sent."""
        self.used = 0
        self._words[_LENGTH] = 0
        self._words[_GENERATION] += 1

    @property
    def generation(self) -> int:
        """How many frames were sent."""
        return self._words[_GENERATION]

    def taken(self, stream: int) -> int:
        """What the coordinator has read of it; see :meth:`reading`."""
        return self._words[_TAKEN + stream]

    def has_taken(self, words: Sequence[int]) -> bool:
        """Whether that is what it has read of each stream."""
        return self._words[_TAKEN] == words[0] and self._words[_TAKEN + 1] == words[1]

    # -- the coordinator's side -------------------------------------------------------

    @property
    def moment(self) -> int:
        """A number for what is being executed, or for the time since something was: while it
        is the same, nothing has begun, ended or gone on."""
        return self._words[_EXECUTING]

    @property
    def executing(self) -> Executing | None:
        """The attempt that the worker is in just now, or was in when it died."""
        return executing_at(self._words[_EXECUTING])

    def reading(self, stream: int) -> None:
        """Say that the worker's output is about to be read.

        The lowest bit of a stream's word says that a read is under way, the rest counts the
        bytes that were taken.  With those that are in the Pipe, where the word is the same
        before and after these are counted, that is all that was ever written.
        """
        self._words[_TAKEN + stream] |= 1

    def have_read(self, stream: int, count: int) -> None:
        """The read is over; so many bytes were taken."""
        self._words[_TAKEN + stream] += 2 * count - 1

    def copy(self) -> tuple[int, bytes] | None:
        """The generation and the data now; None where the worker sent them meanwhile."""
        generation = self._words[_GENERATION]
        data = bytes(self._view[_RECORDS : _RECORDS + self._words[_LENGTH]])
        return (generation, data) if generation == self._words[_GENERATION] else None


def executing_at(moment: int) -> Executing | None:
    """The attempt that is executed at a :attr:`Ledger.moment`; its number in 16 bits."""
    if not moment or moment & _OVER:
        return None
    return (moment >> 28 & _CALL_MASK) - 1, moment >> 12 & _ATTEMPT_MASK


def times_at(moment: int) -> int:
    """How often what is executed at a moment went on after a nested call, in 12 bits; of a
    bunch that counts its items, too."""
    return moment & _RESUMED_MASK


class Copied(Protocol):
    """A ledger, or what somebody has told of one."""

    def copy(self) -> tuple[int, bytes] | None: ...


class Intake:
    """Takes each record of one worker once and in order, whichever way it comes.

    Every generation is sent as one frame, so the ledger's own is the next to be taken only
    when the frames of all before it have come.
    """

    def __init__(self) -> None:
        self._next = 0  # the generation of the next frame
        self._taken = 0  # so many bytes of it were taken from the ledger

    def frame(self, frame: memoryview) -> list[tuple[Any, ...]]:
        """The records of a frame that are new.  Raises WireError where it is malformed."""
        if len(frame) < 8 or _WORD.unpack_from(frame)[0] != self._next:
            raise WireError("a worker sent a frame that is not the next one")
        data: bytes | memoryview = frame[8:]
        if self._taken:
            data = _HEAD + bytes(data[len(_HEAD) + self._taken :])
        records = parse(data)
        self._next += 1
        self._taken = 0
        return records

    def look(self, ledger: Copied) -> list[tuple[Any, ...]]:
        """The new records that the worker has not sent yet; reads the ledger only."""
        copied = ledger.copy()
        if copied is None or copied[0] != self._next:
            return []
        records = parse(b"".join((_HEAD, memoryview(copied[1])[self._taken :], _TAIL)))
        # Caught while the worker clears it, it looks empty: what was taken stays taken.
        self._taken = max(self._taken, len(copied[1]))
        return records


def dumps(record: Any) -> bytes:
    """A record as it is kept: its pickle without the beginning and the end.

    Raises OverflowError where a part of it has 4 GiB or more.
    """
    return pickle.dumps(record, _PROTOCOL)[2:-1]


def parse(data: bytes | memoryview) -> list[Any]:
    """The records, and items of bunches, in a pickle.  Raises WireError where it is malformed."""
    try:
        records: list[Any] = pickle.loads(data)
    except Exception as error:
        raise WireError(f"a worker sent what is no record: {error!r}") from error
    if type(records) is not list:
        raise WireError("a worker sent what is no record")
    return records


def shared_file(size: int = _ALL) -> int:
    """A descriptor of ``size`` zero bytes of memory that other processes can map."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("taskrun")
    else:
        import tempfile  # only where there is no memfd

        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd
