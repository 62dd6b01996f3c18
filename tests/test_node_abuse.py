"""Whoever has the key and is no node, or one that lies: the coordinator goes on."""

from __future__ import annotations

import math
import pickle
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grid import KEY, LEASE, Grid, grid_in
from harness import Running, Runs, started
from stubs import Stub, dialler
from transport_support import fill_queue, unix_path

from taskrun import messages as m
from taskrun.addresses import parse
from taskrun.engines import nodes
from taskrun.model import Failure
from taskrun.network import channels as ch
from taskrun.roles import STEER
from taskrun.transport import dial_blocking
from taskrun.wire import header

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[Grid]:
    with grid_in(tmp_path) as made:
        yield made


class Mute(Stub):
    """Takes calls and says nothing of them."""

    def answer(self, worker: int, records: list[tuple[Any, ...]]) -> None:
        if records[0][0] == m.QUIT:
            self.end(worker, "exited with status 0")
        self.got = [*getattr(self, "got", ()), *records]


def stub(grid: Grid, kind: type[Stub] = Stub) -> Stub:
    """One that has joined."""
    before = grid.joined
    reactor = grid.shop.reactor
    made = kind(reactor, f"stub{before}", dialler(grid.address, KEY, reactor))
    grid.shop.until(lambda: grid.joined > before)
    return made


def goes_on(grid: Grid, *left: Stub) -> None:
    """Another node is served as ever, when those that are left have gone."""
    for one in left:
        one.talk.leave("enough")
    grid.shop.until(lambda: not grid.nodes.nodes)
    stub(grid)
    (worker,) = grid.shop.workers()
    assert grid.shop.do(worker, "same", 7) == 7


def mute_with_a_call(grid: Grid) -> tuple[Mute, int, Any]:
    """A node, its worker, and what that is executing."""
    made = stub(grid, Mute)
    assert isinstance(made, Mute)
    (worker,) = grid.shop.workers()
    call = grid.shop.start(worker, "same", 1)
    grid.shop.until(lambda: hasattr(made, "got"))
    return made, worker, call


def report(call: int, kind: Any, payload: Any, seconds: Any = 0.0) -> tuple[Any, ...]:
    return (m.ENDED, call, 1, kind, payload, None, time.time(), seconds, False)


# -- many at once ---------------------------------------------------------------------


def test_fifty_nodes_join_work_and_are_gone_at_once(grid: Grid) -> None:
    reactor = grid.shop.reactor
    made = [Stub(reactor, "stub", dialler(grid.address, KEY, reactor)) for _ in range(50)]
    grid.shop.until(lambda: grid.joined == 50)
    assert len({node.name for node in grid.nodes.nodes.values()}) == 50
    assert grid.shop.all(m.Capacity)[-1].slots == 50
    workers = grid.shop.workers(50)
    calls = [grid.shop.start(worker, "same", worker) for worker in workers for _ in range(2)]
    assert [grid.shop.value(call) for call in calls] == [w for w in workers for _ in range(2)]
    last = time.monotonic() + 2 * LEASE  # all are heard of for longer than a lease
    grid.shop.until(lambda: time.monotonic() > last)
    assert len(grid.nodes.nodes) == 50
    for one in made:
        one.peer.close()
        one.joined = False
    grid.shop.until(lambda: not grid.nodes.nodes)
    assert grid.shop.all(m.Capacity)[-1].slots == 0
    goes_on(grid)


# -- garbled --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_node_that_says_anything_ends_only_itself(grid: Grid, seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    bad, _, call = mute_with_a_call(grid)
    for _ in range(30):
        data = chance.randbytes(chance.randrange(60))
        if chance.random() < 0.5:
            data = pickle.dumps(chance.choice(JUNK))
        key = chance.choice([0, 2, 3, 4, ch.of_value(1), ch.of_state(0), 2**32 - 1])
        if chance.random() < 0.9:
            bad.talk.send(key, chance.randrange(256), data)
        else:
            bad.peer.send(data)
    bad.peer.finish()
    bad.joined = False
    grid.shop.until(lambda: not grid.nodes.nodes)
    assert call.id not in {key for e in grid.shop.all(m.Finished) for key, *_ in e.reports}
    goes_on(grid)


