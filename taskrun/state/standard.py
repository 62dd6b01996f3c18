"""The named objects, for clients of the standard library.

    from multiprocessing.managers import DictProxy, SyncManager

    class Run(SyncManager):
        pass

    Run.register("state_dict", proxytype=DictProxy)
    run = Run(("127.0.0.1", 5000), authkey=b"...")
    run.connect()
    pages = run.state_dict("pages")      # what state.dict("pages") is in a task

What they share is a handle, which lives in the coordinator and is called on a thread of
the connection: there, and never on the loop, values are pickled and unpickled.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from taskrun.manager.blocking import waits_like
from taskrun.state import containers, handles
from taskrun.state.clients import Client
from taskrun.state.handles import Handle
from taskrun.state.local import LocalClient
from taskrun.state.stored import to_stored


class Dict(containers.Dict):
    """As containers.Dict; its views are lists, which can be sent."""

    def keys(self) -> Any:
        return list(self)

    def values(self) -> Any:
        return [value for _, value in self._items()]

    def items(self) -> Any:
        return list(self._items())


class Queue(handles.Queue):
    """As handles.Queue; an item whose getter is gone comes back."""

    def put_back(self, item: Any) -> None:
        assert isinstance(self._bound, LocalClient)
        self._bound.store.put_back(self.name, to_stored(item))


waits_like(Queue, queue.Queue)
waits_like(handles.Event, threading.Event)

_LIST = (
    "__add__", "__contains__", "__delitem__", "__getitem__", "__iadd__", "__len__", "__reversed__",
    "__setitem__", "__iter__", "append", "clear", "copy", "count", "extend", "index", "insert",
    "pop", "remove", "reverse", "sort",
)  # fmt: skip
_DICT = (
    "__contains__", "__delitem__", "__getitem__", "__iter__", "__len__", "__setitem__", "clear",
    "copy", "delete_many", "get", "get_many", "items", "keys", "pop", "popitem", "replace",
    "setdefault", "update", "values",
)  # fmt: skip
_SET = (
    "__contains__", "__iter__", "__len__", "add", "add_many", "clear", "copy", "discard",
    "discard_many", "pop", "remove", "update",
)  # fmt: skip
_ITERATES = {"__iter__": "Iterator"}
_HANDLES: dict[str, tuple[type[Handle], tuple[str, ...], dict[str, str]]] = {
    "state_dict": (Dict, _DICT, _ITERATES),
    "state_list": (containers.List, _LIST, _ITERATES),
    "state_set": (containers.Set, _SET, _ITERATES),
    "state_counter": (handles.Counter, ("add", "get", "set"), {}),
    "state_queue": (
        Queue,
        ("empty", "full", "get", "get_nowait", "put", "put_many", "put_nowait", "qsize"),
        {},
    ),
    "state_event": (handles.Event, ("clear", "is_set", "set", "wait"), {}),
}


class Registry(Mapping[str, Any]):
    """typeid -> (callable, exposed, method_to_typeid, proxytype): what the standard library
    registers, and the named objects.  It is put together when it is first looked at."""

    def __init__(self, make_client: Callable[[], Client]) -> None:
        self._make_client = make_client
        self._made: dict[str, Any] | None = None
        self._shared: dict[tuple[str, str], Handle] = {}
        self._mutex = threading.Lock()

    @property
    def _registry(self) -> dict[str, Any]:
        if self._made is None:
            from taskrun.manager.managers import SyncManager

            self._made = {**SyncManager._registry, **dict(self._named())}
        return self._made

    def _named(self) -> Iterator[tuple[str, Any]]:
        for typeid, (kind, exposed, typeids) in _HANDLES.items():
            yield typeid, (self._maker(kind), exposed, typeids or None, None)

    def _maker(self, kind: type[Handle]) -> Callable[..., Handle]:
        def make(name: str, *options: Any) -> Handle:
            with self._mutex:
                found = self._shared.get((kind.kind, name))
                if found is None:
                    found = kind(name, *options, client=self._make_client())
                    self._shared[kind.kind, name] = found
                return found

        return make

    def __getitem__(self, typeid: str) -> Any:
        return self._registry[typeid]

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry)

    def __len__(self) -> int:
        return len(self._registry)
