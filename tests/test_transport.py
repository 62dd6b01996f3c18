"""Connections that prove the authkey: over Unix sockets, loopback and TLS."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from transport_support import DEADLINE, KEY, Meeting, unix_path

from taskrun import addresses
from taskrun.errors import DialError, UsageError
from taskrun.reactor import Reactor
from taskrun.transport import Wire, dial, dial_blocking, listen

ADDRESSES: dict[str, Callable[[], Any]] = {
    "unix": unix_path,
    "loopback": lambda: ("127.0.0.1", 0),
    "tls": lambda: addresses.Tls("127.0.0.1", 0),
}


@pytest.fixture(params=ADDRESSES)
def meeting(request: pytest.FixtureRequest) -> Iterator[Meeting]:
    address = {"unix": unix_path(), "tls": addresses.Tls("127.0.0.1", 0)}.get(
        request.param, ("127.0.0.1", 0)
    )
    with closing(Meeting(address)) as made:
        yield made


# -- what it is for -------------------------------------------------------------------


def test_frames_arrive_whole_in_order_and_both_ways(meeting: Meeting) -> None:
    here, there = meeting.meet()
    assert (here.hello, there.hello) == (b"node", b"node")
    there.send(b"one ", b"frame")
    there.send()
    there.send(b"x" * 3_000_000, b"y" * 3_000_000)
    here.send(b"answer")
    meeting.until(lambda: len(meeting.here.frames) == 3 and meeting.there.frames)
    assert meeting.here.frames[:2] == [b"one frame", b""]
    assert meeting.here.frames[2] == b"x" * 3_000_000 + b"y" * 3_000_000
    assert meeting.there.frames == [b"answer"]
    assert there.unsent == 0


def test_the_end_of_a_connection_is_told_to_the_other_side_only(meeting: Meeting) -> None:
    _, there = meeting.meet()
    there.close()
    meeting.until(lambda: meeting.here.ends)
    assert len(meeting.here.ends) == 1 and meeting.there.ends == []


def test_what_is_sent_before_finish_arrives(meeting: Meeting) -> None:
    here, there = meeting.meet()
    there.send(b"never read")
    here.send(b"x" * 1_000_000)
    here.send(b"the reason")
    here.finish()
    meeting.until(lambda: meeting.there.ends)
    assert meeting.there.frames[-1] == b"the reason"
    meeting.until(lambda: here.closed)


def test_a_client_that_waits_gets_the_same_frames(meeting: Meeting) -> None:
    def talk() -> bytes:
        with dial_blocking(meeting.address, KEY, b"client") as wire:
            wire.send(b"a" * 100_000, b"b")
            return bytes(wire.recv(DEADLINE))

    meeting.here.on_frame = lambda peer, frame: peer.send(b"%d" % len(frame))
    assert meeting.beside(talk) == b"100001"


def test_one_who_does_not_read_makes_us_keep_what_is_unsent_and_is_told_of_by_on_drained(
    meeting: Meeting,
) -> None:
    here, there = meeting.meet()
    drained: list[int] = []
    here.on_drained = lambda: drained.append(here.unsent)
    there.pause()
    here.send(b"x" * 20_000_000)
    meeting.until(lambda: here.unsent < 20_000_000)
    assert here.unsent > 0 and not drained
    there.resume()
    meeting.until(lambda: meeting.there.frames)
    meeting.until(lambda: drained)
    assert drained == [0]


def test_on_drained_is_called_too_where_the_other_end_takes_all_at_once(meeting: Meeting) -> None:
    # Who stopped its own source when much waited has to hear of it.
    here, _ = meeting.meet()
    drained: list[int] = []
    here.on_drained = lambda: drained.append(here.unsent)
    here.send(b"all at once")
    meeting.until(lambda: drained)
    assert drained == [0]


def test_what_goes_first_overtakes_the_frames_that_wait(meeting: Meeting) -> None:
    here, there = meeting.meet()
    there.pause()
    frames = [bytes([number]) * 250_000 for number in range(200)]
    for frame in frames:
        here.send(frame[:1], frame[1:])
    meeting.until(lambda: here.unsent < sum(map(len, frames)))
    here.send_first(b"beat")
    here.send_first(b"beat again")
    there.resume()
    meeting.until(lambda: len(meeting.there.frames) == 202)
    came = meeting.there.frames
    first = came.index(b"beat")
    assert first < 150 and came[first + 1] == b"beat again"
    assert [*came[:first], *came[first + 2 :]] == frames


def test_what_came_before_a_pause_waits_and_comes_before_the_end(meeting: Meeting) -> None:
    here, there = meeting.meet()
    meeting.there.on_frame = lambda peer, frame: frame.endswith(b"wait") and peer.pause()
    for frame in (b"wait", b"two", b"and wait", b"four"):
        here.send(frame)  # all in one piece
    meeting.until(lambda: meeting.there.frames)
    assert not meeting.reactor.run_until(lambda: len(meeting.there.frames) > 1, monotonic() + 0.1)
    here.finish()
    there.resume()
    meeting.until(lambda: len(meeting.there.frames) == 3)
    there.listen(lambda frame: meeting.there.hear(there, bytes(frame)), meeting.there.ends.append)
    meeting.until(lambda: meeting.there.ends)
    assert meeting.there.frames == [b"wait", b"two", b"and wait", b"four"]


# -- who is not let in ----------------------------------------------------------------


def test_a_wrong_key_is_told_to_both_sides_and_is_not_worth_another_try(meeting: Meeting) -> None:
    meeting.dial(key=b"another key of sixteen bytes")
    meeting.until(lambda: meeting.there.failures)
    (failure,) = meeting.there.failures
    assert "authkey" in str(failure) and not failure.retry and failure.exit_status == 2
    assert "does not have the authkey" in meeting.here.notices[0]
    assert meeting.here.peers == []


@pytest.mark.parametrize("key", [b"", b"fifteen bytes.."])
def test_a_short_key_is_refused_before_anything_is_done(key: bytes) -> None:
    reactor = Reactor()
    with pytest.raises(UsageError, match="needs at least 16"):
        listen(("127.0.0.1", 0), key, reactor, print)
    with pytest.raises(UsageError, match="needs at least 16"):
        dial(("127.0.0.1", 1), key, reactor, b"node", print, print)
    with pytest.raises(UsageError, match="needs at least 16"):
        dial_blocking(("127.0.0.1", 1), key, b"client")
    reactor.close()


def test_nobody_there_is_worth_another_try() -> None:
    with pytest.raises(DialError, match="cannot be reached") as caught:
        dial_blocking(unix_path(), KEY, b"client", timeout=5)
    assert caught.value.retry and caught.value.exit_status == 3


def test_a_listener_that_says_nothing_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = monotonic()
        with pytest.raises(DialError, match="does not answer") as caught:
            dial_blocking(silent.getsockname(), KEY, b"client", timeout=0.3)
    assert caught.value.retry
    assert monotonic() - began < 5


@contextmanager
def silence() -> Iterator[tuple[str, int]]:
    """An address from which nothing comes back, as from behind a firewall: its queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as kept:
        for _ in range(3):
            client = kept.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        yield full.getsockname()


