"""A call, and the few states that it goes through.

    waiting -> ready -> running -> ok | failed | skipped | cancelled
                  ^        |
                  |        +-> held       its function returned futures; they are awaited
                  +-- sleeping <+         it is tried again after a pause

``running`` means assigned to a worker: begun, or next in its queue.  A call ends once;
the four final states are never left.
"""

from __future__ import annotations

from typing import Any, Final

from taskrun.bunch import Bunch
from taskrun.model import Encoded, Failure, Recipe

WAITING: Final = "waiting"
READY: Final = "ready"
RUNNING: Final = "running"
SLEEPING: Final = "sleeping"
HELD: Final = "held"
OK: Final = "ok"
FAILED: Final = "failed"
SKIPPED: Final = "skipped"
CANCELLED: Final = "cancelled"

FINAL: Final = frozenset((OK, FAILED, SKIPPED, CANCELLED))


def both_names(name: str, label: str | None) -> str:
    """What people see who may want to ask again, by either: the label, and the name behind it."""
    return name if label in (None, name) else f"{label} ({name})"


class Call:
    """One invocation of a task with its arguments.

    ``index`` is its place in its fan-out (None, int, or a tuple for a product); for a
    submitted call its ordinal.  ``attempt`` counts tries from 1; reports of any other
    attempt are stale.  ``needs`` counts the inputs that have not ended yet.
    """

    __slots__ = (
        "attempt",  # the current try; 0: not tried yet
        "began",  # when the current attempt is known to have begun, else None
        "blob",  # of a submitted call: its pickled (args, kwargs), or a Bunch
        "cause",  # the call because of which this one was skipped or cancelled
        "children",  # {key: Call} submitted by this one, until it ends
        "dependants",  # calls that take this one's value
        "ending",  # why the running attempt was interrupted: "timeout", "cancelled", or None
        "expansions",  # the families.Expansions that wait for this call's items
        "failure",  # the last attempt's Failure
        "family",  # the families.Family of a static call; None: submitted
        "generation",  # the attempt of the parent that last asked for this child
        "id",
        "index",
        "inputs",  # of a submitted call: {key: Call} of the futures in its arguments
        "items",  # the value's items, each encoded, for each()
        "key",
        "label",
        "needs",
        "parent",
        "recipe",
        "refused",  # delivered failures: the parent saw this call fail
        "seconds",  # the last attempt's duration
        "state",
        "teardown",  # runs though the run is being stopped: always=, or below such a call
        "units",  # what it holds of resources
        "users",  # how many may still ask for the value
        "value",
        "wall",  # wall clock at the current attempt's begin, as its worker saw it
        "watchers",  # the workforce.Waits of running attempts that wait for this call
        "worker",
    )

    def __init__(
        self,
        id: int,
        recipe: Recipe,
        index: Any,
        family: Any = None,
        parent: Call | None = None,
        key: bytes = b"",
    ) -> None:
        self.id = id
        self.recipe = recipe
        self.index = index
        self.family = family
        self.parent = parent
        self.key = key
        self.state: str = WAITING
        self.teardown: bool = recipe.always or (parent is not None and parent.teardown)
        self.attempt = 0
        self.needs = 0
        self.users = 0
        self.dependants: list[Call] | None = None
        self.expansions: list[Any] | None = None
        self.children: dict[bytes, Call] | None = None
        self.inputs: dict[bytes, Call] | None = None
        self.watchers: list[Any] | None = None
        self.blob: Any = None  # a pickle: bytes, or blobs.Shared; or a Bunch
        self.value: Encoded = None
        self.items: list[Encoded] | None = None
        self.failure: Failure | None = None
        self.cause: Call | None = None
        self.label: str | None = None
        self.worker: int | None = None
        self.began: float | None = None
        self.ending: str | None = None
        self.units: dict[str, Any] | None = None
        self.generation = 0
        self.seconds = 0.0
        self.wall = 0.0
        self.refused = False

    @property
    def name(self) -> str:
        """``total``, ``fetch[3]``, ``d[1,2]``; of a submitted call ``work#12``."""
        if self.index is None:
            return self.recipe.name
        if self.family is None:
            return f"{self.recipe.name}#{self.index}"
        if type(self.index) is tuple:
            places = [str(place) for place in self.index] + ["*"] * self.placeholder
            return f"{self.recipe.name}[{','.join(places)}]"
        return f"{self.recipe.name}[{self.index}]"

    @property
    def placeholder(self) -> bool:
        """Whether it stands for the calls of a fan-out that nobody can count."""
        return self.needs < 0

    @property
    def is_to_blame(self) -> bool:
        """Whether it failed, or was cancelled other than with what it needs."""
        return self.state == FAILED or (self.state == CANCELLED and self.cause is None)

    @property
    def tolerated(self) -> bool:
        """Whether those whom its failure concerns take it: all its consumers; of a submitted
        call its parent, who was told, or cancelled it, and yet ended well, or fails and is
        tolerated in turn."""
        call = self
        while call.family is None and call.parent is not None:
            if not call.refused or call.parent.state in (OK, SKIPPED):
                return call.refused
            if call.parent.state != FAILED:
                return False
            call = call.parent
        return call.family is not None and call.family.tolerated

    @property
    def title(self) -> str:
        """What people see: the label, where the task has one."""
        return self.label or self.name

    @property
    def verdict(self) -> str:
        """How it ended, behind its name: ``failed``, ``was skipped``."""
        return f"was {self.state}" if self.state in (SKIPPED, CANCELLED) else self.state

    def arguments(self) -> Any:
        """What the worker needs to build the arguments; see ``messages.CALL``."""
        if self.family is not None:
            index, wires = self.index, self.family.wires
            if len(wires) == 1:
                return (wires[0].fetch(index),)
            return tuple([wire.fetch(index) for wire in wires])
        if type(self.blob) is Bunch:
            return self.blob.waiting()
        links = {key: call.outcome() for key, call in (self.inputs or {}).items()}
        return (self.blob, links)

    def outcome(self) -> Encoded | Failure:
        """The value, or how it ended instead."""
        return self.value if self.state == OK else self.ended_as()

    def ended_as(self) -> Failure:
        """How a call that did not succeed ended, as a Failure."""
        if self.failure is not None:
            return self.failure
        if self.state == CANCELLED:
            return Failure("cancelled", "CallCancelled", f"{self.title} was cancelled")
        why = f", because {self.cause.title} {self.cause.verdict}" if self.cause else ""
        return Failure("skipped", "CallSkipped", f"{self.title} was skipped{why}")

    def __repr__(self) -> str:
        return f"<call {self.id} {self.name} {self.state} attempt {self.attempt}>"
