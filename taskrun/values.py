"""Values, arguments and exceptions as they travel between processes.

What is small and plain travels as itself, all else as a pickle that only workers open
(see ``model.Encoded``), its large parts in files that they map (see ``blobs``).  The C
pickler comes first, because it is several times faster; cloudpickle takes over for what
has no importable name: lambdas, local classes, and all that lives in a ``__main__`` which
the other side does not have.

Futures inside a value travel as links.  ``encode`` gives their keys beside the value; the
run waits for those calls and sends what became of them along, by key; ``decode`` puts each
in its future's place.  So an encoded value comes in two halves, (payload, keys):

(3, ())             the value 3
(None, ())          the value None
(None, (key,))      the value *is* one future's; nothing else is known of it yet
(pickle, keys)      a pickle, with the futures of these keys in it

An exception travels as a ``model.Failure``; see ``failures``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeAlias

from taskrun import blobs, errors
from taskrun.blobs import Draft, Portable, Shared
from taskrun.context import Future, pickling
from taskrun.failures import class_name, decode_failure, encode_failure, guarded
from taskrun.model import MOST_ITEMS, Encoded, Failure, Kept

__all__ = [
    "are_plain",
    "decode",
    "decode_failure",
    "dumps_arguments",
    "encode",
    "encode_failure",
    "encode_items",
    "loads_arguments",
]

Held: TypeAlias = tuple[Encoded, tuple[bytes, ...]]
"""A payload, and the keys of the futures in it."""

PROTOCOL = pickle.HIGHEST_PROTOCOL
SHORT = 256  # characters of a str that travels as itself

_PLAIN = frozenset((type(None), bool, float))
_SIMPLE = frozenset((*_PLAIN, int, str))  # where they come encoded, they are themselves
_INT_MAX = 1 << 63  # a bigger int costs whoever merely passes it on
_MAIN = b"__main__"


# -- values ---------------------------------------------------------------------------


def encode(obj: Any) -> Held:
    """``obj`` as it travels, and the keys of the futures inside it, at any depth.

    Raises ResultError, which names the part that is to blame, when it cannot be pickled.
    """
    kind = type(obj)
    if kind in _PLAIN:
        return obj, ()
    if kind is str:
        if len(obj) <= SHORT:
            return obj, ()
    elif kind is int:
        if -_INT_MAX <= obj < _INT_MAX:
            return obj, ()
    elif kind is Future and obj.key:
        return None, (obj.key,)
    elif kind is Shared:  # it was pickled already
        return obj, ()
    return _pickled(obj, _unpicklable_result)


def encode_items(obj: Any) -> list[Held]:
    """The items of ``obj``, each encoded; of a dict its keys.  An iterator is consumed.

    Raises ResultError when ``obj`` has no items (a str and bytes count as one value) or no
    end, and whatever the iteration itself raises.
    """
    if isinstance(obj, str | bytes | bytearray):
        raise errors.ResultError(
            f"each() needs the items of a result, and this one is of type {class_name(type(obj))}: "
            "return a list, such as [text] or text.splitlines()"
        )
    if isinstance(obj, Future):
        raise errors.ResultError(
            "each() needs the items of a result, and this one is a Future, whose items are "
            "not known yet: return a list of futures, one per item"
        )
    try:
        items = iter(obj)
    except TypeError as error:
        raise errors.ResultError(
            f"each() needs the items of a result, and this one, of type {class_name(type(obj))}, "
            "has none: return a list or another iterable"
        ) from error
    encoded = [encode(item) for item in islice(items, MOST_ITEMS + 1)]
    if len(encoded) > MOST_ITEMS:
        raise errors.ResultError(
            f"each() needs the items of a result, and this one, of type {class_name(type(obj))}, "
            f"has more than {MOST_ITEMS:,}; is it endless?"
        )
    return encoded


def are_plain(items: list[Any]) -> bool:
    """Whether all of them surely travel as themselves: asked at once, since they are often
    very many."""
    kinds = set(map(type, items))
    if kinds == {int}:
        return bool(min(items) >= -_INT_MAX and max(items) < _INT_MAX)
    if kinds == {str}:
        return max(map(len, items)) <= SHORT
    return kinds <= _PLAIN


def decode(encoded: Encoded) -> Any:
    """The value of ``encoded``; a Failure becomes the exception object.

    Raises whatever unpickling raises.
    """
    kind = type(encoded)
    while kind is tuple and encoded[0] is None:  # the value is another one: go there
        (encoded,) = encoded[1].values()
        kind = type(encoded)
    if kind is bytes:
        return pickle.loads(encoded)
    if kind is Shared:
        return blobs.loads(encoded)
    if kind is tuple:
        return _loads(*encoded)
    if kind is list:
        if _SIMPLE.issuperset(map(type, encoded)):
            return encoded[:]
        return [decode(item) for item in encoded]
    if kind is Failure:
        return decode_failure(encoded)
    if kind is Kept:
        return decode(encoded.brought())
    return encoded


def dumps_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Portable, tuple[bytes, ...]]:
    """A submitted call's arguments as a pickle, and the keys of the futures in them.

    Raises ArgumentError, which names the argument, when they cannot be pickled.
    """
    return _pickled((args, kwargs), _unpicklable_arguments)


def unfit_arguments(why: str) -> Portable:
    """In the place of arguments of which nothing could be made: to load them raises
    ArgumentError, with ``why``."""
    return _dumps(_Unfit(why))


class _Unfit:
    def __init__(self, why: str) -> None:
        self._why = why

    def __reduce__(self) -> Any:
        return _refuse, (self._why,)


def _refuse(why: str) -> None:
    raise errors.ArgumentError(why)


def loads_arguments(
    blob: Portable, links: dict[bytes, Encoded]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) of :func:`dumps_arguments`, futures replaced by their values."""
    args, kwargs = _loads(blob, links)
    return args, kwargs


