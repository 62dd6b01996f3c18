"""Nodes that join, work and leave: what is different from workers on this machine."""

from __future__ import annotations

import json
import os
import signal
import struct
import textwrap
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from grid import KEY, Grid, grid_in
from workshop import CHORES, INTERRUPTIBLE, alive, cancelled, interrupt, task_file

from taskrun import messages as m
from taskrun import transport
from taskrun.engines.remote import RemoteLink
from taskrun.network import channels as ch
from taskrun.network.channels import Offer
from taskrun.network.conversation import JOIN
from taskrun.network.joining import Hello, Refused, Welcome, hello_frame, read_answer

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[Grid]:
    with grid_in(tmp_path) as made:
        yield made


def test_calls_are_executed_on_a_node_and_their_values_come_back(grid: Grid) -> None:
    grid.node(2)
    assert grid.shop.all(m.Capacity)[-1].slots == 2
    first, second = grid.shop.workers(2)
    assert grid.shop.do(first, "add", 2, 3) == 5
    assert grid.shop.do(second, "pid") == grid.shop.pid(second)


def test_a_node_of_one_lane_executes_that_and_nothing_else(grid: Grid) -> None:
    grid.node(2, "--lane", "thread")
    last = grid.shop.all(m.Capacity)[-1]
    assert (last.slots, last.nodes["lab1"]["cpu"], last.lanes) == (0, 0, {"thread": 2})
    grid.shop.until(lambda: any("of the lane thread" in it for it in grid.shop.watcher.notices))
    grid.node(1)
    threads, (process,) = grid.shop.workers(2, "thread"), grid.shop.workers()
    for worker, node in [*((worker, "lab1") for worker in threads), (process, "lab2")]:
        assert grid.shop.do(worker, "where") == (node, f"w{worker}")


def test_many_calls_travel_in_few_messages_and_end_in_order(grid: Grid) -> None:
    grid.node(1)
    (worker,) = grid.shop.workers()
    calls = [grid.shop.make("same", number) for number in range(2000)]
    grid.shop.assign(worker, *calls)
    assert [grid.shop.value(call) for call in calls] == list(range(2000))
    assert [key for key, _ in grid.shop.reports] == [call.id for call in calls]
    assert len(grid.shop.all(m.Finished)) < 400


def test_what_ended_before_a_long_call_is_known_while_that_runs(grid: Grid) -> None:
    grid.node(1)
    (worker,) = grid.shop.workers()
    for _ in range(5):
        short, long = grid.shop.make("same", 1), grid.shop.make("nap", 0.5)
        grid.shop.assign(worker, short, long)
        assert grid.shop.value(short) == 1
        assert (long.id, 1) not in grid.shop.reports
        grid.shop.value(long)


