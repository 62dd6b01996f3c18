"""``taskrun.connect``: the shared state of a live run, from outside."""

from __future__ import annotations

import os
from typing import Any

from taskrun import addresses
from taskrun.authkey import given
from taskrun.state.containers import Dict, List, Set
from taskrun.state.handles import Barrier, Counter, Event, Lock, Queue, Semaphore, Watch
from taskrun.state.remote import Connection, RemoteClient
from taskrun.state.stored import loaded


def connect(
    address: Any = None,
    authkey: bytes | str | os.PathLike[str] | None = None,
    *,
    tls_cert: str | None = None,
    tls_key: str | None = None,
    tls_ca: str | None = None,
    insecure_plain: bool = False,
    run: str | None = None,
) -> Connected:
    """The shared state of a live run, or of a server; with ``run``, of that run of a server.

    ``address``: ``"HOST:PORT"``, ``"tls://HOST:PORT"``, ``"unix:PATH"`` or (host, port);
    without one, the variable TASKRUN_ADDRESS, or this user's only live run.  ``authkey``:
    the key itself, or the path of a file with it; without one, that which taskrun always
    takes.  Where HOST is another machine, TLS is spoken.  ``tls_cert``, ``tls_key`` and
    ``tls_ca``, or the variables TASKRUN_TLS_CERT and so on, may name files in PEM: a
    certificate to show with its key, and who must have signed the coordinator's.
    ``insecure_plain`` is for one that was started with ``--insecure-plain``: without TLS,
    whoever is on the network between can read and change everything, and run code on both
    sides.

    Raises UsageError where there is no such address or key, StateLost where nobody answers,
    StateRefused where the key is not the right one, the address has another form, or the
    server has no such run.
    """
    if address is None or isinstance(address, str):
        address = addresses.find(address, insecure_plain=insecure_plain)
    elif not insecure_plain:
        address = addresses.secured(address)
    return Connected(address, given(authkey), (tls_cert, tls_key, tls_ca), run)


class _Holding(RemoteClient):
    """What it has acquired lasts until ``close()``, whichever connections end before: one that
    nobody speaks on stays open all the time."""

    def _begin(self) -> None:
        super()._begin()
        self._lasting: Connection | None = None

    def connect(self) -> Connection:
        self.hold()
        return super().connect()

    def hold(self) -> None:
        """Have that connection, also where the one before has broken."""
        if self._lasting is None or self._lasting.ready():  # it is told nothing but its end
            self._lasting = super().connect()


class Connected:
    """The state of another process: the same handles as in ``taskrun.state``.

    A context manager; ``close()`` ends it, and releases what it holds.
    """

    def __init__(
        self,
        address: Any,
        authkey: bytes,
        tls: tuple[str | None, str | None, str | None] = (None, None, None),
        run: str | None = None,
    ) -> None:
        """``tls``: a certificate, its key, and who signs the others'."""
        self.address = address
        self._client = _Holding(address, authkey, tls=tls, run=run)
        self._client.hold()  # now, rather than at first use, it is told

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def __enter__(self) -> Connected:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<shared state at {addresses.shown(self.address)}>"

    # -- what there is ----------------------------------------------------------------

    def names(self) -> list[tuple[str, str, int]]:
        """(name, kind, length) of all objects."""
        found: list[tuple[str, str, int]] = self._client.call(("state.names", "", None, ()))
        return found

    def value(self, name: str) -> Any:
        """What is in the object of that name, as plain Python; an ``Unloadable`` stands for
        what this process cannot load.  Raises KeyError."""
        kind, exported = self._client.call(("state.export", name, None, ()))
        if kind == "dict":
            return {key: loaded(value) for key, value in exported}
        if kind in ("list", "queue"):
            return [loaded(value) for value in exported]
        return set(exported) if kind == "set" else exported

    def watch(self) -> Watch:
        """The changes of all objects, as they happen."""
        return Watch(self._client, ("state.watch", "", None, (None,)))

    # -- handles ----------------------------------------------------------------------

    def dict(self, name: str) -> Dict:
        return Dict(name, client=self._client)

    def list(self, name: str) -> List:
        return List(name, client=self._client)

    def set(self, name: str) -> Set:
        return Set(name, client=self._client)

    def counter(self, name: str) -> Counter:
        return Counter(name, client=self._client)

    def queue(self, name: str, maxsize: int | None = None) -> Queue:
        return Queue(name, maxsize, client=self._client)

    def lock(self, name: str) -> Lock:
        return Lock(name, client=self._client)

    def semaphore(self, name: str, permits: int | None = None) -> Semaphore:
        return Semaphore(name, permits, client=self._client)

    def event(self, name: str) -> Event:
        return Event(name, client=self._client)

    def barrier(self, name: str, parties: int | None = None) -> Barrier:
        return Barrier(name, parties, client=self._client)