def _pickled(obj: Any, complain: Callable[[Any], Exception]) -> tuple[Portable, tuple[bytes, ...]]:
    outer = pickling.keys
    keys: list[bytes] = []
    pickling.keys = keys
    try:
        data = _dumps(obj)
    except Exception as error:
        raise complain(obj) from error
    finally:
        pickling.keys = outer
    return data, tuple(dict.fromkeys(keys)) if keys else ()


def _dumps(obj: Any) -> Portable:
    draft = Draft()
    try:
        data = pickle.dumps(obj, PROTOCOL, buffer_callback=draft.keep)
    except (RecursionError, MemoryError):
        raise  # the other pickler needs more of both
    except Exception:
        data = _MAIN
    if _MAIN not in data:
        return blobs.sealed(data, draft)
    from taskrun.byvalue import Pickler  # slow to import, seldom needed

    if pickling.keys:
        pickling.keys.clear()
    draft = Draft()
    Pickler(draft, PROTOCOL, buffer_callback=draft.keep).dump(obj)
    return draft.sealed()


def _loads(blob: Portable, links: dict[bytes, Encoded]) -> Any:
    if not links:
        return blobs.loads(blob)
    values: dict[bytes, Any] = {}

    def resolve(key: bytes) -> Any:
        if key not in values:  # futures of one call share its value
            values[key] = decode(links[key])
        return values[key]

    outer = pickling.resolve
    pickling.resolve = resolve
    try:
        return blobs.loads(blob)
    finally:
        pickling.resolve = outer


# -- what cannot be pickled -----------------------------------------------------------


def _unpicklable_result(obj: Any) -> errors.ResultError:
    path, error = _culprit([("", obj)])
    because = f", because of its {path}" if path else ""
    return errors.ResultError(f"a {class_name(type(obj))} cannot be pickled{because}: {error}")


def _unpicklable_arguments(arguments: Any) -> errors.ArgumentError:
    args, kwargs = arguments
    parts = [(f"argument {number}", part) for number, part in enumerate(args, 1)]
    parts += [(f"argument {name}=", part) for name, part in kwargs.items()]
    path, error = _culprit(parts)
    return errors.ArgumentError(f"{path or 'an argument'} cannot be pickled: {error}")


def _culprit(parts: Iterable[tuple[str, Any]]) -> tuple[str, str]:
    """The path to the innermost part that cannot be pickled, and what is wrong with it."""
    path, wrong = "", "it is nested too deeply"
    for _ in range(8):
        for label, part in parts:
            error = _pickling_error(part)
            if error is not None:
                path, wrong, parts = path + label, error, list(_parts(part))
                break
        else:
            break
    return path, wrong


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(obj, dict):
        yield from ((f"[{guarded(key, repr)}]", part) for key, part in obj.items())
    elif isinstance(obj, list | tuple):
        yield from ((f"[{index}]", part) for index, part in enumerate(obj))
    elif not callable(obj):
        yield from ((f".{name}", part) for name, part in getattr(obj, "__dict__", {}).items())


def _pickling_error(obj: Any) -> str | None:
    outer = pickling.keys
    pickling.keys = []
    try:
        _dumps(obj)
    except Exception as error:
        return f"{type(error).__name__}: {guarded(error, str)}"
    finally:
        pickling.keys = outer
    return None
