"""The objects that clients wait for: queues, locks, semaphores, events and barriers.

An operation that cannot be done at once is parked: the client is told so, and gets its
answer when another client's operation has made it possible.  Nobody waits here.  Clients
are served in the order in which they came.

Locks and semaphores are leased: whoever holds one is known by its *owner*, a call's
attempt or a client outside, and what it holds is free again when the owner has ended.
"""

from __future__ import annotations

import queue
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, Protocol

from taskrun.errors import StateError
from taskrun.state.kinds import CLEARED, DELETED, SET, Ear, Hosted, _check_stored
from taskrun.state.stored import Stored
from taskrun.state.wire import ERROR, OK, PARKED, Owner, Reply

DONE: Final[Reply] = (OK, None)


class Client(Protocol):
    """Who asks; it waits for one thing at a time."""

    wait: Wait | None
    undo: Callable[[], object] | None
    """Takes back what was given to it, until it has acknowledged that."""
    acknowledges: bool

    def answer(self, reply: Reply) -> object:
        """Take the answer to a parked operation, later; on any thread."""


class Wait:
    """A client's parked operation, and what it would give or take."""

    __slots__ = ("client", "detail", "owner")

    def __init__(self, client: Client, owner: Owner | None = None, detail: Any = None) -> None:
        self.client = client
        self.owner = owner
        self.detail = detail
        client.wait = self

    def end(self, reply: Reply) -> None:
        self.client.wait = None
        self.client.answer(reply)


class Waits:
    """Parked operations, the first first.  Those that were withdrawn are passed over."""

    def __init__(self) -> None:
        self._waits: deque[Wait] = deque()
        self._tidy_at = 16

    def add(self, wait: Wait) -> None:
        if len(self._waits) >= self._tidy_at:
            self._waits = deque(self)  # many may have been withdrawn
            self._tidy_at = 2 * len(self._waits) + 16
        self._waits.append(wait)

    def __iter__(self) -> Iterator[Wait]:
        return (wait for wait in self._waits if wait.client.wait is wait)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def first(self) -> Wait | None:
        while self._waits:
            if self._waits[0].client.wait is self._waits[0]:
                return self._waits[0]
            self._waits.popleft()
        return None

    def take(self) -> Wait | None:
        wait = self.first()
        if wait is not None:
            self._waits.popleft()
        return wait

    def refuse(self, owner: Owner) -> None:
        """Those of ``owner``, which has ended, wait no more."""
        for wait in [wait for wait in self if wait.owner == owner]:
            wait.end((ERROR, ("StateError", (f"{describe(owner)} has ended",))))

    def end_all(self, reply: Reply) -> None:
        while (wait := self.take()) is not None:
            wait.end(reply)


