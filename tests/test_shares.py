"""How slots are dealt to runs, and how output is kept."""

from __future__ import annotations

from typing import Any

from taskrun.serving.kept import Follower, Kept
from taskrun.serving.shares import deal
from taskrun.serving.talk import JSON, STDERR, STDOUT, heard


def totals(places: dict[str, int], runs: dict[str, int | None]) -> list[int]:
    return [sum(share.values()) for share in deal(places, runs).values()]


def test_runs_get_equal_shares_but_for_one_slot() -> None:
    assert totals({"local": 4, "lab": 3}, {"a": None, "b": None, "c": None}) == [3, 2, 2]


def test_nobody_goes_without_where_there_is_a_slot_for_each() -> None:
    assert totals({"local": 1, "lab": 2}, {"a": None, "b": None, "c": None}) == [1, 1, 1]


def test_what_one_does_not_want_is_for_the_others() -> None:
    assert totals({"local": 8}, {"a": 1, "b": None, "c": None}) == [1, 4, 3]
    assert totals({"local": 8}, {"a": 1}) == [1]


def test_where_there_is_nothing_or_nobody_nothing_is_dealt() -> None:
    assert deal({"local": 4}, {}) == {}
    assert deal({}, {"a": None}) == {"a": {}}


class Peer:
    """A connection that takes nothing until it is told to."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.unsent = 0
        self.closed = False
        self.on_drained: Any = None

    def send(self, *parts: bytes | memoryview) -> None:
        self.frames.append(b"".join(parts))

    def finish(self) -> None:
        self.closed = True

    @property
    def text(self) -> bytes:
        return b"".join(frame[1:] for frame in self.frames if frame[0] != JSON)

    @property
    def said(self) -> list[dict[str, Any]]:
        return [heard(frame) for frame in self.frames if frame[0] == JSON]


def test_lines_are_kept_whole_and_in_order() -> None:
    kept, peer = Kept(), Peer()
    follower = Follower(kept, peer)
    for stream, data in ((STDOUT, b"a"), (STDERR, b"b\n"), (STDOUT, b"c\nd"), (STDOUT, b"\n")):
        kept.write(stream, data)
        follower.pump()
    assert peer.text == b"b\nac\nd\n"


def test_one_who_comes_late_or_is_slow_is_told_how_much_went_by() -> None:
    kept, slow = Kept(most=100), Peer()
    follower = Follower(kept, slow)
    slow.unsent = 1 << 30
    for number in range(50):
        kept.write(STDOUT, b"%09d\n" % number)
        follower.pump()
    late = Peer()
    Follower(kept, late).ended(7)
    slow.unsent = 0
    slow.on_drained()
    follower.ended(7)
    for peer in (slow, late):
        assert peer.said == [{"skipped": 40}, {"ended": 7}] and peer.closed
        assert peer.text.count(b"\n") == 10 and peer.text.endswith(b"000000049\n")
