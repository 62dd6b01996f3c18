"""Frames on a Pipe, and the memory that outlives a worker."""

from __future__ import annotations

import itertools
import multiprocessing.connection
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from interrupting import at_each_step, broken_off_at

from taskrun import wire
from taskrun.errors import WireError
from taskrun.ledger import SIZE, Intake, Ledger, dumps, shared_file
from taskrun.reactor import Reactor
from taskrun.wire import Decoder, FrameReader, FrameWriter, header, send_frame
from taskrun.workers.outbox import Outbox

SIZES = (0, 1, 3, 100, 16 * 1024, 16 * 1024 + 1, 300_000, 1 << 20)


def framed(*payloads: bytes) -> bytes:
    return b"".join(header(len(payload)) + payload for payload in payloads)


# -- frames ---------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 5, 11, 4096])
def test_frames_come_out_whole_however_the_bytes_are_cut(step: int) -> None:
    payloads = [b"", b"a", b"bc" * 10, b"x" * 5000]
    data = framed(*payloads)
    decoder = Decoder()
    frames: list[bytes] = []
    for start in range(0, len(data), step):
        frames += [bytes(frame) for frame in decoder.feed(data[start : start + step])]
    assert frames == payloads


def test_a_long_header_is_understood_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_LARGEST_SHORT", 10)
    data = framed(b"y" * 50, b"z" * 5)
    for cut in range(1, len(data)):
        decoder = Decoder()
        frames = decoder.feed(data[:cut]) + decoder.feed(data[cut:])
        assert [bytes(frame) for frame in frames] == [b"y" * 50, b"z" * 5]


@pytest.mark.parametrize(
    "start",
    [
        struct.pack("!i", -2),
        struct.pack("!i", -2147483648),
        struct.pack("!iQ", -1, (64 << 30) + 1),
        struct.pack("!iQ", -1, (1 << 64) - 1),
    ],
)
def test_an_absurd_length_is_refused_before_anything_is_kept_for_it(start: bytes) -> None:
    with pytest.raises(WireError, match="frame cannot have"):
        Decoder().feed(start)


def test_the_pieces_of_a_large_frame_are_not_copied_again_and_again() -> None:
    piece = b"\0" * (64 * 1024)
    decoder = Decoder()
    decoder.feed(header(64 << 20))
    start = time.perf_counter()
    frames = [frame for _ in range(1024) for frame in decoder.feed(piece)]
    assert [len(frame) for frame in frames] == [64 << 20]
    # Copied once that is 64 MB, a few hundredths of a second; with every piece, 32 GB.
    assert time.perf_counter() - start < 2


def test_the_standard_library_reads_and_writes_the_same_frames() -> None:
    ours, theirs = multiprocessing.Pipe()
    for size in SIZES:
        payload = os.urandom(size)
        writer = threading.Thread(target=send_frame, args=(ours.fileno(), payload))
        writer.start()
        assert theirs.recv_bytes() == payload
        writer.join()
        writer = threading.Thread(target=theirs.send_bytes, args=(payload,))
        writer.start()
        decoder, frames = Decoder(), []
        while not frames:
            frames = decoder.feed(os.read(ours.fileno(), 65536))
        assert bytes(frames[0]) == payload
        writer.join()
    ours.close()
    theirs.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def test_what_does_not_fit_waits_and_arrives_in_order(pair: Any) -> None:
    ours, theirs = pair
    reactor = Reactor()
    writer = FrameWriter(ours.fileno(), reactor)
    payloads = [os.urandom(size) for size in SIZES] * 2
    for payload in payloads:
        writer.send(payload)
    assert writer.pending
    got: list[bytes] = []
    decoder = Decoder()

    def read() -> None:
        got.extend(bytes(frame) for frame in decoder.feed(theirs.recv(100_000)))

    reactor.add_reader(theirs.fileno(), read)
    assert reactor.run_until(lambda: len(got) == len(payloads), time.monotonic() + 20)
    assert got == payloads
    assert not writer.pending
    reactor.close()


