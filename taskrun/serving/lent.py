"""A Pool that somebody elsewhere has, and what a server lends it: slots here and on nodes.

To the server it is one of its runs: it has a share of all slots, as long as its connection
is there.  The scheduler is in the process that made the Pool, which the server cannot dial.
So it is told of each node that comes for it, and dials again for that one: the server joins
the two connections, and frames pass unread.  The slots of the server's own machine are a
node as well, a process that is started when the first of them is lent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Final

from taskrun import transport
from taskrun.demand import HERE
from taskrun.reactor import Reactor
from taskrun.serving.hosts import join
from taskrun.serving.processes import LOST, environment, write_key
from taskrun.serving.runs import ENDED, RUNNING, WAITING
from taskrun.serving.talk import said
from taskrun.workers.jobs import Folder

PATIENCE: Final = 10.0  # seconds that a node waits to be taken
AGAIN: Final = 1.0  # seconds before our own node is started again
GRACE: Final = 4.0  # seconds that it has to end in order


class LentPool:
    """One Pool.  ``peer`` is the connection to it; ``who`` made it, as people are told;
    ``address``: the server's own, for its node; ``slots``: those of the server's machine."""

    words: tuple[str, ...] = ()
    wants: int | None = None  # it does not say how many slots it has work for
    lanes: frozenset[str] = frozenset()  # calls of a Pool are of none but processes
    demand: None = None  # and need nothing else

    def __init__(
        self,
        name: str,
        who: str,
        jobs: int | None,
        peer: transport.Peer,
        reactor: Reactor,
        address: str,
        key: bytes,
        slots: int,
        on_end: Callable[[LentPool], object],
    ) -> None:
        """Raises OSError where there is no room for a key file."""
        self.name = name
        self.file = who
        self.jobs = jobs
        self.state = WAITING
        self.status: int | None = None
        self.shares: dict[str, int] = {}
        self.submitted = time.time()
        self._peer = peer
        self._reactor = reactor
        self._address = address
        self._slots = slots
        self._on_end = on_end
        self._came: deque[transport.Peer] = deque()
        self._node: subprocess.Popen[bytes] | None = None
        self._folder = Folder()
        try:
            self._key_file = write_key(self._folder, key)
        except BaseException:
            self._folder.remove()
            raise

    @property
    def slots(self) -> int:
        """Of all places."""
        return sum(self.shares.values())

    # -- as any run of a server -------------------------------------------------------

    def start(self, shares: Mapping[str, int]) -> None:
        """Lend it the first slots: place -> slots."""
        self.state = RUNNING
        self.share(shares, {})

    def share(self, shares: Mapping[str, int], of_lanes: Mapping[str, int]) -> None:
        """Lend it so many from now on; it has no use for those of lanes."""
        if dict(shares) != self.shares:
            self.shares = dict(shares)
            self._peer.send(said(shares=self.shares))
            self._start_node()

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Take all back."""
        if self.state != ENDED:
            self._peer.send(said(over=f"{self.name} was stopped there"))
            self._peer.finish()
            self.end(128 + number)

    def cancel(self) -> None:
        """The same."""
        self.interrupt()

    def kill(self) -> None:
        """The same."""
        self.interrupt(signal.SIGKILL)

    def end(self, status: int = LOST) -> None:
        """It is gone, or is to be."""
        if self.state == ENDED:
            return
        self.state, self.status, self.shares = ENDED, status, {}
        for peer in self._came:
            peer.close()
        self._came.clear()
        self._end_node()
        self._on_end(self)

    def described(self) -> dict[str, Any]:
        """For ``taskrun status``."""
        return {
            "run": self.name, "file": self.file, "words": [], "state": self.state,
            "status": self.status, "pid": None, "submitted": self.submitted,
            "slots": self.slots, "wants": self.wants, "shares": self.shares, "lent": True,
        }  # fmt: skip

    # -- nodes that come for it -------------------------------------------------------

    def take_node(self, peer: transport.Peer) -> None:
        """A node has come for it."""
        self._came.append(peer)
        self._reactor.call_at(monotonic() + PATIENCE, lambda: self._give_up(peer))
        self._peer.send(said(come=True))

    def _give_up(self, peer: transport.Peer) -> None:
        if peer in self._came:
            self._came.remove(peer)
            peer.close()  # it comes again

    def take_line(self, peer: transport.Peer) -> None:
        """It has dialled for a node."""
        if self._came:
            join(self._came.popleft(), peer)
        else:
            peer.close()

    # -- the server's own machine -----------------------------------------------------

    def _start_node(self) -> None:
        if self._node is not None or not self.shares.get(HERE):
            return  # it is there, or nobody needs it
        command = [
            sys.executable, "-P", "-m", "taskrun.cli.lent", str(os.getpid()), self._address,
            self.name, str(self._slots),
        ]  # fmt: skip
        try:
            self._node = subprocess.Popen(
                command, env=environment(self._key_file), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError:
            self._start_node_later()

    def _start_node_later(self) -> None:
        self._reactor.call_at(monotonic() + AGAIN, self._start_node)

    def look(self) -> None:
        """Some process of the server's has ended: perhaps its node."""
        if self._node is not None and self._node.poll() is not None:
            self._node = None
            if self.state == RUNNING:
                self._start_node_later()

    def _end_node(self) -> None:
        self._folder.remove()
        node = self._node
        if node is None:
            return
        # The first has it finish what runs, of which nobody is left to hear.
        node.send_signal(signal.SIGTERM)
        node.send_signal(signal.SIGINT)
        self._reactor.call_at(monotonic() + GRACE, node.kill)
