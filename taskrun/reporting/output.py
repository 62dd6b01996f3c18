"""What a run shows while it goes on: each line of each call, attributed, whole.

Bytes come in as calls write them; ``Lines`` cuts them into whole lines, and what is done
with the lines is the difference between the modes: ``line`` shows each as it comes, with
its call's name before it, ``group`` shows a block per call when the call ends, ``raw`` shows
lines without a name, ``quiet`` shows none.  A failure is shown when it happens, in every
mode.  All work on lines is on blocks of bytes, because a task may print 100 MB.

Each live call's last 64 KB of output are kept, for the report of its failure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import IO, Any

from taskrun.messages import SAY_BEGAN, AttemptEnded, Succeeded
from taskrun.model import Failure
from taskrun.observers import Observer
from taskrun.reporting import text
from taskrun.reporting.terminal import Terminal

__all__ = ["MODES", "Lines", "Output", "Terminal", "make_output"]

LONGEST_LINE = 16 * 1024 * 1024
TAIL = 64 * 1024
SPOOL = 1024 * 1024
RECENT = 16
"""So many failed calls keep their tail after their end, for those who report them later."""

CUT = b" ... [longer than 16 MiB: cut here by taskrun]\n"


# -- bytes to lines -------------------------------------------------------------------


class Lines:
    """Cuts one stream into whole lines; holds what is not a whole line yet.

    ``overwrite``: a line reads as a terminal would show it, so of a progress bar that
    returns to the start of its line only the last state stays.  ``cut`` ends the pieces
    of a line that is longer than a line may be.
    """

    __slots__ = ("_cut", "_overwrite", "_rest")

    def __init__(self, overwrite: bool = True, cut: bytes = CUT) -> None:
        self._overwrite = overwrite
        self._cut = cut
        self._rest = bytearray()

    def feed(self, data: bytes) -> bytes:
        """The lines that ``data`` completes, as one block."""
        end = data.rfind(b"\n") + 1
        if not end:
            self._rest += data
            return self._too_long()
        block = bytes(self._rest) + data[:end] if self._rest else data[:end]
        self._rest[:] = data[end:]
        return (_overwritten(block) if self._overwrite else block) + self._too_long()

    def end(self) -> bytes:
        """What is left, ended by a newline; nothing if nothing is left."""
        if not self._rest:
            return b""
        line = bytes(self._rest) + b"\n"
        self._rest.clear()
        return _overwritten(line) if self._overwrite else line

    def _too_long(self) -> bytes:
        if self._overwrite and b"\r" in self._rest:
            self._rest[:] = _last_state(bytes(self._rest))
        if len(self._rest) <= LONGEST_LINE:
            return b""
        pieces = []
        while len(self._rest) > LONGEST_LINE:
            end = _character_start(self._rest, LONGEST_LINE)
            pieces.append(bytes(self._rest[:end]))
            del self._rest[:end]
        return b"".join(piece + self._cut for piece in pieces)


def _overwritten(block: bytes) -> bytes:
    """The lines of ``block``, each without what a carriage return has overwritten."""
    if b"\r" not in block:
        return block
    lines = block.split(b"\n")
    return b"\n".join(_last_state(line).rstrip(b"\r") for line in lines)


def _last_state(line: bytes) -> bytes:
    return line[line.rstrip(b"\r").rfind(b"\r") + 1 :]


def _character_start(data: bytearray, index: int) -> int:
    """The nearest index, not after ``index``, that does not split a UTF-8 character."""
    for start in range(index, index - 4, -1):
        if data[start] & 0xC0 != 0x80:
            return start
    return index


class Tail:
    """The last 64 KB of what a call wrote."""

    __slots__ = ("_blocks", "_size")

    def __init__(self) -> None:
        self._blocks: deque[tuple[str, bytes]] = deque()
        self._size = 0

    def add(self, stream: str, block: bytes) -> None:
        if len(block) > TAIL:
            start = block.find(b"\n", len(block) - TAIL - 1, -1) + 1
            block = block[start or len(block) - TAIL :]
        self._blocks.append((stream, block))
        self._size += len(block)
        while self._size > TAIL:
            self._size -= len(self._blocks.popleft()[1])

    def text(self) -> text.Captured:
        return [(stream, text.decode(block)) for stream, block in self._blocks]


class Spool:
    """Blocks of output in order: in memory up to 1 MiB, beyond that in a temporary file."""

    def __init__(self) -> None:
        self._blocks: list[tuple[str, bytes]] = []
        self._size = 0
        self._file: IO[bytes] | None = None

    def add(self, stream: str, block: bytes) -> None:
        """Keep a block.  Raises OSError when the temporary file cannot take it; nothing
        that was kept before is lost then."""
        self._blocks.append((stream, block))
        self._size += len(block)
        if self._size > SPOOL:
            self._spill()

    def __bool__(self) -> bool:
        return bool(self._blocks) or self._file is not None

    def blocks(self) -> Iterator[tuple[str, bytes]]:
        """All blocks, in order; once."""
        if self._file is not None:
            self._file.seek(0)
            while header := self._file.readline():
                stream, size = header.decode().split()
                yield stream, self._file.read(int(size))
            self._file.close()
        yield from self._blocks

    def _spill(self) -> None:
        if self._file is None:
            import tempfile  # heavy; few runs need it

            # Closed when it has been read; without a name, it is gone with this process too.
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        end = self._file.tell()
        try:
            for stream, block in self._blocks:
                _write_all(self._file, f"{stream} {len(block)}\n".encode() + block)
        except OSError:
            self._file.seek(end)
            self._file.truncate()
            raise
        self._blocks.clear()
        self._size = 0


def _write_all(file: IO[bytes], data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


# -- what all modes share -------------------------------------------------------------


class _Live:
    """A call that has written something, or a worker for nobody, and what it wrote."""

    __slots__ = ("call", "lines", "spool", "spooling", "tail", "worker")

    def __init__(self, call: Any, worker: str) -> None:
        self.call = call
        self.worker = worker
        self.lines: dict[str, Lines] = {}
        self.tail = Tail()
        self.spool = Spool()
        self.spooling = True


class Output(Observer):
    """Shows failures, and keeps tails; the modes say what becomes of lines.

    It expects a call's last output before its end, and copes with the contrary: what
    comes late is shown late.
    """

    overwrite = True
    shows_captured = False
    """Whether a failure's block repeats what the call wrote."""
    stdout = "stdout"
    """Where lines of stdout go."""
    WIDEST_TITLE = 40
    WIDEST_PADDING = 20

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self._width = 0
        self._paint = terminal.paint("stderr")
        self._live: dict[int | str, _Live] = {}
        self._recent: dict[int, Tail] = {}
        self._failing: dict[int, tuple[AttemptEnded, str]] = {}
        self._shown: dict[int, str] = {}

    def tail(self, call: Any) -> text.Captured:
        """The last 64 KB that a call wrote: of a live one, or one that failed just now."""
        live = self._live.get(call.id)
        tail = live.tail if live is not None else self._recent.get(call.id)
        return tail.text() if tail is not None else []

    # -- what a mode overrides --------------------------------------------------------

    def show(self, live: _Live, stream: str, block: bytes) -> None:
        """Whole lines of a call have come."""

    def show_call(self, live: _Live, seconds: float | None) -> None:
        """A call that has written something is at its end."""

    def show_retry(self, line: str) -> None:
        self._say(line)

    def place(self, stream: str) -> str:
        """Where the lines of a stream go."""
        return self.stdout if stream == "stdout" else stream

    # -- what is observed -------------------------------------------------------------

    def output(self, call: Any | None, stream: str, data: bytes, worker: str = "") -> None:
        key = worker if call is None else call.id
        live = self._live.get(key)
        if live is None:
            live = self._live[key] = _Live(call, worker)
        lines = live.lines.get(stream)
        if lines is None:
            lines = live.lines[stream] = Lines(self.overwrite)
        self._take(live, stream, lines.feed(data))

    def output_ended(self, call: Any) -> None:
        live = self._live.get(call.id)
        if live is not None:
            for stream, lines in live.lines.items():
                self._take(live, stream, lines.end())

    def attempt_ended(self, event: AttemptEnded, worker: str) -> None:
        if self._live:
            self.output_ended(event.call)
        if event.again is not None:
            self.show_retry(_retry_line(event, worker))
        elif event.outcome != "value":
            self._failing[event.call.id] = event, worker

    def succeeded(self, event: Succeeded, worker: str) -> None:
        if self._live or self._failing:
            super().succeeded(event, worker)

    def call_ended(self, call: Any) -> None:
        live = self._live.pop(call.id, None) if self._live else None
        event, worker = self._failing.pop(call.id, (None, "")) if self._failing else (None, "")
        if live is not None:
            self.show_call(live, event.seconds if event is not None else None)
        if call.state == "failed":
            if live is not None:
                self._keep_recent(call, live.tail)
            self._show_failure(call, event, worker)

    def notice(self, text: str) -> None:
        self._say("\n".join(f"taskrun: {line}" for line in text.split("\n")))

    def stopping(self, reason: str) -> None:
        self.notice(f"stopping: {reason}")

    def run_ended(self, status: int, reason: str) -> None:
        for live in list(self._live.values()):
            for stream, lines in live.lines.items():
                self._take(live, stream, lines.end())
            self.show_call(live, None)
        self._live.clear()

    # -- lines with a name ------------------------------------------------------------

    def _show_tagged(self, live: _Live, stream: str, block: bytes) -> None:
        tag = text.encode(self._tag(live, stream))
        lines = self._tamed(stream, block)
        tagged = tag + lines[:-1].replace(b"\n", b"\n" + tag) + b"\n"
        self.terminal.write_lines(self.place(stream), tagged)

    def _tag(self, live: _Live, stream: str) -> str:
        """On a terminal the bars stand below each other and names have colours; elsewhere
        there is one space on each side of the bar, so that one can search for it."""
        call = live.call
        title = live.worker or "worker" if call is None else text.title_of(call)
        title = text.shorten(title, self.WIDEST_TITLE)
        if not self.terminal.is_terminal(self.place(stream)):
            return f"{title} | "
        self._width = max(self._width, min(len(title), self.WIDEST_PADDING))
        paint = self.terminal.paint(self.place(stream))
        bar = paint("red", "|") if stream == "stderr" else paint("dim", "|")
        task = title if call is None else call.recipe.name
        return f"{paint.tag(task, title)}{' ' * (self._width - len(title))} {bar} "

    # -- failures ---------------------------------------------------------------------

    def _show_failure(self, call: Any, event: AttemptEnded | None, worker: str) -> None:
        heading = self._paint("bad", f"FAILED {text.title_of(call)}")
        where = _where(call, event, worker)
        failure: Failure | None = call.failure
        if failure is None or (call.cause is not None and call.cause is not call):
            cause = f": {text.title_of(call.cause)} failed" if call.cause is not None else ""
            return self._say(f"{heading}{where}{cause}")
        body = self._body(call, failure)
        if body is None:
            line = f"{text.one_line(failure.headline)}, as {self._shown[_key(call, failure)]}"
            return self._say(f"{heading}{where}: {line}")
        shows = self.shows_captured and failure.kind != "lost"  # that one quotes it itself
        captured = captured_text(self.tail(call), 100) if shows else ""
        return self._say(f"{heading}{where}\n{text.indent(body)}{captured}")

    def _body(self, call: Any, failure: Failure) -> str | None:
        """The traceback, or None if the same one was shown for another call of the task."""
        key = _key(call, failure)
        if failure.traceback and key in self._shown:
            return None
        if len(self._shown) < 10_000:
            self._shown[key] = text.title_of(call)
        return text.failure_text(failure)

    def _keep_recent(self, call: Any, tail: Tail) -> None:
        self._recent[call.id] = tail
        if len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]

    def _take(self, live: _Live, stream: str, block: bytes) -> None:
        if block:
            live.tail.add(stream, block)
            self.show(live, stream, block)

    def _say(self, lines: str) -> None:
        block = text.encode(lines if lines.endswith("\n") else lines + "\n")
        self.terminal.write_lines("stderr", self._tamed("stderr", block))

    def _tamed(self, stream: str, block: bytes) -> bytes:
        return text.tame(block) if self.terminal.is_terminal(stream) else block


