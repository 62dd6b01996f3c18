"""The objects that the coordinator holds: dicts, lists, sets and counters.

Each method is one operation, and happens at once: nothing else is done meanwhile.  Values
are in the stored form (see ``stored``), and are never looked into.  Those objects that
clients may have to wait for are in ``waiting``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, ClassVar, TypeAlias

from taskrun.errors import StateError
from taskrun.state.stored import ATOMS, Stored, is_key, is_stored

Ear: TypeAlias = Callable[["Hosted", str, Any, Any], object]
"""Is told of a change: the object, what happened, the key, and the new value."""

SET, DELETED, CLEARED, ADDED, REMOVED, CHANGED = (
    "set", "deleted", "cleared", "added", "removed", "changed",
)  # fmt: skip


class Hosted:
    """One named object.  ``ears`` are those of the store that it is in."""

    kind: ClassVar[str]

    def __init__(self, name: str, options: tuple[Any, ...], ears: list[Ear]) -> None:
        self.name = name
        self.options = options
        self._ears = ears

    def __len__(self) -> int:
        raise NotImplementedError

    def tell(self, action: str, key: Any = None, value: Any = None) -> None:
        """Those who listen hear of a change."""
        for ear in self._ears:
            ear(self, action, key, value)

    def exported(self) -> Any:
        """What somebody is shown who wants to see the object, in stored values."""
        raise NotImplementedError

    def restore(self, rows: Iterable[tuple[Any, Stored]]) -> None:
        """Take over what was kept in a file, as ``kept`` had given it."""
        raise NotImplementedError

    def owner_ended(self, owner: Any) -> None:
        """Nothing that ``owner`` holds here is held any more."""


class Dict(Hosted):
    """Keys, and for each its version and value.  A version is never used twice, so that
    what has changed meanwhile is known."""

    kind = "dict"

    def __init__(self, name: str, options: tuple[Any, ...], ears: list[Ear]) -> None:
        super().__init__(name, options, ears)
        self.items: dict[Any, tuple[int, Stored]] = {}
        self._version = 0

    def __len__(self) -> int:
        return len(self.items)

    def get(self, key: Any) -> Stored:
        return self.items[key][1]

    def set(self, key: Any, value: Stored) -> None:
        if type(key) not in ATOMS:
            _check_key(key)
        if type(value) not in ATOMS:
            _check_stored(value)
        self._set(key, value)

    def _set(self, key: Any, value: Stored) -> None:
        self._version += 1
        self.items[key] = (self._version, value)
        if self._ears:
            self.tell(SET, key, value)

    def delete(self, key: Any) -> None:
        self.pop(key)

    def pop(self, key: Any) -> Stored:
        _, value = self.items.pop(key)
        self.tell(DELETED, key)
        return value

    def popitem(self) -> tuple[Any, Stored]:
        if not self.items:
            raise KeyError(f"popitem(): state dict {self.name!r} is empty")
        key, (_, value) = self.items.popitem()
        self.tell(DELETED, key)
        return key, value

    def setdefault(self, key: Any, value: Stored) -> Stored:
        if key not in self.items:
            self.set(key, value)
        return self.items[key][1]

    def contains(self, key: Any) -> bool:
        return key in self.items

    def size(self) -> int:
        return len(self.items)

    def clear(self) -> None:
        self.items.clear()
        self.tell(CLEARED)

    def read(self, key: Any) -> tuple[int, Stored]:
        """(version, value); version 0: there is none."""
        return self.items.get(key, (0, None))

    def swap(self, key: Any, version: int, value: Stored) -> tuple[int, Stored] | None:
        """Set the value if it still has that version; else what it has now."""
        now = self.read(key)
        if now[0] != version:
            return now
        self.set(key, value)
        return None

    def get_many(self, keys: Iterable[Any]) -> list[tuple[Any, Stored]]:
        """(key, value) for each that is there."""
        items = self.items
        return [(key, items[key][1]) for key in keys if key in items]

    def update(self, pairs: list[tuple[Any, Stored]]) -> None:
        for key, value in pairs:
            _check_key(key)
            _check_stored(value)
        for key, value in pairs:
            self._set(key, value)

    def replace(self, pairs: list[tuple[Any, Stored]]) -> None:
        """These items, instead of all others."""
        self.clear()
        self.update(pairs)

    def delete_many(self, keys: Iterable[Any]) -> int:
        found = [key for key in dict.fromkeys(keys) if key in self.items]
        for key in found:
            self.pop(key)
        return len(found)

    def exported(self) -> Any:
        return [(key, value) for key, (_, value) in self.items.items()]

    def restore(self, rows: Iterable[tuple[Any, Stored]]) -> None:
        self.update(list(rows))


class List(Hosted):
    """Values in order.  ``moves`` changes whenever the places of items do, ``version``
    whenever anything does."""

    kind = "list"

    def __init__(self, name: str, options: tuple[Any, ...], ears: list[Ear]) -> None:
        super().__init__(name, options, ears)
        self.items: list[Stored] = []
        self.moves = self.version = 0

    def __len__(self) -> int:
        return len(self.items)

    def _moved(self, since: int) -> None:
        """Everything from index ``since`` on may be different."""
        self.moves += 1
        self.version += 1
        self.tell(CHANGED, since)

    def get(self, index: Any) -> Stored:
        return self.items[index]

    def set(self, index: int, value: Stored) -> None:
        _check_stored(value)
        self.items[index] = value
        self.version += 1
        self.tell(SET, index % len(self.items), value)

    def slice(self, start: Any, stop: Any, step: Any) -> list[Stored]:
        return self.items[start:stop:step]

    def set_slice(self, start: Any, stop: Any, step: Any, values: list[Stored]) -> None:
        for value in values:
            _check_stored(value)
        self.items[start:stop:step] = values
        self._moved(0)

    def delete_slice(self, start: Any, stop: Any, step: Any) -> None:
        del self.items[start:stop:step]
        self._moved(0)

    def append(self, value: Stored) -> None:
        _check_stored(value)
        self.items.append(value)
        self.version += 1
        self.tell(SET, len(self.items) - 1, value)

    def extend(self, values: list[Stored]) -> None:
        for value in values:
            _check_stored(value)
        start = len(self.items)
        self.items.extend(values)
        self.version += 1
        if self._ears:
            for place, value in enumerate(values, start):
                self.tell(SET, place, value)

    def insert(self, index: int, value: Stored) -> None:
        _check_stored(value)
        place = slice(index, None).indices(len(self.items))[0]
        self.items.insert(place, value)
        self._moved(place)

    def pop(self, index: int) -> Stored:
        if not self.items:
            raise IndexError(f"pop from empty state list {self.name!r}")
        value = self.items[index]  # where there is none: IndexError, also of 10**20
        del self.items[index]
        self._moved(index if index >= 0 else len(self.items) + 1 + index)
        return value

    def delete_if(self, index: int, moves: int, value: Stored) -> bool:
        """Delete an item, if it is still in that place."""
        if moves != self.moves or not _same(self.items[index], value):
            return False
        self.pop(index)
        return True

    def replace_if(self, values: list[Stored], version: int) -> bool:
        if version != self.version:
            return False
        self.set_slice(None, None, None, values)
        return True

    def read(self) -> tuple[int, int, list[Stored]]:
        """(moves, version, values)."""
        return self.moves, self.version, list(self.items)

    def reverse(self) -> None:
        self.items.reverse()
        self._moved(0)

    def clear(self) -> None:
        self.items.clear()
        self.moves += 1
        self.version += 1
        self.tell(CLEARED)

    def size(self) -> int:
        return len(self.items)

    def exported(self) -> Any:
        return list(self.items)

    def restore(self, rows: Iterable[tuple[Any, Stored]]) -> None:
        self.extend([value for _, value in sorted(rows, key=lambda row: int(row[0]))])


class Set(Hosted):
    """Keys only."""

    kind = "set"

    def __init__(self, name: str, options: tuple[Any, ...], ears: list[Ear]) -> None:
        super().__init__(name, options, ears)
        self.items: dict[Any, None] = {}  # in the order in which they came

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item: Any) -> bool:
        """Whether it was new."""
        _check_key(item)
        if item in self.items:
            return False
        self.items[item] = None
        self.tell(ADDED, item)
        return True

    def discard(self, item: Any) -> bool:
        """Whether it was there."""
        if item not in self.items:
            return False
        del self.items[item]
        self.tell(REMOVED, item)
        return True

    def contains(self, item: Any) -> bool:
        return item in self.items

    def size(self) -> int:
        return len(self.items)

    def pop(self) -> Any:
        if not self.items:
            raise KeyError(f"pop from empty state set {self.name!r}")
        item = next(iter(self.items))
        self.discard(item)
        return item

    def clear(self) -> None:
        self.items.clear()
        self.tell(CLEARED)

    def update(self, items: Iterable[Any]) -> list[Any]:
        """Those that were new, in order."""
        return [item for item in items if self.add(item)]

    def discard_many(self, items: Iterable[Any]) -> int:
        return sum([self.discard(item) for item in items])

    def keep(self, items: Iterable[Any]) -> None:
        """Only these, of those that are there."""
        kept = frozenset(items)
        self.discard_many([item for item in self.items if item not in kept])

    def toggle_many(self, items: Iterable[Any]) -> None:
        """Remove those that are there, and add those that are not."""
        for item in dict.fromkeys(items):
            if not self.discard(item):
                self.add(item)

    def contains_many(self, items: Iterable[Any]) -> list[bool]:
        return [item in self.items for item in items]

    def exported(self) -> Any:
        return list(self.items)

    def restore(self, rows: Iterable[tuple[Any, Stored]]) -> None:
        self.update([key for key, _ in rows])


class Counter(Hosted):
    """A number."""

    kind = "counter"

    def __init__(self, name: str, options: tuple[Any, ...], ears: list[Ear]) -> None:
        super().__init__(name, options, ears)
        self.value: int | float = 0

    def __len__(self) -> int:
        return 1

    def add(self, amount: int | float) -> int | float:
        if type(amount) not in (int, float):
            raise TypeError(f"a counter adds numbers, not {type(amount).__name__}")
        self.value += amount
        if self._ears:
            self.tell(SET, None, self.value)
        return self.value

    def get(self) -> int | float:
        return self.value

    def set(self, value: int | float) -> int | float:
        """What it was before."""
        if type(value) not in (int, float):
            raise TypeError(f"a counter holds numbers, not {type(value).__name__}")
        before, self.value = self.value, value
        self.tell(SET, None, value)
        return before

    def exported(self) -> Any:
        return self.value

    def restore(self, rows: Iterable[tuple[Any, Stored]]) -> None:
        for _, value in rows:
            self.set(value)


def _same(one: Stored, other: Stored) -> bool:
    """NaN does not equal itself."""
    return bool(one == other or (one != one and other != other))


def first(items: Iterable[Any], count: int) -> list[Any]:
    """As many as there are, at most ``count``."""
    return list(islice(items, count))


# -- what clients send ----------------------------------------------------------------


def _check_key(key: object) -> None:
    if not is_key(key):
        raise StateError(f"{type(key).__name__} is no key")


def _check_stored(value: object) -> None:
    if not is_stored(value):
        raise StateError(f"{type(value).__name__} is not a stored value")
