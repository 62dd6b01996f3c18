"""How far a run is: a bar on a terminal, a line now and then elsewhere.

What happens for every call only counts.  Time is asked for, and text is made, when
something is to be drawn: from a ``Snapshot``, by pure functions.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from taskrun.messages import AttemptEnded, Succeeded
from taskrun.observers import Observer
from taskrun.reporting import text
from taskrun.reporting.terminal import Terminal

FIRST_BAR = 0.3  # seconds: a run that is shorter shows no bar
FIRST_LINE = 2.0  # seconds: a run that is shorter shows no milestones
HEARTBEAT = 60.0  # seconds without a milestone, after which one is shown anyway
WINDOW = 30.0  # seconds over which the rate is taken
NARROWEST_BAR, WIDEST_BAR = 8, 40
NARROWEST = 10  # columns: where there are fewer, a bar would say nothing
NAMES = 3
SHORTEST_NAME = 16
NEVER = sys.maxsize


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a run at one moment; ``rate`` is in calls a second, None: not known."""

    done: int
    total: int
    failed: int = 0
    running: int = 0
    rate: float | None = None
    longest: tuple[str, ...] = ()

    @property
    def percent(self) -> int:
        return self.done * 100 // self.total if self.total else 0

    @property
    def left(self) -> float | None:
        """Seconds until the calls known so far are done, at this rate."""
        return (self.total - self.done) / self.rate if self.rate else None


# -- rendering ------------------------------------------------------------------------


def render_line(snapshot: Snapshot) -> str:
    """``[ 40%] 4000/10000 done, 2 failed, 1250/s, 5 s left``."""
    facts = [f"{snapshot.done}/{snapshot.total} done", *_facts(snapshot)]
    return f"[{snapshot.percent:3d}%] {', '.join(fact for fact in facts if fact)}"


def render_bar(snapshot: Snapshot, width: int, *, ascii: bool = False, colour: bool = False) -> str:
    """The bar and what fits beside it, in at most ``width`` columns; ``""`` where those are
    too few.

    Needs tqdm, whose drawing of a bar and measure of text this uses.
    """
    if width < NARROWEST:
        return ""
    from tqdm import tqdm  # heavy; only a terminal needs it

    room = width - len("100%|| ") - NARROWEST_BAR
    facts = _fitting(snapshot, room)
    names = _names(snapshot, room - len(facts) - len(" | "))
    bar = max(NARROWEST_BAR, min(WIDEST_BAR, NARROWEST_BAR + room - len(facts) - len(names)))
    parts: dict[str, Any] = {"percent": snapshot.percent, "facts": facts, "names": names}
    drawn: str = tqdm.format_meter(
        n=snapshot.done,
        total=max(1, snapshot.total),
        elapsed=0,
        ncols=width,
        ascii=ascii,
        colour=("red" if snapshot.failed else "green") if colour else None,
        bar_format=f"{{percent:3d}}%|{{bar:{bar}}}| {{facts}}{{names}}",
        **parts,
    )
    return drawn


def _facts(snapshot: Snapshot) -> tuple[str, str, str, str]:
    """Running, failed, rate, time left; empty where there is nothing to say."""
    left = snapshot.left
    return (
        f"{snapshot.running} running" if snapshot.running else "",
        f"{snapshot.failed} failed" if snapshot.failed else "",
        text.rate(snapshot.rate) if snapshot.rate else "",
        f"{text.rough(left)} left" if left else "",
    )


def _fitting(snapshot: Snapshot, room: int) -> str:
    """The facts that fit into ``room`` columns, the more important ones first to be kept."""
    running, failed, per_second, left = _facts(snapshot)
    shown = [f"{snapshot.done}/{snapshot.total}"]
    candidates = [shown[0], running, failed, per_second, left]
    for fact in (failed, left, running, per_second):
        if fact and len(", ".join([*shown, fact])) <= room:
            shown.append(fact)
    return ", ".join(fact for fact in candidates if fact in shown)


def _names(snapshot: Snapshot, room: int) -> str:
    """What runs longest, as far as there is room."""
    names = ""
    for name in snapshot.longest:
        longer = f"{names}, {name}" if names else name
        if len(longer) > room:
            break
        names = longer
    if not names and snapshot.longest and room >= SHORTEST_NAME:
        names = text.shorten(snapshot.longest[0], room)
    return f" | {names}" if names else ""


# -- counting -------------------------------------------------------------------------


