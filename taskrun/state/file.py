"""Shared state in a file: loaded when a run starts, written while it goes on.

The store tells of each change; twice a second a thread of its own writes what has changed
since into an SQLite file.  So whatever ends the run, at most the last second is lost, and
the file is always that of one moment for each object.  Dicts, lists, sets, counters, queues
and events are kept; locks, semaphores and barriers belong to those who hold them.

A row has an object's number, a place in it, and a key and a value in pickles: a dict's or
set's item has a place that is never given again, a list's item its index.
"""

from __future__ import annotations

import pickle
import sqlite3
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from taskrun.errors import RunError, StateError, UsageError
from taskrun.reactor import Reactor
from taskrun.state.kinds import CHANGED, CLEARED, DELETED, REMOVED, Hosted
from taskrun.state.store import Store

INTERVAL: Final = 0.5  # seconds between two writings
_APPLICATION: Final = 0x7A5C5EED
_VERSION: Final = 1
_KEPT: Final = frozenset(("dict", "list", "set", "counter", "queue", "event"))
_PROTOCOL: Final = 4
_SCHEMA: Final = """
create table object (id integer primary key, name text unique not null, kind text not null,
                     options blob not null);
create table item (object integer not null, place integer not null, key blob, value blob,
                   primary key (object, place)) without rowid;
"""


Items: TypeAlias = dict[int, tuple[Any, Any] | None]
"""Place -> key and value; None for what is gone."""

Taken: TypeAlias = tuple[bool, int | None, Items]


class _Tracked:
    """What has changed of one object since it was last written.

    ``places`` says where each key of a dict or set is.  ``items`` are changed places, None
    for what is gone; from index ``since`` on, a list is to be written anew.
    """

    def __init__(self, hosted: Hosted, number: int) -> None:
        self.hosted = hosted
        self.number = number
        self.places: dict[Any, int] = {}
        self.last = 0
        self.cleared = False
        self.since: int | None = None
        self.items: Items = {}

    def place(self, key: Any) -> int:
        if self.hosted.kind not in ("dict", "set"):
            return key or 0
        found = self.places.get(key)
        if found is None:
            self.last += 1
            found = self.places[key] = self.last
        return found

    def note(self, action: str, key: Any, value: Any) -> None:
        """A change, as the store tells it."""
        if action == CLEARED:
            self.cleared, self.since = True, None
            self.items.clear()
            self.places.clear()
        elif action == CHANGED:
            self.since = key if self.since is None else min(self.since, key)
        elif action in (DELETED, REMOVED):
            self.items[self.place(key)] = None
            self.places.pop(key, None)
        else:
            self.items[self.place(key)] = (key, value)

    def taken(self) -> Taken:
        """What is to be written: whether all rows go first, from which place on they go,
        and the rows.  It counts as written from now on."""
        cleared, since, items = self.cleared, self.since, self.items
        if since is not None:
            items = {place: item for place, item in items.items() if place < since}
            values = self.hosted.items[since:]  # type: ignore[attr-defined]
            items.update((place, (None, value)) for place, value in enumerate(values, since))
        self.cleared, self.since, self.items = False, None, {}
        return cleared, since, items

    def give_back(self, cleared: bool, since: int | None, items: Items) -> None:
        """What was taken could not be written; meanwhile more may have changed."""
        if self.cleared:
            return  # nothing of it is there any more
        self.cleared = cleared
        self.items = {**items, **self.items}
        self.since = min((one for one in (since, self.since) if one is not None), default=None)


