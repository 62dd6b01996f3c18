"""Values and keys, in the form in which the coordinator keeps them.

A value is kept as the bytes of its pickle, inside a tuple; only plain numbers, strings and
the like are kept as they are.  So the coordinator never runs code that came with a value,
and does not need the modules that its class is in.

A key (of a dict, or an item of a set) must be compared and hashed by the coordinator, so it
is kept as it is, and has to be made of plain values.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Hashable
from typing import Any, TypeAlias

Stored: TypeAlias = Any
"""An atom, or a tuple of one pickle."""

ATOMS = frozenset((int, float, str, bool, type(None), bytes))
_KEY_ATOMS = ATOMS | {complex}
_KEY_NAMES = {
    ("datetime", "date"),
    ("datetime", "datetime"),
    ("datetime", "time"),
    ("datetime", "timedelta"),
    ("decimal", "Decimal"),
    ("uuid", "UUID"),
}


def to_stored(value: Any) -> Stored:
    """``value`` as the coordinator keeps it.  Raises what pickling it raises."""
    if type(value) in ATOMS:
        return value
    return (_dumps(value),)


def _dumps(value: Any) -> bytes:
    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError):
        from taskrun.byvalue import dumps  # slow to import, and seldom needed

        return dumps(value)


def from_stored(stored: Stored) -> Any:
    """The value itself.  Raises what unpickling it raises."""
    return pickle.loads(stored[0]) if type(stored) is tuple else stored


class Unloadable:
    """Stands for a value whose class is not known here, or that raises while it is loaded."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __repr__(self) -> str:
        kind = type(self.error).__name__
        return f"<a value that cannot be loaded here: {kind}: {self.error}>"


def loaded(stored: Stored) -> Any:
    """The value itself, or an Unloadable: for whoever looks at many."""
    try:
        return from_stored(stored)
    except (Exception, SystemExit) as error:  # it may be anything, of anybody's code
        return Unloadable(error)


def is_stored(value: object) -> bool:
    """Whether somebody sent a value in this form."""
    if type(value) is tuple:
        return len(value) == 1 and type(value[0]) is bytes
    return type(value) in ATOMS


def check_key(key: Any) -> Hashable:
    """``key`` itself, with numbers of numpy as Python's.  Raises TypeError where it is not made
    of plain values, ValueError where there is a NaN in it."""
    if type(key) in _KEY_ATOMS and key == key:
        return key  # type: ignore[no-any-return]
    plain = key if is_key(key) else _without_numpy(key)
    if is_key(plain):
        if _has_nan(plain):
            raise ValueError(
                f"{key!r} cannot be a key of shared state: NaN equals nothing, so that nobody "
                "would find it again"
            )
        return plain  # type: ignore[no-any-return]
    raise TypeError(
        f"{key!r} of type {type(key).__qualname__} cannot be a key of shared state: it is "
        "compared in another process; keys are str, bytes, numbers, None, dates, UUIDs, and "
        "tuples and frozensets of them"
    )


def _has_nan(key: Any) -> bool:
    if type(key) in (tuple, frozenset):
        return any(map(_has_nan, key))
    return bool(key != key)


def _without_numpy(key: Any) -> Any:
    """Numbers and strings of numpy are equal to Python's, and have the same hash."""
    if type(key) in (tuple, frozenset):
        return type(key)(map(_without_numpy, key))
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return key
    kinds = (numpy.integer, numpy.floating, numpy.complexfloating, numpy.bool_, numpy.character)
    return key.item() if isinstance(key, kinds) else key


def is_key(key: object) -> bool:
    """Whether ``key`` is made of plain values, at any depth."""
    kind = type(key)
    if kind in _KEY_ATOMS:
        return True
    if kind is tuple or kind is frozenset:
        return all(is_key(part) for part in key)  # type: ignore[attr-defined]
    if (kind.__module__, kind.__qualname__) in _KEY_NAMES:
        # A time zone may be of any class.
        return getattr(key, "tzinfo", None) is None or _is_plain_zone(key)
    return False


def _is_plain_zone(moment: Any) -> bool:
    from datetime import timezone

    return type(moment.tzinfo) is timezone
