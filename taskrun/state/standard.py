"""The named objects, for clients of the standard library.

    from multiprocessing.managers import AcquirerProxy, DictProxy, SyncManager

    class Run(SyncManager):
        pass

    Run.register("state_dict", proxytype=DictProxy)
    Run.register("state_lock", proxytype=AcquirerProxy)
    run = Run(("127.0.0.1", 5000), authkey=b"...")
    run.connect()
    pages = run.state_dict("pages")      # what state.dict("pages") is in a task
    with run.state_lock("pages lock"):
        ...

What they share is a handle, which lives in the coordinator and is called on a thread of
the connection: there, and never on the loop, values are pickled and unpickled.  What a
connection has acquired is free when it ends.  Errors of ours, which only those could read who
have taskrun, become builtin ones.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from taskrun.errors import TaskrunError
from taskrun.manager import blocking
from taskrun.state import containers, handles
from taskrun.state.handles import Handle
from taskrun.state.local import Caller, LocalClient
from taskrun.state.store import Store
from taskrun.state.wire import Owner, Request


class Guest(LocalClient):
    """The client of all connections of the standard library, each on a thread of its own,
    which it looks after while it waits."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._here = threading.local()

    def owner(self) -> Owner:
        """The connection that this thread serves."""
        owner: Owner | None = getattr(self._here, "owner", None)
        if owner is None:
            made = owner = self._here.owner = ("client", os.urandom(8).hex())
            blocking.waiter().at_end(lambda: self.store.owner_ended(made))
        return owner

    def call(self, request: Request) -> Any:
        try:
            return super().call(request)
        except TaskrunError as error:
            raise _builtin(error) from None

    def wait(self, request: Request, timeout: float | None) -> Any:
        try:
            value = super().wait(request, timeout)
        except TaskrunError as error:
            raise _builtin(error) from None
        if request[0] == "queue.get":
            blocking.waiter().undo_by(lambda: self.store.put_back(request, value))
        return value

    def _block(self, request: Request, holder: Any, caller: Caller, timeout: float | None) -> bool:
        return blocking.waiter().slices(caller.block, timeout)


def _builtin(error: TaskrunError) -> Exception:
    """The nearest of the exceptions that every client knows."""
    kinds = (kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    kind = next(kinds)
    return RuntimeError(str(error)) if kind is Exception else kind(str(error))


class _Sent:
    """What is sent of it, as for ``copy.deepcopy()`` of a proxy, is a plain copy."""

    copy: Callable[[], Any]

    def __reduce__(self) -> tuple[Any, ...]:
        plain = self.copy()
        return type(plain), (plain,)


class Dict(_Sent, containers.Dict):
    """As containers.Dict; its views are lists, which can be sent."""

    def keys(self) -> Any:
        return list(self)

    def values(self) -> Any:
        return [value for _, value in self._items()]

    def items(self) -> Any:
        return list(self._items())


class List(_Sent, containers.List):
    """As containers.List."""


class Set(_Sent, containers.Set):
    """As containers.Set."""


_LIST = (
    "__add__", "__contains__", "__delitem__", "__getitem__", "__iadd__", "__imul__", "__iter__",
    "__len__", "__mul__", "__reversed__", "__rmul__", "__setitem__", "append", "clear", "copy",
    "count", "extend", "index", "insert", "pop", "remove", "reverse", "sort",
)  # fmt: skip
_DICT = (
    "__contains__", "__delitem__", "__getitem__", "__ior__", "__iter__", "__len__", "__or__",
    "__ror__", "__setitem__", "clear", "copy", "delete_many", "get", "get_many", "items", "keys",
    "pop", "popitem", "replace", "setdefault", "update", "values",
)  # fmt: skip
_SET = (
    "__contains__", "__iter__", "__len__", "add", "add_many", "clear", "copy", "discard",
    "discard_many", "pop", "remove", "update",
)  # fmt: skip
_ITERATES = {"__iter__": "Iterator"}
_HANDLES: dict[str, tuple[type[Handle], tuple[str, ...], dict[str, str]]] = {
    "state_dict": (Dict, _DICT, _ITERATES),
    "state_list": (List, _LIST, _ITERATES),
    "state_set": (Set, _SET, _ITERATES),
    "state_counter": (handles.Counter, ("add", "get", "set"), {}),
    "state_queue": (
        handles.Queue,
        ("empty", "full", "get", "get_nowait", "put", "put_many", "put_nowait", "qsize"),
        {},
    ),
    "state_event": (handles.Event, ("clear", "is_set", "set", "wait"), {}),
    "state_lock": (handles.Lock, ("acquire", "locked", "release"), {}),
    "state_semaphore": (handles.Semaphore, ("acquire", "locked", "release"), {}),
    "state_barrier": (handles.Barrier, ("n_waiting", "wait"), {}),
}


class Registry(Mapping[str, Any]):
    """typeid -> (callable, exposed, method_to_typeid, proxytype): what the standard library
    registers, and the named objects.  It is put together when it is first looked at."""

    def __init__(self, store: Callable[[], Store]) -> None:
        self._store = store
        self._made: dict[str, Any] | None = None

    @property
    def _registry(self) -> dict[str, Any]:
        if self._made is None:
            from taskrun.manager.managers import SyncManager

            self._made = {**SyncManager._registry, **dict(self._named())}
        return self._made

    def _named(self) -> Iterator[tuple[str, Any]]:
        client = Guest(self._store())
        for typeid, (kind, exposed, typeids) in _HANDLES.items():
            yield typeid, (partial(kind, client=client), exposed, typeids or None, None)

    def __getitem__(self, typeid: str) -> Any:
        return self._registry[typeid]

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry)

    def __len__(self) -> int:
        return len(self._registry)