JUNK: list[Any] = [
    None, 0, [], {}, "", b"", [[]], [()], [{}], [1.5], [(m.ENDED,)], [(m.READY,)], ("x", "y", "z"),
    ("x", None, 5), ([], 0, (1, 2)), [("ended", [], 1, "value", None, None, 0.0, 0.0, True)],
]  # fmt: skip


@pytest.mark.parametrize(
    "end",
    [b"", b"junk", *map(pickle.dumps, (5, ("x", "y", "z"), ("x", "y", "z", True), (1, 2, 3, 4)))],
)
def test_a_garbled_end_of_a_worker_is_an_end(grid: Grid, end: bytes) -> None:
    bad, worker, _ = mute_with_a_call(grid)
    bad.talk.send(ch.of_worker(worker), ch.ENDED, end)
    assert "which was garbled" in grid.lost(worker).reason
    goes_on(grid)


def test_a_worker_that_a_machine_denies_does_not_end_a_run_that_has_others(grid: Grid) -> None:
    bad, worker, _ = mute_with_a_call(grid)
    (node,) = grid.nodes.nodes.values()
    grid.shop.engine.perform(m.StartWorkers(1))
    (denied,) = set(node.links) - {worker}
    bad.talk.send(ch.of_worker(denied), ch.ENDED, pickle.dumps(("not started: no", 0, None, True)))
    assert grid.lost(denied).reason == "not started: no"
    assert grid.shop.all(m.NoMoreWorkers) == [m.NoMoreWorkers("process", 1)]


FAILURE = Failure("error", "E", "said")


@pytest.mark.parametrize(
    "told",
    [
        ("value", None, math.nan), ("value", None, -1.0), ("value", None, "1"), ([], None),
        ("nothing", None), ("error", None), ("error", (1, 2)), ("retry", (FAILURE, 1)),
        ("retry", ("1", FAILURE)), ("retry", (math.nan, FAILURE)), ("retry", (10**400, FAILURE)),
        ("held", 5), ("skip", FAILURE),
    ],
)  # fmt: skip
def test_an_end_of_a_call_in_no_known_form_ends_its_worker(grid: Grid, told: Any) -> None:
    bad, worker, call = mute_with_a_call(grid)
    bad.say(worker, report(call.id, *told))
    grid.lost(worker)
    goes_on(grid, bad)


def test_what_a_node_says_of_calls_that_it_does_not_have_is_ignored(grid: Grid) -> None:
    _, honest_worker, call = mute_with_a_call(grid)
    liar = stub(grid)
    (worker,) = grid.shop.workers()
    liar.say(worker, report(10**9, "value", None), report(-1, "value", None))
    liar.talk.send(ch.of_worker(honest_worker), ch.ENDED, pickle.dumps(("lied", 0, None, False)))
    liar.talk.send(ch.of_worker(honest_worker), ch.CALLS, b"lied")
    assert grid.shop.do(worker, "same", 3) == 3
    assert not grid.shop.all(m.WorkerLost)
    assert call.id not in {key for e in grid.shop.all(m.Finished) for key, *_ in e.reports}


# -- too much, and too little ---------------------------------------------------------


@pytest.mark.parametrize("size", [2**20, 2**30, 2**40, -5])
def test_a_frame_that_is_too_long_ends_the_connection(grid: Grid, size: int) -> None:
    bad = stub(grid)
    head = header(size) if size > 0 else struct.pack("!i", size)
    bad.peer._socket.send(head + bytes(1000))
    grid.shop.until(lambda: any("is away (a frame cannot" in n for n in grid.shop.watcher.notices))
    goes_on(grid)


