"""The workers of this machine: a template process that starts them, and their Pipes.

Everything that a worker had sent is read before it is reported as ended; what it had ended
and not sent is taken from its ledger.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from time import monotonic
from typing import Any, Final, Protocol

from taskrun import descriptors, sessions
from taskrun.engines.links import PROCESS, Link, PipeLink
from taskrun.engines.nursery import Launch, Nursery, how_it_ended
from taskrun.errors import RunError, WireError
from taskrun.reactor import Reactor
from taskrun.workers.settings import EXITED, STARTED, UP, Birth, Settings

HANGING: Final = 0.5  # seconds between the end of a worker's Pipe and its own
FILES: Final = 8  # descriptors that a worker may take here, on its way and with its state
BESIDE: Final = 128  # ... and what else there may be in this process
FEW: Final = 5  # templates that may end before they are of any use


class Crew(Protocol):
    """All workers of an engine, as far as the places are concerned where they are."""

    def add(self, link: Link) -> None:
        """A worker is about to start."""

    def hear(self, link: Link, frame: memoryview) -> bool:
        """Take a frame of its call Pipe; False: it is no worker any more."""

    def hear_control(self, link: Link, frame: memoryview) -> None:
        """Take a frame of its control Pipe."""

    def look(self, link: Link) -> bool:
        """Take what it has ended and not sent; whether there was anything."""

    def reject(self, link: Link, why: str) -> None:
        """It is no worker any more, whatever it is."""

    def ended(self, link: Link, how: str) -> None:
        """Its process has ended."""

    def assume_begun(self, link: Link) -> None:
        """Nobody can say any more which of its calls it has begun."""

    def not_started(
        self,
        worker: int,
        reason: str,
        lane: str = PROCESS,
        last_output: str = "",
        *,
        denied: bool = False,
    ) -> None:
        """It could not be started; ``denied``: since this machine has not what it takes."""

    def output(self, call: Any, stream: str, data: bytes, worker: str) -> None:
        """A call, or the worker for nobody, wrote this."""

    def worker_changed(self, name: str, what: str) -> None:
        """A worker, or a node, came or went."""

    def notice(self, text: str) -> None:
        """Something to say to the person."""

    def give_up(self, reason: str) -> None:
        """No more workers can be had."""


class Local:
    """Where the workers of this machine are.

    ``settings``: what they are told; ``launch``: see ``Nursery``; ``make_link``: what holds
    our ends of a worker.
    """

    def __init__(
        self,
        crew: Crew,
        reactor: Reactor,
        settings: Settings,
        launch: Launch | None = None,
        make_link: Callable[..., PipeLink] = PipeLink,
    ) -> None:
        self._crew = crew
        self._reactor = reactor
        self._settings = settings
        self._launch = launch
        self._make_link = make_link
        self._nursery: Nursery | None = None
        self._wanted: list[int] = []  # workers, while there is nobody to start them
        self._until: float | None = None
        self._failed_templates = 0
        self._complained = self._closing = False
        self.links: dict[int, PipeLink] = {}
        self._lanes: dict[int, str] = {}  # of workers that are not there yet

    def open(self) -> None:
        """Start the template.  Raises RunError where no process can be started."""
        self._nursery = Nursery(
            self._settings, self._reactor, self._open, self._on_message, self._on_template_end,
            self._launch,
        )  # fmt: skip
        if self._until is not None:
            self._nursery.hold(self._until)

    @property
    def busy(self) -> bool:
        """Whether workers were asked for that are not there yet."""
        return self._nursery is not None and self._nursery.busy

    @property
    def load(self) -> int:
        """How many workers there are, or were asked for."""
        asked = self._nursery.wanted() if self._nursery is not None else []
        return len(self.links) + len(self._wanted) + len(asked)

    @property
    def is_gone(self) -> bool:
        """Whether there is no template."""
        return self._nursery is None

    def start(self, workers: list[int], lane: str = PROCESS) -> None:
        """Start these workers."""
        self._lanes.update(dict.fromkeys(workers, lane))
        self._wanted += workers
        descriptors.allow(BESIDE + FILES * self.load)
        if self._nursery is not None:  # else there is another one soon
            wanted, self._wanted = self._wanted, []
            self._nursery.start(wanted)

    def hold(self, until: float) -> None:
        """Let all workers live until then, and no longer, if nobody says otherwise."""
        self._until = until
        if self._nursery is not None:
            self._nursery.hold(until)

    def proven(self) -> None:
        """Its workers are of use."""
        self._failed_templates = 0

    # -- ends -------------------------------------------------------------------------

    def abandon(self, deadline: float) -> None:
        """From now on no template is replaced; one that is not up yet ends."""
        self._closing = True
        if self._nursery is not None and self._nursery.abandon(deadline):
            self._nursery = None

    def quit(self, grace: float) -> None:
        """Have the template end all workers, and itself."""
        if self._nursery is not None:
            self._nursery.quit(grace)

    def kill(self) -> None:
        """End the template at once; its workers die with it."""
        if self._nursery is not None:
            self._nursery.kill()
            self._nursery = None

    # -- the template -----------------------------------------------------------------

    def _open(self, worker: int) -> tuple[Birth, list[int]] | None:
        try:
            lane = self._lanes.pop(worker)
            link = self._make_link(worker, self._reactor, self._crew.output, self._signal, lane)
        except OSError as error:
            self._crew.not_started(worker, f"not started: {error.strerror}", lane, denied=True)
            return None
        self.links[worker] = link
        self._crew.add(link)
        link.wires.listen(lambda: self._on_calls(link), lambda: self._on_control(link))
        return link.wires.birth, link.wires.handed_over

    def _signal(self, worker: int, number: int) -> None:
        if self._nursery is not None:
            self._nursery.signal(worker, number)

    def _on_message(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == UP and message[1] is not None and not self._complained:
            self._complained = True
            text, traceback = message[1]
            self._crew.notice(f"in the workers, {text}\n{traceback}".rstrip())
        elif kind == STARTED and message[1] in self.links:
            self.links[message[1]].pid = message[2]
        elif kind == EXITED and message[1] in self.links:
            link = self.links.pop(message[1])
            link.denied = isinstance(message[2], str)
            self._crew.ended(link, how_it_ended(message[2]))

    def _on_template_end(self, how: str) -> None:
        assert self._nursery is not None
        self._wanted += self._nursery.wanted()
        self._nursery = None
        links, self.links = self.links, {}
        for link in links.values():
            _await_death(link)
            link.blameless = True  # templates that end in a row are counted below
            self._crew.ended(link, f"ended with the process that started it, which {_was(how)}")
        if not self._closing:
            self._replace(how)

    def _replace(self, how: str) -> None:
        self._failed_templates += 1
        if self._failed_templates > FEW:
            self._crew.give_up(
                f"the process that starts workers {_was(how)}, again and again; "
                "TASKRUN_DEBUG=1 shows what it says"
            )
            return
        try:
            self.open()
        except RunError as error:
            self._crew.give_up(str(error))
            return
        self.start([])

    # -- what workers say -------------------------------------------------------------

    def _on_calls(self, link: PipeLink) -> None:
        reader = link.wires.reader
        try:
            frames = reader.read()
        except WireError as error:
            self._crew.reject(link, f"what it sent could not be read: {error}")
            return
        for frame in frames:
            if not self._crew.hear(link, frame):
                return
        if reader.at_end:
            self._end_hanging_later(link)

    def _on_control(self, link: PipeLink) -> None:
        reader = link.wires.control_reader
        try:
            frames = reader.read()
        except WireError as error:
            self._crew.reject(link, f"what it sent could not be read: {error}")
            return
        for frame in frames:
            self._crew.hear_control(link, frame)
        if reader.at_end:
            self._end_hanging_later(link)

    def _end_hanging_later(self, link: PipeLink) -> None:
        link.stop_listening()
        self._reactor.call_at(monotonic() + HANGING, lambda: self._end_hanging(link))

    def _end_hanging(self, link: PipeLink) -> None:
        """It closed its Pipes, and did not end; or it has, and nobody has said how yet."""
        if self.links.get(link.id) is not link:
            return
        if link.pid is None or not sessions.has_ended(link.pid):
            self._crew.reject(link, "it had closed its Pipes")


def _await_death(link: PipeLink) -> None:
    """Its parent is gone, and so is it in a moment: end what is left of its session."""
    if link.pid is not None:
        sessions.signal_session(link.pid, signal.SIGKILL)
    link.wires.await_end(1.0)


def _was(how: str) -> str:
    return how if how.startswith("exited") else f"was {how}"