class Progress(Observer):
    """Counts, and shows the count: call :meth:`tick` every ``interval`` seconds.

    ``now`` is the wall clock.  ``running`` says how many calls are running, where somebody
    knows; otherwise those count whose beginning was announced.
    """

    _started: float
    _shown: float  # when the last line was
    _next_bar: float  # when the bar may be drawn again
    _samples: deque[tuple[float, int]]  # (when, calls done), for the rate

    def __init__(
        self,
        terminal: Terminal,
        now: Callable[[], float] = time.time,
        running: Callable[[], int] | None = None,
    ) -> None:
        self._has_bar = terminal.has_bar
        self.interval = 0.1 if self._has_bar else 5.0
        self._terminal = terminal
        self._now = now
        self._count_running = running
        self._added = self._to_come = self._done = self._failed = 0
        self._running: dict[int, tuple[float, Any]] = {}
        self._fractions: dict[int, float] = {}
        self._next_line = NEVER
        self._ended = False
        self._start(now())

    # -- what is observed -------------------------------------------------------------

    def run_started(self, run: Any) -> None:
        self._start(self._now())

    def calls_added(self, calls: Sequence[Any]) -> None:
        self._added += len(calls)
        self._plan_line()

    def calls_to_come(self, count: int) -> None:
        self._to_come = count
        self._plan_line()

    def call_began(self, call: Any, attempt: int, worker: str, wall: float) -> None:
        self._running[call.id] = wall, call

    def progressed(self, call: Any, done: float, total: float | None) -> None:
        if total and call.id in self._running:
            self._fractions[call.id] = done / total

    def attempt_ended(self, event: AttemptEnded, worker: str) -> None:
        if self._running:
            self._running.pop(event.call.id, None)
            if self._fractions:
                self._fractions.pop(event.call.id, None)

    def succeeded(self, event: Succeeded, worker: str) -> None:
        if self._running:
            for call in event.calls:
                self._running.pop(call.id, None)
                self._fractions.pop(call.id, None)
        self._done += len(event.calls)
        if self._done >= self._next_line:
            self._milestone()

    def call_ended(self, call: Any) -> None:
        self._done += 1
        if call.state == "failed":
            self._failed += 1
        if self._done >= self._next_line:
            self._milestone()

    def run_ended(self, status: int, reason: str) -> None:
        self._next_line = NEVER
        self._ended = True
        self._terminal.set_bar("")

    # -- showing ----------------------------------------------------------------------

    def tick(self) -> None:
        """Time has passed: redraw the bar, or give a sign of life where there is none."""
        if self._ended:
            return
        now = self._now()
        if self._has_bar:
            if now >= self._next_bar:
                self._next_bar = max(self._next_bar + self.interval, now)
                self._draw(now)
        elif now - self._shown >= HEARTBEAT and self._total:
            names = self._longest(now)
            self._line(now, f" | {', '.join(names)}" if names else "")

    @property
    def _total(self) -> int:
        return self._added + self._to_come

    def snapshot(self, now: float) -> Snapshot:
        running = self._count_running() if self._count_running else len(self._running)
        rate = self._rate(now)
        longest = self._longest(now)
        return Snapshot(self._done, self._total, self._failed, running, rate, longest)

    def _start(self, now: float) -> None:
        self._started = self._shown = now
        self._next_bar = now + FIRST_BAR
        self._samples = deque([(now, 0)])

    def _draw(self, now: float) -> None:
        bar = render_bar(
            self.snapshot(now),
            self._terminal.width() - 3,  # a full line, or the ^C that is typed there, would wrap
            ascii=not self._terminal.is_utf8,
            colour=self._terminal.paint("stderr").enabled,
        )
        self._terminal.set_bar(bar)

    def _milestone(self) -> None:
        """Another tenth is done.  Said at most once a second, and as time goes on less
        often, since the tenths of a growing run are passed many times."""
        self._plan_line()
        now = self._now()
        elapsed = now - self._started
        if elapsed < FIRST_LINE or now - self._shown < max(1.0, elapsed / 20):
            return
        if self._done < self._total:
            self._line(now)

    def _line(self, now: float, more: str = "") -> None:
        self._shown = now
        self._terminal.write_lines("stderr", render_line(self.snapshot(now)) + more)

    def _plan_line(self) -> None:
        """The count of ended calls at which the next tenth of what is known is done."""
        if not self._has_bar and not self._ended:
            tenth = self._done * 10 // self._total + 1 if self._total else 1
            self._next_line = -(-self._total * tenth // 10)

    def _rate(self, now: float) -> float | None:
        """Calls a second over the last half minute, or over the whole run if none ended
        in it."""
        samples = self._samples
        if now - samples[-1][0] >= 1.0:
            samples.append((now, self._done))
        while len(samples) > 1 and now - samples[0][0] > WINDOW:
            samples.popleft()
        then, done = samples[0]
        if self._done > done and now > then:
            return (self._done - done) / (now - then)
        elapsed = now - self._started
        return self._done / elapsed if self._done and elapsed > 0 else None

    def _longest(self, now: float) -> tuple[str, ...]:
        # Calls are announced about in the order in which they began.
        return tuple(
            self._described(call, now - began)
            for began, call in islice(self._running.values(), NAMES)
        )

    def _described(self, call: Any, seconds: float) -> str:
        title = text.shorten(text.title_of(call), 30)
        fraction = self._fractions.get(call.id)
        share = f" {min(1.0, max(0.0, fraction)):.0%}" if fraction is not None else ""
        return f"{title}{share} {text.rough(seconds)}"