def test_a_node_that_never_reads_is_lost(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_MOST_UNREAD", 100_000)
    bad = stub(grid)

    def beat() -> bool:
        for _ in range(10_000):
            bad.talk.beat(0.0)
        return any("reads nothing" in e.reason for e in grid.shop.all(m.WorkerLost))

    (worker,) = grid.shop.workers()
    bad.peer.pause()
    grid.shop.until(beat)
    assert "reads nothing" in grid.lost(worker).reason
    goes_on(grid)


def test_a_node_that_does_not_end_a_garbled_worker_is_lost(grid: Grid) -> None:
    class Stubborn(Mute):
        def end(self, worker: int, how: str) -> None:
            self.refused = how

    bad = stub(grid, Stubborn)
    (worker,) = grid.shop.workers()
    grid.shop.start(worker, "same", 1)
    bad.talk.send(ch.of_worker(worker), ch.CALLS, b"garbled")
    assert "what it sent could not be read" in grid.lost(worker).reason
    assert "node stub0 is lost: it did not end w1" in grid.shop.watcher.notices
    goes_on(grid)


def test_a_connection_to_the_state_cannot_be_opened_twice(grid: Grid) -> None:
    ours, theirs = socket.socketpair()
    connect: Callable[[], socket.socket] = lambda: ours  # noqa: E731
    with theirs:
        grid.nodes.connect_to_state = connect  # type: ignore[method-assign]
        bad = stub(grid)
        for _ in range(2):
            bad.talk.send(ch.of_state(1), ch.OPEN, b"")
        grid.shop.until(lambda: not grid.nodes.nodes)
        goes_on(grid)


@pytest.mark.timeout(30)
def test_a_connection_to_the_state_waits_for_room_and_the_run_goes_on_meanwhile(
    grid: Grid, tmp_path: Path
) -> None:
    # The run's own thread is to let in those who wait: it must not be one of them.
    path = unix_path()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(0)
        others = fill_queue(path)
        grid.nodes._state = lambda: (path, b"")
        made = stub(grid)
        (worker,) = grid.shop.workers()
        for channel, data in ((ch.OPEN, b""), (ch.PASS, b"hel"), (ch.PASS, b"lo"), (ch.CLOSE, b"")):
            made.talk.send(ch.of_state(1), channel, data)
        assert grid.shop.do(worker, "same", 7) == 7
        for other in others:
            listening.accept()[0].close()
            other.close()
        grid.shop.until(lambda: select.select([listening], [], [], 0)[0])
        with listening.accept()[0] as accepted:
            grid.shop.until(lambda: len(accepted.recv(9, socket.MSG_PEEK)) == 5)
            assert accepted.recv(9) == b"hello"
            grid.shop.until(lambda: accepted.recv(9) == b"")


# -- who steers -----------------------------------------------------------------------

DEEP = b'{"do":' + b"[" * 100_000
REQUESTS = [
    b"", b"\xff", b"null", b"[]", b"5", b'"do"', b"{}", DEEP, b'{"do": []}', b'{"do": "explain"}',
    b'{"do": "slots", "slots": 1e999, "nodes": {}}', b'{"do": "slots", "slots": 1, "nodes": []}',
    b'{"do": "slots", "slots": 1, "nodes": {"a": 1e999}}', b'{"do": "tell", "call": "quick"}',
    *(b'{"do": "%s", "call": %s}' % (what, call) for what in (b"explain", b"cancel", b"stack")
      for call in (b"[]", b"{}", b"null", b"5", b'"\\ud800"', b'""', b"[1]", b"1e999")),
]  # fmt: skip


def test_requests_of_any_form_are_answered(tmp_path: Path, runs: Runs) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "tasks.py").write_text(
        "import time\nfrom taskrun import task\n@task\ndef slow(): time.sleep(60)\n"
    )
    run: Running = runs.start(
        "exec", "tasks.py", "-j", "1", "--listen", "127.0.0.1:0",
        "--authkey-file", str(tmp_path / "key"), cwd=tmp_path,
    )  # fmt: skip
    address = run.await_line("listening on", err=True).split()[-1]
    wire = dial_blocking(parse(address), KEY, STEER)
    for request in REQUESTS:
        wire.send(request)
        assert b'"error"' in bytes(wire.recv(10)), request
    wire.send(b'{"do": "status"}')
    assert b'"ok"' in bytes(wire.recv(10))
    wire.close()
