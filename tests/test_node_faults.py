"""Nodes, workers, coordinators and connections that go away: who notices, and what follows.

The lease of these tests is short; that of people is 15 s.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from grid import LEASE, Grid, grid_in
from harness import Running
from workshop import alive, gone

from taskrun import messages as m

pytestmark = pytest.mark.timeout(120)

TICKING = """
@task
def tick(x):
    "Writes the time into a file, again and again, until it is killed."
    while True:
        with open(x + ".part", "w") as file: file.write(str(time.monotonic()))
        os.rename(x + ".part", x)
        time.sleep(0.01)

@task
def tick_below(x):
    subprocess.run(["bash", "-c", f"while true; do date +%s.%N > {x}; sleep 0.02; done"])

@task
def start_apart(x):
    "Starts two processes, one in a session of its own, and notes their pids."
    pids = [subprocess.Popen(["sleep", "300"], start_new_session=own).pid for own in (True, False)]
    with open(x + ".part", "w") as file: print(*pids, file=file)
    os.rename(x + ".part", x)
    time.sleep(300)

@task
def hold_the_gil(x):
    import ctypes
    ctypes.PyDLL(None).usleep(int(x * 1e6))
    return x
"""


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[Grid]:
    with grid_in(tmp_path, TICKING) as made:
        yield made


def supervisor(node: Running) -> psutil.Process:
    return psutil.Process(node.process.pid)


def others(node: Running) -> list[int]:
    """The pids of the template and the workers of a node."""
    return [process.pid for process in node.others()]


def last_tick(path: Path) -> float:
    return float(path.read_text())


# -- processes ------------------------------------------------------------------------


def test_a_supervisor_that_is_killed_takes_its_workers_along(grid: Grid) -> None:
    node = grid.node(2)
    first, second = grid.shop.workers(2)
    ticking = grid.shop.start(first, "tick_below", str(grid.folder / "ticks"))
    grid.shop.until((grid.folder / "ticks").exists)
    behind = grid.shop.start(first, "same", 1)
    began = time.monotonic()
    node.signal(signal.SIGKILL)
    node.assert_gone()
    lost = grid.lost(first)
    assert LEASE * 0.9 <= time.monotonic() - began < LEASE + 2
    assert "lost with the node lab1: nothing was heard of it" in lost.reason
    # Both may have begun, for all that is known; the idle worker is none that died.
    assert {e.call for e in grid.shop.all(m.Began)} >= {ticking.id, behind.id}
    assert [e.worker for e in grid.shop.all(m.Retiring)] == [second]
    assert grid.shop.all(m.Capacity)[-1].slots == 0


def test_another_node_takes_over_after_one_was_killed(grid: Grid) -> None:
    first_node, _ = grid.node(1), grid.node(1)
    workers = grid.shop.workers(2)
    where = {grid.shop.do(worker, "where")[0]: worker for worker in workers}
    first_node.signal(signal.SIGKILL)
    grid.shop.until(lambda: grid.shop.all(m.Capacity)[-1].slots == 1)
    assert grid.shop.do(where["lab2"], "same", 1) == 1


def test_a_template_that_is_killed_is_replaced(grid: Grid) -> None:
    node = grid.node(1)
    (worker,) = grid.shop.workers()
    pid = grid.shop.pid(worker)
    template = supervisor(node).children()[0]
    template.kill()
    assert "ended with the process that started it" in grid.lost(worker).reason
    assert gone(pid)
    (another,) = grid.shop.workers()
    assert grid.shop.do(another, "same", 1) == 1


def test_what_a_call_has_started_ends_with_a_template_that_is_killed(grid: Grid) -> None:
    node = grid.node(1)
    (worker,) = grid.shop.workers()
    noted = grid.folder / "pids"
    grid.shop.assign(worker, grid.shop.make("start_apart", str(noted)))
    grid.shop.until(noted.exists)
    supervisor(node).children()[0].kill()
    grid.lost(worker)
    assert gone(*map(int, noted.read_text().split()))


def test_a_coordinator_that_is_killed_leaves_nothing_running(grid: Grid) -> None:
    node = grid.node(1)
    (worker,) = grid.shop.workers()
    grid.shop.start(worker, "tick", str(grid.folder / "ticks"))
    grid.shop.until((grid.folder / "ticks").exists)
    pids = others(node)
    grid.kill()
    began = time.monotonic()
    assert gone(*pids, seconds=LEASE + 2)
    assert time.monotonic() - began > LEASE / 2  # it might have come back
    assert node.process.poll() is None


def test_a_node_that_meets_another_coordinator_ends_its_calls_and_joins_it(grid: Grid) -> None:
    node = grid.node(1)
    port = grid.listener.address[1]
    (worker,) = grid.shop.workers()
    grid.shop.start(worker, "tick", str(grid.folder / "ticks"))
    grid.shop.until((grid.folder / "ticks").exists)
    pids = others(node)
    grid.kill()
    grid.open(port)
    grid.shop.until(lambda: grid.joined == 1)
    assert gone(*pids, seconds=0.5)
    (worker,) = grid.shop.workers()
    assert grid.shop.do(worker, "same", 5) == 5


def test_a_node_misses_nothing_of_what_another_coordinator_says_while_it_ends_its_calls(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid.node(4)
    port = grid.listener.address[1]
    for worker in grid.shop.workers(4):
        grid.shop.start(worker, "tick", str(grid.folder / f"ticks{worker}"))
    grid.shop.until(lambda: len(list(grid.folder.glob("ticks*[0-9]"))) == 4)
    grid.kill()
    # To tell a node of the job now takes several frames.
    monkeypatch.setattr(sys, "argv", [*sys.argv, *("x" * 120_000 for _ in range(3))])
    grid.open(port)
    grid.shop.until(lambda: grid.joined == 1)
    (worker,) = grid.shop.workers()
    assert grid.shop.do(worker, "same", 5) == 5


def test_a_call_that_holds_the_gil_is_no_lost_node(grid: Grid) -> None:
    grid.node(1)
    (worker,) = grid.shop.workers()
    assert grid.shop.do(worker, "hold_the_gil", 2 * LEASE) == 2 * LEASE
    assert not grid.shop.all(m.WorkerLost)


# -- connections ----------------------------------------------------------------------


def test_a_node_that_comes_back_within_its_lease_goes_on(grid: Grid) -> None:
    proxy = grid.proxy()
    node = grid.node(1, address=proxy.address)
    (worker,) = grid.shop.workers()
    calls = [grid.shop.start(worker, "nap", 0.2) for _ in range(5)]
    proxy.cut(refuse=True)
    node.await_line("lost the connection", err=True)
    proxy.mend()
    assert [grid.shop.value(call) for call in calls] == [0.2] * 5
    assert not grid.shop.all(m.WorkerLost)
    assert grid.joined == 1
    node.await_line("is back at", err=True)
    said = [notice for notice in grid.shop.watcher.notices if " is " in notice]
    assert [" is away (" in notice for notice in said] == [True, False]
    assert said[1].endswith(" is back")


def test_results_that_came_while_it_was_away_are_not_lost(grid: Grid) -> None:
    proxy = grid.proxy()
    grid.node(1, address=proxy.address)
    (worker,) = grid.shop.workers()
    calls = [grid.shop.start(worker, "same", number) for number in range(50)]
    calls.append(grid.shop.start(worker, "shout", "said"))
    proxy.stall()
    calls_behind = [grid.shop.start(worker, "same", number) for number in range(50)]
    end = time.monotonic() + LEASE / 3
    grid.shop.until(lambda: time.monotonic() > end)
    proxy.cut()
    proxy.go_on()
    assert [grid.shop.value(call) for call in calls[:50]] == list(range(50))
    assert [grid.shop.value(call) for call in calls_behind] == list(range(50))
    assert grid.shop.written(calls[50]) == b"said\n"
    assert not grid.shop.all(m.WorkerLost)


def test_a_silent_node_is_lost_and_has_ended_its_calls_by_then(grid: Grid) -> None:
    proxy = grid.proxy()
    node = grid.node(1, address=proxy.address)
    (worker,) = grid.shop.workers()
    ticks = grid.folder / "ticks"
    call = grid.shop.start(worker, "tick", str(ticks))
    grid.shop.until(ticks.exists)
    pids = others(node)
    proxy.stall()
    lost = grid.lost(worker)
    known = time.monotonic()
    assert lost.executing in (None, (call.id, 1))
    assert not any(map(alive, pids))
    assert last_tick(ticks) < known
    proxy.go_on()
    grid.shop.until(lambda: grid.joined == 2)  # as a new one
    (worker,) = grid.shop.workers()
    assert grid.shop.do(worker, "same", 1) == 1


def test_a_supervisor_that_is_stopped_has_ended_its_calls_all_the_same(grid: Grid) -> None:
    node = grid.node(1)
    (worker,) = grid.shop.workers()
    ticks = grid.folder / "ticks"
    grid.shop.start(worker, "tick", str(ticks))
    grid.shop.until(ticks.exists)
    pid = grid.shop.pid(worker)
    node.signal(signal.SIGSTOP)
    grid.lost(worker)
    assert not alive(pid)  # its template saw to it
    node.signal(signal.SIGCONT)
    grid.shop.until(lambda: grid.joined == 2)
    (worker,) = grid.shop.workers()
    assert grid.shop.do(worker, "same", 1) == 1


def test_a_node_that_is_stopped_for_less_than_its_lease_goes_on(grid: Grid) -> None:
    node = grid.node(1)
    (worker,) = grid.shop.workers()
    call = grid.shop.start(worker, "nap", 0.6)
    node.signal(signal.SIGSTOP)
    end = time.monotonic() + LEASE / 3
    grid.shop.until(lambda: time.monotonic() > end)
    node.signal(signal.SIGCONT)
    assert grid.shop.value(call) == 0.6
    assert not grid.shop.all(m.WorkerLost)


@pytest.mark.parametrize("seed", range(3))
def test_calls_end_once_over_a_connection_that_breaks_again_and_again(
    tmp_path: Path, seed: int
) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    with grid_in(tmp_path, TICKING, lease=10.0) as grid:
        proxy = grid.proxy()
        grid.node(2, address=proxy.address)
        workers = grid.shop.workers(2)
        calls = []
        for round in range(12):
            for _ in range(chance.randrange(60)):
                worker = chance.choice(workers)
                size = chance.choice([0, 10, 300_000])
                call = grid.shop.make("zeros", size) if size else grid.shop.make("same", round)
                calls.append((call, size, round))
                grid.shop.assign(worker, call)
            end = time.monotonic() + chance.uniform(0, 0.1)
            grid.shop.until(lambda end=end: time.monotonic() > end)  # type: ignore[misc]
            proxy.cut()
        for call, size, round in calls:
            assert grid.shop.value(call) == (bytes(size) if size else round)
        assert not grid.shop.all(m.WorkerLost)
        ended = [key for event in grid.shop.all(m.Finished) for key in event.reports]
        assert len(ended) == len(calls)


# -- nothing is left ------------------------------------------------------------------


def test_nothing_of_a_node_is_left_after_it(grid: Grid) -> None:
    node = grid.node(2)
    workers = grid.shop.workers(2)
    for worker in workers:
        grid.shop.do(worker, "zeros", 1_000_000)
    node.signal(signal.SIGTERM)
    for worker in workers:
        grid.shop.engine.perform(m.StopWorker(worker))
    grid.shop.until(lambda: node.process.poll() is not None)
    assert node.end().status == 0
    assert os.listdir(grid.folder / "cache" / "taskrun" / "work") == []


def test_what_a_killed_node_left_is_removed_by_the_next(grid: Grid) -> None:
    work = grid.folder / "cache" / "taskrun" / "work"
    node = grid.node(1)
    node.signal(signal.SIGKILL)
    node.assert_gone()
    assert len(os.listdir(work)) == 1
    grid.node(1)
    assert len(os.listdir(work)) == 1
