"""Handles of dicts, lists and sets: with the interfaces of ``collections.abc``.

What is read is a copy.  A change to it changes nothing here: ``d["k"].append(1)`` does not
reach the dict.  Where a plain list, dict or set is read out of a shared dict or list, it
comes as a subclass that warns when it is changed.
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    ValuesView,
)
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any

from taskrun.errors import StateLost
from taskrun.state.copies import as_copy, unsaved
from taskrun.state.handles import MISSING, Handle, items
from taskrun.state.stored import Stored, check_key, from_stored, to_stored

UpdateArgument = Mapping[Any, Any] | Iterable[tuple[Any, Any]]


class _Container(Handle):
    """What has a length and can be iterated."""

    def __len__(self) -> int:
        return int(self._do("size"))

    def __bool__(self) -> bool:
        return len(self) > 0

    def clear(self) -> None:
        """Remove all items."""
        self._do("clear")

    def _pages(self, what: str = "") -> Iterator[list[Any]]:
        """The items as they are now, page by page."""
        client = self._client
        page, cursor = client.call(("iterate", self.name, self._options, (self.kind, what)))
        try:
            yield page
            while cursor:
                page, cursor = client.call(("next", self.name, None, (cursor,)))
                yield page
        finally:
            if cursor:
                with suppress(StateLost):  # it is over anyway
                    client.call(("stop", self.name, None, (cursor,)))

    def _described(self) -> str:
        return items(len(self))


class Dict(_Container, MutableMapping[Any, Any]):
    """A shared dict.  Keys are plain values: str, numbers, tuples of them, and the like."""

    kind = "dict"
    __hash__ = Handle.__hash__

    def __getitem__(self, key: Any) -> Any:
        return as_copy(from_stored(self._do("get", check_key(key))), "dict", self.name, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._do("set", check_key(key), to_stored(value))
        if unsaved:
            unsaved.discard(("dict", self.name, key))

    def __delitem__(self, key: Any) -> None:
        self._do("delete", check_key(key))

    def __contains__(self, key: object) -> bool:
        return bool(self._do("contains", check_key(key)))

    def __iter__(self) -> Iterator[Any]:
        return (key for page in self._pages("keys") for key in page)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Mapping) and not isinstance(other, Handle):
            return self.copy() == dict(other)
        return Handle.__eq__(self, other)

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of ``key``, or ``default``."""
        version, stored = self._do("read", check_key(key))
        return as_copy(from_stored(stored), "dict", self.name, key) if version else default

    def pop(self, key: Any, default: Any = MISSING) -> Any:
        """Remove ``key`` and give its value; of all who try, one gets it."""
        try:
            stored = self._do("pop", check_key(key))
        except KeyError:
            if default is MISSING:
                raise
            return default
        return from_stored(stored)

    def popitem(self) -> tuple[Any, Any]:
        """Remove the item that came last, and give it."""
        key, stored = self._do("popitem")
        return key, from_stored(stored)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """The value of ``key``, which is set first if there is none; all who try at the same
        time get the same value."""
        stored = self._do("setdefault", check_key(key), to_stored(default))
        return as_copy(from_stored(stored), "dict", self.name, key)

    def update(self, other: UpdateArgument = (), /, **more: Any) -> None:  # type: ignore[override]
        """Set many items, in one round trip."""
        pairs = {**_plain(other), **more}
        self._do("update", _to_pairs(pairs))

    def replace(self, other: UpdateArgument) -> None:
        """Have these items instead of all others."""
        self._do("replace", _to_pairs(_plain(other)))

    def get_many(self, keys: Iterable[Any]) -> dict[Any, Any]:
        """The items of those ``keys`` that are there, in one round trip."""
        return {key: from_stored(stored) for key, stored in self._do("get_many", _keys(keys))}

    def delete_many(self, keys: Iterable[Any]) -> int:
        """Delete those ``keys`` that are there, in one round trip; gives how many were."""
        return int(self._do("delete_many", _keys(keys)))

    def update_at(self, key: Any, function: Callable[[Any], Any], default: Any = MISSING) -> Any:
        """Set ``key`` to ``function(value)``, in one step as far as others can see; gives
        the new value.

        ``function`` gets ``default`` where there is no value (without one: KeyError).  It
        runs here, and again where the value has changed meanwhile, so it should do nothing
        but compute.
        """
        key = check_key(key)
        version, stored = self._do("read", key)
        while True:
            if not version and default is MISSING:
                raise KeyError(key)
            value = function(from_stored(stored) if version else default)
            now = self._do("swap", key, version, to_stored(value))
            if now is None:
                return value
            version, stored = now

    def copy(self) -> dict[Any, Any]:
        """A plain dict of what is there now."""
        return dict(self._items())

    def _items(self) -> Iterator[tuple[Any, Any]]:
        return ((key, from_stored(stored)) for page in self._pages("items")
                for key, stored in page)  # fmt: skip

    def items(self) -> ItemsView[Any, Any]:
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        return _Values(self)

    def __or__(self, other: Any) -> dict[Any, Any]:
        return self.copy() | dict(other)

    def __ror__(self, other: Any) -> dict[Any, Any]:
        return dict(other) | self.copy()

    def __ior__(self, other: UpdateArgument) -> Dict:  # type: ignore[misc]
        self.update(other)
        return self


