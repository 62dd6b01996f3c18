"""Events into the scheduler core, commands out of it, and the records on the Pipes.

Events and commands are frozen.  What happens once per call is batched: one ``Finished``
carries many reports, so that the cost of a message is shared by the calls in it.

The records on a Pipe are plain tuples, because hundreds of thousands of them cross every
second; each kind is described here once and built and taken apart in one place each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from taskrun.blobs import Portable
from taskrun.bunch import Bunch
from taskrun.demand import Loan
from taskrun.model import Encoded, Failure, Recipe

CallId: TypeAlias = int
WorkerId: TypeAlias = int
Key: TypeAlias = bytes

# -- records on the Pipes -------------------------------------------------------------
#
# A record is a tuple whose first item says its kind.  A frame to a worker, and both ways on
# the control Pipe, is one pickled list of records; a frame from a worker on the call Pipe is
# a piece of its ledger: a generation number, then one pickled list of records.

# To a worker, on the call Pipe:
TASK = "task"  # (TASK, recipe id, name, reference, blob | None, names | None, constants, flags)
FORGET = "forget"  # (FORGET, recipe id)   no call of it will come
CALL = "call"  # (CALL, call, attempt, recipe id, index, args, units | None)   execute
NESTED = "nested"  # as CALL: execute it on top of the attempt that waits, or give it back
DELIVER = "deliver"  # (DELIVER, call | None, {key: Encoded | Failure})   awaited outcomes
QUIT = "quit"  # (QUIT, whether to wait for threads)   finish what per_worker made, and exit

# To a worker, on the control Pipe:
REPORT = "report"  # (REPORT, count)   flush; say what runs; give back up to count calls
#                                    (None: no word about them)
INTERRUPT = "interrupt"  # (INTERRUPT, call, attempt, reason)
PING = "ping"  # (PING, token)
STACK = "stack"  # (STACK, token, call | None)

# From a worker, on the call Pipe, in the order in which they happened:
READY = "ready"  # (READY, pid)
BEGAN = "began"  # (BEGAN, call, attempt, wall clock, label | None)
ENDED = "ended"  # (ENDED, *Report)
DEFINE = "define"  # (DEFINE, reference, name, facts)   before the first SUBMIT of a task
SUBMIT = "submit"  # (SUBMIT, call, attempt, key, reference, args, keys)
WAIT = "wait"  # (WAIT, call, attempt, keys, any_of)
RESUME = "resume"  # (RESUME, call, attempt)   no longer waits (time is up)
CANCEL = "cancel"  # (CANCEL, call, attempt, key)   a future was cancelled
PROGRESS = "progress"  # (PROGRESS, call, attempt, done, total)
GAVE_BACK = "gave back"  # (GAVE_BACK, [(call, attempt), ...], (call, attempt, count) | None)
#                                    whole calls, and the last items of the bunch that it is in
ITEMS = "items"  # (ITEMS, call, attempt, wall clock)   what follows are plain values and the
#                                    seconds each took: items of a bunch that have ended
ITEM = "item"  # (ITEM, call, attempt, Encoded | Failure, wall clock, seconds)   one of them
YIELDED = "yielded"  # (YIELDED, call, attempt, first, [Encoded, ...])   items of a generator
OUTPUT = "output"  # (OUTPUT, call, attempt, stream, bytes)   where calls share their process
AT = "at"  # (AT, call, attempt, wall clock, pid)   in the notes of a chunk: it begins
SILENT = "silent"  # (SILENT,)   in the notes of a chunk: here was a record too long for them
RETIRE = "retire"  # (RETIRE, reason)   finishes what it has, and wants no more calls
NOTICE = "notice"  # (NOTICE, text)   something that people should know

# From a worker, on the control Pipe:
PONG = "pong"  # (PONG, token)
STACK_IS = "stack is"  # (STACK_IS, token, text)

# Among the keys of a WAIT: something that is no call, until a RESUME.
OUTSIDE = b""  # meanwhile the worker may execute any other call on top
OUTSIDE_ALONE = b"\0"  # ... it may not: what comes must not wait for that call

# Among them, too: another thread of the attempt waits already, for what its WAIT said.
ALSO = b"\1"

# What these are made of:
#
# reference   (module, qualname) of a Task, or the digest of its cloudpickle blob
# names       the parameters that CALL's args fill, in order; None: args is the tuple
#             (pickle of (args, kwargs), {key: Encoded}) of a submitted call
# constants   {parameter: Encoded}, the same for every call (set by -p)
# index       int, or a tuple of them for a product: the call's place in its fan-out;
#             None: a single call.  A submitted call's ordinal, shown as ``work#12``
# args        a list: the items of a bunch (see ``taskrun.bunch``), each a plain value, a tuple
#             of such, or pickled (args, kwargs); its function gives Encoded values
# units       what the call got of resources: {"gpu": [0, 1], "memory": 4e9}
# key         identifies a call among its parent's children
# facts       options of a submitted task, {field of Recipe: value}, and its blob

# Flags of a TASK.
SAY_BEGAN = 1  # report BEGAN at once (the task has a timeout or a label)
WANT_ITEMS = 2  # encode the value's items too: an each() will consume them
RENDER = 4  # the value is to be str(value): somebody prints it
DROP_VALUE = 8  # nobody consumes the value: check that it can travel, but do not send it
STOPS = 16  # its failure stops the run: begin nothing more that was sent in advance


class Report(NamedTuple):
    """How an attempt ended, as the worker tells it.

    ``kind`` and ``payload``: ``value`` (Encoded); ``held`` ((pickle | None, keys): a value
    with futures in it, None where it *is* one future); ``error`` (Failure, and whether
    retry_on matches); ``retry`` (seconds, Failure); ``skip`` (reason).
    ``items``: the value's items, each Encoded, where they were wanted; of a ``held`` value
    each a pair (pickle | None, keys), as the value itself; otherwise what a generator has
    yielded before.
    ``began`` is wall clock, ``seconds`` the duration.  ``wrote``: C level or subprocess
    output preceded the end, so the output Pipes hold this attempt's end marker.
    """

    call: CallId
    attempt: int
    kind: str
    payload: Any
    items: list[Encoded] | None
    began: float
    seconds: float
    wrote: bool


# -- events ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker can take calls of a lane, ``slots`` of them at a time; ``node``: the machine it
    is on, where that is another one."""

    worker: WorkerId
    pid: int = 0
    lane: str = "process"
    slots: int = 1
    node: str = ""


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone.  ``executing`` is the attempt it was in, if any; what it had not
    begun runs elsewhere.  ``reason`` reads like ``killed by SIGKILL``."""

    worker: WorkerId
    reason: str
    executing: tuple[CallId, int] | None
    last_output: str = ""
    lane: str = "process"


@dataclass(frozen=True, slots=True)
class Retiring:
    """A worker finishes the calls that it has; it is to get no more."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class Capacity:
    """So many slots there are from now on, on all nodes together.  ``nodes``: what the other
    machines have of resources.  ``lanes``: how many workers of a lane machines have that are
    there for it alone.  ``places``: what a server calls the nodes."""

    slots: int
    nodes: dict[str, dict[str, float]] = field(default_factory=dict)
    lanes: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lent:
    """A server lends resources, or wants some back."""

    loan: Loan


