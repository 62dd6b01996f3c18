"""What clients share: objects by their secret names, counted.

A name (*ident*) is 128 random bits: it cannot be guessed and is never given out twice.  An
object registered twice under one typeid has one name and one count.  The count is of
references that clients hold; beside it an object lives while proxies of it live inside the
server, in other shared objects.

Where the system says which process a client is (Unix sockets on Linux), references are
counted for each process too, and given back when it has died.

Everything here may be called on any thread.  Objects are made, and dropped, outside the
lock: either may run code of users, or come back here.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from taskrun.manager import hosted

# typeid -> (callable, exposed, method_to_typeid, proxytype), as in multiprocessing.managers
Registry = Mapping[
    str, tuple[Callable[..., Any] | None, Any, Mapping[str, str] | None, Callable[..., Any]]
]


class Entry:
    """One shared object."""

    __slots__ = (
        "exposed", "ident", "inline", "nested", "quick", "references", "typeid", "typeids", "value",
    )  # fmt: skip

    def __init__(self, ident: str, typeid: str, value: Any) -> None:
        self.ident = ident
        self.typeid = typeid
        self.value = value
        self.exposed: frozenset[str] = frozenset()
        self.typeids: Mapping[str, str] = {}  # of what some methods return
        self.inline = False  # whether the loop may serve it
        self.quick: Mapping[str, Callable[..., Any]] = {}  # methods that it need not think about
        self.references = 0
        self.nested = 0  # proxies inside the server

    def leave_loop(self) -> None:
        """The loop serves it no more."""
        self.inline = False
        self.quick = {}

    @property
    def triple(self) -> tuple[Any, frozenset[str], Mapping[str, str]]:
        """The form in which multiprocessing.managers keeps it."""
        return self.value, self.exposed, self.typeids


def public_methods(value: object) -> list[str]:
    """What a type exposes that does not say what it exposes."""
    names = (name for name in dir(value) if not name.startswith("_"))
    return [name for name in names if callable(getattr(value, name))]


def _drop_elsewhere(values: list[Any]) -> None:
    """Have objects collected by a thread: that may take long, or run code of users."""
    if any(value is not None for value in values):
        # The list is emptied there; here is no reference left.
        try:
            threading.Thread(target=values.clear, daemon=True).start()
        except RuntimeError:
            values.clear()  # the system gives us no more threads


class Objects:
    """All shared objects of one server."""

    def __init__(
        self,
        registry: Registry,
        later: Callable[[Callable[[], object]], object],
        on_holder: Callable[[int], object] = lambda pid: None,
    ) -> None:
        """``later`` has something called soon, outside of whatever is going on: proxies
        can be collected at any moment, also while the lock is held.  ``on_holder`` is told,
        later too, of a process that has begun to hold references."""
        self._registry = registry
        self._on_holder = on_holder
        self._later = later
        self._mutex = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._known: dict[tuple[int, str], Entry] = {}
        self._held: dict[int, Counter[str]] = {}  # by process
        self.find = self._entries.get  # ident -> Entry | None

    # -- making -----------------------------------------------------------------------

    def is_quick(self, typeid: object) -> bool:
        """Whether the loop may make one of these."""
        registered = self._registry.get(typeid)  # type: ignore[call-overload]
        return registered is None or hosted.is_quick(registered[0])

    def create(
        self, typeid: str, args: Any, kwds: Any, *, inline: bool = False, pid: int | None = None
    ) -> tuple[Entry, tuple[str, ...]]:
        """Make or find an object, with one more reference to it.  ``inline`` says that it
        may be served on the loop, if it is of a kind for that."""
        make, exposed, typeids, _ = self._registry[typeid]
        if make is not None:
            value = make(*args, **kwds)
        elif kwds or len(args) != 1:
            raise ValueError(f"{typeid}, which has no callable, takes one positional argument")
        else:
            value = args[0]
        if typeids is not None and not isinstance(typeids, dict):
            raise TypeError(f"method_to_typeid of {typeid} is not a dict")
        names = [*(public_methods(value) if exposed is None else exposed), *(typeids or ())]
        inline = (
            inline
            and hosted.is_inline(value)
            and hosted.is_quick(make)
            and all(map(self.is_quick, (typeids or {}).values()))
        )
        with self._mutex:
            entry = self._enter(typeid, value, inline)
            entry.exposed = frozenset(names)
            entry.typeids = typeids or {}
            if entry.inline:
                entry.quick = hosted.quick_methods(value, entry.exposed - entry.typeids.keys())
            self._add(entry, pid)
        return entry, tuple(names)

    def _enter(self, typeid: str, value: Any, inline: bool) -> Entry:
        # While an entry holds the object, no other one can have its id.
        entry = self._known.get((id(value), typeid))
        if entry is None:
            entry = Entry(secrets.token_hex(16), typeid, value)
            entry.inline = inline
            self._entries[entry.ident] = self._known[id(value), typeid] = entry
        return entry

    # -- counting ---------------------------------------------------------------------

    def incref(self, ident: str, pid: int | None = None) -> None:
        """Count one more reference.  Raises KeyError for an unknown object."""
        with self._mutex:
            self._add(self._entries[ident], pid)

    def _add(self, entry: Entry, pid: int | None) -> None:
        entry.references += 1
        if pid is None:
            return
        if pid not in self._held:
            self._held[pid] = Counter()
            self._later(lambda: self._on_holder(pid))
        self._held[pid][entry.ident] += 1

    def decref(self, ident: str, pid: int | None = None) -> None:
        """Count one less; the last one ends the object.  Raises KeyError."""
        with self._mutex:
            entry = self._entries[ident]
            if not entry.references:
                return  # it lives inside of others only
            held = self._held.get(pid) if pid is not None else None
            if held and held[ident] > 1:
                held[ident] -= 1
            elif held:
                del held[ident]  # a Counter does not mind if it is not there
            dropped = self._take(entry, 1)
        del dropped  # outside the lock

    def release_process(self, pid: int) -> None:
        """Give back what a process held that is no more.  On the loop."""
        with self._mutex:
            held = self._held.pop(pid, Counter())
            found = [(self._entries.get(ident), count) for ident, count in held.items()]
            dropped = [self._take(entry, count) for entry, count in found if entry is not None]
        _drop_elsewhere(dropped)

    def _take(self, entry: Entry, count: int) -> Any:
        entry.references = max(0, entry.references - count)
        return self._forget(entry)

    def _forget(self, entry: Entry) -> Any:
        """Take out an entry that nobody refers to; its object, to be dropped by the caller."""
        if entry.references or entry.nested or entry.ident not in self._entries:
            return None
        del self._entries[entry.ident]
        del self._known[id(entry.value), entry.typeid]
        value, entry.value = entry.value, None
        entry.leave_loop()
        return value

    # -- proxies inside the server ----------------------------------------------------

    def nest(self, ident: str) -> None:
        """Keep an object for ever, or until :meth:`unnest`.  Raises KeyError."""
        with self._mutex:
            self._entries[ident].nested += 1

    def unnest(self, ident: str) -> None:
        """Undo :meth:`nest`.  On the loop."""
        with self._mutex:
            entry = self._entries[ident]
            entry.nested -= 1
            dropped = [self._forget(entry)]
        _drop_elsewhere(dropped)

    def keep_while(self, proxy: object, ident: str) -> None:
        """Keep an object while a proxy of it lives in the server.  Raises KeyError."""
        self.nest(ident)
        weakref.finalize(proxy, self._later, lambda: self.unnest(ident)).atexit = False

    # -- what is there ----------------------------------------------------------------

    def counted(self) -> list[Entry]:
        """The objects that clients refer to, by name."""
        with self._mutex:
            found = [entry for entry in self._entries.values() if entry.references]
        return sorted(found, key=lambda entry: entry.ident)

    def nested(self) -> Iterator[str]:
        """The names of those with proxies inside the server."""
        return (ident for ident, entry in list(self._entries.items()) if entry.nested)
