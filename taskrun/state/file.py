"""Shared state in a file: loaded when a run starts, written while it goes on.

The store tells of each change; twice a second a thread of its own writes what has changed
since into an SQLite file.  So whatever ends the run, at most the last second is lost, and
the file is always that of one moment for each object.  Dicts, lists, sets, counters, queues
and events are kept; locks, semaphores and barriers belong to those who hold them.

A row has an object's number, a place in it, and a key and a value in pickles, of plain values
only (see ``stored``): a dict's or set's item has a place that is never given again, a list's
item its index.  A name that is no Unicode, as one of a file may be, is a blob.
"""

from __future__ import annotations

import os
import pickle
import sqlite3
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from taskrun.errors import RunError, StateError, UsageError
from taskrun.manager.pickling import load_plain
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

    ``places`` says where each key of a dict or set is, and which of the keys that are equal
    (1, True) it is.  ``items`` are changed places, None
    for what is gone; from index ``since`` on, a list is to be written anew.
    """

    def __init__(self, hosted: Hosted, number: int) -> None:
        self.hosted = hosted
        self.number = number
        self.places: dict[Any, tuple[int, Any]] = {}
        self.last = 0
        self.cleared = False
        self.since: int | None = None
        self.items: Items = {}

    def place(self, key: Any) -> tuple[int, Any]:
        if self.hosted.kind not in ("dict", "set"):
            return key or 0, None
        found = self.places.get(key)
        if found is None:
            self.last += 1
            found = self.places[key] = self.last, key
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
            self.items[self.place(key)[0]] = None
            self.places.pop(key, None)
        else:
            place, key = self.place(key)
            self.items[place] = (key, value)

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
        self._last = 0  # number of an object
        self._changed: set[_Tracked] = set()
        self._error: Exception | None = None  # why the last writing failed
        self._refused: dict[_Tracked, Exception] = {}  # what cannot be written, and why
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="state file", daemon=True)
        self._database = self._open()

    # -- beginning and ending ---------------------------------------------------------

    def start(self) -> None:
        """Load what is in the file, and keep it up to date from now on."""
        try:
            self._load()
        except Exception as error:  # damage may be of any kind
            why = str(error) or type(error).__name__
            raise UsageError(f"the state file {self._path} is damaged: {why}") from None
        self._store.ears.append(self._note)
        self._thread.start()

    def close(self) -> None:
        """Write the last changes.  Raises RunError where that fails."""
        self._stopping.set()
        if self._thread.ident is not None:  # it was started, so the file was read
            self._thread.join()
            self._changed.update(self._refused)
            self._write()
        self._database.close()
        reasons = [f"{one.hosted.name!r}: {error}" for one, error in self._refused.items()]
        if self._error is not None:
            reasons = [str(self._error)]
        if reasons:
            raise RunError(
                "the last changes of the state could not be written: "
                f"{self._path}: {'; '.join(reasons)}"
            )

    def _open(self) -> sqlite3.Connection:
        if not self._path:
            raise UsageError("the path of the state file is empty: is a variable not set?")
        try:
            # Only an absolute path is never a name that means something to SQLite, as :memory:.
            made = sqlite3.connect(os.path.abspath(self._path), timeout=0.2,
                                   check_same_thread=False, isolation_level=None)  # fmt: skip
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
            if kind not in _KEPT:
                raise StateError(f"it has a {kind}, which is never kept")
            if isinstance(name, bytes):
                name = name.decode("utf-8", "surrogatepass")
            hosted = self._store.find(kind, name, load_plain(options))
            self._last = max(self._last, number)
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
            item = load_plain(key) if by_key else place
            found.append((item, load_plain(value)))
            tracked.last = max(tracked.last, place)
            if by_key:
                tracked.places[item] = place, item
        return found

    # -- writing ----------------------------------------------------------------------

    def _note(self, hosted: Hosted, action: str, key: Any, value: Any) -> None:
        """An ear of the store."""
        if hosted.kind not in _KEPT:
            return
        tracked = self._tracked.get(hosted.name)
        if tracked is None:
            self._last += 1
            tracked = self._tracked[hosted.name] = _Tracked(hosted, self._last)
        tracked.note(action, key, value)
        self._changed.add(tracked)

    def _run(self) -> None:
        self._reactor.may_wait_for_this_thread()  # in the store
        while not self._stopping.wait(INTERVAL):
            self._write()

    def _write(self) -> None:
        """Write what has changed.  What cannot be written is tried again the next time, or, if
        it is one object that cannot be, when that has changed."""
        with self._store.mutex:
            changed, self._changed = self._changed, set()
            taken = {tracked: tracked.taken() for tracked in changed}
        if not taken:
            return
        try:
            self._database.execute("begin immediate")
            refused = {tracked: self._write_apart(tracked, *taken[tracked]) for tracked in taken}
            self._database.execute("commit")
        except Exception as error:
            self._put_off(taken, error)
            return
        if self._error is not None:
            self._notice(f"the state is kept again: {self._path}")
        self._error = None
        for tracked, why in refused.items():
            self._settle(tracked, taken[tracked], why)

    def _put_off(self, taken: dict[_Tracked, Taken], error: Exception) -> None:
        with self._store.mutex:
            for tracked, one in taken.items():
                tracked.give_back(*one)
                self._changed.add(tracked)
        if self._error is None:
            self._notice(f"the state is not kept for now, to be tried again: {self._path}: {error}")
        self._error = error
        try:
            if self._database.in_transaction:
                self._database.execute("rollback")
        except sqlite3.Error as second:
            self._error = second  # a disk that fails again; sqlite rolls back by itself

    def _settle(self, tracked: _Tracked, taken: Taken, why: Exception | None) -> None:
        """The others are written; so is this one, or this is why it is not."""
        name = tracked.hosted.name
        if why is not None:
            with self._store.mutex:
                tracked.give_back(*taken)
            if tracked not in self._refused:
                self._notice(f"{name!r} is not kept as it is now: {self._path}: {why}")
            self._refused[tracked] = why
        elif self._refused.pop(tracked, None) is not None:
            self._notice(f"{name!r} is kept again: {self._path}")

    def _write_apart(
        self, tracked: _Tracked, cleared: bool, since: int | None, items: Items
    ) -> Exception | None:
        """Write one object, or say why it cannot be written.  Raises what keeps out the others
        too."""
        self._database.execute("savepoint object")
        try:
            self._write_object(tracked, cleared, since, items)
        except Exception as error:
            if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.DataError):
                raise
            self._database.execute("rollback to object")
            return error
        self._database.execute("release object")
        return None

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
            (number, _kept_name(hosted.name), hosted.kind, _dumps(hosted.options or None)),
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


def _kept_name(name: str) -> str | bytes:
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")
    return name


def _dumps(value: Any) -> bytes:
    return pickle.dumps(value, _PROTOCOL)
