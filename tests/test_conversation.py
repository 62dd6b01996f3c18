"""A conversation over connections that break: everything arrives, once and in order."""

from __future__ import annotations

import random
from collections import defaultdict, deque

import pytest

from taskrun.errors import WireError
from taskrun.network.conversation import CHUNK, WINDOW, Conversation

Message = tuple[int, bytes]


class Side:
    """One side, with what it has received, by key."""

    def __init__(self) -> None:
        self.got: dict[int, list[Message]] = defaultdict(list)
        self.beats: list[float] = []
        self.echoes: list[float] = []
        self.talk = Conversation(
            self._on_message, on_beat=self.beats.append, on_echo=self.echoes.append
        )
        self.outgoing: deque[bytes] = deque()

    def _on_message(self, key: int, channel: int, data: bytes | memoryview) -> None:
        self.got[key].append((channel, bytes(data)))

    def send(self, *parts: bytes | memoryview) -> None:
        """As a peer: to the other side, as long as the connection holds."""
        self.outgoing.append(b"".join(parts))

    def send_first(self, frame: bytes) -> None:
        """The same, before all that is under way."""
        self.outgoing.appendleft(frame)


class Line:
    """Two sides, and the connection between them; with a ``chance`` of what no connection
    should do to frames."""

    def __init__(self, chance: random.Random | None = None) -> None:
        self.sides = Side(), Side()
        self._chance = chance
        self.connect()

    def connect(self) -> None:
        """A new connection; what was under way on the last one is lost."""
        first, second = self.sides
        for side in self.sides:
            side.talk.detach()
            side.outgoing = deque()
        counts = first.talk.received, second.talk.received
        first.talk.attach(first, counts[1])
        second.talk.attach(second, counts[0])

    def deliver(self, number: int) -> None:
        """One frame of a side arrives at the other."""
        outgoing = self.sides[number].outgoing
        if not outgoing:
            return
        frame = outgoing.popleft()
        if self._chance is None:
            self.sides[1 - number].talk.take(memoryview(frame))
            return
        what = self._chance.random()
        if what < 0.02 and outgoing:
            return  # dropped
        if what < 0.04:
            outgoing.appendleft(frame)  # doubled
        elif what < 0.06 and outgoing:
            outgoing.insert(1, frame)  # too late
            return
        try:
            self.sides[1 - number].talk.take(memoryview(frame))
        except WireError:
            self.connect()

    def polite(self) -> None:
        """From now on it does what a connection should."""
        self._chance = None

    def settle(self) -> None:
        while any(side.outgoing for side in self.sides):
            for number in (0, 1):
                self.deliver(number)


def test_messages_of_a_key_arrive_in_order_whatever_their_size() -> None:
    line = Line()
    sent = [(channel, bytes([channel]) * size) for channel, size in
            enumerate([0, 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 1])]  # fmt: skip
    for channel, data in sent:
        line.sides[0].talk.send(7, channel, data)
    line.settle()
    assert line.sides[1].got[7] == sent


def test_a_long_message_does_not_keep_another_key_waiting() -> None:
    line = Line()
    long = bytes(3 * WINDOW)
    first, second = line.sides
    first.talk.send(1, 0, long)
    first.talk.send(2, 0, b"short")
    assert sum(map(len, first.outgoing)) < 2 * WINDOW
    first.talk.beat(3.5)
    while not second.got[2]:
        line.deliver(0)
        line.deliver(1)
    assert not second.got[1]
    line.settle()
    assert second.got[1] == [(0, long)]
    assert first.echoes == [3.5] and second.beats == [3.5]
    assert first.talk.waiting == 0


def test_what_was_not_acknowledged_is_sent_again_and_taken_once() -> None:
    line = Line()
    for number in range(10):
        line.sides[0].talk.send(1, number, b"x")
    for _ in range(4):
        line.deliver(0)
    line.connect()
    line.settle()
    assert [channel for channel, _ in line.sides[1].got[1]] == list(range(10))


def test_a_frame_that_is_not_the_next_one_ends_the_connection() -> None:
    line = Line()
    line.sides[0].talk.send(1, 0, b"a")
    line.sides[0].talk.send(1, 1, b"b")
    line.sides[0].outgoing.popleft()
    with pytest.raises(WireError, match="frame 1 came instead of 0"):
        line.deliver(0)


def test_a_frame_that_comes_twice_is_taken_once() -> None:
    line = Line()
    line.sides[0].talk.send(1, 0, b"a")
    line.sides[0].outgoing.append(line.sides[0].outgoing[0])
    line.settle()
    assert line.sides[1].got[1] == [(0, b"a")]


@pytest.mark.parametrize("frame", [b"", b"\x01", b"\x02short", b"\x09", b"\x03" + bytes(15)])
def test_a_malformed_frame_is_an_error(frame: bytes) -> None:
    with pytest.raises(WireError):
        Line().sides[0].talk.take(memoryview(frame))


def test_a_side_that_claims_more_than_was_sent_is_refused() -> None:
    with pytest.raises(WireError, match="cannot have been received"):
        Line().sides[0].talk.attach(Side(), 3)


@pytest.mark.parametrize("rude", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_lost_or_doubled_over_connections_that_break(seed: int, rude: bool) -> None:
    """A ``rude`` connection also drops, doubles and reorders frames: then it is given up."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    line = Line(chance if rude else None)
    sent: list[dict[int, list[Message]]] = [defaultdict(list), defaultdict(list)]
    for step in range(400):
        number = chance.randrange(2)
        what = chance.random()
        if what < 0.3:
            key, size = chance.randrange(4), chance.choice([3, 100, 2 * CHUNK + 7])
            message = step % 200, chance.randbytes(3) + bytes(size)
            sent[number][key].append(message)
            line.sides[number].talk.send(key, *message)
        elif what < 0.95:
            line.deliver(number)
        elif what < 0.98:
            line.sides[number].talk.beat(step)
        else:
            line.connect()
    line.polite()
    line.connect()
    line.settle()
    for number in (0, 1):
        assert dict(line.sides[1 - number].got) == dict(sent[number])
        assert line.sides[number].talk.waiting == 0
