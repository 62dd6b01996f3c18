"""Nodes, and what servers and coordinators may do to them: these by hand, on the same reactor."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from transport_support import KEY, no_descriptors

from taskrun import transport
from taskrun.errors import DialError, UsageError
from taskrun.network import channels as ch
from taskrun.network.channels import Offer
from taskrun.network.conversation import JOIN, Conversation
from taskrun.network.joining import Hosting, Refused, Welcome, answer_frame
from taskrun.reactor import Reactor
from taskrun.signals import Signals
from taskrun.workers import host as module
from taskrun.workers import node as node_module
from taskrun.workers.host import Host
from taskrun.workers.jobs import Work
from taskrun.workers.node import ROLE, Node

pytestmark = pytest.mark.timeout(30)

TAKEN_IN = answer_frame(Hosting("lab", "a session", True))
DRAIN = b'{"drain": true}'

Answer = Callable[[Any], object]


def hang_up(peer: Any) -> None:
    peer.close()


def say_nothing(peer: Any) -> None:
    pass


def take_in(*frames: bytes) -> Answer:
    def answer(peer: Any) -> None:
        for frame in (TAKEN_IN, *frames):
            peer.send(frame)

    return answer


def no_part(run: str, offer: Offer) -> int:
    raise AssertionError(f"there is no run {run}")


def serve(
    *answers: Answer,
    part: Callable[[str, Offer], int] = no_part,
    reactors: list[Reactor] | None = None,
) -> tuple[int | None, list[float]]:
    """Be a server that answers the first connection of a node by the first of these, and so on;
    gives how the node ended, and when each connection came."""
    reactor = Reactor()
    if reactors is not None:
        reactors.append(reactor)
    came: list[float] = []
    joined: list[Host] = []

    def on_connection(peer: Any) -> None:
        answer = answers[len(came)]
        came.append(monotonic())
        first = [answer]
        peer.listen(lambda frame: first and first.pop()(peer), lambda reason: None)

    listener = transport.listen(("127.0.0.1", 0), KEY, reactor, on_connection)
    dial = partial(transport.dial, listener.address, KEY, reactor, ROLE)

    def on_peer(peer: Any) -> None:
        hosting = Hosting("lab", "a session", True)
        joined.append(
            Host(reactor, peer, hosting, Offer("lab", 1, {}), dial, part, lambda text: None)
        )

    dial(on_peer, pytest.fail)
    reactor.run_until(lambda: bool(joined), monotonic() + 10)
    try:
        return joined[0].run(), came
    finally:
        listener.close()
        reactor.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE", 0.5)
    monkeypatch.setattr(module, "AGAIN", 0.1)


def test_a_server_that_says_nothing_to_a_node_that_comes_back_is_dialled_again() -> None:
    status, came = serve(hang_up, say_nothing, take_in(DRAIN))
    assert status == 0 and len(came) == 3


def test_a_server_that_hangs_up_at_once_is_not_dialled_without_a_pause() -> None:
    status, came = serve(hang_up, hang_up, hang_up, take_in(DRAIN))
    assert status == 0
    assert min(later - earlier for earlier, later in pairwise(came)) > 0.09


def test_what_a_server_says_at_once_is_taken_by_the_node_that_goes_on_there() -> None:
    reactor = Reactor()
    first = [take_in(DRAIN)]  # and nothing to whoever comes again

    def on_connection(peer: Any) -> None:
        peer.listen(lambda frame: first and first.pop()(peer), lambda reason: None)

    listener = transport.listen(("127.0.0.1", 0), KEY, reactor, on_connection)
    dial = partial(transport.dial, listener.address, KEY, reactor, ROLE)
    offer = Offer("lab", 1, {})
    node = Node(reactor, offer, dial)
    give_up = reactor.call_at(monotonic() + 10, partial(pytest.fail, "it was not told to leave"))
    try:
        assert node.run() == 0 and node.server is not None
        host = Host(reactor, *node.server, offer, dial, no_part, lambda text: None)
        assert host.run() == 0
    finally:
        give_up.cancel()
        listener.close()
        reactor.close()


def test_a_supervisor_that_is_told_to_leave_as_it_is_started_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork = os.fork

    def fork_and_tell() -> int:
        if pid := fork():
            os.kill(pid, signal.SIGTERM)
        return pid

    monkeypatch.setattr(os, "fork", fork_and_tell)
    for _ in range(3):  # the first fork of a process takes longer: then it may come in time
        began = monotonic()
        status, came = serve(hang_up, take_in(b'{"take": ["r1"]}', DRAIN), part=be_told)
        assert status == 0 and len(came) == 2 and monotonic() - began < 4


def be_told(run: str, offer: Offer) -> int:
    """As a node, that has not been let in yet."""
    reactor, told = Reactor(), list[int]()
    with Signals(reactor, told.append):
        reactor.run_until(lambda: bool(told), monotonic() + 5)
    return 0 if told else 1


@pytest.mark.parametrize("rubbish", [b"rubbish", b"[]", b'{"take": 3}', b"\xff", b"[" * 100_000])
def test_a_server_that_says_what_no_server_says_is_dialled_again(rubbish: bytes) -> None:
    status, came = serve(take_in(rubbish), take_in(DRAIN))
    assert status == 0 and len(came) == 2


def test_what_answers_as_no_server_does_is_not_one_any_more() -> None:
    status, came = serve(hang_up, lambda peer: peer.send(b"rubbish"))
    assert status is None and len(came) == 2


@pytest.mark.parametrize(("channel", "data"), [(ch.JOB, b"junk"), (ch.START, b""), (99, b"")])
def test_a_coordinator_that_says_what_none_says_is_left_and_dialled_again(
    channel: int, data: bytes
) -> None:
    reactor = Reactor()
    came: list[Any] = []

    def on_connection(peer: Any) -> None:
        came.append(peer)
        peer.listen(partial(answer, peer, [len(came)]), lambda reason: None)

    def answer(peer: Any, first: list[int], frame: memoryview) -> None:
        if first and first.pop() == 1:
            peer.send(answer_frame(Welcome("a session", False, 0, 9.0, "lab")))
            talk = Conversation(lambda key, channel, data: None)
            talk.attach(peer, 0)
            talk.send(ch.NODE, channel, data)
        elif frame[0] == JOIN:
            peer.send(answer_frame(Refused("it is enough", False)))

    listener = transport.listen(("127.0.0.1", 0), KEY, reactor, on_connection)
    dial = partial(transport.dial, listener.address, KEY, reactor, ROLE)
    said: list[str] = []
    node = Node(reactor, Offer("lab", 1, {}), dial, say=said.append)
    try:
        with pytest.raises(UsageError, match="it is enough"):
            node.run()
    finally:
        listener.close()
        reactor.close()
    assert len(came) == 2 and any("said what cannot be" in text for text in said)


def test_a_node_without_descriptors_waits_for_some_before_it_lets_more_workers_in() -> None:
    reactor, said = Reactor(), list[int]()
    talk: Any = SimpleNamespace(send=lambda key, channel, data: said.append(channel), waiting=0)
    work = Work(reactor, talk, "lab", pytest.fail)
    path = work._listen_for_state()
    with ExitStack() as stack:
        workers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(5)]
        for worker in workers:
            worker.connect(path)
        turns = 0
        with no_descriptors():
            until = monotonic() + 0.5
            while monotonic() < until:
                reactor.run_once(until - monotonic())
                turns += 1
        assert turns < 50
        assert reactor.run_until(lambda: said == [ch.OPEN] * 5, monotonic() + 10)
    work.end(0.0)
    reactor.close()
    assert not os.path.exists(path)


class Stuck:
    """A connection that is under way for ever."""

    def __init__(self) -> None:
        self.closed = False

    def listen(self, on_frame: Any, on_end: Any) -> None:
        pass

    def send(self, *parts: bytes) -> None:
        pass

    def close(self) -> None:
        self.closed = True


OnPeer = Callable[[Any], object]
OnFailure = Callable[[DialError], object]


def leave_alone(
    reactor: Reactor,
    dial_again: Callable[[OnPeer, OnFailure], Any],
    say: Callable[[str], object] = lambda text: None,
) -> None:
    """Be a coordinator that lets a node in, and then is gone: from then on the node dials by
    ``dial_again``, until that says that it is enough."""

    def on_connection(peer: Any) -> None:
        peer.listen(partial(let_in, peer), lambda reason: None)

    def let_in(peer: Any, frame: memoryview) -> None:
        peer.send(answer_frame(Welcome("a session", False, 0, 1.0, "lab")))
        peer.finish()

    def dial(on_peer: OnPeer, on_failure: OnFailure) -> Any:
        return first.pop()(on_peer, on_failure) if first else dial_again(on_peer, on_failure)

    listener = transport.listen(("127.0.0.1", 0), KEY, reactor, on_connection)
    first = [partial(transport.dial, listener.address, KEY, reactor, ROLE)]
    try:
        with pytest.raises(UsageError, match="it is enough"):
            Node(reactor, Offer("lab", 1, {}), dial, say=say).run()
    finally:
        listener.close()
        reactor.close()


ENOUGH = DialError("it is enough", retry=False)


@pytest.mark.parametrize("reached", [False, True])
def test_a_node_whose_lease_is_over_gives_up_what_it_had_begun_and_dials_once(
    reached: bool,
) -> None:
    reactor = Reactor()
    stuck = Stuck()
    dialled: list[bool] = []

    def dial_again(on_peer: OnPeer, on_failure: OnFailure) -> Any:
        dialled.append(stuck.closed)
        if len(dialled) > 1:
            reactor.call_soon(lambda: on_failure(ENOUGH))
        elif reached:
            reactor.call_soon(lambda: on_peer(stuck))
        else:
            return stuck
        return Stuck()

    leave_alone(reactor, dial_again)
    assert dialled == [False, True]


def test_a_node_that_waits_to_dial_again_as_its_lease_ends_waits_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node_module, "FIRST_WAIT", 1.5)
    monkeypatch.setattr(node_module, "LONGEST_WAIT", 1.5)
    reactor = Reactor()
    over: list[float] = []
    dialled: list[float] = []

    def dial_again(on_peer: OnPeer, on_failure: OnFailure) -> Any:
        dialled.append(monotonic())
        reactor.call_soon(lambda: on_failure(ENOUGH))
        return Stuck()

    def say(text: str) -> None:
        if "no coordinator for" in text:
            over.append(monotonic())

    leave_alone(reactor, dial_again, say)
    assert len(over) == 1 and dialled[0] - over[0] > 1.1


def test_nothing_begins_for_another_server_before_all_has_ended_that_was_for_the_last_one(
    tmp_path: Path,
) -> None:
    began, ended, early = (tmp_path / name for name in ("began", "ended", "early"))

    def part(run: str, offer: Offer) -> int:
        if run == "r2":
            (early if not ended.exists() else tmp_path / "late").touch()
            return 0
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        began.touch()
        while not (tmp_path / "end").exists():
            time.sleep(0.01)
        ended.touch()
        return 0

    def first(peer: Any) -> None:
        peer.send(b'{"take": ["r1"], "version": 1}')
        wait_for(began, lambda: peer.close())

    def second(peer: Any) -> None:
        peer.send(answer_frame(Hosting("lab", "another session", True)))
        peer.send(b'{"take": ["r2"], "version": 1}')
        threading.Timer(0.3, (tmp_path / "end").touch).start()
        wait_for(tmp_path / "late", lambda: peer.send(DRAIN))

    def wait_for(file: Path, then: Callable[[], object]) -> None:
        reactor = current[0]
        if file.exists():
            then()
        else:
            reactor.call_at(monotonic() + 0.01, lambda: wait_for(file, then))

    current: list[Reactor] = []
    status, _ = serve(first, second, part=part, reactors=current)
    assert status == 0 and not early.exists()
