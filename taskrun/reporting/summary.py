"""The last word of a run: what was done, what was slow, what failed and why.

``Summary`` counts while the run goes on, in an ``Account`` of bounded size: a million calls
are numbers by task, and calls that failed the same way are one ``Failed``.  ``render``
makes text of an Account and does nothing else.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from taskrun.messages import AttemptEnded, Succeeded
from taskrun.model import Failure
from taskrun.observers import Observer
from taskrun.reporting import text
from taskrun.reporting.output import captured_text
from taskrun.reporting.terminal import Terminal
from taskrun.reporting.text import Captured, Paint

ROWS = 40  # tasks in the table
SLOWEST = 5  # calls in the list of the slowest
SLOW = 1.0  # seconds from which a call is worth naming as slow
NAMED = 4  # calls that are named where many are meant
FULL = 10  # failures that are shown with their traceback
BRIEF = 20  # failures that are shown in one line each
KEPT = 1000  # different failures, retried calls and reasons that are remembered
KEPT_BYTES = 16 * 1024 * 1024  # of tracebacks and captured output
CAPTURED_LINES = 30


# -- what is known --------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """The calls of one task, by how they ended; ``seconds`` is what all attempts took."""

    added: int = 0
    ok: int = 0
    failed: int = 0
    tolerated: int = 0
    skipped: int = 0
    cancelled: int = 0
    seconds: float = 0.0

    @property
    def ended(self) -> int:
        return self.ok + self.failed + self.skipped + self.cancelled


@dataclass(slots=True, eq=False)
class Failed:
    """Calls of one task that failed the same way; told at length of the first of them."""

    task: str
    title: str
    failure: Failure
    where: str = ""
    captured: Captured = field(default_factory=list)
    count: int = 1
    tolerated: int = 0
    others: list[tuple[str, str]] = field(default_factory=list)
    alike: bool = True
    skipped: int = 0
    brief: bool = False


@dataclass(slots=True)
class Because:
    """Calls of one task that were skipped, or failed, for one reason: the calls in
    ``causes``, or the reason that a task gave itself."""

    task: str
    verb: str
    reason: str
    count: int = 0
    causes: dict[str, None] = field(default_factory=dict)


@dataclass(slots=True)
class Account:
    """All that a summary tells."""

    elapsed: float = 0.0
    status: int = 0
    reason: str = ""
    tasks: dict[str, Tally] = field(default_factory=dict)
    slowest: list[tuple[float, int, str]] = field(default_factory=list)
    retried: dict[str, int] = field(default_factory=dict)
    retried_calls: int = 0
    because: dict[tuple[str, str, str], Because] = field(default_factory=dict)
    failures: list[Failed] = field(default_factory=list)
    more_failures: int = 0

    def total(self) -> Tally:
        tallies = self.tasks.values()
        return Tally(
            added=sum(tally.added for tally in tallies),
            ok=sum(tally.ok for tally in tallies),
            failed=sum(tally.failed for tally in tallies),
            tolerated=sum(tally.tolerated for tally in tallies),
            skipped=sum(tally.skipped for tally in tallies),
            cancelled=sum(tally.cancelled for tally in tallies),
            seconds=sum(tally.seconds for tally in tallies),
        )


# -- rendering ------------------------------------------------------------------------


def render(account: Account, paint: Paint) -> str:
    """The summary: the verdict last, before it the root failure, before that the rest."""
    sections = [
        _table(account, paint),
        _list("slowest", [f"{title}  {text.duration(s)}" for s, _, title in account.slowest]),
        _list("retried", _retried(account)),
        *_reasons(account),
        *_failures(account, paint),
    ]
    blocks = ["".join(f"{line}\n" for line in section) for section in sections if section]
    # Set off from what came before, unless it is a single line.
    return "\n".join([*([""] if blocks else []), *blocks, _verdict(account, paint) + "\n"])


def _verdict(account: Account, paint: Paint) -> str:
    total = account.total()
    if not total.added:
        return "no calls" + (f": {account.reason}" if account.reason else "")
    calls = f"{text.plural(total.added, 'call')} in {text.duration(account.elapsed)}"
    style = "green" if account.status == 0 else "bad"
    reason = f"\nstopped: {text.one_line(account.reason)}" if account.reason else ""
    if total.ok == total.added:
        return f"{calls}: {paint(style, 'all ok')}{reason}"
    return f"{paint(style, calls)}: {_counts(total, paint)}{reason}"


def _counts(tally: Tally, paint: Paint) -> str:
    """``20 ok, 1 failed, 3 skipped``."""
    untolerated = tally.failed - tally.tolerated
    not_run = tally.added - tally.ended
    parts = [
        f"{tally.ok:,} ok" if tally.ok else "",
        paint("bad", f"{untolerated:,} failed") if untolerated else "",
        paint("yellow", f"{tally.tolerated:,} failed (tolerated)") if tally.tolerated else "",
        paint("yellow", f"{tally.skipped:,} skipped") if tally.skipped else "",
        paint("yellow", f"{tally.cancelled:,} cancelled") if tally.cancelled else "",
        f"{not_run:,} not run" if not_run > 0 else "",
    ]
    return ", ".join(part for part in parts if part)


def _table(account: Account, paint: Paint) -> list[str]:
    """A row per task, when there is more than one."""
    rows = [(name, tally) for name, tally in account.tasks.items() if tally.added]
    if len(rows) < 2:
        return []
    shown = rows[:ROWS]
    names = [text.shorten(text.one_line(name), 36) for name, _ in shown]
    counts = [_counts(tally, Paint(False)) for _, tally in shown]
    wide, wider = max(map(text.columns, names)), min(30, max(map(len, counts)))
    lines = [
        f"{paint.tag(task, name)}{' ' * (wide - text.columns(name))}  "
        f"{_counts(tally, paint)}{' ' * (wider - len(count))}  {_spent(tally):>9}".rstrip()
        for (task, tally), name, count in zip(shown, names, counts, strict=True)
    ]
    hidden = len(rows) - len(shown)
    return [*lines, f"and {text.plural(hidden, 'more task')}"] if hidden else lines


def _spent(tally: Tally) -> str:
    return text.duration(tally.seconds) if tally.ok or tally.seconds else ""


def _list(heading: str, items: list[str]) -> list[str]:
    """Items below each other, the heading beside the first."""
    return [f"{heading if not i else '':9}{item}" for i, item in enumerate(items)]


def _retried(account: Account) -> list[str]:
    if not account.retried_calls:
        return []
    most = sorted(account.retried.items(), key=lambda item: -item[1])[:SLOWEST]
    lines = [f"{title}  {text.times(count)}" for title, count in most]
    hidden = account.retried_calls - len(lines)
    return [*lines, f"and {text.plural(hidden, 'more call')}"] if hidden > 0 else lines


def _reasons(account: Account) -> list[list[str]]:
    """``words: 3 skipped, because fetch[3] failed``."""
    found = list(account.because.values())
    lines = [
        f"{because.task}: {because.count:,} {because.verb}, {_why(because)}"
        for because in found[:BRIEF]
    ]
    hidden = sum(because.count for because in found[BRIEF:])
    return [[*lines, f"and {text.plural(hidden, 'more call')}"] if hidden else lines]


def _why(because: Because) -> str:
    if not because.causes:
        return f"because it says: {because.reason}" if because.reason else "without a reason"
    named = list(because.causes)
    causes = f"{', '.join(named[:NAMED])} and others" if len(named) > NAMED else _joined(named)
    reason = because.reason if len(named) == 1 else because.reason.replace("was ", "were ", 1)
    return f"because {causes} {reason}"


def _joined(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _failures(account: Account, paint: Paint) -> list[list[str]]:
    """Tolerated failures first, the root failure last; the last ones at length."""
    ordered = _ordered(account.failures)
    full = [failed for failed in ordered[-FULL:] if not failed.brief]
    brief = [failed for failed in ordered if failed not in full]
    hidden = account.more_failures + sum(failed.count for failed in brief[BRIEF:])
    lines = [_brief(failed, paint) for failed in brief[:BRIEF]]
    if hidden:
        lines.append(f"and {text.plural(hidden, 'more failure')}")
    return [lines, *(_full(failed, paint) for failed in full)]


def _ordered(failures: list[Failed]) -> list[Failed]:
    """The root failure is the one that kept most calls from running; of equals the first."""
    roots = [failed for failed in failures if failed.tolerated < failed.count]
    if not roots:
        return failures
    root = max(roots, key=lambda failed: failed.skipped)
    rest = [failed for failed in failures if failed is not root]
    return [*sorted(rest, key=lambda failed: failed.tolerated < failed.count), root]


def _brief(failed: Failed, paint: Paint) -> str:
    more = f" and {text.plural(failed.count - 1, 'more call')}" if failed.count > 1 else ""
    headline = text.one_line(text.shorten(failed.failure.headline, 200))
    return f"{_heading(failed, paint)}{more}: {headline}"


def _full(failed: Failed, paint: Paint) -> list[str]:
    block = text.indent(text.failure_text(failed.failure))
    if failed.failure.kind != "lost":  # that one quotes the last output itself
        block += captured_text(failed.captured, CAPTURED_LINES)
    block += f"  {_same_way(failed)}\n" if failed.count > 1 else ""
    where = f" ({failed.where})" if failed.where else ""
    return [_heading(failed, paint) + where, *block.removesuffix("\n").split("\n")]


def _heading(failed: Failed, paint: Paint) -> str:
    if failed.tolerated == failed.count:
        return paint("yellow", f"failed, tolerated: {failed.title}")
    return paint("bad", f"FAILED {failed.title}")


def _same_way(failed: Failed) -> str:
    """``and 57 more calls of fetch failed the same way: fetch[4], fetch[9], ...``."""
    others = failed.count - 1
    calls = f"and {text.plural(others, 'more call')} of {failed.task} failed"
    if failed.alike:
        return f"{calls} the same way: {text.named([t for t, _ in failed.others], others, NAMED)}"
    named = [f"\n    {title}: {headline}" for title, headline in failed.others]
    return f"{calls} likewise:{''.join(named)}" + ("\n    ..." * (others > len(named)))


# -- collecting -----------------------------------------------------------------------


class Summary(Observer):
    """Keeps the account of a run, and writes the summary to stderr when the run ends.

    ``tail`` gives what a failed call wrote last (``Output.tail``).  ``now`` is any clock
    that counts seconds.  ``quiet``: of a run that failed the verdict is all, and of others
    there is nothing.
    """

    def __init__(
        self,
        terminal: Terminal,
        tail: Callable[[Any], Captured],
        now: Callable[[], float] = time.monotonic,
        slow: float = SLOW,
        quiet: bool = False,
    ) -> None:
        self.account = Account()
        self._terminal = terminal
        self._tail = tail
        self._now = now
        self._started = now()
        self._slower_than = slow
        self._quiet = quiet
        self._failed: dict[int, Failed] = {}
        self._failing: dict[int, str] = {}
        self._by_call: dict[int, Failed] = {}
        self._undecided: list[tuple[Any, Failed | None]] = []
        self._attempts = 0
        self._bytes = 0

    # -- what is observed -------------------------------------------------------------

    def run_started(self, run: Any) -> None:
        self._started = self._now()
        for task in run.plan.tasks:
            self._tally(task.name)

    def calls_added(self, calls: Sequence[Any]) -> None:
        recipe = tally = None
        for call in calls:
            if call.recipe is not recipe:
                recipe = call.recipe
                tally = self._tally(recipe.name)
            tally.added += 1  # type: ignore[union-attr]

    def attempt_ended(self, event: AttemptEnded, worker: str) -> None:
        self._attempts += 1
        self._tally(event.call.recipe.name).seconds += event.seconds
        if event.seconds > self._slower_than:
            self._slow(event)
        if event.again is not None:
            self._retried(event)
        elif event.outcome != "value":
            where = text.attempt_text(event.attempt, event.seconds, worker)
            self._failing[event.call.id] = where

    def succeeded(self, event: Succeeded, worker: str) -> None:
        recipe = tally = None
        for call in event.calls:
            if call.recipe is not recipe:
                recipe = call.recipe
                tally = self._tally(recipe.name)
            seconds = call.seconds
            self._attempts += 1
            tally.ok += 1  # type: ignore[union-attr]
            tally.seconds += seconds  # type: ignore[union-attr]
            if seconds > self._slower_than:
                self._slow(event.attempt(call))

    def call_ended(self, call: Any) -> None:
        tally = self._tally(call.recipe.name)
        state = call.state
        if state == "ok":
            tally.ok += 1
            return
        where = self._failing.pop(call.id, "")
        if state == "failed":
            tally.failed += 1
            self._call_failed(call, tally, where)
        elif state == "skipped":
            tally.skipped += 1
            self._call_skipped(call)
        else:
            tally.cancelled += 1

    def run_ended(self, status: int, reason: str) -> None:
        account = self.account
        account.elapsed = self._now() - self._started
        account.status, account.reason = status, reason
        if self._quiet and not status:
            return
        account.slowest.sort(reverse=True)
        self._judge_the_undecided()
        paint = self._terminal.paint("stderr")
        shown = f"{_verdict(account, paint)}\n" if self._quiet else render(account, paint)
        summary = text.encode(shown)
        is_terminal = self._terminal.is_terminal("stderr")
        self._terminal.write_lines("stderr", text.tame(summary) if is_terminal else summary)

    # -- keeping it short -------------------------------------------------------------

    def _tally(self, task: str) -> Tally:
        tally = self.account.tasks.get(task)
        if tally is None:
            tally = self.account.tasks[task] = Tally()
        return tally

    def _slow(self, event: AttemptEnded) -> None:
        title = text.title_of(event.call)
        if event.attempt > 1:
            title += f" (attempt {event.attempt})"
        # Of equally slow ones the first stay: a later one has a smaller second item.
        heapq.heappush(self.account.slowest, (event.seconds, -self._attempts, title))
        if len(self.account.slowest) > SLOWEST:
            heapq.heappop(self.account.slowest)
        if len(self.account.slowest) == SLOWEST:
            self._slower_than = self.account.slowest[0][0]

    def _retried(self, event: AttemptEnded) -> None:
        retried = self.account.retried
        title = text.title_of(event.call)
        if event.attempt == 1:
            self.account.retried_calls += 1
        if title in retried or len(retried) < KEPT:
            retried[title] = retried.get(title, 0) + 1

    def _call_failed(self, call: Any, tally: Tally, where: str) -> None:
        failed = None
        if call.cause is not None and call.cause is not call:
            self._because(call, "failed")
        elif call.failure is not None:
            failed = self._add_failure(call, call.failure, where)
        if call.tolerated:
            self._tolerated(tally, failed)
        elif call.parent is not None and len(self._undecided) < KEPT:
            # Its parent may still tolerate it, by catching the exception and going on.
            self._undecided.append((call, failed))

    def _judge_the_undecided(self) -> None:
        for call, failed in self._undecided:
            if call.tolerated:
                self._tolerated(self._tally(call.recipe.name), failed)
        self._undecided.clear()

    def _tolerated(self, tally: Tally, failed: Failed | None) -> None:
        tally.tolerated += 1
        if failed is not None:
            failed.tolerated += 1

    def _add_failure(self, call: Any, failure: Failure, where: str) -> Failed | None:
        key = text.same_failure(call.recipe.name, failure)
        failed = self._failed.get(key)
        if failed is None:
            if len(self._failed) >= KEPT:
                self.account.more_failures += 1
                return None
            failed = self._failed[key] = self._new_failure(call, failure, where)
            self.account.failures.append(failed)
        else:
            failed.count += 1
            failed.alike = failed.alike and failure.message == failed.failure.message
            if len(failed.others) < NAMED:
                headline = text.one_line(text.shorten(failure.headline, 200))
                failed.others.append((text.title_of(call), headline))
        if len(self._by_call) < KEPT:
            self._by_call[call.id] = failed
        return failed

    def _new_failure(self, call: Any, failure: Failure, where: str) -> Failed:
        title, task = text.title_of(call), text.one_line(call.recipe.name)
        captured = self._tail(call)
        self._bytes += len(failure.traceback) + len(failure.message)
        self._bytes += sum(len(block) for _, block in captured)
        if self._bytes > KEPT_BYTES:
            short = Failure(failure.kind, failure.type_name, text.shorten(failure.message, 200))
            return Failed(task, title, short, where, brief=True)
        kept = Failure(failure.kind, failure.type_name, failure.message, failure.traceback)
        return Failed(task, title, kept, where, captured)

    def _call_skipped(self, call: Any) -> None:
        self._because(call, "skipped")
        if call.cause is not None and call.cause.id in self._by_call:
            self._by_call[call.cause.id].skipped += 1

    def _because(self, call: Any, verb: str) -> None:
        task, cause = call.recipe.name, call.cause
        if cause is not None:
            reason = f"{'was ' if cause.state in ('skipped', 'cancelled') else ''}{cause.state}"
            key = (task, verb, f"{cause.recipe.name} {reason}")
        else:
            reason = text.one_line(text.shorten(call.failure.message, 200)) if call.failure else ""
            key = (task, verb, reason)
        because = self.account.because.get(key)
        if because is None:
            if len(self.account.because) >= KEPT:
                key, reason, cause = (task, verb, "..."), "other reasons", None
            because = self.account.because.setdefault(key, Because(task, verb, reason))
        because.count += 1
        if cause is not None and len(because.causes) <= NAMED:
            because.causes[text.title_of(cause)] = None
