"""Pickles, read and written in two ways: on the event loop, and on a thread.

Unpickling runs whatever the pickle names, and pickling whatever the value's class defines:
a network connection (a proxy of another manager counts its references there), or an hour
of work.  None of that may happen on the loop.  So the loop reads and writes only what is
made of plain builtin values, and small; anything else raises :class:`NotPlain` before any
of it has run, and a thread does it over again.

This keeps the loop going; it is no protection against clients.  Who has the key may run
code in the server, as everywhere in multiprocessing.
"""

from __future__ import annotations

import array
import builtins
import copyreg
import io
import pickle
from collections.abc import Callable
from typing import Any

PROTOCOL = 4  # what every client from Python 3.4 on reads, and the default until 3.13
LARGEST_INLINE = 256 * 1024  # bytes that the loop reads or writes of one value


class NotPlain(Exception):
    """Raised where the loop would have to run code of others, or would take too long."""


_PLAIN_CLASSES: set[type] = {
    bytearray, complex, frozenset, object, range, set, slice,
    *(found for found in vars(builtins).values()
      if isinstance(found, type) and issubclass(found, Exception)),
}  # fmt: skip
_PLAIN_NAMES = {
    *(("builtins", found.__name__) for found in _PLAIN_CLASSES),
    ("array", "array"),
    ("array", "_array_reconstructor"),
    ("collections", "OrderedDict"),
    ("collections", "deque"),
    ("datetime", "date"),
    ("datetime", "datetime"),
    ("datetime", "time"),
    ("datetime", "timedelta"),
    ("datetime", "timezone"),
    ("decimal", "Decimal"),
    ("uuid", "UUID"),
    ("multiprocessing.managers", "Token"),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN_NAMES:
            return super().find_class(module, name)
        raise NotPlain(f"{module}.{name}")


# A pickle names something by two lines (GLOBAL and INST), by two strings (STACK_GLOBAL), or
# by a number (EXT1, EXT2, EXT4).  One without these bytes, even in its strings, names nothing.
_NAMING = b"\n\x82\x83\x84\x93"
_SHORT = 1024  # bytes; a longer one has them by chance


def load_plain(payload: bytes) -> Any:
    """The value of a pickle that names nothing but builtins.  Raises NotPlain, or whatever
    a broken pickle raises."""
    size = len(payload)
    if size < _SHORT and len(payload.translate(None, _NAMING)) == size:
        return pickle.loads(payload)
    return _PlainUnpickler(io.BytesIO(payload)).load()


# -- writing on the loop --------------------------------------------------------------


def _reduce_array(value: array.array[Any]) -> tuple[Any, ...]:
    return array.array, (value.typecode, value.tobytes())


def _reduce_view(view: Any) -> tuple[Any, ...]:
    return list, (list(view),)


_EMPTY: dict[str, str] = {}
_VIEWS = tuple(type(view) for view in (_EMPTY.keys(), _EMPTY.values(), _EMPTY.items()))
REDUCERS: dict[type, Callable[[Any], Any]] = {
    array.array: _reduce_array,
    **dict.fromkeys(_VIEWS, _reduce_view),
}
_WRITABLE = _PLAIN_CLASSES | {array.array, *_VIEWS}
_ATOMS = {int, float, bool, type(None)}
_SIZED = {str, bytes}


class _Bounded(io.BytesIO):
    def write(self, data: Any) -> int:
        # The pickler writes in pieces of 64 KiB, and large strings in one.
        if self.tell() + len(data) > LARGEST_INLINE:
            raise NotPlain("a large value")
        return super().write(data)


class _PlainPickler(pickle.Pickler):
    dispatch_table = REDUCERS

    def reducer_override(self, value: Any) -> Any:
        if _writable(type(value)) or (isinstance(value, type) and _writable(value)):
            return NotImplemented
        raise NotPlain(f"a value of type {type(value).__qualname__}")


def _writable(kind: type) -> bool:
    return kind in _WRITABLE or (kind.__module__, kind.__qualname__) in _PLAIN_NAMES


def dump_plain(value: tuple[str, Any]) -> bytes | memoryview:
    """The pickle of a reply.  Raises NotPlain, also when it gets large."""
    content = value[1]
    kind = type(content)
    if kind in _ATOMS or (kind in _SIZED and len(content) < LARGEST_INLINE):
        return pickle.dumps(value, PROTOCOL)
    buffer = _Bounded()
    _PlainPickler(buffer, PROTOCOL).dump(value)
    return buffer.getbuffer()


# -- on a thread ----------------------------------------------------------------------


_PROXY_MODULES = {"multiprocessing.managers", "taskrun.manager.proxies"}


class Loader(pickle.Unpickler):
    """Reads any pickle.  ``rebuild_proxy`` stands in for the standard library's function
    that makes proxies, so that the server recognizes proxies of its own objects."""

    def __init__(self, payload: bytes, rebuild_proxy: Callable[..., Any]) -> None:
        super().__init__(io.BytesIO(payload))
        self._rebuild_proxy = rebuild_proxy

    def find_class(self, module: str, name: str) -> Any:
        if name in ("RebuildProxy", "rebuild_proxy") and module in _PROXY_MODULES:
            return self._rebuild_proxy
        return super().find_class(module, name)


class _Dumper(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, PROTOCOL)
        from multiprocessing.managers import BaseProxy
        from multiprocessing.reduction import ForkingPickler

        extra = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        self.dispatch_table = {**copyreg.dispatch_table, **extra, **REDUCERS}
        self.proxies: list[object] = []
        self._proxy_class = BaseProxy

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, self._proxy_class):
            self.proxies.append(value)
        elif isinstance(value, BaseException) and type(value).__module__ == "builtins":
            # Not as a library may have it registered, with what the client may not have: tblib.
            return value.__reduce_ex__(PROTOCOL)
        return NotImplemented


def dump(value: tuple[str, Any]) -> tuple[memoryview, list[object]]:
    """The pickle of a reply, whatever is in it and however large it gets; and the proxies
    in it.  These must live until the client has made its own."""
    buffer = io.BytesIO()
    dumper = _Dumper(buffer)
    dumper.dump(value)
    return buffer.getbuffer(), dumper.proxies


# -- the other serializer -------------------------------------------------------------


def load_xml(payload: bytes) -> Any:
    """The request in an XML-RPC message: tuples have become lists."""
    import xmlrpc.client

    (value,), _ = xmlrpc.client.loads(payload.decode("utf-8"))
    return value


def dump_xml(value: tuple[str, Any]) -> tuple[memoryview, list[object]]:
    """The XML-RPC message of a reply; there are no proxies in one."""
    import xmlrpc.client

    text = xmlrpc.client.dumps((value,), allow_none=True)
    return memoryview(text.encode("utf-8")), []
