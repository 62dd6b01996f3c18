"""The channel of a call: messages between whoever submitted it and the call, both ways.

The coordinator holds it.  Both ends name it after what they know: the call that submitted
and the key of the future, or the call itself; ``Line`` says which channel that is.  It ends
with the call on the one side, and with the submitting call on the other; what was sent
before can still be received.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from taskrun.calls import FINAL
from taskrun.calls import Call as RunCall
from taskrun.state.kinds import Ear, Hosted
from taskrun.state.stored import Stored
from taskrun.state.waiting import DONE, Client, Queue
from taskrun.state.wire import ERROR, Reply

SUBMITTER: Final = 0
CALL: Final = 1


class Box(Queue):
    """What one side has still to receive."""

    closed = False  # nothing more comes

    def get(self, client: Client, parks: bool) -> Reply:
        if self.closed and not self._items:
            return _CLOSED
        return super().get(client, parks)

    def shut(self) -> None:
        """Nothing more comes: those that wait for it are told."""
        self.closed = True
        self._getters.end_all(_CLOSED)


_CLOSED: Reply = (ERROR, ("ChannelClosed", ("the other end of the channel is closed",)))


class Channel(Hosted):
    """Two boxes, one for each side."""

    kind = "channel"

    def __init__(self, name: str, options: tuple[Any, ...], ears: list[Ear]) -> None:
        super().__init__(name, options, ears)
        self._boxes = Box(name, (), []), Box(name, (), [])

    def __len__(self) -> int:
        return sum(len(box) for box in self._boxes)

    @property
    def is_over(self) -> bool:
        """Whether both ends are closed."""
        return all(box.closed for box in self._boxes)

    def send(self, client: Client, side: int, value: Stored) -> Reply:
        if self._boxes[1 - side].closed:
            return ERROR, ("ChannelClosed", ("this end of the channel is closed",))
        if self._boxes[side].closed:
            return _CLOSED
        return self._boxes[1 - side].put(client, value, False)

    def recv(self, client: Client, side: int, parks: bool) -> Reply:
        return self._boxes[side].get(client, parks)

    def close(self, client: Client | None, side: int) -> Reply:
        """``side`` sends nothing more, and receives nothing more."""
        self._boxes[1 - side].shut()
        return DONE

    def put_back(self, side: int, value: Stored) -> None:
        """Who received it was interrupted."""
        self._boxes[side].put_back(None, value)


class Line(NamedTuple):
    """Which channel is meant: its own name, that of the submitting call (-1: there is none),
    and whether the call has ended."""

    name: str
    submitter: int
    ended: bool


class Channels:
    """The channels of a store, by the calls that they end with."""

    def __init__(self, objects: dict[str, Hosted], line: Callable[[str], Line]) -> None:
        self._objects = objects
        self._line = line
        self._submitted_by: defaultdict[int, set[str]] = defaultdict(set)
        self._open: set[str] = set()

    def find(self, name: str) -> Channel:
        """The channel that somebody names, made if there is none."""
        line = self._line(name)
        found = self._objects.get(f"{_PREFIX}{line.name}")
        if isinstance(found, Channel):
            return found
        made = Channel(line.name, (), [])
        self._objects[f"{_PREFIX}{line.name}"] = made
        self._open.add(line.name)
        if line.submitter >= 0:
            self._submitted_by[line.submitter].add(line.name)
        if line.ended:
            made.close(None, CALL)
            if line.submitter < 0:
                made.close(None, SUBMITTER)
        return made

    def call_ended(self, call: int) -> None:
        """A call reached its end: so do its channel, and those to the calls it submitted."""
        if not self._open:
            return
        line = self._line(of_call(call))
        self._close(line.name, CALL)
        if line.submitter < 0:
            self._close(line.name, SUBMITTER)
        for name in self._submitted_by.pop(call, ()):
            self._close(name, SUBMITTER)

    def _close(self, name: str, side: int) -> None:
        channel = self._objects.get(f"{_PREFIX}{name}")
        if isinstance(channel, Channel):
            channel.close(None, side)
            if channel.is_over:
                del self._objects[f"{_PREFIX}{name}"]
                self._open.discard(name)


_PREFIX: Final = "\0channel "  # no name that anybody gives
_OF_CALL: Final = "call:"


def of_call(call: int) -> str:
    """How a channel is named after its call."""
    return f"{_OF_CALL}{call}"


def of_child(submitter: int, key: bytes) -> str:
    """How a channel is named after the submitting call, and the future's key."""
    return f"{submitter}/{key.hex()}"


def line_of(name: str, find: Callable[[int], RunCall | None]) -> Line:
    """The channel that ``name`` means among the calls of a run, which ``find`` gives by id.

    Raises ValueError for what is no name of a channel.
    """
    if name.startswith(_OF_CALL):
        call = find(int(name.removeprefix(_OF_CALL)))
        if call is None:
            return unknown_line(name)
        ended = call.state in FINAL
        if call.parent is None:
            return Line(name, -1, ended)
        return Line(of_child(call.parent.id, call.key), call.parent.id, ended)
    number, _, key = name.partition("/")
    submitter = find(int(number))
    if submitter is None or submitter.state in FINAL:
        return Line(name, int(number), True)
    child = (submitter.children or {}).get(bytes.fromhex(key))
    return Line(name, submitter.id, child is not None and child.state in FINAL)


def unknown_line(name: str) -> Line:
    """Outside a run: there are no calls, and no other end."""
    return Line(name, -1, True)
