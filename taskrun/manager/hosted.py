"""Which objects the loop itself may serve, and the hosted types that are our own.

Served on the loop: exactly the builtin containers and the like, made by the callables that
the standard library registers, holding plain values only.  Their methods cannot block and
run no code of users.  What could take long (sorting, copying a long list) is left to a
thread, and so is everything else.
"""

from __future__ import annotations

import array
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

LONG = 10_000  # items; below, walking through all of them is quick


class Counter:
    """A number that many add to: ``add`` says what it has become."""

    def __init__(self, value: float = 0) -> None:
        self._value = value
        self._mutex = threading.Lock()  # the loop and threads may add at the same time

    def add(self, amount: float = 1) -> float:
        # A number that a client sends may have a method of its own for this, which must not
        # keep others waiting, the loop among them.
        while True:
            before = self._value
            after = before + amount
            with self._mutex:
                if self._value is before:
                    self._value = after
                    return after

    def get(self) -> float:
        return self._value

    def __repr__(self) -> str:
        return f"Counter({self._value!r})"


class Set(set[T]):
    """A set whose ``add`` says whether the item was new."""

    def add(self, item: T) -> bool:  # type: ignore[override]
        before = len(self)
        super().add(item)
        return len(self) > before


_EMPTY: dict[str, str] = {}
_ITERATED: tuple[Iterable[object], ...] = ([], set(), _EMPTY, _EMPTY.values(), _EMPTY.items())
_ITERATORS = tuple(type(iter(found)) for found in _ITERATED)
_INLINE: set[type] = {dict, list, set, array.array, Counter, Set, *_ITERATORS}
_QUICK: set[Callable[..., Any]] = {dict, list, set, Counter, Set}


def _know_standard_types() -> None:
    """Adds what multiprocessing.managers registers; only once that is needed at all."""
    import queue
    from multiprocessing import managers

    standard: Any = managers  # its type stubs do not have all of it
    _INLINE.update((standard.Namespace, standard.Value))
    _QUICK.update((standard.Namespace, standard.Value, standard.Array))
    _QUICK.update((queue.Queue, threading.Event, threading.Lock, threading.RLock))
    _QUICK.update((threading.Semaphore, threading.BoundedSemaphore))
    _QUICK.update((threading.Condition, threading.Barrier))


def is_quick(make: Callable[..., Any] | None) -> bool:
    """Whether the loop may call what a typeid is registered with, given plain arguments."""
    if make is None or make in _QUICK:
        return True
    if getattr(make, "__module__", None) not in ("multiprocessing.managers", "queue", "threading"):
        return False
    _know_standard_types()
    return make in _QUICK


def is_inline(value: object) -> bool:
    """Whether the loop may call the methods of ``value``, made by a quick callable."""
    return type(value) in _INLINE


# Never slower for a longer container.
_CONSTANT = {
    "__delattr__", "__delitem__", "__getattribute__", "__len__", "__next__",
    "__iter__", "__setattr__", "__setitem__", "add", "append", "discard", "extend", "get",
    "insert", "pop", "popitem", "set", "setdefault", "update",
}  # fmt: skip
_SHOWING = {"__repr__", "__str__"}
_SHOWN = 100  # items; each may be large in itself
_MULTIPLY = {"__imul__", "__mul__", "__rmul__"}


def quick_methods(value: Any, names: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """Those of the methods ``names`` of an inline object that take no longer for a long one,
    whatever their arguments."""
    names = (name for name in names if _is_constant(value, name) and hasattr(value, name))
    return {name: getattr(value, name) for name in names}


def _is_constant(value: Any, method: str) -> bool:
    if method == "__contains__":
        return type(value) is not list
    return method in _CONSTANT or (method == "__getitem__" and type(value) is dict)


def takes_long(value: Any, method: str, args: tuple[Any, ...]) -> bool:
    """Whether the loop had better leave this call of an inline object to a thread."""
    if method in _MULTIPLY:
        return True
    if _is_constant(value, method):
        return False
    if method == "__getitem__" and not (args and type(args[0]) is slice):
        return False
    try:
        return len(value) > (LONG if method not in _SHOWING else _SHOWN)
    except TypeError:  # it has no length
        return False
