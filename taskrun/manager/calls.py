"""Executing a client's requests, the same on the loop and on a thread.

A request is ``(ident, method, args, kwds)``, a reply ``(kind, value)``: the client returns
the value of ``#RETURN``, makes a proxy of ``#PROXY``, and raises what comes with
``#ERROR`` (an exception) or ``#TRACEBACK`` and ``#UNSERIALIZABLE`` (text).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

from taskrun.manager.objects import Entry, Objects

Reply = tuple[str, Any]
Invoke = Callable[[Entry, str, Callable[..., Any], Any, Mapping[str, Any]], Any]

# What may be asked of any object, whatever it exposes.
_ALWAYS: dict[str, Callable[[Any], Any]] = {
    "__str__": str,
    "__repr__": repr,
    "#GETVALUE": lambda value: value,
}


def complaint() -> Reply:
    """The reply to a request that is wrong in itself; for use in an ``except`` block."""
    return "#TRACEBACK", traceback.format_exc()


def _plainly(
    entry: Entry, method: str, function: Callable[..., Any], args: Any, kwds: Mapping[str, Any]
) -> Any:
    return function(*args, **kwds)


def execute(
    objects: Objects,
    address: Any,
    request: Any,
    *,
    invoke: Invoke = _plainly,
    inline: bool = False,
    pid: int | None = None,
) -> Reply:
    """The reply to a request.  ``invoke`` calls the method; ``inline`` says that this is
    the loop, so that what the method returns may be served there too."""
    try:
        ident, method, args, kwds = request
        entry = objects.find(ident)
        if entry is None:
            raise KeyError(ident)
        function = getattr(entry.value, method, None) if method in entry.exposed else None
        if function is None:
            return "#RETURN", _fallback(entry, method, args, kwds)
    except Exception:
        return complaint()
    try:
        result = invoke(entry, method, function, args, kwds)
    except Exception as error:
        return failure(error)
    if method not in entry.typeids:
        return "#RETURN", result
    try:
        return _proxy(objects, address, entry.typeids[method], result, inline, pid)
    except Exception:
        return complaint()


def _fallback(entry: Entry, method: str, args: Any, kwds: Mapping[str, Any]) -> Any:
    if method not in _ALWAYS:
        kind = type(entry.value).__name__
        raise AttributeError(f"method {method!r} of this {kind} is not exposed to clients")
    return _ALWAYS[method](entry.value, *args, **kwds)


def _proxy(
    objects: Objects, address: Any, typeid: str, value: Any, inline: bool, pid: int | None
) -> Reply:
    from multiprocessing.managers import Token

    entry, exposed = objects.create(typeid, (value,), {}, inline=inline, pid=pid)
    return "#PROXY", (exposed, Token(typeid, address, entry.ident))


def failure(error: Exception) -> Reply:
    """The reply to a call that raised: the exception, with a note of where in a user's code
    it came from; the traceback itself does not travel."""
    try:
        _add_note(error)
    except Exception:
        pass  # its class is a user's, and need not take one
    return "#ERROR", error


def _add_note(error: Exception) -> None:
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every if not frame.filename.startswith(_OURS)]
    if frames and not getattr(error, "__notes__", None):
        lines = "".join(traceback.format_list(frames)).rstrip()
        error.add_note(f"In the manager's server:\n{lines}")


_OURS = __file__.rpartition("/")[0]
