"""Connections that prove the authkey: over Unix sockets, loopback and TLS."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from taskrun import addresses
from taskrun.errors import DialError, UsageError
from taskrun.reactor import Reactor
from taskrun.transport import Listener, Peer, Wire, dial, dial_blocking, listen

KEY = os.urandom(32).hex().encode()
DEADLINE = 20.0  # seconds; nothing here takes one


class Side:
    """One end of connections on a reactor, and all that happened there."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.frames: list[bytes] = []
        self.ends: list[str] = []
        self.failures: list[DialError] = []
        self.notices: list[str] = []
        self.on_frame: Callable[[Peer, bytes], object] = lambda peer, frame: None

    def take(self, peer: Peer) -> None:
        self.peers.append(peer)
        peer.listen(lambda frame: self.hear(peer, bytes(frame)), self.ends.append)

    def hear(self, peer: Peer, frame: bytes) -> None:
        self.frames.append(frame)
        self.on_frame(peer, frame)


class Meeting:
    """A listener and those who dial it, on one reactor."""

    def __init__(self, address: Any, **options: Any) -> None:
        self.reactor = Reactor()
        self.here = Side()
        self.there = Side()
        self.listener: Listener = listen(
            address, KEY, self.reactor, self.here.take, notice=self.here.notices.append, **options
        )
        self.address = self.listener.address

    def dial(self, key: bytes = KEY, role: bytes = b"node", **options: Any) -> None:
        dial(self.address, key, self.reactor, role, self.there.take, self.there.failures.append,
             **options)  # fmt: skip

    def until(self, predicate: Callable[[], object]) -> None:
        done = self.reactor.run_until(lambda: bool(predicate()), monotonic() + DEADLINE)
        assert done, (vars(self.here), vars(self.there))

    def meet(self) -> tuple[Peer, Peer]:
        """A connection: (the listening side's Peer, the dialling side's)."""
        before = len(self.here.peers), len(self.there.peers)
        self.dial()
        self.until(lambda: len(self.here.peers) > before[0] and len(self.there.peers) > before[1])
        return self.here.peers[-1], self.there.peers[-1]

    def close(self) -> None:
        for peer in self.here.peers + self.there.peers:
            peer.close()
        self.listener.close()
        self.reactor.close()

    def beside(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns or raises, in a thread, while the reactor runs."""
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append((work(), None))
            except Exception as error:
                outcome.append((None, error))
            self.reactor.post(lambda: None)

        threading.Thread(target=run, daemon=True).start()
        self.until(lambda: outcome)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value


def unix_path() -> str:
    return os.path.join(tempfile.mkdtemp(prefix="transport-"), "socket")


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