def _key(call: Any, failure: Failure) -> int:
    return text.same_failure(call.recipe.name, failure)


def _where(call: Any, event: AttemptEnded | None, worker: str) -> str:
    parts = ["tolerated"] if call.tolerated else []
    if event is not None:
        parts.append(text.attempt_text(event.attempt, event.seconds, worker))
    return f" ({', '.join(parts)})" if parts else ""


def _retry_line(event: AttemptEnded, worker: str) -> str:
    title = text.title_of(event.call)
    retries = event.call.recipe.retries
    counted = retries is not None and event.attempt <= retries
    which = f"retry {event.attempt} of {retries}" if counted else "retry"
    when = f"in {text.duration(event.again)}" if event.again else "at once"
    return f"{title} {_what_happened(event, worker)}, {which} {when}"


def _what_happened(event: AttemptEnded, worker: str) -> str:
    if event.failure is None:
        return "failed"
    headline = text.one_line(event.failure.headline)
    if event.outcome == "lost":
        # The message says which call was lost as well, which stands before it here.
        _, _, reason = headline.partition(f"(attempt {event.attempt}) ")
        reason = reason.partition("; its last output")[0].removeprefix("was ")
        return f"lost its worker {worker}: {reason or headline}"
    return f"{'asks for a retry' if event.outcome == 'retry' else 'failed'} ({headline})"


