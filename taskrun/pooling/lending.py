"""The workers of ``Pool(address=...)``: a server lends them, on its own machine and on its nodes.

    Pool --a connection--> server        the Pool takes part as one more run, with a share
    node --> server --> Pool             each node that comes for it, joined by the server

Calls, retries and callbacks stay with the scheduler in this process.  The workers are those
of nodes that have joined a run, and come and go as those do; what is different is that the
Pool need not be reachable: whenever a node has come, it dials the server again.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, Final

from taskrun import addresses, transport
from taskrun import authkey as keys
from taskrun.engines.nodes import UNFIT, Nodes
from taskrun.errors import DialError, RunError, UsageError
from taskrun.messages import Event
from taskrun.network.bundles import Bundle, make_bundle
from taskrun.network.joining import versions
from taskrun.observers import Observer
from taskrun.pooling import memory, remote
from taskrun.pooling.starting import PoolWorkers, bases, known_names
from taskrun.reactor import Reactor
from taskrun.serving import talk
from taskrun.workers.settings import FORKSERVER

ANSWER: Final = 20.0  # seconds that the server has to connect and to answer
_GOODBYE: Final = 1.0  # seconds for it to take the last words
_INSTALLED: Final = ("site-packages", "dist-packages")


class Borrower:
    """What the workers of one Pool are told, and where they are had; see ``starting.Starter``."""

    method: str = FORKSERVER
    hard: int | None = None
    lent = True

    def __init__(
        self,
        address: Any,
        authkey: bytes | str | os.PathLike[str] | None,
        most: int | None,
        setup: remote.Setup,
        limits: memory.Limits,
        *,
        insecure_plain: bool,
    ) -> None:
        """``most``: how many workers it wants at most.  Raises UsageError for what cannot be
        used, or cannot travel."""
        if limits.hard is not None:
            raise UsageError(
                "maxrss: only workers of this machine can be stopped for their memory; say one "
                "size, above which they are replaced"
            )
        self.line = Line(address, keys.given(authkey), most, insecure_plain=insecure_plain)
        name, self.bundle = _main()
        data = None if name is None else pickle.dumps({"init_main_from_name": name})
        self.base = next(bases) << 48
        self.told = remote.Start(
            self.method, data, _packed(setup, by_value=self.bundle is None), None,
            maxrss=limits.soft, base=self.base, captured=True,
        )  # fmt: skip

    def workers(
        self, recipe_ids: Iterator[int], grace: float, state: Callable[[], tuple[Any, bytes]]
    ) -> PoolWorkers:
        """The engine."""
        return LentWorkers(self, recipe_ids, grace, state)

    def in_main(self, function: Any) -> bool:
        """Whether a function of ``__main__`` is found there by its name in workers."""
        return self.bundle is not None and known_names(self.method)(function)

    def launch(self, fd: int, ours: int) -> int:
        """Nothing starts on this machine."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held for workers."""


class LentWorkers(PoolWorkers):
    """The engine: nodes, and the connection to the server that sends them."""

    def __init__(
        self,
        start: Borrower,
        recipe_ids: Iterator[int],
        grace: float,
        state: Callable[[], tuple[Any, bytes]],
    ) -> None:
        self.lent = Nodes(bundle=lambda: start.bundle, state=state)
        super().__init__(start, recipe_ids, grace, state, slots=0, nodes=self.lent)
        self._line = start.line
        self._deaf: set[int] = set()  # outputs that nobody reads any more

    def start(self, reactor: Reactor, post: Callable[[Event], None], observer: Observer) -> None:
        """See ``engines.base``.  Raises DialError and UsageError too: where the server cannot
        be reached, has another key or is of another version."""
        super().start(reactor, post, observer)
        self._line.open(reactor, self)
        self.lent.lease = self._line.lease
        reactor.call_soon(lambda: self.share(self._line.shares))

    def share(self, shares: dict[str, int]) -> None:
        """From now on the server lends so many slots, by node."""
        self.set_slots(0, shares)

    def lost(self, reason: str) -> None:
        """There is no server any more."""
        self.give_up(reason)

    def close(self, deadline: float) -> None:
        """See ``engines.base``."""
        super().close(deadline)
        self._line.close()

    @property
    def settled(self) -> bool:
        """Whether no worker is about to start."""
        return all(link.ready for link in self._links.values())

    def _on_capacity(self) -> None:
        self.resized(max(1, sum(self._line.shares.values())), self.lent.slots)
        super()._on_capacity()

    # -- what comes from nodes --------------------------------------------------------

    def output(self, call: Any, stream: str, data: bytes, worker: str) -> None:
        """A call wrote this: it comes out where a worker of this machine would write it."""
        fd = 1 if stream == "stdout" else 2
        rest = memoryview(data)
        try:
            while rest and fd not in self._deaf:
                rest = rest[os.write(fd, rest) :]
        except OSError:
            self._deaf.add(fd)  # the call goes on: it has nothing to do with it

    def notice(self, text: str) -> None:
        """Nodes come and go, which concerns nobody; one that cannot come may be missed."""
        if UNFIT in text:
            warnings.warn(text, RuntimeWarning, stacklevel=2)


