"""The proxies of the standard library, with their mistakes put right.

- A proxy that was unpickled knows its manager's key, whatever this process' own key is, if
  this process has ever used a proxy or a manager with that address (gh-78740, gh-139801).
- Methods that return a proxy work without a manager object at hand: a dict can be iterated
  in another process (gh-99595).
- After os.fork() parent and child no longer talk over one connection (gh-101320), and the
  child counts its references.
- A proxy may be collected at any moment, on any thread.  On one of a server in this very
  process its reference is given back later: the loop must not wait for its own answer, nor
  for a lock that a thread holds which waits for the loop.
- A call that is interrupted between request and reply (Ctrl-C) drops its connection: the
  next call must not get that reply.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from multiprocessing import managers, process
from typing import Any

from taskrun.manager import client
from taskrun.manager.pickling import Loader
from taskrun.manager.server import loop_here

_keys: dict[Any, bytes] = {}  # address -> key


def remember_key(address: Any, authkey: bytes) -> None:
    """Proxies with this address are unpickled with this key from now on."""
    _keys[address] = process.AuthenticationString(authkey)  # type: ignore[attr-defined]


def rebuild_proxy(make: Any, token: Any, serializer: str, kwds: dict[str, Any]) -> Any:
    """What unpickles a proxy."""
    known = _keys.get(token.address)
    if known is not None:
        kwds.setdefault("authkey", known)
    return managers.RebuildProxy(make, token, serializer, kwds)  # type: ignore[attr-defined]


def _rebuild_carried(
    carrier: Proxy, make: Any, token: Any, serializer: str, kwds: dict[str, Any]
) -> Any:
    """What unpickles a proxy out of a reply: most likely it has the carrier's key, though
    the server may have another name there."""
    if _same_server(token.address, carrier._token.address):
        kwds.setdefault("authkey", carrier._authkey)
    return rebuild_proxy(improved(make), token, serializer, kwds)


def _same_server(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return bool(one[1] == other[1])
    return bool(one == other)


_decref = managers.BaseProxy._decref  # type: ignore[attr-defined]


def _release(*reference: Any) -> None:
    """What a proxy's finalizer calls, of the standard library's proxies too."""
    loop = loop_here()
    if loop is None:
        _decref(*reference)
    else:
        # No thread is started here: this may have interrupted just that.
        loop.post(lambda: _release_elsewhere(reference))


def _release_elsewhere(reference: tuple[Any, ...]) -> None:
    try:
        threading.Thread(target=_decref, args=reference, daemon=True).start()
    except RuntimeError:
        pass  # the system gives us no more threads: it stays counted


managers.BaseProxy._decref = staticmethod(_release)  # type: ignore[attr-defined]


class Proxy(managers.BaseProxy):
    """The base of all proxies here."""

    # Of the standard library's, whose type stubs do not list them.
    _authkey: bytes
    _id: str
    _manager: Any
    _serializer: str
    _tls: Any
    _token: Any

    def __init__(
        self,
        token: Any,
        serializer: str,
        manager: Any = None,
        authkey: bytes | None = None,
        exposed: Any = None,
        incref: bool = True,
        manager_owned: bool = False,
    ) -> None:
        if authkey is None and manager is None:
            authkey = _keys.get(token.address)
        super().__init__(token, serializer, manager, authkey, exposed, False, manager_owned)
        self._Client = client.client_for(serializer)
        self._pid = os.getpid()
        remember_key(token.address, self._authkey)
        if incref:
            self._incref()

    def _incref(self) -> None:
        self._pid = os.getpid()
        super()._incref()  # type: ignore[misc]

    def _connection(self) -> Any:
        """This thread's connection, made by this process."""
        pid = os.getpid()
        tls = self._tls
        if getattr(tls, "pid", pid) != pid and hasattr(tls, "connection"):
            self._disconnect()
        if self._pid != pid:  # os.fork(): nobody has told us
            self._incref()
        if not hasattr(tls, "connection"):
            self._connect()  # type: ignore[attr-defined]
            tls.pid = pid
        return tls.connection

    def _disconnect(self) -> None:
        conn = self._tls.connection
        del self._tls.connection
        conn.close()

    def _callmethod(self, methodname: str, args: Any = (), kwds: Any = None) -> Any:
        """Call a method of the shared object; its result, or a proxy of that."""
        kind, result = self._exchange((self._id, methodname, args, kwds or {}))
        if kind == "#RETURN":
            return result
        if kind == "#PROXY":
            return self._proxy(*result)
        try:
            raise managers.convert_to_error(kind, result)  # type: ignore[attr-defined]
        finally:
            del result  # else it would be in a cycle with its own traceback

    def _exchange(self, request: tuple[Any, ...]) -> Any:
        """Send a request, and get the reply.  Where that is broken off, nobody knows what would
        be read from the connection next."""
        conn = self._connection()
        xml = self._serializer == "xmlrpclib"
        payload = None if xml else client.pickled(request)
        try:
            if payload is None:
                conn.send(request)
                return conn.recv()
            conn.send_bytes(payload)
            reply = conn.recv_bytes()
        except BaseException:
            self._disconnect()
            raise
        return Loader(reply, partial(_rebuild_carried, self)).load()

    def _proxy(self, exposed: Any, token: Any) -> Any:
        known: Any = managers.SyncManager if self._manager is None else self._manager
        make = known._registry.get(token.typeid, (AutoProxy,))[-1]
        token.address = self._token.address
        proxy = improved(make)(
            token, self._serializer, manager=self._manager, authkey=self._authkey, exposed=exposed
        )
        conn = self._Client(token.address, authkey=self._authkey)
        client.ask(conn, "decref", token.id)
        conn.close()
        return proxy

    def __reduce__(self) -> tuple[Any, ...]:
        make, token, serializer, kwds = super().__reduce__()[1]
        if make is managers.AutoProxy:  # type: ignore[attr-defined]
            make = AutoProxy
        return rebuild_proxy, (make, token, serializer, kwds)

    def _reduce_as_standard(self) -> tuple[Any, ...]:
        """As the standard library's proxy would be pickled."""
        make, token, serializer, kwds = super().__reduce__()[1]
        make = _STANDARD.get(make, make)
        return managers.RebuildProxy, (make, token, serializer, kwds)  # type: ignore[attr-defined]