def captured_text(captured: text.Captured, limit: int) -> str:
    """The last ``limit`` lines of what a call wrote, below a traceback; lines of stderr
    are marked ``!``, lines of stdout ``|``."""
    lines = [
        ("!" if stream == "stderr" else "|", line)
        for stream, block in captured
        for line in block.removesuffix("\n").split("\n")
    ]
    if not lines:
        return ""
    left_out = len(lines) - limit
    heading = f"  output, its last {limit} lines:\n" if left_out > 0 else "  output:\n"
    return heading + "".join(f"    {mark} {line}\n" for mark, line in lines[-limit:])


# -- the modes ------------------------------------------------------------------------


class RawOutput(Output):
    """Lines as they come, without a name."""

    overwrite = False

    def show(self, live: _Live, stream: str, block: bytes) -> None:
        self.terminal.write_lines(self.place(stream), block)


class QuietOutput(Output):
    """Failures only, with what the failed call wrote."""

    shows_captured = True

    def show_retry(self, line: str) -> None:
        return None


class LineOutput(Output):
    """Each line as it comes, after its call's name: ``fetch[3] | text``.

    A call's label comes another way than what it writes, and perhaps after that, which then
    waits for it.
    """

    def show(self, live: _Live, stream: str, block: bytes) -> None:
        if not _awaits_its_label(live.call):
            self._show_held(live)
            self._show_tagged(live, stream, block)
            return
        try:
            live.spool.add(stream, block)
        except OSError:
            self._show_held(live)  # nothing is lost, and the name will do

    def _show_held(self, live: _Live) -> None:
        if live.spool:
            held, live.spool = live.spool, Spool()
            for stream, block in held.blocks():
                self._show_tagged(live, stream, block)

    def call_began(self, call: Any, attempt: int, worker: str, wall: float) -> None:
        if (live := self._live.get(call.id)) is not None:
            self._show_held(live)

    def output_ended(self, call: Any) -> None:
        super().output_ended(call)
        if (live := self._live.get(call.id)) is not None:
            self._show_held(live)

    def show_call(self, live: _Live, seconds: float | None) -> None:
        self._show_held(live)


