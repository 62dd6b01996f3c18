"""Where calls wait that were submitted to a Pool, until the core is given them, in order.

The core is given so many that it has always enough to do, and not more: the rest is cheaper
here.  Any thread puts in; only who runs the loop takes out, until the pool is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

from taskrun import messages as m
from taskrun.blobs import Portable
from taskrun.bunch import Bunch
from taskrun.errors import CallCancelled
from taskrun.model import Failure, Recipe

BUNCH_SECONDS: Final = 0.001  # how much work is in a bunch ...
BUNCH_ITEMS: Final = 512  # ... and at most how many calls
RECENT: Final = 5  # bunches of which it is known how long their items took ...
ASKED: Final = 64  # ... and of each, so many items


class Job(Protocol):
    """Who wants to know how a call ends; called by who runs the loop.

    ``call``: its id in the core; None as long as it has none, negative if it will not get one.
    """

    call: int | None

    def ended(self, call: Any, last: m.AttemptEnded | None, pid: int | None) -> None:
        """The call has ended; ``last`` is its last attempt, in the process ``pid``."""

    def failed(self, error: BaseException) -> None:
        """The call will not end: the pool is over."""


class Owner(Protocol):
    """Who wants to know how small calls end, which travel in bunches; called by who runs the
    loop.  ``tokens``: what it knows them by."""

    def items_ended(self, tokens: Sequence[Any], values: list[Any], row: Row) -> None:
        """They have ended, with these encoded values or Failures."""

    def items_failed(self, tokens: Sequence[Any], error: BaseException | Failure) -> None:
        """They will not end, or have not."""

    def is_withdrawn(self, token: Any) -> bool:
        """Whether it was cancelled before it was taken."""


class Row(NamedTuple):
    """Where and when items of a bunch were executed; ``wall``: when the first of them began."""

    worker: int
    pid: int | None
    attempt: int
    wall: float
    seconds: list[float]


class Single(Protocol):
    """A token that has its recipe and arguments with it, and so needs no entry: in the places
    of where it will have been executed and what comes of it."""

    _where: Any
    _value: Any


Entry = tuple[Recipe, Any, Owner | None, Any]
"""The recipe of a call, its arguments, who owns it (None: a Job), and the job or the owner's
token."""


class Inbox:
    """The calls of one Pool that wait.

    ``entries``: each as an Entry, or as a Single; ``singles`` is the owner of all Singles.
    ``bunches``: whether small calls are to be sent in bunches.
    """

    def __init__(self, *, bunches: bool) -> None:
        self.entries: deque[Entry | Single] = deque()
        self.singles: Owner | None = None
        self.bunches = bunches
        self._any_withdrawn = False
        self._untold: dict[int, Job] = {}  # by their id(): cancelled here, and not told yet
        self._paces: dict[int, float] = {}  # recipe -> seconds that one of its items takes
        self._recent: dict[int, deque[float]] = {}  # what the last bunches told of that

    def __len__(self) -> int:
        return len(self.entries)

    def _parts(self, entry: Any) -> Entry:
        if type(entry) is tuple:
            return entry
        return entry._where, entry._value, self.singles, entry

    def tokens(self) -> list[Any]:
        """The jobs and tokens of all that wait."""
        return [self._parts(entry)[3] for entry in list(self.entries)]  # others add to it

    # -- what is next -----------------------------------------------------------------

    def first(self) -> tuple[Recipe, Owner | None]:
        """The recipe and the owner of the first call."""
        recipe, _, owner, _ = self._parts(self.entries[0])
        return recipe, owner

    def next_calls(self, recipe: Recipe, room: int) -> tuple[list[Portable], list[Job]]:
        """The first calls, as long as they are of this recipe and in no bunch: their arguments,
        and their jobs."""
        entries = self.entries
        blobs: list[Portable] = []
        jobs: list[Job] = []
        while entries and len(blobs) < room and _is_job(entries[0], recipe):
            _, blob, _, job = self._parts(entries.popleft())
            if job.call is None:
                blobs.append(blob)
                jobs.append(job)
            else:
                self._drop(recipe, None, job)
        return blobs, jobs

    def next_bunches(self, recipe: Recipe, owner: Owner, room: int, workers: int) -> list[Bunch]:
        """The first calls, as long as they are of this recipe and owner, in up to ``room``
        bunches."""
        size = self._bunch_size(recipe, workers)
        bunches: list[Bunch] = []
        popleft = self.entries.popleft
        while self.entries and len(bunches) < room:
            entries: list[Any] = [popleft() for _ in range(min(size, len(self.entries)))]
            alike = self._how_many_alike(entries, recipe, owner)
            if alike < len(entries):
                self.entries.extendleft(reversed(entries[alike:]))
                del entries[alike:]
            if not entries:
                break
            if self._any_withdrawn:
                entries = self._still_wanted(entries, owner)
            if not entries:
                continue
            if owner is self.singles:
                bunches.append(Bunch(owner, entries, [entry._value for entry in entries]))
            else:
                _, items, _, tokens = zip(*entries, strict=True)
                bunches.append(Bunch(owner, tokens, items))
        return bunches

    def _how_many_alike(self, entries: list[Any], recipe: Recipe, owner: Owner) -> int:
        """How many of these, the first ones, can be one bunch."""
        count = 0
        if owner is self.singles:
            for entry in entries:
                if type(entry) is tuple or entry._where is not recipe:
                    break
                count += 1
        else:
            for entry in entries:
                if type(entry) is not tuple or entry[0] is not recipe or entry[2] is not owner:
                    break
                count += 1
        return count

    def are_few(self, recipe: Recipe) -> bool:
        """Whether all that wait are less than one bunch, if they are of this recipe."""
        pace = self._paces.get(recipe.id)
        return pace is not None and self.bunches and len(self.entries) * pace < BUNCH_SECONDS / 2

    def _bunch_size(self, recipe: Recipe, workers: int) -> int:
        """So many items as take a moment, and so few that all workers get some; one, as long as
        nobody knows what they cost."""
        pace = self._paces.get(recipe.id)
        if pace is None or pace > BUNCH_SECONDS or not self.bunches:
            return 1
        share = -(-len(self.entries) // (2 * workers))
        return max(1, min(BUNCH_ITEMS, int(BUNCH_SECONDS / max(pace, 1e-9)), share))

    def learn(self, recipe: Recipe, seconds: list[float]) -> None:
        """So long took items of a recipe, each."""
        # Without the longest of them, and of what was found last the middle: an item that had
        # to wait for its core says nothing of the next ones, but many long ones do.
        seconds = seconds[:ASKED]
        count = max(1, len(seconds) - 1)
        recent = self._recent.setdefault(recipe.id, deque(maxlen=RECENT))
        recent.append((sum(seconds) - max(seconds)) / count if len(seconds) > 1 else seconds[0])
        self._paces[recipe.id] = sorted(recent)[len(recent) // 2]

    def forget(self, recipe: int) -> None:
        """No calls of it are left."""
        self._paces.pop(recipe, None)
        self._recent.pop(recipe, None)

    # -- what is not wanted any more --------------------------------------------------

    def withdraw(self, job: Job) -> None:
        """It was cancelled, and is perhaps here: then it will not be fed."""
        job.call = -1
        self._any_withdrawn = True
        self._untold[id(job)] = job

    def tell_withdrawn(self) -> None:
        """Tell those that wait here and were cancelled; not only when their turn comes."""
        for entry in list(self.entries) if self._untold else ():
            recipe, _, owner, job = self._parts(entry)
            self._drop(recipe, owner, job)
        self._untold.clear()

    def _still_wanted(self, entries: list[Any], owner: Owner) -> list[Any]:
        parts = [self._parts(entry) for entry in entries]
        for recipe, _, _, token in parts:
            self._drop(recipe, owner, token)
        return [
            entry
            for entry, (_, _, _, token) in zip(entries, parts, strict=True)
            if not owner.is_withdrawn(token)
        ]

    def _drop(self, recipe: Recipe, owner: Owner | None, job: Any) -> None:
        """It is not to be fed, if it was cancelled; it is told so once."""
        if self._untold.pop(id(job), None) is not None:
            _tell(owner, job, withdrawn(recipe))

    def fail(self, error: BaseException) -> None:
        """None of them will end."""
        while self.entries:
            try:
                recipe, _, owner, job = self._parts(self.entries.popleft())
            except IndexError:  # another thread took it
                return
            if _is_withdrawn(owner, job):
                self._drop(recipe, owner, job)
            else:
                _tell(owner, job, error)


def withdrawn(recipe: Recipe) -> CallCancelled:
    """What those get who cancelled a call of this recipe."""
    return CallCancelled(f"{recipe.name} was cancelled: it was asked for")


def _is_withdrawn(owner: Owner | None, job: Any) -> bool:
    return job.call is not None if owner is None else owner.is_withdrawn(job)


def _tell(owner: Owner | None, job: Any, error: BaseException) -> None:
    if owner is None:
        job.failed(error)
    else:
        owner.items_failed([job], error)


def _is_job(entry: Any, recipe: Recipe) -> bool:
    return type(entry) is tuple and entry[0] is recipe and entry[2] is None