def test_nobody_looks_here_for_what_only_a_node_can_see(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid.node(1)
    (worker,) = grid.shop.workers()
    copies: list[Any] = []
    look = RemoteLink.look

    def noted(link: RemoteLink) -> list[tuple[Any, ...]]:
        copies.append(link._copy)
        return look(link)

    monkeypatch.setattr(RemoteLink, "look", noted)
    calls = [grid.shop.make("nap", 0.05) for _ in range(5)]
    grid.shop.assign(worker, *calls)
    for call in calls:
        grid.shop.value(call)
    assert None not in copies


def test_output_comes_with_its_call_and_before_its_end(grid: Grid) -> None:
    grid.node(2)
    workers = grid.shop.workers(2)
    calls = [grid.shop.make("shout", f"line {number}\n" * 50) for number in range(40)]
    for number, call in enumerate(calls):
        grid.shop.assign(workers[number % 2], call)
    for number, call in enumerate(calls):
        grid.shop.report(call)
        for stream in ("stdout", "stderr"):
            text = f"line {number}\n" * 50 + "\n"
            assert grid.shop.written(call, stream).decode() == text
    assert [call.id for call in grid.shop.watcher.ended[:5]]


def test_output_is_shown_while_a_call_runs(grid: Grid) -> None:
    grid.shop.close()
    source = """
    @task
    def talk(x):
        print("first", flush=True)
        while not os.path.exists(x): time.sleep(0.01)
    """
    grid.module, grid.file = task_file(grid.folder, CHORES + textwrap.dedent(source))
    grid.open()
    grid.node(1)
    (worker,) = grid.shop.workers()
    go = grid.folder / "go"
    call = grid.shop.start(worker, "talk", str(go))
    grid.shop.until(lambda: grid.shop.written(call) == b"first\n")
    go.touch()
    grid.shop.report(call)


def test_the_name_of_the_node_is_known_to_calls_and_to_observers(grid: Grid) -> None:
    grid.node(1)
    (worker,) = grid.shop.workers()
    assert grid.shop.do(worker, "where") == ("lab1", f"w{worker}")
    link = grid.shop.engine._links[worker]  # type: ignore[attr-defined]
    assert link.name == f"lab1/w{worker}"


def test_a_large_value_crosses_once_for_many_calls(grid: Grid) -> None:
    proxy = grid.proxy()
    grid.node(2, address=proxy.address)
    workers = grid.shop.workers(2)
    value = bytes(30_000_000)
    first = grid.shop.make("size", value)
    calls = [first, *(grid.shop.again(first) for _ in range(7))]
    before = proxy.passed
    for number, call in enumerate(calls):
        grid.shop.assign(workers[number % 2], call)
    assert [grid.shop.value(call) for call in calls] == [len(value)] * 8
    assert 30_000_000 < proxy.passed - before < 31_000_000


def test_a_large_result_does_not_keep_other_workers_waiting(grid: Grid) -> None:
    grid.node(2)
    first, second = grid.shop.workers(2)
    large = grid.shop.start(first, "zeros", 40_000_000)
    small = [grid.shop.start(second, "same", number) for number in range(20)]
    assert [grid.shop.value(call) for call in small] == list(range(20))
    assert len(grid.shop.value(large)) == 40_000_000


def test_calls_come_back_that_a_node_has_in_advance(grid: Grid) -> None:
    grid.node(1)
    (worker,) = grid.shop.workers()
    calls = [grid.shop.make("nap", 1.0), *(grid.shop.make("same", n) for n in range(6))]
    grid.shop.assign(worker, *calls)
    link = grid.shop.engine._links[worker]  # type: ignore[attr-defined]
    grid.shop.until(lambda: link.executing)
    grid.shop.engine.perform(m.Reclaim(worker, 4))
    back = grid.shop.await_event(m.GaveBack)
    assert [id for id, _ in back.calls] == [call.id for call in calls[-4:]]
    assert [grid.shop.value(call) for call in calls[1:3]] == [0, 1]


@pytest.mark.parametrize("name", ["tidy", "swallow", "immune"])
def test_a_call_that_is_interrupted_ends(tmp_path: Path, name: str) -> None:
    with grid_in(tmp_path, INTERRUPTIBLE) as grid:
        grid.node(1)
        (worker,) = grid.shop.workers()
        flag = tmp_path / "flag"
        call = grid.shop.start(worker, name, str(flag))
        grid.shop.until(flag.exists)
        interrupt(grid.shop, worker, call)
        if name == "tidy":
            assert cancelled(grid.shop, call)
            assert grid.shop.written(call) == b"tidied up\n"
            assert grid.shop.do(worker, "same", 1) == 1
        else:
            assert grid.lost(worker).executing == (call.id, 1)


def test_a_worker_that_is_killed_loses_only_what_it_was_executing(grid: Grid) -> None:
    grid.node(2)
    first, second = grid.shop.workers(2)
    done = [grid.shop.make("same", number) for number in range(5)]
    fatal = grid.shop.make("shout_and_die", "last words")
    behind = grid.shop.make("same", 9)
    grid.shop.assign(first, *done, fatal, behind)
    lost = grid.lost(first)
    assert lost.executing == (fatal.id, 1)
    assert lost.reason == "killed by SIGKILL"
    assert lost.last_output == "last words\n"
    assert [grid.shop.value(call) for call in done] == list(range(5))
    assert (behind.id, 1) not in grid.shop.reports
    assert grid.shop.do(second, "same", 3) == 3


def test_a_worker_stops_when_it_is_told_to(grid: Grid) -> None:
    node = grid.node(1)
    (worker,) = grid.shop.workers()
    pid = grid.shop.pid(worker)
    grid.shop.engine.perform(m.StopWorker(worker))
    grid.shop.until(lambda: not alive(pid))
    assert not grid.shop.all(m.WorkerLost)
    assert node.process.poll() is None


def test_a_worker_that_is_ready_only_after_its_node_was_to_go_gets_no_calls(grid: Grid) -> None:
    grid.node(1)
    grid.shop.engine.perform(m.StartWorkers(1))
    grid.shop.engine.set_slots(0, {})  # type: ignore[attr-defined]
    assert len(grid.shop.all(m.Retiring)) == 1  # which nobody knows yet
    ready = grid.shop.await_event(m.WorkerReady)
    grid.shop.until(lambda: len(grid.shop.all(m.Retiring)) == 2)
    assert grid.shop.all(m.Retiring)[1].worker == ready.worker


def test_workers_of_other_lanes_stay_where_there_are_slots_and_go_with_the_last(
    tmp_path: Path,
) -> None:
    with grid_in(tmp_path, slots=2) as grid:
        grid.shop.workers(2)
        (thread,) = grid.shop.workers(1, "thread")
        engine: Any = grid.shop.engine
        engine.set_slots(2, {})
        assert not grid.shop.all(m.Retiring)
        engine.set_slots(1, {})
        (event,) = grid.shop.all(m.Retiring)
        assert event.worker != thread
        engine.set_slots(0, {})
        assert len(grid.shop.all(m.Retiring)) == 3


def test_a_node_of_one_lane_keeps_as_many_workers_as_it_has_slots_left(grid: Grid) -> None:
    grid.node(2, "--lane", "thread")
    grid.shop.workers(2, "thread")
    engine: Any = grid.shop.engine
    engine.set_slots(0, {"lab1": 1})
    assert len(grid.shop.all(m.Retiring)) == 1


# -- joining --------------------------------------------------------------------------


def test_a_node_waits_for_a_coordinator_that_is_not_there_yet(grid: Grid) -> None:
    port = grid.listener.address[1]
    grid.shop.close()
    grid.listener.close()
    node = grid.node(1, address=f"127.0.0.1:{port}", wait=False)
    node.await_line("waiting for a coordinator", err=True)
    grid.open(port)
    grid.shop.until(lambda: grid.joined == 1)
    (worker,) = grid.shop.workers()
    assert grid.shop.do(worker, "same", 1) == 1


def test_two_nodes_share_the_work_and_have_names_of_their_own(grid: Grid) -> None:
    grid.node(1, "--name", "twin")
    grid.node(2, "--name", "twin")
    assert grid.shop.all(m.Capacity)[-1].slots == 3
    workers = grid.shop.workers(3)
    nodes = [grid.shop.do(worker, "where")[0] for worker in workers]
    assert sorted(nodes) == ["twin", "twin-2", "twin-2"]


def test_workers_start_here_first_then_on_nodes(tmp_path: Path) -> None:
    with grid_in(tmp_path, slots=1) as grid:
        grid.node(1)
        workers = sorted(grid.shop.workers(2))  # who is ready first is another question
        assert [grid.shop.do(worker, "where")[0] for worker in workers] == ["local", "lab1"]
        spare = grid.shop.workers(6)
        nodes = [grid.shop.do(worker, "where")[0] for worker in spare]
        assert sorted(nodes) == ["lab1"] * 3 + ["local"] * 3
        grid.shop.engine.perform(m.StartWorkers(1))
        assert "no machine has room" in grid.shop.await_event(m.WorkerLost).reason


def test_a_node_with_another_key_is_told_so(grid: Grid) -> None:
    grid.key_file.write_bytes(b"another key of sufficient length")
    node = grid.node(1, wait=False)
    grid.shop.until(lambda: node.process.poll() is not None)
    ended = node.end()
    assert ended.status == 2
    assert "key" in ended.err
    assert "another key" not in ended.err


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"python": [3, 99]}, "it has Python 3.99, and the coordinator Python"),
        ({"wire": 99}, "speaks wire version 99"),
        ({"slots": 0}, "offers what no node can have"),
        ({"slots": "many"}, "invalid literal"),
        ({"name": "two\nlines"}, "a node's name is printable"),
        ({"resources": 3}, "what no node says"),
        ({"slots": 1e999}, "what no node says"),
        ({"received": []}, "how much it has received"),
    ],
)
def test_a_node_that_does_not_fit_is_refused_with_the_reason(
    grid: Grid, said: dict[str, object], reason: str
) -> None:
    stranger = Stranger(grid, said)
    answer = stranger.answer()
    assert isinstance(answer, Refused)
    assert reason in answer.reason
    assert any(reason in notice for notice in grid.shop.watcher.notices)


