"""The other side of a server: who submits a run, and follows it to its end.

What the run writes comes out here as if it ran here, and its exit status is this one's.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from taskrun import addresses, transport
from taskrun.errors import DialError, RunError, UsageError
from taskrun.network.bundles import Bundle
from taskrun.reactor import Reactor
from taskrun.reporting.terminal import Terminal
from taskrun.serving import talk
from taskrun.signals import Signals
from taskrun.telling import tell

INTERRUPTED: Final = 130
TERMINATED: Final = 143
_QUESTION: Final = "taskrun: c + Enter cancels the run, d + Enter leaves it alone: "


def submission(bundle: Bundle, words: Sequence[str], jobs: int | None) -> list[bytes]:
    """What is said to submit a run; see ``talk``."""
    said = talk.said(
        do="submit", file=bundle.file, digest=bundle.digest, words=list(words), jobs=jobs
    )
    return [said, bytes([talk.BUNDLE]) + bundle.data]


class Following:
    """A connection to a server about one run.

    ``dial(on_peer, on_failure)`` connects; ``shown`` is the address, as messages say it;
    ``frames`` say what is wanted.  ``detach``: be content with the run's name.
    """

    def __init__(
        self,
        reactor: Reactor,
        dial: Callable[[Callable[[transport.Peer], object], Callable[[DialError], object]], object],
        shown: str,
        frames: list[bytes],
        *,
        detach: bool = False,
    ) -> None:
        self._reactor = reactor
        self._dial = dial
        self._shown = shown
        self._frames = frames
        self._detach = detach
        self._peer: transport.Peer | None = None
        self._run = ""
        self._status: int | None = None
        self._error: Exception | None = None
        self._asking = False
        self._signalled = False
        self._terminal = Terminal(sys.stdout, sys.stderr)
        self._terminal.on_broken = lambda reason: reactor.post(lambda: self._on_broken(reason))
        self._handlers: dict[str, Callable[[Any], None]] = {
            "run": self._on_run,
            "skipped": self._on_skipped,
            "ended": self._on_ended,
            "error": self._on_error,
        }

    def run(self) -> int:
        """Follow to the end; gives the exit status.  Raises UsageError and RunError."""
        try:
            with Signals(self._reactor, self._on_signal, noted=self._terminal.hurry):
                self._dial(self._on_peer, self._on_failure)
                self._reactor.run_until(lambda: self._status is not None or bool(self._error))
        finally:
            if self._peer is not None:
                self._peer.close()
            self._reactor.close()
        if self._error is not None:
            raise self._error
        assert self._status is not None
        return self._status

    # -- what comes -------------------------------------------------------------------

    def _on_peer(self, peer: transport.Peer) -> None:
        self._peer = peer
        peer.listen(self._on_frame, self._on_end)
        for frame in self._frames:
            peer.send(frame)

    def _on_failure(self, error: DialError) -> None:
        self._error = error

    def _on_end(self, reason: str) -> None:
        if not self._run:
            self._error = RunError(f"{self._shown} did not take the run: {reason}")
        else:
            self._error = RunError(
                f"lost the server at {self._shown}, and {self._run} perhaps with it: {reason}; "
                f"if it is back, taskrun attach {self._run} {self._shown} goes on"
            )

    def _on_frame(self, frame: memoryview) -> None:
        if self._status is not None:
            return
        if frame and frame[0] in (talk.STDOUT, talk.STDERR):
            stream = "stdout" if frame[0] == talk.STDOUT else "stderr"
            self._terminal.write(stream, bytes(frame[1:]))
            return
        try:
            said = talk.heard(frame)
        except ValueError as error:
            self._error = RunError(f"{self._shown} is no server of this version: {error}")
            return
        for key, value in said.items():
            if key in self._handlers:
                self._handlers[key](value)

    def _on_run(self, name: str) -> None:
        self._run = name
        if self._signalled:
            self._interrupt()  # which had to wait for the name
        elif self._detach:
            print(name, flush=True)
            self._status = 0

    def _on_skipped(self, lines: int) -> None:
        tell(f"{lines:,} lines were written before those that are kept")

    def _on_ended(self, status: int) -> None:
        self._status = status

    def _on_error(self, text: str) -> None:
        self._error = UsageError(text)

    def _on_broken(self, reason: str) -> None:
        """The output cannot be written.  After a signal that is the end's business."""
        if self._status is None and not self._signalled:
            self._error = RunError(f"{reason}; {self._goes_on()}")

    # -- Ctrl-C -----------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        again, self._signalled = self._signalled, True
        if number == signal.SIGTERM:
            self._leave(TERMINATED)
        elif self._run:
            self._interrupt()
        elif again or self._peer is None or self._peer.unsent:
            self._leave(INTERRUPTED)  # nothing was submitted, or it is to be at once
        else:
            tell(f"{self._shown} has not answered yet, and is waited for; again to leave at once")

    def _interrupt(self) -> None:
        """Cancel the run, or ask whether to, where there is somebody who can answer."""
        if self._asking or not (os.isatty(0) and os.isatty(2)):
            self._cancel()
        else:
            self._asking = True
            sys.stderr.write(f"\n{_QUESTION}")
            sys.stderr.flush()
            self._reactor.add_reader(0, self._on_answer)

    def _on_answer(self) -> None:
        answer = os.read(0, 1024).decode(errors="replace").strip().lower()
        if answer.startswith("d"):
            self._leave(0)
        elif answer.startswith("c"):
            self._cancel()
        self._asking = False
        self._reactor.remove_reader(0)

    def _leave(self, status: int) -> None:
        if self._run:
            tell(self._goes_on())
        self._status = status

    def _goes_on(self) -> str:
        return f"{self._run} goes on; taskrun attach {self._run} {self._shown} follows it"

    def _cancel(self) -> None:
        if self._peer is not None:
            self._peer.send(talk.said(do="interrupt"))


def follow(
    address: str,
    key: bytes,
    frames: list[bytes],
    *,
    tls: Any = None,
    insecure_plain: bool = False,
    detach: bool = False,
) -> int:
    """Say ``frames`` to the server at ``address`` and follow the run; gives its exit status.
    Raises UsageError and RunError."""
    parsed = addresses.parse(address, insecure_plain=insecure_plain)
    reactor = Reactor()

    def dial(
        on_peer: Callable[[transport.Peer], object], on_failure: Callable[[DialError], object]
    ) -> object:
        return transport.dial(
            parsed, key, reactor, talk.SUBMIT, on_peer, on_failure, tls=tls,
            insecure_plain=insecure_plain,
        )  # fmt: skip

    return Following(reactor, dial, address, frames, detach=detach).run()
