"""Lists, dicts and sets that were read out of shared state: copies, which say so.

``d["k"].append(1)`` changes a copy, and the change is lost.  That cannot be seen when it
happens, since ``x = d["k"]; x.append(1); d["k"] = x`` begins in the same way; but when a
copy is thrown away that was changed and went nowhere afterwards, a change was lost, most
likely, and a warning says so, unless that place was set since: ``d["k"] = [*x, 1]`` may
be how it was written back.  ``list(d["k"])`` is a plain list, for whoever wants one.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias


class LostChange(UserWarning):
    """A copy of a shared value was changed, and not written back."""


Place: TypeAlias = tuple[str, str, Any]
"""Kind and name of an object, and the key in it."""

unsaved: set[Place] = set()
"""Where copies were read that have been changed, and nothing was set since."""


def _noting(kind: type, name: str) -> Callable[..., Any]:
    method = getattr(kind, name)

    def changing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "_where"):  # else it was made by type(copy)()
            self._changed = True
            unsaved.add(self._where)
        return method(self, *args, **kwargs)

    changing.__name__ = name
    changing.__doc__ = method.__doc__
    return changing


class _Copy:
    """Mixed into a builtin container."""

    __slots__ = ()
    _changed: bool
    _where: Place
    _plain: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # It goes somewhere: back into the state, or into a result.  Over there it is plain.
        self._changed = False  # type: ignore[misc]
        unsaved.discard(self._where)
        return self._plain, (self._plain(self),)

    def __del__(self) -> None:
        if getattr(self, "_changed", False) and self._where in unsaved and not sys.is_finalizing():
            unsaved.discard(self._where)
            kind, name, key = self._where
            what = f"state.{kind}({name!r})[{key!r}]"
            warnings.warn(
                f"a copy of {what} was changed and not written back: the change is lost; "
                f"assign it, or use {_advice(kind)}",
                LostChange,
                stacklevel=2,
            )


def _advice(kind: str) -> str:
    return "update_at(key, function)" if kind == "dict" else "a lock around reading and writing"


def _copying(kind: type, *changing: str) -> type:
    body: dict[str, Any] = {name: _noting(kind, name) for name in changing}
    body |= {"__slots__": ("_changed", "_where"), "_plain": kind, "__hash__": None}
    return type(f"{kind.__name__}_copy", (_Copy, kind), body)


_COPIES: dict[type, type] = {
    list: _copying(
        list, "append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort",
        "__setitem__", "__delitem__", "__iadd__", "__imul__",
    ),
    dict: _copying(
        dict, "clear", "pop", "popitem", "setdefault", "update",
        "__setitem__", "__delitem__", "__ior__",
    ),
    set: _copying(
        set, "add", "clear", "difference_update", "discard", "intersection_update", "pop",
        "remove", "symmetric_difference_update", "update",
        "__iand__", "__ior__", "__isub__", "__ixor__",
    ),
}  # fmt: skip


def as_copy(value: Any, kind: str, name: str, key: Any) -> Any:
    """``value``; a container as one that warns.  ``key`` says where in the object it was."""
    copying = _COPIES.get(type(value))
    if copying is None:
        return value
    copy = copying(value)
    copy._changed = False
    copy._where = (kind, name, key)
    return copy
