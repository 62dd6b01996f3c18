"""A conversation that outlives its connections.

Between a coordinator and a node there is one conversation, over one connection at a time.
What is said is numbered.  Until the other side has acknowledged it, it is kept; when a
connection broke and another one takes its place, each side tells how much it has received,
and the other goes on from there.  So everything arrives once and in order, or the
conversation as a whole is given up.

Messages belong to *keys*: those of one key arrive in order, those of different keys may
overtake each other.  A long message goes in chunks, and only so much is on its way at a
time: neither heartbeats nor the other keys wait for it.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from taskrun.errors import WireError

Data: TypeAlias = bytes | memoryview
OnMessage: TypeAlias = Callable[[int, int, Data], object]

CHUNK: Final = 256 * 1024  # bytes of a message that go in one piece
WINDOW: Final = 4 * 1024 * 1024  # bytes on their way, not acknowledged
_ACK_BYTES: Final = WINDOW // 8  # received, after which an acknowledgement is due
_ACK_FRAMES: Final = 512

# A frame begins with its kind.
JOIN: Final = 0  # JSON; see ``joining``
_DATA: Final = 1  # number, key, channel, whether more of the message follows
_ACK: Final = 2  # so many frames were received
_BEAT: Final = 3  # the same, and when this was sent
_ECHO: Final = 4  # the same, and when the beat was sent that this answers
LEAVE: Final = 5  # the conversation is over, and why

_HEAD = struct.Struct("!BQIBB")
MOST_FRAME: Final = CHUNK + _HEAD.size  # bytes; no frame of a conversation has more
_COUNT = struct.Struct("!BQ")
_STAMP = struct.Struct("!BQd")


class Peer(Protocol):
    """A connection, as far as a conversation is concerned; see ``transport``."""

    def send(self, *parts: Data) -> None: ...

    def send_first(self, frame: bytes) -> None: ...


class Conversation:
    """One side of it.

    ``on_message(key, channel, data)`` gets whole messages; ``on_beat(stamp)`` is called for
    a beat of the other side, ``on_echo(stamp)`` for the answer to one of ours.
    ``on_room()`` is called whenever nothing waits any more.
    """

    def __init__(
        self,
        on_message: OnMessage,
        *,
        on_beat: Callable[[float], object] = lambda stamp: None,
        on_echo: Callable[[float], object] = lambda stamp: None,
        on_room: Callable[[], object] = lambda: None,
    ) -> None:
        self.received = 0  # frames
        self.waiting = 0  # bytes of messages that are not on their way yet
        self._on_message = on_message
        self._on_beat, self._on_echo, self._on_room = on_beat, on_echo, on_room
        self._peer: Peer | None = None
        self._sent = 0  # frames, since the conversation began
        self._unacked: deque[tuple[Data, ...]] = deque()
        self._on_the_way = 0  # bytes of them
        self._queues: dict[int, deque[tuple[int, memoryview]]] = {}  # by key
        self._begun: dict[int, list[Data]] = {}  # of messages that have not come wholly
        self._told = 0  # how many received frames were acknowledged
        self._untold_bytes = 0

    # -- connections ------------------------------------------------------------------

    def attach(self, peer: Peer, received: int) -> None:
        """Go on over ``peer``, whose side has received so many frames.  Raises WireError
        where that cannot be."""
        self._acknowledged(received)
        self._peer = peer
        for frame in self._unacked:
            peer.send(*frame)
        self._pump()

    def detach(self) -> None:
        """The connection is gone."""
        self._peer = None

    @property
    def is_attached(self) -> bool:
        """Whether there is a connection."""
        return self._peer is not None

    # -- sending ----------------------------------------------------------------------

    def send(self, key: int, channel: int, data: Data) -> None:
        """Send a message, as soon as there is room for it."""
        if key in self._queues or self._on_the_way >= WINDOW or len(data) > CHUNK:
            self._queues.setdefault(key, deque()).append((channel, memoryview(data)))
            self.waiting += len(data)
            self._pump()
        else:
            self._transmit(key, channel, 0, data)

    def beat(self, stamp: float) -> None:
        """Say that this side is alive; the other answers with the same ``stamp``."""
        self._say(_STAMP.pack(_BEAT, self.received, stamp))

    def leave(self, reason: str) -> None:
        """Say that the conversation is over."""
        if self._peer is not None:
            self._peer.send(bytes([LEAVE]) + reason.encode())

    def _say(self, frame: bytes) -> None:
        """Say what has no number: it need not wait for what has."""
        if self._peer is not None:
            self._told, self._untold_bytes = self.received, 0
            self._peer.send_first(frame)

    def _transmit(self, key: int, channel: int, more: int, data: Data) -> None:
        head = _HEAD.pack(_DATA, self._sent, key, channel, more)
        self._sent += 1
        self._unacked.append((head, data))
        self._on_the_way += len(data)
        if self._peer is not None:
            self._peer.send(head, data)

    def _pump(self) -> None:
        """Send what waits, a chunk of each key in turn, while there is room."""
        queues = self._queues
        if not queues:
            return
        while queues and self._on_the_way < WINDOW:
            key = next(iter(queues))
            queue = queues.pop(key)
            channel, data = queue.popleft()
            more = len(data) > CHUNK
            chunk = data[:CHUNK]
            self.waiting -= len(chunk)
            # A negative channel: the beginning of that message has been sent.
            self._transmit(key, channel if channel >= 0 else ~channel, int(more), chunk)
            if more:
                queue.appendleft((channel if channel < 0 else ~channel, data[CHUNK:]))
            if queue:
                queues[key] = queue  # behind the others
        if not queues:
            self._on_room()

    # -- receiving --------------------------------------------------------------------

    def take(self, frame: memoryview) -> None:
        """A frame came; neither JOIN nor LEAVE.  Raises WireError where it cannot be."""
        try:
            kind = frame[0]
            if kind == _DATA:
                self._take_data(frame)
            elif kind == _ACK:
                self._acknowledged(_COUNT.unpack(frame)[1])
                self._pump()
            elif kind in (_BEAT, _ECHO):
                self._take_beat(frame)
            else:
                raise WireError(f"a frame of the unknown kind {kind}")
        except (struct.error, IndexError) as error:
            raise WireError(f"a malformed frame: {error}") from None

    def _take_data(self, frame: memoryview) -> None:
        _, number, key, channel, more = _HEAD.unpack_from(frame)
        if number < self.received:
            return  # it came before, over the last connection
        if number > self.received:
            raise WireError(f"frame {number} came instead of {self.received}")
        self.received += 1
        data = frame[_HEAD.size :]
        self._untold_bytes += len(data)
        if self._untold_bytes >= _ACK_BYTES or self.received - self._told >= _ACK_FRAMES:
            self._say(_COUNT.pack(_ACK, self.received))
        if not more and key not in self._begun:
            self._on_message(key, channel, data)
            return
        pieces = self._begun.setdefault(key, [])
        pieces.append(data)
        if not more:
            del self._begun[key]
            self._on_message(key, channel, b"".join(pieces))

    def _take_beat(self, frame: memoryview) -> None:
        kind, received, stamp = _STAMP.unpack(frame)
        self._acknowledged(received)
        self._pump()
        if kind == _BEAT:
            self._say(_STAMP.pack(_ECHO, self.received, stamp))
            self._on_beat(stamp)
        else:
            self._on_echo(stamp)

    def _acknowledged(self, received: int) -> None:
        unacked = self._unacked
        first = self._sent - len(unacked)
        if not first <= received <= self._sent:
            if received < first and self._peer is not None:
                return  # said before a later one: it tells nothing new
            raise WireError(f"{received} frames cannot have been received of {self._sent}")
        for _ in range(received - first):
            self._on_the_way -= len(unacked.popleft()[1])