class _Items(ItemsView[Any, Any]):
    _mapping: Dict

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self._mapping._items()


class _Values(ValuesView[Any]):
    _mapping: Dict

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in self._mapping._items())

    def __contains__(self, value: object) -> bool:
        return any(value == one for one in self)


def _keys(keys: Iterable[Any]) -> list[Any]:
    return [check_key(key) for key in keys]


def _plain(items: UpdateArgument) -> dict[Any, Any]:
    return items.copy() if isinstance(items, Dict) else dict(items)  # in few round trips


def _to_pairs(items: dict[Any, Any]) -> list[tuple[Any, Any]]:
    return [(check_key(key), to_stored(value)) for key, value in items.items()]


class List(_Container, MutableSequence[Any]):
    """A shared list."""

    kind = "list"
    __hash__ = Handle.__hash__

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [from_stored(one) for one in self._do("slice", *_parts(index))]
        value = from_stored(self._do("get", _index(index)))
        return as_copy(value, "list", self.name, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            self._do("set_slice", *_parts(index), [to_stored(one) for one in value])
        else:
            self._do("set", _index(index), to_stored(value))
            if unsaved:
                unsaved.discard(("list", self.name, index))

    def __delitem__(self, index: Any) -> None:
        if isinstance(index, slice):
            self._do("delete_slice", *_parts(index))
        else:
            self._do("pop", _index(index))

    def __iter__(self) -> Iterator[Any]:
        return (from_stored(one) for page in self._pages() for one in page)

    def __reversed__(self) -> Iterator[Any]:
        return iter(self[:][::-1])

    def __contains__(self, value: object) -> bool:
        return any(value is one or value == one for one in self)

    def __eq__(self, other: object) -> bool:
        return self[:] == other if isinstance(other, list) else Handle.__eq__(self, other)

    def append(self, value: Any) -> None:
        self._do("append", to_stored(value))

    def extend(self, values: Iterable[Any]) -> None:
        """Append many values, in one round trip; nobody else's come between them."""
        self._do("extend", [to_stored(value) for value in values])

    def __iadd__(self, values: Iterable[Any]) -> List:  # type: ignore[misc]
        self.extend(values)
        return self

    def __add__(self, values: Any) -> list[Any]:
        return self[:] + list(values)  # type: ignore[no-any-return]

    def __radd__(self, values: Any) -> list[Any]:
        return list(values) + self[:]  # type: ignore[no-any-return]

    def __mul__(self, times: int) -> list[Any]:
        return self[:] * times  # type: ignore[no-any-return]

    __rmul__ = __mul__

    def __imul__(self, times: int) -> List:
        self._rewrite(lambda stored: stored * times)
        return self

    def insert(self, index: int, value: Any) -> None:
        self._do("insert", _index(index), to_stored(value))

    def pop(self, index: int = -1) -> Any:
        """Remove an item and give it; of all who try, one gets it."""
        return from_stored(self._do("pop", _index(index)))

    def remove(self, value: Any) -> None:
        """Remove the first item that equals ``value``; the comparison is done here, and again
        where the list has changed meanwhile."""
        while True:
            moves, _, stored = self._do("read")
            place = [from_stored(one) for one in stored].index(value)
            if self._do("delete_if", place, moves, stored[place]):
                return

    def sort(self, *, key: Callable[[Any], Any] | None = None, reverse: bool = False) -> None:
        """Sort it in place; the comparison is done here, as for :meth:`remove`."""

        def sort(stored: list[Stored]) -> list[Stored]:
            values = sorted(map(from_stored, stored), key=key, reverse=reverse)
            return [to_stored(value) for value in values]

        self._rewrite(sort)

    def _rewrite(self, change: Callable[[list[Stored]], list[Stored]]) -> None:
        """Put what ``change`` makes of all values in their place; it is called again where
        the list has changed meanwhile."""
        while True:
            _, version, stored = self._do("read")
            if self._do("replace_if", change(stored), version):
                return

    def reverse(self) -> None:
        self._do("reverse")

    def index(self, value: Any, *between: int) -> int:
        return self[:].index(value, *between)  # type: ignore[no-any-return]

    def copy(self) -> list[Any]:
        """A plain list of what is there now."""
        return list(self)


def _index(index: Any) -> int:
    from operator import index as as_index

    return as_index(index)


def _parts(part: slice) -> tuple[Any, Any, Any]:
    start, stop, step = (
        None if one is None else _index(one) for one in (part.start, part.stop, part.step)
    )
    return start, stop, step


class Set(_Container, MutableSet[Any]):
    """A shared set.  Items are plain values, as the keys of a dict are."""

    kind = "set"
    __hash__ = Handle.__hash__

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> set[Any]:
        return set(it)

    def __contains__(self, item: object) -> bool:
        return bool(self._do("contains", check_key(item)))

    def __iter__(self) -> Iterator[Any]:
        return (item for page in self._pages() for item in page)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, AbstractSet) and not isinstance(other, Handle):
            return self.copy() == set(other)
        return Handle.__eq__(self, other)

    def __and__(self, other: Iterable[Any]) -> set[Any]:
        return self.copy() & set(other)

    def __or__(self, other: Iterable[Any]) -> set[Any]:
        return self.copy() | set(other)

    def __sub__(self, other: Iterable[Any]) -> set[Any]:
        return self.copy() - set(other)

    def __le__(self, other: AbstractSet[Any]) -> bool:
        return self.copy() <= set(other)

    def __ge__(self, other: AbstractSet[Any]) -> bool:
        return self.copy() >= set(other)

    def add(self, item: Any) -> bool:  # type: ignore[override]
        """Add an item; gives whether it was new: of all who try, one gets True."""
        return bool(self._do("add", check_key(item)))

    def add_many(self, items: Iterable[Any]) -> list[Any]:
        """Add many items, in one round trip; gives those that were new, in order."""
        new: list[Any] = self._do("update", _keys(items))
        return new

    def update(self, *others: Iterable[Any]) -> None:
        """Add the items of all ``others``, in one round trip."""
        self.add_many(item for other in others for item in other)

    def discard(self, item: Any) -> bool:  # type: ignore[override]
        """Remove an item; gives whether it was there."""
        return bool(self._do("discard", check_key(item)))

    def remove(self, item: Any) -> None:
        if not self.discard(item):
            raise KeyError(item)

    def discard_many(self, items: Iterable[Any]) -> int:
        """Remove those ``items`` that are there, in one round trip; gives how many were."""
        return int(self._do("discard_many", _keys(items)))

    def pop(self) -> Any:
        """Remove the item that came first, and give it."""
        return self._do("pop")

    def copy(self) -> set[Any]:
        """A plain set of what is there now."""
        return set(self)

    def __ior__(self, other: Iterable[Any]) -> Set:
        self.update(other)
        return self

    def __isub__(self, other: Iterable[Any]) -> Set:
        self.discard_many(other)
        return self

    def __ixor__(self, other: Iterable[Any]) -> Set:  # type: ignore[misc]
        if isinstance(other, Set) and self == other:
            self.clear()  # itself: what comes meanwhile is not to stay
        else:
            self._do("toggle_many", _keys(other))
        return self

    def __iand__(self, other: Iterable[Any]) -> Set:
        self._do("keep", _keys(other))
        return self
