"""What people see of a run: all that watches it, put together around one terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from taskrun.observers import Observer
from taskrun.reactor import Reactor
from taskrun.reporting.output import make_output
from taskrun.reporting.progress import Progress
from taskrun.reporting.summary import Summary
from taskrun.reporting.terminal import Target, Terminal
from taskrun.settings import Settings


class Display(Observer):
    """The observers that the settings ask for; keeps them going while the run lasts."""

    def __init__(
        self,
        settings: Settings,
        reactor: Reactor,
        stdout: Target = None,
        *,
        results: bool = False,
    ) -> None:
        """``stdout``: where it goes, unless to this process's own.  ``results``: it is for
        results; what calls print goes to stderr."""
        self.terminal = Terminal(sys.stdout if stdout is None else stdout, sys.stderr)
        self.terminal.on_broken = lambda reason: reactor.post(lambda: self._stop(reason))
        self._reactor = reactor
        self._run: Any = None
        self._progress: Progress | None = None
        self._events: Any = None
        # With --json, stdout holds events and nothing else; people read stderr.
        output = make_output("quiet" if settings.json else settings.output, self.terminal)
        if results:
            output.stdout = "stderr"
        self.observers: list[Observer] = [self, output]
        quiet = settings.output == "quiet"
        if not (quiet or settings.inline):
            self._progress = Progress(self.terminal, running=self._running)
            self.observers.append(self._progress)
        self.observers.append(Summary(self.terminal, output.tail, quiet=quiet))
        if settings.joblog is not None:
            self._add_job_log(settings.joblog, output)
        if settings.json:
            self._add_events()

    def _add_job_log(self, path: str, output: Observer) -> None:
        from taskrun.reporting.records import JobLog

        self.observers.append(JobLog(path, output.notice, self._reactor.call_soon))

    def _add_events(self) -> None:
        from taskrun.reporting.records import Events

        self._events = Events(self.terminal, self._reactor.call_soon)
        self.observers.append(self._events)

    def show_result(self, call: Any, value: str) -> None:
        """Show what a call of ``taskrun map`` has returned."""
        if self._events is not None:
            self._events.result(call, value)
        else:
            self.terminal.write_lines("stdout", f"{value}\n")

    def run_started(self, run: Any) -> None:
        self._run = run
        if self._progress is not None:
            self._tick()

    def signalled(self) -> None:
        self.terminal.hurry()

    def _tick(self) -> None:
        assert self._progress is not None
        if self._run.status is None:
            self._progress.tick()
            self._reactor.call_at(time.monotonic() + self._progress.interval, self._tick)

    def _running(self) -> int:
        return int(self._run.core.running()) if self._run is not None else 0

    def _stop(self, reason: str) -> None:
        if self._run is not None and self._run.status is None:
            self._run.stop(reason)
