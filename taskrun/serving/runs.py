"""One run of a server: a process of its own, what it writes, and who follows it.

    waiting --a slot--> running --its end--> ended

The process is an ordinary coordinator in the folder of its bundle.  What goes wrong in it
ends this run, and no other.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import IO, Any, Final, NamedTuple

from taskrun import addresses
from taskrun.demand import HERE, Amounts, Demand, Lot
from taskrun.engines.nursery import how_it_ended
from taskrun.network.bundles import unpack
from taskrun.reactor import Reactor
from taskrun.serving.control import Control
from taskrun.serving.kept import Follower, Kept, Peer
from taskrun.serving.processes import LOST, environment, write_key
from taskrun.serving.talk import STDERR, STDOUT
from taskrun.steering import WHOLE_RUN
from taskrun.workers.jobs import Folder

WAITING: Final = "waiting"
RUNNING: Final = "running"
ENDED: Final = "ended"
GRACE: Final = 4.0  # seconds that a run has to end in order when the server does
_READ: Final = 64 * 1024


class Submission(NamedTuple):
    """What a client wants: ``words`` come after ``taskrun exec``; ``file`` is the task file's
    place in the bundle, and ``data`` the bundle.  ``jobs``: the most slots it may get."""

    file: str
    words: tuple[str, ...]
    jobs: int | None
    data: bytes


class ServedRun:
    """One run.  ``on_end`` is called when it has ended, ``on_wants`` when it wants more slots
    or fewer, or other resources, and ``on_back`` with those that it gives back.  ``key`` is what
    its process and the server prove to each other; ``lease``: seconds that its nodes may be
    silent; ``resources``: those of the server's machine."""

    def __init__(
        self,
        name: str,
        submission: Submission,
        reactor: Reactor,
        key: bytes,
        on_end: Callable[[ServedRun], object],
        on_wants: Callable[[], object],
        on_back: Callable[[str, Lot], object],
        lease: float,
        resources: Amounts,
    ) -> None:
        """Raises OSError and ValueError where the bundle cannot be unpacked."""
        self.name = name
        self.file = submission.file
        self.words = submission.words
        self.jobs = submission.jobs
        self.state = WAITING
        self.status: int | None = None
        self.shares: dict[str, int] = {}
        self._of_lanes: dict[str, int] = {}
        self.submitted = time.time()
        self.kept = Kept()
        self._reactor = reactor
        self._key = key
        self._on_end = on_end
        self._lease = lease
        self._resources = resources
        self._followers: list[Follower] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._cancelled = False
        self.control = Control(
            reactor, self.address, key, self._tell_slots, on_wants, partial(on_back, name)
        )
        self._folder = Folder()
        try:
            self._lay_out(submission.data)
        except BaseException:
            self._folder.remove()
            raise

    def _lay_out(self, data: bytes) -> None:
        archive = os.path.join(self._folder.path, "bundle.zip")
        with open(archive, "wb") as file:
            file.write(data)
        self._files = os.path.join(self._folder.path, "files")
        unpack(archive, self._files)
        os.unlink(archive)
        self._key_file = write_key(self._folder, self._key)

    @property
    def pid(self) -> int | None:
        """Of its process, while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def address(self) -> str:
        """The path of its process's Unix socket."""
        name = f"{addresses.SERVED}{os.getpid()}-{self.name}.sock"
        return os.path.join(addresses.runtime_folder(), name)

    @property
    def wants(self) -> int | None:
        """How many slots it has work for; None: that is not known."""
        return self.control.wants

    @property
    def lanes(self) -> frozenset[str]:
        """Those that it has calls for, beside that of processes."""
        return self.control.lanes

    @property
    def demand(self) -> Demand | None:
        """What it needs of resources; None: that is not known."""
        return self.control.demand

    @property
    def slots(self) -> int:
        """Of all places."""
        return sum(self.shares.values())

    # -- its process ------------------------------------------------------------------

    def start(self, shares: Mapping[str, int]) -> None:
        """Start it; ``shares``: place -> slots."""
        self.shares = dict(shares)
        command = [
            sys.executable, "-P", "-m", "taskrun.cli.served", str(os.getpid()), "exec",
            f"./{self.file}", f"--lease={self._lease}", *self.words, "-j", str(shares.get(HERE, 0)),
            "--listen", f"unix:{self.address}",
            *(f"--resource={name}={much:.0f}" for name, much in self._resources.items()),
        ]  # fmt: skip
        try:
            self._process = made = subprocess.Popen(
                command, cwd=self._files, env=environment(self._key_file),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:  # no room, or words that no command can have
            reason = getattr(error, "strerror", None) or error
            why = f"the process of {self.name} cannot be started: {reason}"
            self.state = RUNNING
            self._reactor.call_soon(lambda: self._end(LOST, why))  # others are being started
            return
        self.state = RUNNING
        assert made.stdout is not None and made.stderr is not None
        self._listen(STDOUT, made.stdout)
        self._listen(STDERR, made.stderr)
        self.control.open()

    def _listen(self, stream: int, pipe: IO[bytes]) -> None:
        os.set_blocking(pipe.fileno(), False)
        self._reactor.add_reader(pipe.fileno(), lambda: self._read(stream, pipe))

    def _read(self, stream: int, pipe: IO[bytes]) -> bool:
        """Take what is there; whether there may be more."""
        try:
            data = os.read(pipe.fileno(), _READ)
        except BlockingIOError:
            return False
        if data:
            self.kept.write(stream, data)
            self._pump()
        else:
            self._reactor.remove_reader(pipe.fileno())
        return bool(data)

    def look(self) -> None:
        """Some process of the server's has ended: perhaps this one."""
        if self._process is None or self._process.poll() is None or self.state == ENDED:
            return
        process = self._process
        for stream, pipe in ((STDOUT, process.stdout), (STDERR, process.stderr)):
            assert pipe is not None
            while self._read(stream, pipe):
                pass
            self._reactor.remove_reader(pipe.fileno())
            pipe.close()
        status = process.returncode
        if status >= 0:
            self._end(status)
        else:
            self._end(LOST, f"the process of {self.name} was {how_it_ended(status)}")

    def say(self, text: str) -> None:
        """Have those who follow it read this line."""
        self.kept.write(STDERR, f"taskrun: {text}\n".encode())
        self._pump()

    def _end(self, status: int, why: str = "") -> None:
        if why:
            self.say(f"error: {why}")
        self.kept.finish()
        self.state, self.status = ENDED, status
        self.shares = {}
        self._of_lanes = {}
        self.control.close()
        self._folder.remove()
        if os.path.exists(self.address):
            os.unlink(self.address)
        followers, self._followers = self._followers, []
        for follower in followers:
            follower.ended(status)
        self._on_end(self)

    # -- steering it ------------------------------------------------------------------

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """The first time: stop in order.  The second time: at once."""
        if self._process is not None and self.state == RUNNING:
            self._process.send_signal(number)
        elif self.state == WAITING:
            self._end(128 + number, "stopped before it began")

    def cancel(self) -> None:
        """Do as Ctrl-C does; its process says by whom it was told to, where it can be told."""
        first, self._cancelled = not self._cancelled, True
        if first and self.state == RUNNING:
            self.control.ask({"do": "cancel", "call": WHOLE_RUN}, self._on_cancel_answer)
        else:
            self.interrupt()

    def _on_cancel_answer(self, answer: Any) -> None:
        if answer is None:  # it does not listen yet
            self.interrupt()

    def kill(self) -> None:
        """End its process at once; its workers end with it."""
        if self._process is not None and self.state == RUNNING:
            self._process.kill()

    def share(self, shares: Mapping[str, int], of_lanes: Mapping[str, int]) -> None:
        """Tell it how many slots it has from now on; ``of_lanes``: where these are for calls of
        one lane alone."""
        if (shares, of_lanes) != (self.shares, self._of_lanes):
            self.shares, self._of_lanes = dict(shares), dict(of_lanes)
            self._tell_slots()

    def _tell_slots(self) -> None:
        nodes = {place: slots for place, slots in self.shares.items() if place != HERE}
        self.control.tell_slots(self.shares.get(HERE, 0), {**nodes, **self._of_lanes})

    # -- who follows it ---------------------------------------------------------------

    def follow(self, peer: Peer) -> Follower:
        """From now on ``peer`` is told all that it writes, and how it ends."""
        follower = Follower(self.kept, peer)
        if self.status is not None:
            follower.ended(self.status)
        else:
            self._followers.append(follower)
            follower.pump()
        return follower

    def leave(self, follower: Follower) -> None:
        """One who followed it is gone."""
        if follower in self._followers:
            self._followers.remove(follower)

    def _pump(self) -> None:
        for follower in self._followers:
            follower.pump()

    def described(self) -> dict[str, Any]:
        """For ``taskrun status``."""
        return {
            "run": self.name, "file": self.file, "words": list(self.words), "state": self.state,
            "status": self.status, "pid": self.pid, "submitted": self.submitted,
            "slots": self.slots, "wants": self.wants,
            "shares": {**self.shares, **self._of_lanes},
            "lines": self.kept.lines, "followers": len(self._followers),
            "address": f"unix:{self.address}",
        }  # fmt: skip