class Queue(Hosted):
    """Values, first in, first out; at most ``maxsize`` of them, if that is not 0."""

    kind = "queue"

    def __init__(self, name: str, options: tuple[Any, ...], ears: list[Ear]) -> None:
        super().__init__(name, options, ears)
        self._maxsize = _number(options[0], least=0) if options else 0
        self._items: deque[tuple[int, Stored]] = deque()
        self._last = 0  # number of the last item put in
        self._front = 0  # ... and of the last that was put back
        self._getters = Waits()
        self._putters = Waits()

    def __len__(self) -> int:
        return len(self._items)

    def _is_full(self) -> bool:
        return 0 < self._maxsize <= len(self._items)

    def put(self, client: Client, value: Stored, parks: bool) -> Reply:
        _check_stored(value)
        if self._is_full():
            if not parks:
                raise queue.Full
            self._putters.add(Wait(client, detail=value))
            return PARKED, None
        self._put(value)
        return DONE

    def put_many(self, client: Client, values: list[Stored]) -> Reply:
        """All of them, or none."""
        for value in values:
            _check_stored(value)
        if self._maxsize:
            room = self._maxsize + len(self._getters) - len(self._items)
            if len(values) > room:
                raise queue.Full
        for value in values:
            self._put(value)
        return DONE

    def _put(self, value: Stored) -> None:
        self._last += 1
        getter = self._getters.take()
        if getter is not None:
            self._give(getter.client, self._last, value)
            getter.end((OK, value))
            return
        self._items.append((self._last, value))
        self.tell(SET, self._last, value)

    def get(self, client: Client, parks: bool) -> Reply:
        if not self._items:
            if not parks:
                raise queue.Empty
            self._getters.add(Wait(client))
            return PARKED, None
        number, value = self._items.popleft()
        self.tell(DELETED, number)
        self._give(client, number, value)
        self._fill()
        return OK, value

    def _give(self, client: Client, number: int, value: Stored) -> None:
        if client.acknowledges:
            client.undo = partial(self.put_back, number, value)

    def _fill(self) -> None:
        while not self._is_full() and (putter := self._putters.take()) is not None:
            self._put(putter.detail)
            putter.end(DONE)

    def put_back(self, number: int | None, value: Stored) -> None:
        """Its getter is gone: it is the first again."""
        if number is None:
            self._front -= 1
            number = self._front
        getter = self._getters.take()
        if getter is not None:
            self._give(getter.client, number, value)
            getter.end((OK, value))
            return
        self._items.appendleft((number, value))
        self.tell(SET, number, value)

    def size(self, client: Client) -> Reply:
        return OK, len(self._items)

    def full(self, client: Client) -> Reply:
        return OK, self._is_full()

    def exported(self) -> Any:
        return [value for _, value in self._items]

    def restore(self, rows: Iterable[tuple[Any, Stored]]) -> None:
        for number, value in sorted(rows, key=lambda row: int(row[0])):
            self._last = max(self._last, number)
            self._front = min(self._front, number)
            self._items.append((number, value))
            self.tell(SET, number, value)


class Lock(Hosted):
    """One holder: an owner in a place (a thread, or a coroutine); it may come again."""

    kind = "lock"

    def __init__(self, name: str, options: tuple[Any, ...], ears: list[Ear]) -> None:
        super().__init__(name, options, ears)
        self._holder: tuple[Owner, Any] | None = None
        self._depth = 0
        self._waits = Waits()

    def __len__(self) -> int:
        return len(self._waits)

    def acquire(self, client: Client, owner: Owner, place: Any, parks: bool) -> Reply:
        if self._holder in (None, (owner, place)):
            self._take(client if parks else None, owner, place)
            return OK, True
        if not parks:
            return OK, False
        self._waits.add(Wait(client, owner, place))
        return PARKED, self._holder

    def _take(self, client: Client | None, owner: Owner, place: Any) -> None:
        self._holder = owner, place
        self._depth += 1
        if client is not None and client.acknowledges:
            client.undo = partial(self._undo, owner, place)

    def _undo(self, owner: Owner, place: Any) -> None:
        if self._holder == (owner, place):
            self._release()

    def release(self, client: Client, owner: Owner, place: Any) -> Reply:
        if self._holder != (owner, place):
            held = "is not held" if self._holder is None else "is held by somebody else"
            raise RuntimeError(f"release of state lock {self.name!r}, which {held}")
        self._release()
        return DONE

    def _release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self._pass_on()

    def _pass_on(self) -> None:
        self._holder, self._depth = None, 0
        wait = self._waits.take()
        if wait is not None:
            assert wait.owner is not None
            self._take(wait.client, wait.owner, wait.detail)
            wait.end((OK, True))

    def locked(self, client: Client) -> Reply:
        return OK, self._holder is not None

    def owner_ended(self, owner: Any) -> None:
        self._waits.refuse(owner)
        if self._holder is not None and self._holder[0] == owner:
            self._pass_on()

    def exported(self) -> Any:
        return {"holder": self._holder[0] if self._holder else None, "waiting": len(self._waits)}