def _awaits_its_label(call: Any | None) -> bool:
    return (
        call is not None
        and call.label is None
        and call.began is None
        and bool(call.recipe.flags & SAY_BEGAN)
    )


class GroupOutput(Output):
    """A block per call that wrote something, when the call ends; lines that no block can
    take come as they do in ``line``."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(terminal)
        self._seconds: dict[int, float] = {}

    def attempt_ended(self, event: AttemptEnded, worker: str) -> None:
        super().attempt_ended(event, worker)
        if event.call.id in self._live:
            self._seconds[event.call.id] = event.seconds

    def show(self, live: _Live, stream: str, block: bytes) -> None:
        # Where the temporary file failed, memory must not grow instead.
        if live.call is None or not live.spooling:
            return self._show_tagged(live, stream, block)
        try:
            live.spool.add(stream, block)
        except OSError as error:
            live.spooling = False
            title = text.title_of(live.call)
            self.notice(f"output of {title} cannot wait for its end: {error.strerror or error}")
            for earlier in live.spool.blocks():
                self._show_tagged(live, *earlier)
        return None

    def show_call(self, live: _Live, seconds: float | None) -> None:
        if live.call is None or not live.spooling or not live.spool:
            return
        with self.terminal.lock:
            headed: set[str] = set()
            for stream, block in live.spool.blocks():
                place = "both" if self.terminal.in_one_place else self.place(stream)
                if place not in headed:
                    headed.add(place)
                    self._write(stream, self._heading(live.call, stream))
                self._write(stream, block)
            self._seconds.pop(live.call.id, None)

    def _heading(self, call: Any, stream: str) -> bytes:
        paint = self.terminal.paint(self.place(stream))
        style = {"ok": "green", "failed": "bad"}.get(call.state, "yellow")
        seconds = self._seconds.get(call.id)
        took = f" ({text.duration(seconds)})" if seconds is not None else ""
        title = paint.tag(call.recipe.name, text.title_of(call))
        return text.encode(f"--- {title} {paint(style, call.state)}{took}\n")

    def _write(self, stream: str, block: bytes) -> None:
        self.terminal.write_lines(self.place(stream), self._tamed(stream, block))


MODES: dict[str, type[Output]] = {
    "line": LineOutput,
    "group": GroupOutput,
    "raw": RawOutput,
    "quiet": QuietOutput,
}


def make_output(mode: str, terminal: Terminal) -> Output:
    """The Output for ``--output MODE``: one of ``line``, ``group``, ``raw``, ``quiet``."""
    return MODES[mode](terminal)
