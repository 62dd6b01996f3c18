"""What a node does for one run: its files, its workers, their way to the shared state."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from time import monotonic
from typing import Final

from taskrun.addresses import forget_private, listen_privately
from taskrun.errors import RunError, WireError
from taskrun.manager.listening import Listener
from taskrun.network import channels as ch
from taskrun.network.bundles import Cache, cache_folder, unpack
from taskrun.network.conversation import Conversation, Data
from taskrun.network.parcels import Shelf
from taskrun.network.relay import Relay
from taskrun.places import Place
from taskrun.reactor import Reactor
from taskrun.workers.berths import Berths
from taskrun.workers.settings import Settings, environment_additions

QUIT_GRACE: Final = 0.5  # seconds between TERM and KILL, when a run is over
_LOCK: Final = "lock"
_DEADLINE: Final = 5.0  # seconds in which the template has to end all workers


class Work:
    """One run's part at this node; it lasts as long as the conversation with that run.

    ``name``: what the coordinator calls this node.  ``on_unable`` is called with the reason
    where this machine cannot do its part, when the coordinator has been told.
    """

    def __init__(
        self,
        reactor: Reactor,
        conversation: Conversation,
        name: str,
        on_unable: Callable[[str], object],
    ) -> None:
        self._reactor = reactor
        self._conversation = conversation
        self._name = name
        self._on_unable = on_unable
        self._job: ch.Job | None = None
        self._until = 0.0
        self._folder: Folder | None = None
        self._berths: Berths | None = None
        self._shelf: Shelf | None = None
        self._listener: Listener | None = None  # for the workers' connections to the state
        self._relay = Relay(reactor, conversation)
        self._handlers: dict[int, Callable[[int, Data], None]] = {
            ch.JOB: self._on_job,
            ch.BUNDLE: self._on_bundle,
            ch.START: self._on_start,
            ch.VALUE: self._on_value,
            ch.FORGET: self._on_forget,
        }

    @property
    def count(self) -> int:
        """How many workers there are, or are about to be."""
        return self._berths.count if self._berths is not None else 0

    def was_busy(self) -> bool:
        """Whether a call is being executed, or was since this was asked last."""
        return self._berths is not None and self._berths.was_busy()

    def hold(self, until: float) -> None:
        """The lease goes on until then; see ``settings.lease_clock``."""
        self._until = until
        if self._berths is not None:
            self._berths.local.hold(until)

    # -- messages ---------------------------------------------------------------------

    def take(self, key: int, channel: int, data: Data) -> None:
        """A message came.  Raises WireError where it cannot be one."""
        handler = self._handlers.get(channel)
        if handler is not None:
            handler(key, data)
        elif channel in (ch.PASS, ch.CLOSE):
            self._relay.take(ch.number_of(key), channel, data)
        elif self._berths is not None:
            self._berths.take(ch.worker_of(key), channel, data)
        else:
            raise WireError(f"channel {channel} is of workers, and there are none yet")

    def on_room(self) -> None:
        """The conversation has room again."""
        self._relay.resume()
        if self._berths is not None:
            self._berths.on_room()

    def _on_job(self, key: int, data: Data) -> None:
        self._job = job = pickle.loads(data)
        try:
            if job.bundle is None:
                self._prepare(None)
            elif (path := Cache().find(job.bundle)) is not None:
                self._prepare(path)
            else:
                self._say(ch.WANT, b"")
        except (OSError, ValueError) as error:
            self._cannot("the files of the run cannot be laid out", error)

    def _on_bundle(self, key: int, data: Data) -> None:
        assert self._job is not None and self._job.bundle is not None
        try:
            self._prepare(Cache().keep(self._job.bundle, data))
        except (OSError, ValueError) as error:
            self._cannot("the files of the run cannot be laid out", error)

    def _on_start(self, key: int, data: Data) -> None:
        if self._berths is None:
            raise WireError("workers are to start, and nothing is prepared")
        self._berths.local.start(*pickle.loads(data))

    def _on_value(self, key: int, data: Data) -> None:
        if self._shelf is None or self._berths is None:
            raise WireError("a value comes before anything is prepared")
        try:
            self._shelf.put(ch.number_of(key), data)
        except OSError as error:
            self._cannot("a large value cannot be kept", error)
            return
        self._berths.value_came()

    def _on_forget(self, key: int, data: Data) -> None:
        if self._shelf is not None:
            self._shelf.forget(ch.number_of(key))

    def _say(self, channel: int, data: bytes) -> None:
        self._conversation.send(ch.NODE, channel, data)

    def _unable(self, reason: str) -> None:
        self._say(ch.UNABLE, reason.encode())
        self._on_unable(reason)

    def _cannot(self, what: str, error: Exception) -> None:
        why = error.strerror if isinstance(error, OSError) else None
        self._unable(f"{what} in {cache_folder()}: {why or error}")

    # -- beginning --------------------------------------------------------------------

    def _prepare(self, bundle: str | None) -> None:
        """Make the folder in which calls work, and what starts workers."""
        assert self._job is not None
        self._folder = Folder()
        files, values = (os.path.join(self._folder.path, name) for name in ("files", "values"))
        os.mkdir(values)
        if bundle is None:
            os.mkdir(files)
        else:
            unpack(bundle, files)
        self._shelf = Shelf(values)
        self._berths = Berths(
            self._reactor, self._conversation, self._settings(self._job, files), self._shelf,
            self._unable,
        )  # fmt: skip
        self._berths.local.hold(self._until)
        try:
            self._berths.local.open()
        except RunError as error:
            self._unable(str(error))
            return
        self._say(ch.PREPARED, values.encode())

    def _settings(self, job: ch.Job, files: str) -> Settings:
        """What the coordinator's own workers are told, with what is this machine's."""
        return job.settings._replace(
            path=[files, *sys.path],
            cwd=files,
            file=None if job.file is None else os.path.join(files, job.file),
            environment=environment_additions(dict(os.environ)),
            node=self._name,
            coordinator=os.getpid(),
            blobs=Place((), ""),  # what is large in results has to travel anyway
            state=(self._listen_for_state(), job.state_key) if job.state_key else None,
        )

    def _listen_for_state(self) -> str:
        self._listener = Listener(listen_privately())
        self._listener.start(self._reactor, self._relay.carry, has_room=lambda: True)
        return str(self._listener.address)

    # -- the end ----------------------------------------------------------------------

    def end(self, grace: float) -> None:
        """End all workers and what they started, and let go of everything."""
        if self._berths is not None:
            self._end_workers(self._berths, grace)
        self._relay.close()
        if self._listener is not None:
            self._listener.close()
            forget_private(self._listener.address)
        if self._folder is not None:
            self._folder.remove()

    def _end_workers(self, berths: Berths, grace: float) -> None:
        local = berths.local
        deadline = monotonic() + grace + _DEADLINE
        local.abandon(deadline)
        local.quit(grace)
        if not self._reactor.run_until(lambda: local.is_gone, deadline):
            local.kill()
        berths.close()


class Folder:
    """A new folder, locked by this process; those that nobody holds any more are removed."""

    def __init__(self) -> None:
        """Raises OSError where none can be made."""
        above = os.path.join(cache_folder(), "work")
        os.makedirs(above, mode=0o700, exist_ok=True)
        with open(f"{above}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # nobody takes it for one that was left
            for name in os.listdir(above):
                _remove_left(os.path.join(above, name))
            self.path = tempfile.mkdtemp(dir=above)
            self._lock = open(os.path.join(self.path, _LOCK), "w")  # noqa: SIM115 - it stays
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove it, with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_left(path: str) -> None:
    try:
        with open(os.path.join(path, _LOCK), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass  # somebody works there, or it is no such folder