def test_a_node_that_is_gone_before_it_has_said_anything_is_forgotten_at_once(grid: Grid) -> None:
    stranger = Stranger(grid, {})
    assert isinstance(stranger.answer(), Welcome)
    assert len(grid.nodes.nodes) == 1
    stranger.peer.close()
    grid.shop.until(lambda: not grid.nodes.nodes)
    assert not any("is away" in notice for notice in grid.shop.watcher.notices)


HEAD = struct.Struct("!BQIBB")
RUBBISH = [
    b"", b"\x07", b"\x01" + bytes(40), b"\x05\xff\xff", b"\x02" + b"\xff" * 8,
    HEAD.pack(1, 7, 0, ch.PREPARED, 0), HEAD.pack(1, 0, 0, ch.PREPARED, 0) + b"\xff",
    HEAD.pack(1, 0, 0, ch.NOTICE, 0) + b"\xff", HEAD.pack(1, 0, 0, ch.UNABLE, 0) + b"no",
]  # fmt: skip


@pytest.mark.parametrize("rubbish", RUBBISH, ids=range(len(RUBBISH)))
def test_a_node_that_sends_rubbish_after_joining_is_no_node_any_more(
    grid: Grid, rubbish: bytes
) -> None:
    stranger = Stranger(grid, {})
    assert isinstance(stranger.answer(), Welcome)
    assert len(grid.nodes.nodes) == 1
    stranger.peer.send(rubbish)
    grid.shop.until(lambda: not grid.nodes.nodes)
    grid.node(1)  # the coordinator goes on