class StateFile:
    """The file of a store.  Raises UsageError for a file that cannot be one."""

    def __init__(
        self, path: str, store: Store, reactor: Reactor, notice: Callable[[str], object]
    ) -> None:
        self._path = path
        self._store = store
        self._reactor = reactor
        self._notice = notice
        self._tracked: dict[str, _Tracked] = {}
        self._changed: set[_Tracked] = set()
        self._error: sqlite3.Error | None = None  # why the last writing failed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="state file", daemon=True)
        self._database = self._open()

    # -- beginning and ending ---------------------------------------------------------

    def start(self) -> None:
        """Load what is in the file, and keep it up to date from now on."""
        try:
            self._load()
        except (sqlite3.Error, pickle.UnpicklingError, EOFError, LookupError, ValueError,
                TypeError, StateError) as error:  # fmt: skip
            raise UsageError(f"the state file {self._path} is damaged: {error}") from None
        self._store.ears.append(self._note)
        self._thread.start()

    def close(self) -> None:
        """Write the last changes.  Raises RunError where that fails."""
        self._stopping.set()
        if self._thread.ident is not None:  # it was started, so the file was read
            self._thread.join()
            self._write()
        self._database.close()
        if self._error is not None:
            raise RunError(
                f"the last changes of the state could not be written: {self._path}: {self._error}"
            )

    def _open(self) -> sqlite3.Connection:
        try:
            made = sqlite3.connect(self._path, timeout=0.2, check_same_thread=False,
                                   isolation_level=None)  # fmt: skip
            made.execute("pragma locking_mode = exclusive")
            made.execute("begin immediate")
            self._check(made)
            made.execute("commit")
            made.execute("pragma journal_mode = wal")
            made.execute("pragma synchronous = normal")
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise UsageError(f"the state file {self._path} is used by another run") from None
            raise UsageError(f"the state file {self._path} cannot be used: {error}") from None
        return made

    def _check(self, database: sqlite3.Connection) -> None:
        (application,) = database.execute("pragma application_id").fetchone()
        (version,) = database.execute("pragma user_version").fetchone()
        tables = database.execute("select count(*) from sqlite_master").fetchone()[0]
        if not application and not tables:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute(f"pragma application_id = {_APPLICATION}")
            database.execute(f"pragma user_version = {_VERSION}")
        elif application != _APPLICATION:
            raise UsageError(f"{self._path} is a database, but not a state file of taskrun")
        elif version != _VERSION:
            raise UsageError(f"the state file {self._path} was written by another version")

    # -- reading ----------------------------------------------------------------------

    def _load(self) -> None:
        rows = self._database.execute("select id, name, kind, options from object").fetchall()
        for number, name, kind, options in rows:
            hosted = self._store.find(kind, name, pickle.loads(options))
            tracked = self._tracked[name] = _Tracked(hosted, number)
            items = self._database.execute(
                "select place, key, value from item where object = ? order by place", (number,)
            )
            hosted.restore(self._restored(tracked, items))

    def _restored(
        self, tracked: _Tracked, rows: Iterable[tuple[int, bytes, bytes]]
    ) -> list[tuple[Any, Any]]:
        found = []
        by_key = tracked.hosted.kind in ("dict", "set")
        for place, key, value in rows:
            item = pickle.loads(key) if by_key else place
            found.append((item, pickle.loads(value)))
            tracked.last = max(tracked.last, place)
            if by_key:
                tracked.places[item] = place
        return found

    # -- writing ----------------------------------------------------------------------

    def _note(self, hosted: Hosted, action: str, key: Any, value: Any) -> None:
        """An ear of the store."""
        if hosted.kind not in _KEPT:
            return
        tracked = self._tracked.get(hosted.name)
        if tracked is None:
            number = len(self._tracked) + 1
            tracked = self._tracked[hosted.name] = _Tracked(hosted, number)
        tracked.note(action, key, value)
        self._changed.add(tracked)

    def _run(self) -> None:
        self._reactor.may_wait_for_this_thread()  # in the store
        while not self._stopping.wait(INTERVAL):
            self._write()

    def _write(self) -> None:
        """Write what has changed.  What cannot be written is tried again the next time."""
        with self._store.mutex:
            changed, self._changed = self._changed, set()
            taken = [(tracked, *tracked.taken()) for tracked in changed]
        if not taken:
            return
        try:
            self._database.execute("begin immediate")
            for tracked, cleared, since, items in taken:
                self._write_object(tracked, cleared, since, items)
            self._database.execute("commit")
        except sqlite3.Error as error:
            self._put_off(taken, error)
        else:
            if self._error is not None:
                self._notice(f"the state is kept again: {self._path}")
            self._error = None

    def _put_off(self, taken: list[tuple[_Tracked, *Taken]], error: sqlite3.Error) -> None:
        with self._store.mutex:
            for tracked, cleared, since, items in taken:
                tracked.give_back(cleared, since, items)
                self._changed.add(tracked)
        if self._error is None:
            self._notice(f"the state is not kept for now, to be tried again: {self._path}: {error}")
        self._error = error
        try:
            if self._database.in_transaction:
                self._database.execute("rollback")
        except sqlite3.Error as second:
            self._error = second  # a disk that fails again; sqlite rolls back by itself

    def _write_object(
        self,
        tracked: _Tracked,
        cleared: bool,
        since: int | None,
        items: Items,
    ) -> None:
        hosted, number, run = tracked.hosted, tracked.number, self._database
        run.execute(
            "insert or ignore into object values (?, ?, ?, ?)",
            (number, hosted.name, hosted.kind, _dumps(hosted.options or None)),
        )
        if cleared:
            run.execute("delete from item where object = ?", (number,))
        if since is not None:
            run.execute("delete from item where object = ? and place >= ?", (number, since))
        run.executemany(
            "delete from item where object = ? and place = ?",
            ((number, place) for place, item in items.items() if item is None),
        )
        run.executemany(
            "insert or replace into item values (?, ?, ?, ?)",
            ((number, place, _dumps(item[0]), _dumps(item[1]))
             for place, item in items.items() if item is not None),
        )  # fmt: skip


def _dumps(value: Any) -> bytes:
    return pickle.dumps(value, _PROTOCOL)