def AutoProxy(
    token: Any,
    serializer: str,
    manager: Any = None,
    authkey: bytes | None = None,
    exposed: Any = None,
    **counting: bool,
) -> Any:
    """A proxy with whatever methods the shared object exposes.  ``counting``: incref and
    manager_owned, as of :class:`Proxy`."""
    if authkey is None:
        key = getattr(manager, "_authkey", None) or _keys.get(token.address)
        authkey = process.current_process().authkey if key is None else key
    if exposed is None:
        conn = client.client_for(serializer)(token.address, authkey=authkey)
        try:
            exposed = client.ask(conn, "get_methods", token)
        finally:
            conn.close()
    kind = _auto_type(f"AutoProxy[{token.typeid}]", tuple(exposed))
    proxy = kind(token, serializer, manager, authkey, **counting)
    proxy._isauto = True
    return proxy


_auto_types: dict[tuple[str, tuple[str, ...]], type] = {}


def _auto_type(name: str, exposed: tuple[str, ...]) -> type:
    if (name, exposed) not in _auto_types:
        standard = managers.MakeProxyType(name, exposed)  # type: ignore[attr-defined]
        _auto_types[name, exposed] = type(name, (Proxy, standard), {})
    return _auto_types[name, exposed]


# -- the kinds ------------------------------------------------------------------------

_standard: Any = managers  # not all of it is in its type stubs, and these are not generic there


class IteratorProxy(Proxy, _standard.IteratorProxy):  # type: ignore[misc]
    """As the standard library's."""


class AcquirerProxy(Proxy, _standard.AcquirerProxy):  # type: ignore[misc]
    """As the standard library's."""


class ConditionProxy(Proxy, _standard.ConditionProxy):  # type: ignore[misc]
    """As the standard library's."""


class EventProxy(Proxy, _standard.EventProxy):  # type: ignore[misc]
    """As the standard library's."""


class BarrierProxy(Proxy, _standard.BarrierProxy):  # type: ignore[misc]
    """As the standard library's."""


class NamespaceProxy(Proxy, _standard.NamespaceProxy):  # type: ignore[misc]
    """As the standard library's."""


class ValueProxy(Proxy, _standard.ValueProxy):  # type: ignore[misc]
    """As the standard library's."""


class ListProxy(Proxy, _standard.ListProxy):  # type: ignore[misc]
    """As the standard library's."""


class DictProxy(Proxy, _standard.DictProxy):  # type: ignore[misc]
    """As the standard library's."""


class ArrayProxy(Proxy, _standard.ArrayProxy):  # type: ignore[misc]
    """As the standard library's."""


class PoolProxy(Proxy, _standard.PoolProxy):  # type: ignore[misc]
    """As the standard library's."""


_SET_METHODS = (
    "__contains__", "__len__", "__iter__", "add", "clear", "copy", "difference", "discard",
    "intersection", "isdisjoint", "issubset", "issuperset", "pop", "remove",
    "symmetric_difference", "union", "update",
)  # fmt: skip
_BaseSetProxy: Any = _standard.MakeProxyType("SetProxy", _SET_METHODS)
_BaseSetProxy._method_to_typeid_ = {"__iter__": "Iterator"}
_BaseCounterProxy: Any = _standard.MakeProxyType("CounterProxy", ("add", "get"))


class SetProxy(Proxy, _BaseSetProxy):  # type: ignore[misc]
    """A shared set."""


class CounterProxy(Proxy, _BaseCounterProxy):  # type: ignore[misc]
    """A shared number: ``add(n)`` returns what it has become, ``get()`` what it is."""


_PAIRS = [
    (_standard.IteratorProxy, IteratorProxy),
    (_standard.AcquirerProxy, AcquirerProxy),
    (_standard.ConditionProxy, ConditionProxy),
    (_standard.EventProxy, EventProxy),
    (_standard.BarrierProxy, BarrierProxy),
    (_standard.NamespaceProxy, NamespaceProxy),
    (_standard.ValueProxy, ValueProxy),
    (_standard.ListProxy, ListProxy),
    (_standard.DictProxy, DictProxy),
    (_standard.ArrayProxy, ArrayProxy),
    (_standard.PoolProxy, PoolProxy),
    (_standard.AutoProxy, AutoProxy),
]
_IMPROVED: dict[Any, Any] = dict(_PAIRS)
_STANDARD: dict[Any, Any] = {ours: standard for standard, ours in _PAIRS}


def improved(make: Any) -> Any:
    """Our form of one of the standard library's proxy types, or ``make`` itself."""
    return _IMPROVED.get(make, make)