class Line:
    """The connection to the server.  ``most``: how many slots are wanted, None: any number.

    ``shares``: the slots that are lent, by node; ``lease``: seconds that a node may be silent.
    """

    def __init__(self, address: Any, key: bytes, most: int | None, *, insecure_plain: bool) -> None:
        """Raises UsageError for what is no address."""
        if isinstance(address, str):
            address = addresses.parse(address, insecure_plain=insecure_plain)
        self._address = address if insecure_plain else addresses.secured(address)
        self._insecure_plain = insecure_plain
        self._shown = addresses.shown(self._address)
        self._key = key
        self._most = most
        self.shares: dict[str, int] = {}
        self.lease = 0.0
        self._name = ""
        self._peer: transport.Peer | None = None
        self._error: Exception | None = None
        self._open = False

    def open(self, reactor: Reactor, workers: LentWorkers) -> None:
        """Connect, and have a share.  Raises DialError, UsageError and RunError."""
        self._reactor = reactor
        self._workers = workers
        dialling = self._dial(talk.SUBMIT, self._on_peer, self._on_failure)
        answered = reactor.run_until(lambda: self._open or bool(self._error), monotonic() + ANSWER)
        if self._error is not None:
            raise self._error
        if not answered:
            dialling.close()
            raise RunError(f"{self._shown} does not answer")

    def _dial(
        self,
        role: bytes,
        on_peer: Callable[[transport.Peer], object],
        on_failure: Callable[[DialError], object],
    ) -> transport.Dialling:
        return transport.dial(
            self._address, self._key, self._reactor, role, on_peer, on_failure,
            insecure_plain=self._insecure_plain,
        )  # fmt: skip

    def close(self) -> None:
        """Give all back."""
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.send(talk.said(do="close"))
            peer.finish()
            self._reactor.run_until(lambda: peer.closed, monotonic() + _GOODBYE)
            peer.close()

    # -- what comes -------------------------------------------------------------------

    def _on_peer(self, peer: transport.Peer) -> None:
        self._peer = peer
        peer.listen(self._on_frame, self._on_end)
        who = f"Pool of {socket.gethostname()}, pid {os.getpid()}"
        peer.send(talk.said(do="lend", jobs=self._most, who=who, **versions()))

    def _on_failure(self, error: DialError) -> None:
        self._error = error

    def _on_end(self, reason: str) -> None:
        if self._open:
            self._workers.lost(f"lost the server at {self._shown}: {reason}")
        elif self._error is None:
            self._error = RunError(f"{self._shown} lends no workers: {reason}")

    def _on_frame(self, frame: memoryview) -> None:
        try:
            said = talk.heard(frame)
        except ValueError as error:
            self._on_end(f"it is no server of this version: {error}")
            return
        if "error" in said:
            self._error = UsageError(f"{self._shown} lends no workers: {said['error']}")
        elif "run" in said:
            self._name, self.lease = said["run"], said["lease"]
        elif "shares" in said:
            self.shares = said["shares"]
            if self._open:
                self._workers.share(self.shares)
        elif "dealt" in said:
            self._open = True
        elif "come" in said:
            self._fetch()
        elif "over" in said:
            self._workers.lost(f"the server at {self._shown} lends no more workers: {said['over']}")

    def _fetch(self) -> None:
        """A node has come; if it cannot be taken, it comes again."""
        self._dial(talk.line_of(self._name), self._workers.lent.accept, lambda error: None)


# -- what travels ---------------------------------------------------------------------


def _packed(setup: remote.Setup, *, by_value: bool) -> bytes:
    """Pickled, with ``by_value`` also what is in a ``__main__`` that does not travel."""
    from multiprocessing.reduction import ForkingPickler

    from taskrun import byvalue

    dumps: list[Callable[[Any], Any]] = [ForkingPickler.dumps, byvalue.dumps]
    try:
        return bytes(dumps[by_value](setup))
    except Exception as error:
        raise UsageError(
            "the initializer and its arguments cannot travel to other machines, where locks and "
            f"queues of this process are nothing: {error}"
        ) from error


def _main() -> tuple[str | None, Bundle | None]:
    """The name of the main module, where it was started by that, and the files of its folder,
    if it has any that are not installed."""
    from multiprocessing import spawn

    data = spawn.get_preparation_data("")
    name: str | None = data.get("init_main_from_name")
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None or not os.path.isfile(file):
        return None, None
    folder = os.path.dirname(os.path.realpath(file))
    for _ in range(0 if name is None else name.count(".")):
        folder = os.path.dirname(folder)
    if not set(_INSTALLED).isdisjoint(folder.split(os.sep)):
        return None, None
    return name, make_bundle(file, folder=folder)
