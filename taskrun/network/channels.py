"""What is said between a coordinator and a node, by channel, and which key it goes under.

What a worker and the coordinator say to each other passes through the node unopened: the
frames of its Pipes are the messages.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final, NamedTuple

from taskrun.model import LANES
from taskrun.workers.settings import Settings

PROCESS: Final = "process"
VERSION: Final = 1
"""Of all that goes over the wire, this module's and that of the Pipes; both sides must agree."""

# -- to a node ------------------------------------------------------------------------

JOB: Final = 1  # a pickled Job; comes first
BUNDLE: Final = 2  # the files that were wanted
START: Final = 3  # pickled (workers' numbers, lane)
CALLS: Final = 4  # a frame for a worker's call Pipe
NEEDING: Final = 5  # the same, when these values are there: NUMBERS, then the frame
CONTROL: Final = 6  # a frame for a worker's control Pipe
SIGNAL: Final = 7  # SIGNALLED
VALUE: Final = 8  # a value, to be kept for workers; the key says its number
FORGET: Final = 9  # a value is not needed any more
DRAIN: Final = 10  # finish what you have, take nothing more, and leave

# -- to the coordinator ---------------------------------------------------------------

# CALLS and CONTROL: a frame from a worker's Pipe.
WANT: Final = 21  # the files of the bundle
PREPARED: Final = 22  # the folder in which values are; from now on workers can be started
ENDED: Final = 24  # pickled (how, moment of the ledger, its last copy | None)
LEDGER: Final = 25  # what a worker has ended and not sent: GENERATION, then records
MOMENT: Final = 26  # WORD: what a worker is executing; see Ledger.moment
OUTPUT: Final = 27  # pickled ((call, attempt) | None, stream, bytes)
NOTICE: Final = 28  # text for the person
DRAINING: Final = 29  # finishes what it has, and takes nothing more
UNABLE: Final = 30  # text: why this node cannot take part

# -- both ways: connections of workers to the shared state ----------------------------

OPEN: Final = 40  # a worker has connected
PASS: Final = 41  # bytes
CLOSE: Final = 42  # one side has closed

# -- keys -----------------------------------------------------------------------------

NODE: Final = 0
_VALUES: Final = 1 << 31
_STATES: Final = 1 << 30
_CONTROL: Final = 1


def of_worker(worker: int) -> int:
    """The key of a worker's call Pipe, its outputs and its end."""
    return worker << 1


def of_control(worker: int) -> int:
    """The key of its control Pipe, which overtakes the other one."""
    return worker << 1 | _CONTROL


def worker_of(key: int) -> int:
    """The worker of either key."""
    return key >> 1


def of_value(number: int) -> int:
    """The key of a value."""
    return _VALUES | number


def of_state(connection: int) -> int:
    """The key of a connection to the shared state."""
    return _STATES | connection


def number_of(key: int) -> int:
    """The number of a value or of a connection, by its key."""
    return key & (_STATES - 1)


# -- layouts --------------------------------------------------------------------------

WORD: Final = struct.Struct("!Q")
GENERATION: Final = WORD
SIGNALLED: Final = struct.Struct("!iqq")  # number; if it executes this: call and attempt, or -1
COUNT: Final = struct.Struct("!I")


def pack_needs(numbers: list[int], frame: bytes | memoryview) -> bytes:
    """A NEEDING message."""
    return b"".join((COUNT.pack(len(numbers)), *map(COUNT.pack, numbers), frame))


def unpack_needs(data: memoryview) -> tuple[list[int], memoryview]:
    """The values' numbers, and the frame."""
    (count,) = COUNT.unpack_from(data)
    end = COUNT.size * (count + 1)
    numbers = [number for (number,) in COUNT.iter_unpack(data[COUNT.size : end])]
    return numbers, data[end:]


class Job(NamedTuple):
    """What a node is told of a run.

    ``settings``: as for the coordinator's own workers; the node puts in what is its own.
    ``bundle``: the digest of the files that its workers need, None: none.  ``file``: the
    task file's place among them.
    """

    settings: Settings
    bundle: str | None
    file: str | None
    state_key: bytes


class Offer(NamedTuple):
    """What a node has to offer.

    ``slots`` is its ``-j``: so many calls at a time in the lane ``process``.  ``lanes``: how its
    workers may execute calls; without ``process``, its slots are workers of these.
    """

    name: str
    slots: int
    resources: dict[str, float]
    tags: tuple[str, ...] = ()
    lanes: tuple[str, ...] = LANES

    @property
    def processes(self) -> bool:
        """Whether its slots are for the lane ``process``."""
        return PROCESS in self.lanes

    @property
    def own_lanes(self) -> list[str]:
        """Those that its slots are for, where they are not for processes; else none."""
        return [] if self.processes else list(self.lanes)


def offer_from(said: Any) -> Offer:
    """The Offer in a message of the other side.  Raises ValueError."""
    try:
        name, slots = str(said["name"]), int(said["slots"])
        resources = {str(key): float(value) for key, value in said["resources"].items()}
        tags, lanes = (tuple(map(str, said[each])) for each in ("tags", "lanes"))
        offer = Offer(name, slots, resources, tags, lanes)
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a node says what no node says: {error!r}") from None
    sound = all(0 <= value < math.inf for value in offer.resources.values())
    known = bool(lanes) and set(lanes) <= set(LANES)
    if not (0 < offer.slots <= 100_000 and sound and known):
        raise ValueError("a node offers what no node can have")
    if not (offer.name.isprintable() and 0 < len(name) < 200):
        raise ValueError("a node's name is printable, and has 1 to 199 characters")
    return offer