def test_writing_to_one_who_is_gone_breaks_the_writer_and_nothing_else(pair: Any) -> None:
    ours, theirs = pair
    reactor = Reactor()
    writer = FrameWriter(ours.fileno(), reactor)
    theirs.close()
    writer.send(b"x" * 100)
    writer.send(b"y" * 100_000)
    assert writer.broken and not writer.pending
    reactor.close()


def test_a_reader_says_when_nothing_is_left_and_when_the_end_has_come(pair: Any) -> None:
    ours, theirs = pair
    reader = FrameReader(ours.fileno())
    theirs.sendall(framed(b"one", b"two")[:-1])
    assert [bytes(frame) for frame in reader.read()] == [b"one"]
    assert not reader.drained
    assert reader.read() == [] and reader.drained and not reader.at_end
    theirs.close()
    assert reader.read() == [] and reader.at_end


# -- the ledger -----------------------------------------------------------------------


@pytest.fixture
def both() -> Iterator[tuple[Ledger, Ledger]]:
    """A worker's and a coordinator's view of the same memory."""
    fd = shared_file()
    worker, coordinator = Ledger(fd), Ledger(fd)
    os.close(fd)
    yield worker, coordinator
    worker.close()
    coordinator.close()


def record(*parts: Any) -> bytes:
    return dumps(parts)


def test_the_coordinator_sees_what_is_being_executed(both: Any) -> None:
    worker, coordinator = both
    assert coordinator.executing is None
    worker.begin(0, 1)
    assert coordinator.executing == (0, 1)
    worker.begin((1 << 35) - 2, (1 << 16) - 1)
    assert coordinator.executing == ((1 << 35) - 2, (1 << 16) - 1)
    worker.end()
    assert coordinator.executing is None


def test_no_two_moments_of_a_worker_are_the_same(both: Any) -> None:
    worker, coordinator = both
    moments = [coordinator.moment]
    for step in (
        lambda: worker.begin(1, 1),
        lambda: worker.begin(2, 1),  # nested in it
        lambda: worker.begin(1, 1, 1),  # which goes on
        lambda: worker.end(),
        lambda: worker.begin(1, 2),
        lambda: worker.end(),
    ):
        step()
        moments.append(coordinator.moment)
    assert len(set(moments)) == len(moments)


def test_records_are_taken_from_the_ledger_once(both: Any) -> None:
    worker, coordinator = both
    intake = Intake()
    worker.append(record("a", 1))
    worker.append(record("b", 2))
    assert intake.look(coordinator) == [("a", 1), ("b", 2)]
    worker.append(record("c", 3))
    assert intake.look(coordinator) == [("c", 3)]
    assert intake.look(coordinator) == []


def test_a_frame_that_was_sent_is_not_taken_from_the_ledger_again(both: Any) -> None:
    worker, coordinator = both
    intake = Intake()
    worker.append(record("a"))
    # Killed between sending and clearing.
    assert intake.frame(memoryview(bytes(worker.frame()))) == [("a",)]
    assert intake.look(coordinator) == []


def test_a_frame_brings_only_what_was_not_looked_up_before(both: Any) -> None:
    worker, coordinator = both
    intake = Intake()
    worker.append(record("a"))
    assert intake.look(coordinator) == [("a",)]
    worker.append(record("b"))
    frame = bytes(worker.frame())
    worker.clear()
    worker.append(record("c"))
    # The frame is still on its way: what comes after it has to wait.
    assert intake.look(coordinator) == []
    assert intake.frame(memoryview(frame)) == [("b",)]
    assert intake.look(coordinator) == [("c",)]


@pytest.mark.parametrize("killed_after", range(7))
def test_a_death_at_any_step_loses_nothing_and_brings_nothing_twice(
    both: Any, killed_after: int
) -> None:
    worker, coordinator = both
    intake, sent = Intake(), []
    steps = [
        lambda: worker.begin(1, 1),
        lambda: worker.append(record("ended", 1)),
        lambda: worker.end(),
        lambda: sent.append(bytes(worker.frame())),
        lambda: worker.clear(),
        lambda: worker.begin(2, 1),
        lambda: worker.append(record("ended", 2)),
    ]
    for step in steps[:killed_after]:
        step()
    records = [one for frame in sent for one in intake.frame(memoryview(frame))]
    records += intake.look(coordinator)
    expected = [("ended", 1)] * (killed_after >= 2) + [("ended", 2)] * (killed_after >= 7)
    assert records == expected
    in_it = {1: 1, 2: 1, 6: 2, 7: 2}.get(killed_after)
    assert coordinator.executing == (None if in_it is None else (in_it, 1))


