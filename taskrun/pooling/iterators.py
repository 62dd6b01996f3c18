"""What ``imap`` gives: iterators over results, in order or as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from multiprocessing import TimeoutError
from multiprocessing import pool as standard
from typing import TYPE_CHECKING, Any
from weakref import ref

from taskrun.flag import Flag
from taskrun.model import Failure
from taskrun.pooling.driver import Driver
from taskrun.pooling.inbox import Row
from taskrun.pooling.looping import Waitable
from taskrun.pooling.results import STAYS, Raw, decoded, raw_of

if TYPE_CHECKING:
    _Base = standard.IMapIterator[Any]
else:
    _Base = standard.IMapIterator  # which cannot be subscripted


class _Item:
    """The job of one item, or one chunk of items, of an imap."""

    __slots__ = ("call", "number", "owner")

    def __init__(self, owner: IMapIterator, number: int) -> None:
        self.owner = owner
        self.number = number
        self.call: int | None = None

    def ended(self, call: Any, last: Any, pid: int | None) -> None:
        self.owner.item_ended(self, raw_of(call))

    def failed(self, error: BaseException) -> None:
        self.owner.item_ended(self, Raw((error, True)))


class IMapIterator(Waitable, _Base):
    """What ``imap`` gives, in the order of the items; see ``multiprocessing.pool``.

    ``window``: so many calls may be under way at a time; ``smaller`` times as many until
    :meth:`narrow`.  ``buffered``: results that nobody has taken count as well.  ``at_once``:
    once there is no more room, more are submitted when there is for half of them.
    """

    def __init__(
        self,
        pool: Any,
        driver: Driver,
        *,
        chunked: bool,
        window: int,
        smaller: int,
        buffered: bool,
        at_once: bool,
    ) -> None:
        super().__init__()
        self._pool = pool
        self._driver = driver
        self._chunked = chunked
        self._buffered = buffered
        self._narrow = window
        self._at_once = at_once
        self._limit(window * smaller)
        self._taken = 0  # calls that were submitted
        self._over = 0  # those that are not under way any more
        self._room = Flag()
        self._came: deque[Any] = deque()  # encoded values, and Raws
        self._values: deque[Any] = deque()  # the rest of a chunk
        self._length: int | None = None
        self._given = 0
        self._ended = 0
        self.held: Any = None  # what the calls need as long as there are any

    # -- what users use ---------------------------------------------------------------

    def __iter__(self) -> IMapIterator:
        return self

    def next(self, timeout: float | None = None) -> Any:
        """The next value; raises what its call raised, StopIteration, or TimeoutError."""
        while True:
            if self._values:
                try:
                    return self._values.popleft()
                except IndexError:  # another thread took it
                    continue
            if not self._came:
                if not self.settled() and not self._driver.loop.wait(self, timeout):
                    raise TimeoutError
                if not self._came:
                    self._pool = None
                    raise StopIteration
            try:
                raw = self._came.popleft()
            except IndexError:  # another thread took it
                continue
            self._given += 1
            if self._buffered:
                self._make_room(1)
            if type(raw) is int and not self._chunked:
                return raw
            success, value = decoded(raw if type(raw) is Raw else Raw((raw, type(raw) is Failure)))
            del raw
            if not success:
                raise value
            if not self._chunked:
                return value
            self._values.extend(value)

    __next__ = next

    @property
    def _index(self) -> int:
        """How many have come: as many show progress, or wait."""
        return self._given + len(self._came)

    def __reduce__(self) -> Any:
        raise NotImplementedError(STAYS)

    # -- what comes -------------------------------------------------------------------

    def settled(self) -> bool:
        """Whether there is something to take, or nothing more will come."""
        return bool(self._came) or self._given == self._length

    def item(self, number: int) -> _Item:
        """The job of the next item."""
        return _Item(self, number)

    def item_ended(self, item: _Item, raw: Raw) -> None:
        """One of the items has ended."""
        self._have_ended([item.number], [raw])

    def items_ended(self, tokens: Sequence[int], values: list[Any], row: Row) -> None:
        """See ``inbox.Owner``."""
        self._have_ended(tokens, values)

    def items_failed(self, tokens: Sequence[int], error: BaseException | Failure) -> None:
        """See ``inbox.Owner``."""
        self._have_ended(tokens, [Raw((error, True))] * len(tokens))

    def is_withdrawn(self, token: int) -> bool:
        """See ``inbox.Owner``."""
        return False

    def _have_ended(self, numbers: Sequence[int], raws: list[Any]) -> None:
        self._ended += len(numbers)
        self._arrive(numbers, raws)
        if not self._buffered:
            self._make_room(len(numbers))
        if self._ended == self._length:
            self._pool = self.held = None
        if self.event is not None:
            self.event.set()

    def _arrive(self, numbers: Sequence[int], raws: list[Any]) -> None:
        """These came; the numbers follow each other."""
        raise NotImplementedError

    def _make_room(self, count: int) -> None:
        self._over += count
        if self._taken - self._over <= self._low and not self._room.is_set():
            self._room.set()

    def _limit(self, window: int) -> None:
        self._window = window
        self._low = window // 2 if self._at_once else window - 1

    def narrow(self) -> None:
        """Its items are not small."""
        if self._window != self._narrow:
            self._limit(self._narrow)

    def take_room(self, most: int) -> int:
        """In the feeding thread: how many more may be under way; they count as such from now on."""
        room = max(0, min(most, self._window - self._taken + self._over))
        self._taken += room
        return room

    def lacks_room(self) -> bool:
        """Whether there is less room than it is worth to be woken for."""
        return self._taken - self._over > self._low

    def fed(self, count: int, error: BaseException | None) -> None:
        """On the loop: so many items were submitted, and then ``error`` was raised, if any."""
        if error is not None:
            self._ended += 1
            self._arrive([count], [Raw((error, True))])
            count += 1
        self._length = count
        if self._ended == count:
            self._pool = self.held = None
        if self.event is not None:
            self.event.set()


class Feeding:
    """Where the feeding thread waits for room.  Meanwhile it does not keep the iterator: who lets
    go of one that is ``buffered`` wants no more of it.  Of others all calls are executed."""

    def __init__(self, made: IMapIterator) -> None:
        room = made._room
        self._room = room
        self._loop = made._driver.loop
        self._made = ref(made, lambda _: room.set())
        self._held = None if made._buffered else made

    def await_room(self) -> IMapIterator | None:
        """The iterator, once there is room, or the loop is over; None: it is not there any more."""
        self._room.clear()
        made = self._made()
        while made is not None and made.lacks_room() and not self._loop.over:
            made = None
            self._room.wait(1.0)
            made = self._made()
        return made


class OrderedIterator(IMapIterator):
    """In the order of the items."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._next = 0
        self._early: dict[int, Any] = {}

    def _arrive(self, numbers: Sequence[int], raws: list[Any]) -> None:
        if numbers[0] != self._next:
            self._early.update(zip(numbers, raws, strict=True))
            return
        self._came.extend(raws)
        self._next += len(raws)
        while self._early and self._next in self._early:
            self._came.append(self._early.pop(self._next))
            self._next += 1


class UnorderedIterator(IMapIterator):
    """As they come."""

    def _arrive(self, numbers: Sequence[int], raws: list[Any]) -> None:
        self._came.extend(raws)