def test_a_run_that_ends_as_a_node_joins_does_not_wait_for_it(tmp_path: Path) -> None:
    with grid_in(tmp_path) as grid:
        node = grid.node(1)  # its workers are not up yet
        began = monotonic()
    assert monotonic() - began < 3
    assert "the run has ended" in "".join(node.err)


class Stranger:
    """A peer that says what it likes."""

    def __init__(self, grid: Grid, said: dict[str, object]) -> None:
        self._grid = grid
        self._frames: list[bytes] = []
        self.peer: Any = None
        offer = Offer("stranger", 1, {})
        whole = json.loads(hello_frame(Hello(offer, "", 0))[1:]) | said
        self._hello = bytes([JOIN]) + json.dumps(whole).encode()
        transport.dial(grid.listener.address, KEY, grid.shop.reactor, b"node", self._on_peer, print)

    def _on_peer(self, peer: Any) -> None:
        self.peer = peer
        peer.listen(lambda frame: self._frames.append(bytes(frame)), lambda reason: None)
        peer.send(self._hello)

    def answer(self) -> Any:
        self._grid.shop.until(lambda: self._frames)
        return read_answer(memoryview(self._frames[0]))


# -- leaving --------------------------------------------------------------------------


def test_a_node_that_is_terminated_ends_its_calls_and_leaves(grid: Grid) -> None:
    node = grid.node(2)
    busy, idle = grid.shop.workers(2)
    call = grid.shop.start(busy, "nap", 1.0)
    grid.shop.do(idle, "same", 1)
    retired: list[int] = []

    def stop_when_idle(event: m.Event) -> None:  # what the core does
        if isinstance(event, m.Retiring):
            retired.append(event.worker)
        for worker in [w for w in retired if w == idle or (call.id, 1) in grid.shop.reports]:
            retired.remove(worker)
            grid.shop.engine.perform(m.StopWorker(worker))

    grid.shop.on_event = stop_when_idle
    node.signal(signal.SIGTERM)
    assert grid.shop.value(call) == 1.0
    grid.shop.until(lambda: node.process.poll() is not None)
    assert node.end().status == 0
    assert not grid.shop.all(m.WorkerLost)
    assert grid.shop.all(m.Capacity)[-1].slots == 0