@dataclass(frozen=True, slots=True)
class NoMoreWorkers:
    """For now no more than so many workers of this lane can be had."""

    lane: str
    workers: int


@dataclass(frozen=True, slots=True)
class Began:
    """An attempt has begun; starts its timeout.  ``age``: so many seconds ago, 0.0 where its
    worker's clock may be another one."""

    worker: WorkerId
    call: CallId
    attempt: int
    wall: float
    label: str | None = None
    age: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """Attempts ended: plain tuples laid out as :class:`Report`."""

    worker: WorkerId
    reports: list[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Items:
    """The next items of a bunch have ended, with these values or Failures; ``wall`` is when
    the first of them began, ``seconds`` how long each took."""

    worker: WorkerId
    call: CallId
    attempt: int
    values: list[Encoded]
    seconds: list[float]
    wall: float


@dataclass(frozen=True, slots=True)
class Yielded:
    """A running generator has produced items, from place ``first`` on."""

    call: CallId
    attempt: int
    first: int
    items: list[Encoded]


@dataclass(frozen=True, slots=True)
class GaveBack:
    """A worker returned calls that it had not begun; ``cut``: and so many of the last items
    of a bunch, (call, attempt, count)."""

    worker: WorkerId
    calls: list[tuple[CallId, int]]
    cut: tuple[CallId, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Submitted:
    """A running attempt made new calls: (key, recipe, pickled arguments, keys of the futures
    among the arguments)."""

    parent: CallId
    attempt: int
    calls: list[tuple[Key, Recipe, Portable, tuple[Key, ...]]]


@dataclass(frozen=True, slots=True)
class Fed:
    """New calls from outside the run's graph (``taskrun map``, a Pool): pickled (args, kwargs),
    or bunches.  ``labels``: what people see of them, until the task says that."""

    recipe: Recipe
    arguments: list[Portable] | list[Bunch]
    labels: Sequence[str] = ()
    last: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """A bunch was sent to the spare worker, as the first attempt of a reserved call."""

    worker: WorkerId
    call: CallId
    recipe: Recipe
    bunch: Bunch


@dataclass(frozen=True, slots=True)
class Waiting:
    """A running attempt waits for futures and lends its slot."""

    worker: WorkerId
    call: CallId
    attempt: int
    keys: tuple[Key, ...]
    any_of: bool


@dataclass(frozen=True, slots=True)
class Resumed:
    """A waiting attempt goes on, though what it waited for is not there (time was up)."""

    worker: WorkerId
    call: CallId
    attempt: int


@dataclass(frozen=True, slots=True)
class CancelCalls:
    """Cancel these calls, queued or running, with all that needs them."""

    calls: tuple[CallId, ...]
    reason: str = "cancelled"


@dataclass(frozen=True, slots=True)
class CancelItems:
    """Cancel those items of a bunch that have these tokens."""

    call: CallId
    tokens: list[Any]


@dataclass(frozen=True, slots=True)
class CancelChild:
    """A running attempt cancels a call that it submitted."""

    parent: CallId
    attempt: int
    key: Key


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop the run: start nothing more but ``always=`` tasks, interrupt what runs."""

    reason: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Start nothing new, or go on again."""

    paused: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The run cannot go on (restart limit, engine lost): everything ends now."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event: TypeAlias = (
    WorkerReady
    | WorkerLost
    | Retiring
    | Capacity
    | Lent
    | Began
    | Finished
    | Items
    | Yielded
    | GaveBack
    | Submitted
    | Fed
    | Sent
    | Waiting
    | Resumed
    | CancelCalls
    | CancelItems
    | CancelChild
    | Stop
    | Pause
    | GiveUp
    | NoMoreWorkers
    | Tick
)

# -- commands -------------------------------------------------------------------------
#
# ``calls`` are the core's own Call objects, which the engine reads and never changes.


@dataclass(frozen=True, slots=True)
class StartWorkers:
    """So many more workers of a lane are wanted; ``node``: on that machine, since only there
    is what a call needs."""

    count: int
    lane: str = "process"
    node: str | None = None


@dataclass(frozen=True, slots=True)
class StopWorker:
    """This worker is not needed any more."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class Assign:
    """Send these calls down a worker's call Pipe, in this order.

    ``nested``: the worker waits for them and runs them itself.
    """

    worker: WorkerId
    calls: list[Any]
    nested: bool = False


@dataclass(frozen=True, slots=True)
class Reclaim:
    """Ask a worker to give back up to ``count`` calls that it has not begun, and to say
    what it is executing."""

    worker: WorkerId
    count: int


@dataclass(frozen=True, slots=True)
class Interrupt:
    """End a running attempt: interrupt, then TERM, then KILL after a grace."""

    worker: WorkerId
    call: CallId
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Deliver:
    """Tell a waiting attempt how its futures ended.

    ``call`` says which attempt in the worker; without it, the innermost that submitted the
    key gets the outcome (calls of two parents may have the same key).
    """

    worker: WorkerId
    outcomes: dict[Key, Encoded | Failure]
    call: CallId | None = None


@dataclass(frozen=True, slots=True)
class CallsAdded:
    """For observers: new calls are part of the run, and ``to_come`` more are known of."""

    calls: list[Any]
    to_come: int


class ItemsEnded(NamedTuple):
    """For who fed a bunch: its items from place ``first`` on have ended, in the process
    ``pid``; see :class:`Items`."""

    recipe: Recipe
    bunch: Bunch
    first: int
    event: Items
    pid: int


class ItemsCancelled(NamedTuple):
    """For who fed a bunch: these items are not going to begin."""

    recipe: Recipe
    bunch: Bunch
    tokens: list[Any]


class AttemptEnded(NamedTuple):
    """For observers: an attempt ended.  ``call`` carries the rest; ``outcome`` is one of
    value, error, lost, timeout, cancelled, retry, skip; ``again`` says in how many seconds
    it is tried again (None: it is not)."""

    call: Any
    attempt: int
    outcome: str
    failure: Failure | None
    began: float
    seconds: float
    worker: WorkerId | None
    again: float | None


class CallEnded(NamedTuple):
    """For observers: a call reached its end; ``call.state`` says which."""

    call: Any


class Succeeded(NamedTuple):
    """For observers, in place of an AttemptEnded and a CallEnded for each: attempts gave their
    values, with nothing special about them, and with that their calls ended."""

    worker: WorkerId
    calls: list[Any]

    def attempt(self, call: Any) -> AttemptEnded:
        """How the attempt of one of them ended."""
        return AttemptEnded(
            call, call.attempt, "value", None, call.wall, call.seconds, self.worker, None
        )


@dataclass(frozen=True, slots=True)
class RunEnded:
    """Nothing is left to do.  ``status`` is the exit status the core can know: 0, 1 or 3."""

    status: int
    reason: str = ""


Command: TypeAlias = (
    StartWorkers
    | StopWorker
    | Assign
    | Reclaim
    | Interrupt
    | Deliver
    | CallsAdded
    | ItemsEnded
    | ItemsCancelled
    | AttemptEnded
    | CallEnded
    | Succeeded
    | RunEnded
)
