"""A server for ``multiprocessing.managers``, and the manager classes that go with it.

The server speaks the standard library's wire protocol, so its clients need nothing but
Python.  It lives on an event loop (:class:`taskrun.reactor.Reactor`): an idle client costs
a socket and a few hundred bytes, not a thread.

- ``protocol`` is the handshake and the frames, without any input or output;
- ``objects`` holds what clients share, ``calls`` executes their requests;
- ``peer`` is a connection on the loop, ``promoted`` one that has a thread of its own;
- ``server`` listens and ties these together;
- ``managers``, ``proxies`` and ``client`` are the drop-in for the client's side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskrun.manager.managers import BaseManager, SyncManager
    from taskrun.manager.server import Server

__all__ = ["BaseManager", "Server", "SyncManager"]

_HOMES = {
    "BaseManager": "taskrun.manager.managers",
    "Server": "taskrun.manager.server",
    "SyncManager": "taskrun.manager.managers",
}


def __getattr__(name: str) -> Any:
    # The server alone must not cost the import of multiprocessing.managers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