def test_the_second_signal_ends_a_node_at_once(grid: Grid) -> None:
    node = grid.node(1)
    (worker,) = grid.shop.workers()
    flag = grid.folder / "flag"
    call = grid.shop.start(worker, "touch_and_wait", str(flag))
    grid.shop.until(flag.exists)
    node.signal(signal.SIGTERM)
    node.await_line("ended the calls", err=True)
    node.signal(signal.SIGTERM)
    grid.shop.until(lambda: node.process.poll() is not None)
    assert node.end().status == 128 + signal.SIGTERM
    assert grid.lost(worker).executing == (call.id, 1)


def test_a_node_without_anything_to_do_leaves_by_itself(grid: Grid) -> None:
    node = grid.node(1, "--idle-exit", "0.5")
    grid.shop.until(lambda: node.process.poll() is not None)
    assert node.end().status == 0


def test_a_node_goes_on_to_the_next_coordinator(grid: Grid) -> None:
    node = grid.node(1)
    port = grid.listener.address[1]
    grid.shop.workers()
    grid.listener.close()
    grid.shop.close()
    node.await_line("the run has ended", err=True)
    grid.open(port)
    grid.shop.until(lambda: grid.joined == 1)
    (worker,) = grid.shop.workers()
    assert grid.shop.do(worker, "same", 2) == 2


def test_a_bundle_is_fetched_once_and_calls_work_in_their_own_copy(tmp_path: Path) -> None:
    helper = tmp_path / "helper.py"
    helper.write_text("def words(): return open('data.txt').read().split()\n")
    (tmp_path / "data.txt").write_text("one two")
    (tmp_path / "noise").write_bytes(os.urandom(100_000))
    source = """
    @task
    def read(): import helper; open("made.txt", "w").close(); return helper.words(), os.getcwd()
    """
    with grid_in(tmp_path, source, patterns=("data.txt", "noise")) as grid:
        proxy = grid.proxy()
        folders = []
        for _ in range(2):
            before = proxy.passed
            node = grid.node(1, address=proxy.address)
            (worker,) = grid.shop.workers()
            words, folder = grid.shop.do(worker, "read")
            assert words == ["one", "two"]
            folders.append(folder)
            node.signal(signal.SIGTERM)
            grid.shop.engine.perform(m.StopWorker(worker))
            grid.shop.until(lambda node=node: node.process.poll() is not None)
            node.end()
            folders.append(proxy.passed - before)
        size = len(grid.bundle().data)
        assert folders[1] - folders[3] > 0.9 * size
        assert folders[0] != folders[2]
        assert not Path(folders[0]).exists()
        assert not (tmp_path / "made.txt").exists()