def test_a_record_that_does_not_fit_is_refused_and_can_be_sent_alone(both: Any) -> None:
    worker, coordinator = both
    intake = Intake()
    assert not worker.append(b"x" * (SIZE + 1))
    assert intake.look(coordinator) == []
    large = ("large", b"x" * SIZE)
    assert intake.frame(memoryview(worker.frame_of(large))) == [("large", b"x" * SIZE)]
    worker.clear()
    worker.append(record("next"))
    assert intake.look(coordinator) == [("next",)]


def test_a_task_may_say_something_in_the_middle_of_saying_something(both: Any) -> None:
    # In a signal handler, or in a finalizer that the collector runs.
    worker, _ = both
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.settimeout(20)
        outbox = Outbox(worker, writer.fileno())
        numbers = itertools.count()
        large = b"x" * (SIZE + 1)

        def say() -> None:
            outbox.tell(("told", next(numbers)))
            outbox.tell_item(1, 1, next(numbers), 0.0, 0.0)
            outbox.tell_item(1, 1, next(numbers), 0.0, 0.0)
            outbox.flush()

        def say_much() -> None:
            outbox.tell(("large", next(numbers), large))

        intake, decoder, found = Intake(), Decoder(), set()

        def receive() -> None:
            while -1 not in found:
                for frame in decoder.feed(reader.recv(1 << 20)):
                    for said in intake.frame(memoryview(frame)):
                        found.add(said[1] if type(said) is tuple and len(said) < 4 else said)

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        assert at_each_step(say, say) > 20
        assert at_each_step(say_much, say) > 10
        outbox.tell(("told", -1))
        outbox.flush()
        thread.join(20)
        assert found >= set(range(next(numbers)))


def test_what_a_signal_handler_raises_amid_a_frame_is_raised_when_that_was_sent(
    both: Any,
) -> None:
    worker, _ = both
    reader, writer = socket.socketpair()
    interrupted = threading.Event()

    def handler(number: int, frame: Any) -> None:
        interrupted.set()
        raise TimeoutError

    def receive() -> None:
        assert select.select([reader], [], [], 20)[0]  # the frame has begun, and is stuck
        os.kill(os.getpid(), signal.SIGALRM)
        assert interrupted.wait(20)
        while len(found) < 2:
            for frame in decoder.feed(reader.recv(1 << 20)):
                found.extend(intake.frame(memoryview(frame)))

    intake, decoder, found = Intake(), Decoder(), []
    before = signal.signal(signal.SIGALRM, handler)
    with reader, writer:
        reader.settimeout(20)
        outbox = Outbox(worker, writer.fileno())
        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        try:
            with pytest.raises(TimeoutError):
                outbox.tell(("large", b"x" * 10_000_000))
        finally:
            signal.signal(signal.SIGALRM, before)
        outbox.tell(("next",))
        outbox.flush()
        thread.join(20)
    assert found == [("large", b"x" * 10_000_000), ("next",)]


def test_a_record_may_be_broken_off_at_any_step(both: Any) -> None:
    worker, _ = both
    reader, writer = socket.socketpair()
    intake, decoder = Intake(), Decoder()
    with reader, writer:
        reader.settimeout(20)
        outbox = Outbox(worker, writer.fileno())

        def say() -> None:
            outbox.tell(("broken off", steps))
            outbox.flush()

        steps = 0
        while broken_off_at(steps, say):
            outbox.tell(("whole", steps))
            outbox.flush()
            found: list[Any] = []
            while ("whole", steps) not in found:
                for frame in decoder.feed(reader.recv(1 << 20)):
                    found += intake.frame(memoryview(frame))
            steps += 1
        assert steps > 20


@pytest.mark.parametrize("garbage", [b"", b"1234567", b"\0" * 20, b"\0" * 8 + b"\xff" * 30])
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(WireError):
        Intake().frame(memoryview(garbage))
