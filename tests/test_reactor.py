"""The event loop: order, errors, threads, re-entry."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from interrupting import Broken, at_each_step, interrupted_at

from taskrun.reactor import Reactor


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor()
    yield made
    made.close()


def soon() -> float:
    return time.monotonic() + 10


def test_a_reader_is_called_while_there_is_something_to_read(reactor: Reactor) -> None:
    ours, theirs = socket.socketpair()
    got: list[bytes] = []
    reactor.add_reader(ours.fileno(), lambda: got.append(ours.recv(1)))
    theirs.send(b"ab")
    assert reactor.run_until(lambda: got == [b"a", b"b"], soon())
    reactor.remove_reader(ours.fileno())
    theirs.send(b"c")
    reactor.run_once(0)
    assert got == [b"a", b"b"]
    ours.close()
    theirs.close()


def test_reading_and_writing_are_asked_for_independently(reactor: Reactor) -> None:
    ours, theirs = socket.socketpair()
    seen: list[str] = []
    fd = ours.fileno()
    reactor.add_reader(fd, lambda: seen.append("r"))
    reactor.add_writer(fd, lambda: seen.append("w"))
    reactor.run_once(0)
    reactor.remove_writer(fd)
    theirs.send(b"x")
    reactor.run_once(0)
    reactor.remove_reader(fd)
    reactor.run_once(0)
    assert seen == ["w", "r"]
    ours.close()
    theirs.close()


def test_what_is_removed_during_a_turn_is_not_called_in_it(reactor: Reactor) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []

    def remove_the_other(number: int) -> None:
        called.append(number)
        reactor.remove_reader(pairs[1 - number][0].fileno())

    for number, (ours, theirs) in enumerate(pairs):
        theirs.send(b"x")
        reactor.add_reader(ours.fileno(), lambda n=number: remove_the_other(n))
    reactor.run_once(0)
    assert len(called) == 1
    for pair in pairs:
        for end in pair:
            end.close()


def test_timers_fire_in_order_and_cancelled_ones_do_not(reactor: Reactor) -> None:
    now = time.monotonic()
    fired: list[str] = []
    reactor.call_at(now + 0.02, lambda: fired.append("late"))
    reactor.call_at(now + 0.01, lambda: fired.append("early"))
    reactor.call_at(now + 0.015, lambda: fired.append("never")).cancel()
    assert reactor.run_until(lambda: "late" in fired, soon())
    assert fired == ["early", "late"]


def test_nothing_is_due_when_only_cancelled_timers_are_left(reactor: Reactor) -> None:
    reactor.call_at(time.monotonic() + 1, lambda: None).cancel()
    assert reactor.patience() is None


@pytest.mark.parametrize("seconds", [1e7, 1e300])
def test_what_is_due_in_a_year_does_not_keep_the_loop_from_waiting(
    reactor: Reactor, seconds: float
) -> None:
    reactor.call_at(time.monotonic() + seconds, lambda: None)
    posting = threading.Timer(0.05, lambda: reactor.post(lambda: came.append(1)))
    came: list[int] = []
    posting.start()
    assert reactor.run_until(lambda: bool(came), time.monotonic() + seconds)
    posting.join(10)


def test_a_callback_that_asks_for_another_does_not_starve_the_rest(reactor: Reactor) -> None:
    turns = 0

    def again() -> None:
        nonlocal turns
        turns += 1
        reactor.call_soon(again)

    reactor.call_soon(again)
    reactor.run_once(0)
    assert turns == 1


def test_another_thread_wakes_the_loop(reactor: Reactor) -> None:
    came: list[int] = []
    thread = threading.Thread(target=lambda: reactor.post(lambda: came.append(1)))
    reactor.call_soon(thread.start)
    assert reactor.run_until(lambda: bool(came), soon())
    thread.join()


def test_no_post_is_lost_or_reordered_however_many_threads_post(reactor: Reactor) -> None:
    came: list[tuple[int, int]] = []

    def post(thread: int) -> None:
        for number in range(1000):
            reactor.post(lambda n=number: came.append((thread, n)))

    threads = [threading.Thread(target=post, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    assert reactor.run_until(lambda: len(came) == 4000, soon())
    for thread in threads:
        thread.join()
    for n in range(4):
        assert [number for thread, number in came if thread == n] == list(range(1000))


def test_a_signal_wakes_the_loop(reactor: Reactor) -> None:
    noted: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: noted.append(number))
    previous = signal.set_wakeup_fd(reactor.wakeup_fd)
    try:
        reactor.call_soon(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert reactor.run_until(lambda: bool(noted), soon())
    finally:
        signal.set_wakeup_fd(previous)
        signal.signal(signal.SIGUSR1, before)


def test_an_error_in_a_callback_leaves_the_loop_and_loses_nothing(reactor: Reactor) -> None:
    came: list[int] = []
    reactor.call_soon(lambda: 1 / 0)
    reactor.call_soon(lambda: came.append(1))
    with pytest.raises(ZeroDivisionError):
        reactor.run_once(0)
    reactor.run_once(0)
    assert came == [1]


def test_a_callback_may_run_the_loop_itself(reactor: Reactor) -> None:
    came: list[str] = []

    def outer() -> None:
        reactor.call_soon(lambda: came.append("inner"))
        assert reactor.run_until(lambda: came == ["waiting", "inner"], soon())
        came.append("outer")

    reactor.call_soon(outer)
    reactor.call_soon(lambda: came.append("waiting"))
    reactor.run_once(0)
    assert came == ["waiting", "inner", "outer"]


def test_running_until_something_gives_up_at_the_deadline(reactor: Reactor) -> None:
    start = time.monotonic()
    assert not reactor.run_until(lambda: False, start + 0.02)
    assert 0.02 <= time.monotonic() - start < 5


def test_no_post_silences_those_that_follow_whenever_it_comes(reactor: Reactor) -> None:
    came: list[int] = []

    def post() -> None:
        reactor.post(lambda: came.append(1))

    def turn() -> None:
        post()
        while came or select.select([reactor], [], [], 0)[0]:
            came.clear()
            reactor.run_once(0)

    def interrupt() -> None:
        thread = threading.Thread(target=post)
        thread.start()
        thread.join()

    def turn_and_look() -> None:
        turn()
        post()  # the loop may be asleep
        assert select.select([reactor], [], [], 0)[0]

    assert at_each_step(turn_and_look, interrupt) > 20


def test_a_post_that_a_signal_handler_breaks_off_silences_none_that_follow(
    reactor: Reactor,
) -> None:
    def break_off() -> None:
        raise Broken

    steps = 0
    while interrupted_at(steps, partial(reactor.post, list), break_off):
        steps += 1
        for _ in range(3):
            reactor.run_once(0)
        reactor.post(list)
        assert select.select([reactor], [], [], 0)[0]
        reactor.run_once(0)
    assert steps > 3


@pytest.mark.parametrize("who", ["a signal handler", "a thread"])
def test_a_post_in_the_middle_of_another_wakes_the_loop_at_once(reactor: Reactor, who: str) -> None:
    # A signal handler may post, or have a thread post, and wait for what comes of it: the outer
    # one cannot go on then.
    def post_and_look() -> None:
        thread = threading.Thread(target=reactor.post, args=(list,))
        if who == "a thread":
            thread.start()
            thread.join()
        else:
            thread.run()
        assert select.select([reactor], [], [], 0)[0]

    steps = 0
    while interrupted_at(steps, partial(reactor.post, list), post_and_look):
        steps += 1
        for _ in range(3):
            reactor.run_once(0)
    assert steps > 3


def test_who_is_expected_soon_is_looked_for_before_the_loop_sleeps_but_not_for_ever_in_vain(
    reactor: Reactor,
) -> None:
    ours, theirs = socket.socketpair()
    heard: list[bytes] = []
    reactor.add_reader(ours.fileno(), lambda: heard.append(ours.recv(1)))
    poller, asked = reactor._poller, list[float]()

    class Silent:
        """Nobody speaks while the loop looks; the system speaks up once it sleeps."""

        def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
            asked.append(timeout)
            if timeout:
                theirs.send(b"x")
            return poller.poll(0, most)

    looked = 0
    try:
        reactor._poller = Silent()
        for _ in range(1000):
            asked.clear()
            reactor.expect_soon()
            reactor.run_once(10)
            assert asked[-1] == pytest.approx(10) and not any(asked[:-1])
            looked += len(asked) > 1
    finally:
        reactor._poller = poller
    assert heard == [b"x"] * 1000
    assert 10 < looked < 30, "it goes on looking, but ever more seldom"
    theirs.send(b"y")
    while heard[-1] != b"y":  # within the expectations that are passed over, the loop just sleeps
        reactor.expect_soon()
        reactor.run_once(10)
    ours.close()
    theirs.close()
