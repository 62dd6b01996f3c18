"""The store: all named objects of a run, and the one door to them.

Operations come from the coordinator's loop and from threads; a mutex lets one in at a
time.  None takes long, and none waits: see ``waiting``.  The same store, in a process
without a run, holds that process's own objects.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from taskrun.errors import StateError
from taskrun.state import kinds, waiting
from taskrun.state.channels import Channel, Channels, Line, unknown_line
from taskrun.state.kinds import Ear, Hosted
from taskrun.state.waiting import Client
from taskrun.state.wire import CHANGE, LEASED, OK, TIMED_OUT, Owner, Reply, Request, refusal

KINDS: dict[str, type[Hosted]] = {
    kind.kind: kind
    for kind in (kinds.Dict, kinds.List, kinds.Set, kinds.Counter, waiting.Queue, waiting.Lock,
                 waiting.Semaphore, waiting.Event, waiting.Barrier)
}  # fmt: skip

PAGE = 1000  # items in one reply of an iteration
_MOST_CURSORS = 10_000  # iterations in one process that are not over

_PLAIN = {
    kinds.Dict: "get set delete pop popitem setdefault contains size clear read swap get_many"
                " update replace delete_many",
    kinds.List: "get set slice set_slice delete_slice append extend insert pop delete_if"
                " replace_if read reverse clear size",
    kinds.Set: "add discard contains size pop clear update discard_many keep contains_many"
    " toggle_many",
    kinds.Counter: "add get set",
}  # fmt: skip
_WAITING = {
    waiting.Queue: "put put_many get size full",
    waiting.Lock: "acquire release locked",
    waiting.Semaphore: "acquire release locked",
    waiting.Event: "set clear is_set wait",
    waiting.Barrier: "wait waiting",
    Channel: "send recv close",
}


class Store:
    """Objects by name.

    ``is_alive`` is asked before an owner gets a lease, ``line`` which channel of a call is
    meant, ``title_of`` what people call the call of an id.
    """

    def __init__(
        self,
        is_alive: Callable[[Owner], bool] = lambda owner: True,
        line: Callable[[str], Line] = unknown_line,
        title_of: Callable[[int], str] = "call {}".format,
    ) -> None:
        self.mutex = threading.RLock()
        self.ears: list[Ear] = []
        self.objects: dict[str, Hosted] = {}
        self.channels = Channels(self.objects, line)
        self._is_alive = is_alive
        self._title_of = title_of
        self._owners: dict[Client, Owner] = {}
        self._cursors: defaultdict[Owner | None, dict[int, Iterator[list[Any]]]]
        self._cursors = defaultdict(dict)  # of an owner: its connections are used in turn
        self._last_cursor = 0
        self._watchers: dict[Client, Ear] = {}
        self._clients: defaultdict[Owner, set[Client]] = defaultdict(set)
        self._leased: defaultdict[Owner, set[Hosted]] = defaultdict(set)
        self._plain = {
            f"{kind.kind}.{name}": (kind.kind, getattr(kind, name))
            for kind, names in _PLAIN.items()
            for name in names.split()
        }
        self._waiting = {
            f"{kind.kind}.{name}": (kind.kind, getattr(kind, name))
            for kind, names in _WAITING.items()
            for name in names.split()
        }
        self._others: dict[str, Callable[..., Any]] = {
            "state.names": self._names,
            "state.export": self._export,
            "state.watch": self._watch,
            "iterate": self._iterate,
            "next": self._next,
            "stop": self._stop,
        }

    # -- the door ---------------------------------------------------------------------

    def execute(self, request: Request, client: Client) -> Reply:
        """Do what ``client`` asks.  Where the reply is PARKED, another one follows."""
        try:
            with self.mutex:
                operation, name, options, args = request
                plain = self._plain.get(operation)
                if plain is not None:
                    kind, function = plain
                    found = self.objects.get(name)
                    if found is None or found.kind != kind or options is not None:
                        found = self.find(kind, name, options)
                    return OK, function(found, *args)
                return self._execute(operation, name, options, args, client)
        except Exception as error:  # whatever it is, it is the client's
            return refusal(error)

    def _execute(
        self, operation: str, name: str, options: Any, args: tuple[Any, ...], client: Client
    ) -> Reply:
        waits = self._waiting.get(operation)
        if waits is not None:
            kind, function = waits
            found: Hosted
            if kind == Channel.kind:
                found = self.channels.find(name)
            else:
                found = self.find(kind, name, options)
            if operation in LEASED:
                self._lease(found, args[0])
            reply: Reply = function(found, client, *args)
            return reply
        if operation not in self._others:
            raise StateError(f"there is no operation {operation!r}")
        return OK, self._others[operation](client, name, options, *args)

    def _lease(self, hosted: Hosted, owner: Owner) -> None:
        if not self._is_alive(owner):
            raise StateError(f"{waiting.describe(owner)} has ended: it gets no lease")
        self._leased[owner].add(hosted)

    def find(self, kind: str, name: str, options: Any = None) -> Hosted:
        """The object of that name, made if there is none.  Raises StateError where it is
        of another kind, or has other options."""
        found = self.objects.get(name)
        if found is None:
            if not isinstance(name, str):
                raise TypeError(f"the name of a shared object is a str, not {name!r}")
            made = self.objects[name] = KINDS[kind](name, tuple(options or ()), self.ears)
            return made
        if found.kind != kind:
            raise StateError(
                f"{name!r} is a {found.kind} of this state, so it cannot be a {kind} too: "
                "give one of them another name"
            )
        if options is not None and tuple(options) != found.options:
            raise StateError(
                f"the {kind} {name!r} was made with {_listed(found.options)}, "
                f"and is now asked for with {_listed(options)}"
            )
        return found

    # -- clients come and go ----------------------------------------------------------

    def joined(self, client: Client, owner: Owner) -> None:
        """``client`` is a connection of ``owner``."""
        with self.mutex:
            self._clients[owner].add(client)
            self._owners[client] = owner

    def left(self, client: Client, owner: Owner) -> None:
        """It is gone: it waits for nothing any more, and what did not reach it goes back.
        With the last connection of an owner go its leases."""
        with self.mutex:
            client.wait = None
            undo, client.undo = client.undo, None
            if undo is not None:
                undo()
            self._owners.pop(client, None)
            self._forget_watcher(client)
            self._clients[owner].discard(client)
            if not self._clients[owner]:
                del self._clients[owner]
                self._cursors.pop(owner, None)
                self.owner_ended(owner)

    def owner_ended(self, owner: Owner) -> None:
        """Whatever ``owner`` held is free."""
        with self.mutex:
            for hosted in self._leased.pop(owner, ()):
                hosted.owner_ended(owner)

    def withdraw(self, client: Client) -> Reply | None:
        """``client`` has waited long enough.  None: it has its answer already."""
        with self.mutex:
            if client.wait is None:
                return None
            client.wait = None
            return TIMED_OUT, None

    def put_back(self, request: Request, value: Any) -> None:
        """Whoever took an item of a queue, or a message, was interrupted."""
        operation, name, options, args = request
        with self.mutex:
            if operation == "channel.recv":
                self.channels.find(name).put_back(args[0], value)
                return
            queue = self.find("queue", name, options)
            assert isinstance(queue, waiting.Queue)
            queue.put_back(None, value)

    # -- iteration --------------------------------------------------------------------

    def _iterate(
        self, client: Client, name: str, options: Any, kind: str, what: str
    ) -> tuple[list[Any], int]:
        """The first page of an object's items as they are now, and a number with which to
        ask for the next; 0: there is none."""
        hosted: Any = self.find(kind, name, options)
        every = list(hosted.items)
        if kind == "dict" and what == "items":
            pages = _pages_of_items(every, list(hosted.items.values()))
        else:
            pages = (every[at : at + PAGE] for at in range(0, len(every), PAGE))
        page: list[Any] = next(pages, [])
        if len(every) <= PAGE:
            return page, 0
        cursors = self._cursors_of(client)
        if len(cursors) >= _MOST_CURSORS:
            del cursors[next(iter(cursors))]
        self._last_cursor += 1
        cursors[self._last_cursor] = pages
        return page, self._last_cursor

    def _next(self, client: Client, name: str, options: Any, cursor: int) -> tuple[list[Any], int]:
        pages = self._cursors_of(client).get(cursor)
        if pages is None:
            raise StateError("this iteration is over: too many others were begun and not ended")
        page = next(pages, None)
        if page is None:
            del self._cursors_of(client)[cursor]
            return [], 0
        return page, cursor

    def _stop(self, client: Client, name: str, options: Any, cursor: int) -> None:
        self._cursors_of(client).pop(cursor, None)

    def _cursors_of(self, client: Client) -> dict[int, Iterator[list[Any]]]:
        return self._cursors[self._owners.get(client)]

    # -- looking ----------------------------------------------------------------------

    def _names(self, client: Client, name: str, options: Any) -> list[tuple[str, str, int]]:
        """(name, kind, length) of all objects."""
        named = [one for _, one in sorted(self.objects.items()) if one.kind != Channel.kind]
        return [(one.name, one.kind, len(one)) for one in named]

    def _export(self, client: Client, name: str, options: Any) -> tuple[str, Any]:
        """(kind, what is in it); raises KeyError where there is no such object."""
        hosted = self.objects[name]
        exported = hosted.exported()
        if isinstance(hosted, waiting.Lock) and exported["holder"] is not None:
            exported["holder"] = waiting.describe(exported["holder"], self._title_of)
        return hosted.kind, exported

    def _watch(self, client: Client, name: str, options: Any, kind: str | None) -> None:
        """From now on ``client`` is told of changes: of the one object, or of all."""
        if kind is not None:
            self.find(kind, name, options)

        def tell(hosted: Hosted, action: str, key: Any, value: Any) -> None:
            if not name or hosted.name == name:
                client.answer((CHANGE, (hosted.name, hosted.kind, action, key, value)))

        self._forget_watcher(client)
        self._watchers[client] = tell
        self.ears.append(tell)

    def _forget_watcher(self, client: Client) -> None:
        ear = self._watchers.pop(client, None)
        if ear is not None:
            self.ears.remove(ear)


def _pages_of_items(keys: list[Any], values: list[tuple[int, Any]]) -> Iterator[list[Any]]:
    """Of a dict; ``values`` have their versions with them."""
    for at in range(0, len(keys), PAGE):
        page = zip(keys[at : at + PAGE], values[at : at + PAGE], strict=True)
        yield [(key, value) for key, (_, value) in page]


def _listed(options: tuple[Any, ...]) -> str:
    return ", ".join(map(repr, options)) or "no options"
