"""Drop-ins for ``BaseManager`` and ``SyncManager`` of ``multiprocessing.managers``.

Same names, same arguments, same semantics; the server is ours, and so are the proxies.
They are subclasses of the standard library's, and talk to its servers as well.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import ProcessError, managers, process
from typing import Any, ClassVar

from taskrun.manager import client, hosted
from taskrun.manager.objects import Objects
from taskrun.manager.proxies import (
    AutoProxy,
    CounterProxy,
    SetProxy,
    improved,
    remember_key,
)
from taskrun.manager.server import Server
from taskrun.reactor import Reactor


class _StopEvent(threading.Event):
    """An event that the reactor notices."""

    def __init__(self, reactor: Reactor) -> None:
        super().__init__()
        self._reactor = reactor

    def set(self) -> None:
        super().set()
        self._reactor.post(lambda: None)


class _SharedObjects(Mapping[str, Any]):
    """name -> (object, exposed, method_to_typeid), as RebuildProxy looks at it."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def __getitem__(self, ident: str) -> Any:
        entry = self._objects.find(ident)
        if entry is None:
            raise KeyError(ident)
        return entry.triple

    def __iter__(self) -> Iterator[str]:
        return (entry.ident for entry in self._objects.counted())

    def __len__(self) -> int:
        return len(self._objects.counted())


class _NestedObjects(_SharedObjects):
    """Of these, the ones with a proxy inside the server.  RebuildProxy enters them; from
    then on they stay."""

    def __getitem__(self, ident: str) -> Any:
        if ident not in set(self):
            raise KeyError(ident)
        return super().__getitem__(ident)

    def __setitem__(self, ident: str, triple: Any) -> None:
        self._objects.nest(ident)

    def __iter__(self) -> Iterator[str]:
        return self._objects.nested()

    def __len__(self) -> int:
        return len(set(self))


class ManagerServer:
    """A server with a loop of its own: what ``get_server()`` returns."""

    def __init__(
        self, registry: Mapping[str, Any], address: Any, authkey: bytes, serializer: str
    ) -> None:
        self._reactor = Reactor()
        self.stop_event = _StopEvent(self._reactor)
        self._server = Server(
            registry,
            address,
            authkey,
            self._reactor,
            serializer=serializer,
            on_shutdown=self.stop_event.set,
        )
        self.address = self._server.address
        self.listener = self._server.listeners[0]
        self.id_to_obj = _SharedObjects(self._server.objects)
        self.id_to_local_proxy_obj = _NestedObjects(self._server.objects)

    def serve_forever(self) -> None:
        """Serve until a client asks for the end, or ``stop_event`` is set; then exit."""
        process.current_process()._manager_server = self  # type: ignore[attr-defined]
        self._server.start()
        try:
            while not self.stop_event.is_set():
                self._serve()
        except (KeyboardInterrupt, SystemExit):
            pass  # as the standard library's
        finally:
            self._server.close()
        sys.exit(0)

    def _serve(self) -> None:
        try:
            self._reactor.run_until(self.stop_event.is_set)
        except Exception:
            self._server.report()  # a bug of ours must not end everybody's session


class BaseManager(managers.BaseManager):
    """Like ``multiprocessing.managers.BaseManager``."""

    # Of the standard library's, whose type stubs do not list them.
    _address: Any
    _authkey: bytes
    _serializer: str
    _state: Any

    _Server: Any = ManagerServer
    _registry: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        address: Any = None,
        authkey: bytes | None = None,
        serializer: str = "pickle",
        ctx: Any = None,
        *,
        shutdown_timeout: float = 1.0,
    ) -> None:
        super().__init__(address, authkey, serializer, ctx, shutdown_timeout=shutdown_timeout)
        self._Client = client.client_for(serializer)

    def get_server(self) -> Any:
        """A server that has its address already; call its ``serve_forever()``."""
        state = self._state.value
        if state != managers.State.INITIAL:  # type: ignore[attr-defined]
            started = state == managers.State.STARTED  # type: ignore[attr-defined]
            raise ProcessError("Already started server" if started else "Manager has shut down")
        return self._Server(self._registry, self._address, self._authkey, self._serializer)

    def connect(self) -> None:
        """Use the server at the address.  Raises AuthenticationError, OSError."""
        conn = self._Client(self._address, authkey=self._authkey)
        try:
            client.ask(conn, "dummy")
        finally:
            conn.close()
        remember_key(self._address, self._authkey)
        self._state.value = managers.State.STARTED  # type: ignore[attr-defined]

    def start(self, initializer: Callable[..., Any] | None = None, initargs: Any = ()) -> None:
        """Start a server in a process of its own."""
        super().start(initializer, initargs)
        remember_key(self._address, self._authkey)

    def _create(self, typeid: str, /, *args: Any, **kwds: Any) -> tuple[Any, Any]:
        assert self._state.value == managers.State.STARTED, "server not yet started"  # type: ignore[attr-defined]
        conn = self._Client(self._address, authkey=self._authkey)
        try:
            ident, exposed = client.ask(conn, "create", typeid, *args, **kwds)
        finally:
            conn.close()
        return managers.Token(typeid, self._address, ident), exposed

    @classmethod
    def register(
        cls,
        typeid: str,
        callable: Callable[..., Any] | None = None,
        proxytype: Any = None,
        exposed: Any = None,
        method_to_typeid: Mapping[str, str] | None = None,
        create_method: bool = True,
    ) -> None:
        """Make a type known; see the standard library's documentation."""
        make = AutoProxy if proxytype is None else improved(proxytype)
        super().register(typeid, callable, make, exposed, method_to_typeid, create_method)


class SyncManager(BaseManager, managers.SyncManager):
    """Like ``multiprocessing.managers.SyncManager``; and ``set()`` and ``Counter()``."""


# What newer Pythons' proxies call, and older ones' registries do not list.
_ALSO_EXPOSED = {
    "Lock": ("locked",),
    "RLock": ("locked",),
    "Semaphore": ("locked",),
    "BoundedSemaphore": ("locked",),
    "Condition": ("locked",),
    "list": ("clear", "copy", "__iter__"),
    "dict": ("__or__", "__ror__", "__ior__", "__reversed__", "fromkeys"),
}
_NOT_CREATED = {"Iterator", "AsyncResult"}


def _register_standard_types() -> None:
    for typeid, registered in managers.SyncManager._registry.items():  # type: ignore[attr-defined]
        make, exposed, typeids, proxytype = registered
        if exposed is not None:
            extra = (name for name in _ALSO_EXPOSED.get(typeid, ()) if name not in exposed)
            exposed = (*exposed, *extra)
        SyncManager.register(
            typeid, make, proxytype, exposed, typeids, create_method=typeid not in _NOT_CREATED
        )
    SyncManager.register("set", hosted.Set, SetProxy)
    SyncManager.register("Counter", hosted.Counter, CounterProxy)


_register_standard_types()

__all__ = ["BaseManager", "ManagerServer", "SyncManager"]
