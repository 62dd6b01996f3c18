"""How slots are dealt to runs, and how output is kept."""

from __future__ import annotations

import random
from typing import Any

from taskrun.serving.kept import Follower, Kept
from taskrun.serving.shares import Shares, Wish, deal
from taskrun.serving.talk import JSON, STDERR, STDOUT, heard


def totals(places: dict[str, int], most: dict[str, int | None], **wants: int) -> list[int]:
    wishes = {run: Wish(most[run], wants.get(run)) for run in most}
    return [sum(share.values()) for share in deal(places, wishes, {}).values()]


def test_runs_get_equal_shares_but_for_one_slot() -> None:
    assert totals({"local": 4, "lab": 3}, {"a": None, "b": None, "c": None}) == [3, 2, 2]


def test_nobody_goes_without_where_there_is_a_slot_for_each() -> None:
    assert totals({"local": 1, "lab": 2}, {"a": None, "b": None, "c": None}) == [1, 1, 1]


def test_what_one_does_not_want_is_for_the_others() -> None:
    assert totals({"local": 8}, {"a": 1, "b": None, "c": None}) == [1, 4, 3]
    assert totals({"local": 8}, {"a": 1}) == [1]


def test_where_there_is_nothing_or_nobody_nothing_is_dealt() -> None:
    assert deal({"local": 4}, {}, {}) == {}
    assert deal({}, {"a": Wish()}, {}) == {"a": {}}


def test_a_run_that_has_nothing_to_do_keeps_no_slot_from_one_that_has() -> None:
    runs: dict[str, int | None] = {"a": None, "b": None, "c": 3}
    assert totals({"local": 8}, runs, a=0) == [0, 5, 3]
    assert totals({"local": 8}, runs, a=1, b=9, c=9) == [1, 4, 3]
    assert totals({"local": 8}, runs, a=0, b=1, c=1) == [3, 3, 2]


def test_a_run_keeps_the_places_that_it_has() -> None:
    places = {"local": 2, "lab": 2}
    before = {"a": {"local": 2, "lab": 2}}
    shares = deal(places, {"a": Wish(), "b": Wish()}, before)
    assert shares == {"a": {"local": 1, "lab": 1}, "b": {"local": 1, "lab": 1}}
    less = deal(places, {"a": Wish(None, 3), "b": Wish(None, 1)}, shares)
    assert less["a"]["local"] >= 1 and less["a"]["lab"] >= 1 and sum(less["b"].values()) == 1
    assert deal({"lab": 2}, {"a": Wish(), "b": Wish()}, less) == {"a": {"lab": 1}, "b": {"lab": 1}}


def test_a_run_has_slots_where_it_needs_them_and_others_give_way() -> None:
    places, runs = {"local": 4, "lab": 1}, {"a": Wish(), "b": Wish()}
    before = {"a": {"local": 2, "lab": 1}, "b": {"local": 2}}
    shares = deal(places, runs, before, {"b": {"lab": 1}})
    assert shares == {"a": {"local": 3}, "b": {"lab": 1, "local": 1}}
    assert deal(places, {"a": Wish(), "b": Wish(None, 0)}, {}, {"b": {"lab": 1}})["b"] == {"lab": 1}


def test_any_dealing_gives_out_all_that_is_wanted_and_nothing_twice() -> None:
    chance = random.Random(seed := 7)
    before: Shares = {}
    for _ in range(500):
        places = {f"p{n}": chance.randrange(6) for n in range(chance.randrange(1, 5))}
        wish = [None, 0, 1, 2, 5, 30]
        runs = {
            f"r{n}": Wish(chance.choice(wish[:1] + wish[2:]), chance.choice(wish))
            for n in range(chance.randrange(1, 5))
        }
        before = deal(places, runs, before)
        for place, slots in places.items():
            assert sum(of.get(place, 0) for of in before.values()) <= slots, seed
        have = {run: sum(of.values()) for run, of in before.items()}
        capped = [30 if wish.most is None else wish.most for wish in runs.values()]
        assert sum(have.values()) == min(sum(places.values()), sum(capped)), seed
        for run, wish in runs.items():
            wanted = min(30 if n is None else n for n in wish)
            if have[run] < wanted:  # then nobody has more than what is fair
                assert max(have.values()) <= have[run] + 1, (seed, places, runs, before)


class Peer:
    """A connection that takes nothing until it is told to."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.unsent = 0
        self.closed = False
        self.on_drained: Any = None

    def send(self, *parts: bytes | memoryview) -> None:
        self.frames.append(b"".join(parts))

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
        assert peer.said == [{"skipped": 40}, {"ended": 7}]
        assert peer.text.count(b"\n") == 10 and peer.text.endswith(b"000000049\n")


def test_one_who_reads_slowly_is_told_the_end_once_and_closes_himself() -> None:
    kept, slow = Kept(), Peer()
    follower = Follower(kept, slow)
    slow.unsent = 1 << 30
    kept.write(STDOUT, b"the last line\n")
    follower.ended(3)
    assert slow.frames == []
    slow.unsent, drained = 0, slow.on_drained
    drained()
    assert slow.text == b"the last line\n" and slow.said == [{"ended": 3}]
    assert slow.on_drained is None