class Semaphore(Hosted):
    """So many permits at a time."""

    kind = "semaphore"

    def __init__(self, name: str, options: tuple[Any, ...], ears: list[Ear]) -> None:
        super().__init__(name, options, ears)
        if not options:
            raise StateError(f"there is no semaphore {name!r} yet: say how many permits it has")
        self._permits = _number(options[0], least=1)
        self._held: Counter[Owner] = Counter()
        self._free = self._permits
        self._waits = Waits()

    def __len__(self) -> int:
        return int(self._free)

    def acquire(self, client: Client, owner: Owner, place: Any, parks: bool) -> Reply:
        if self._free:
            self._take(client if parks else None, owner)
            return OK, True
        if not parks:
            return OK, False
        self._waits.add(Wait(client, owner))
        return PARKED, None

    def _take(self, client: Client | None, owner: Owner) -> None:
        self._free -= 1
        self._held[owner] += 1
        if client is not None and client.acknowledges:
            client.undo = partial(self._undo, owner)

    def _undo(self, owner: Owner) -> None:
        if owner in self._held:
            self._give_back(owner, 1)

    def release(self, client: Client, owner: Owner, place: Any) -> Reply:
        if not self._held[owner]:
            raise RuntimeError(f"release of a permit of state semaphore {self.name!r} that is "
                               "not held here")  # fmt: skip
        self._give_back(owner, 1)
        return DONE

    def _give_back(self, owner: Owner, count: int) -> None:
        self._held[owner] -= count
        if not self._held[owner]:
            del self._held[owner]
        self._free += count
        while self._free and (wait := self._waits.take()) is not None:
            assert wait.owner is not None
            self._take(wait.client, wait.owner)
            wait.end((OK, True))

    def locked(self, client: Client) -> Reply:
        return OK, not self._free

    def owner_ended(self, owner: Any) -> None:
        self._waits.refuse(owner)
        if owner in self._held:
            self._give_back(owner, self._held[owner])

    def exported(self) -> Any:
        return {"permits": self._permits, "free": self._free, "waiting": len(self._waits)}


class Event(Hosted):
    """A flag that can be waited for."""

    kind = "event"

    def __init__(self, name: str, options: tuple[Any, ...], ears: list[Ear]) -> None:
        super().__init__(name, options, ears)
        self._flag = False
        self._waits = Waits()

    def __len__(self) -> int:
        return len(self._waits)

    def set(self, client: Client) -> Reply:
        if not self._flag:
            self._flag = True
            self.tell(SET, None, True)
            self._waits.end_all((OK, True))
        return DONE

    def clear(self, client: Client) -> Reply:
        if self._flag:
            self._flag = False
            self.tell(CLEARED)
        return DONE

    def is_set(self, client: Client) -> Reply:
        return OK, self._flag

    def wait(self, client: Client) -> Reply:
        if self._flag:
            return OK, True
        self._waits.add(Wait(client))
        return PARKED, None

    def exported(self) -> Any:
        return self._flag

    def restore(self, rows: Iterable[tuple[Any, Stored]]) -> None:
        for _, value in rows:
            if value:
                self._flag = True
                self.tell(SET, None, True)


class Barrier(Hosted):
    """As many clients as it has parties wait for each other, again and again."""

    kind = "barrier"

    def __init__(self, name: str, options: tuple[Any, ...], ears: list[Ear]) -> None:
        super().__init__(name, options, ears)
        if not options:
            raise StateError(f"there is no barrier {name!r} yet: say how many parties it has")
        self._parties = _number(options[0], least=1)
        self._waits = Waits()

    def __len__(self) -> int:
        return len(self._waits)

    def wait(self, client: Client) -> Reply:
        if len(self._waits) + 1 < self._parties:
            self._waits.add(Wait(client))
            return PARKED, None
        for place, wait in enumerate(list(self._waits)):
            wait.end((OK, place))
        return OK, self._parties - 1

    def waiting(self, client: Client) -> Reply:
        return OK, len(self._waits)

    def exported(self) -> Any:
        return {"parties": self._parties, "waiting": len(self._waits)}


def _number(option: object, least: int) -> int:
    if type(option) is not int:
        raise TypeError(f"it takes a whole number, not {option!r}")
    if option < least:
        raise ValueError(f"it takes at least {least}, not {option}")
    return option


def describe(owner: Owner, title_of: Callable[[int], str] = "call {}".format) -> str:
    """An owner, for people."""
    if owner[0] == "attempt":
        return f"{title_of(owner[1])}, attempt {owner[2]}"
    return "a client outside the run"