def test_of_the_addresses_of_a_name_those_are_tried_that_come_after_a_silent_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with closing(Meeting(("127.0.0.1", 0))) as meeting, silence() as silent:
        found = [(socket.AF_INET, target) for target in (silent, meeting.address)]
        monkeypatch.setattr("taskrun.transport.dialling._targets", lambda *_: found)
        meeting.dial(timeout=1.0)
        meeting.until(lambda: meeting.there.peers or meeting.there.failures)
        assert meeting.there.failures == []


def test_the_folder_of_a_unix_socket_must_be_private(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    with pytest.raises(UsageError, match="open to others"):
        listen(str(shared / "socket"), KEY, Reactor(), print)


def test_a_unix_socket_is_its_owners_alone() -> None:
    path = unix_path()
    with closing(Meeting(path)):
        assert os.stat(path).st_mode & 0o777 == 0o600
    assert not os.path.exists(path)


def test_a_wire_is_not_used_in_a_forked_child(meeting: Meeting) -> None:
    wire: Wire = meeting.beside(lambda: dial_blocking(meeting.address, KEY, b"client"))
    wire._pid += 1
    with pytest.raises(Exception, match="belongs to the parent"):
        wire.send(b"x")
    wire.close()


def test_a_listener_is_not_closed_twice_nor_its_path_taken_by_another() -> None:
    path = unix_path()
    with closing(Meeting(path)), pytest.raises(UsageError, match="listens there already"):
        Meeting(path)
    assert addresses.shown(path) == f"unix:{path}"
