"""Own workers, for real: what they do, how they end, and that nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from workshop import (
    CHORES,
    FORKING,
    INTERRUPTIBLE,
    Make,
    Workshop,
    await_file,
    gone,
    task_file,
)

from taskrun import errors
from taskrun import messages as m
from taskrun.engines.pool import PoolEngine
from taskrun.places import Place

pytestmark = pytest.mark.timeout(120)


# -- plain work -----------------------------------------------------------------------


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_calls_are_executed_and_their_values_come_back(make: Make, start_method: str) -> None:
    shop = make(start_method=start_method)
    first, second = shop.workers(2)
    assert shop.do(first, "add", 2, 3) == 5
    assert shop.do(second, "add", [1], [2]) == [1, 2]
    assert shop.do(first, "pid") == shop.pid(first) != shop.pid(second)


def test_many_calls_in_a_frame_end_in_order_in_few_events(shop: Workshop) -> None:
    (worker,) = shop.workers()
    calls = [shop.make("same", number) for number in range(1000)]
    shop.assign(worker, *calls)
    assert [shop.value(call) for call in calls] == list(range(1000))
    assert [key for key, _ in shop.reports] == [call.id for call in calls]
    assert len(shop.all(m.Finished)) < 200


def test_a_value_that_is_larger_than_the_ledger_travels_like_any_other(shop: Workshop) -> None:
    (worker,) = shop.workers()
    before, large = shop.make("same", 1), shop.make("zeros", 5_000_000)
    after = shop.make("same", 2)
    shop.assign(worker, before, large, after)
    assert shop.value(large) == bytes(5_000_000)
    assert (shop.value(before), shop.value(after)) == (1, 2)


def test_a_worker_has_no_stdin_and_its_own_session(make: Make) -> None:
    shop = make(
        """
        @task
        def look(): return sys.stdin.read(), os.getsid(0), signal.getsignal(signal.SIGTERM)
        """
    )
    (worker,) = shop.workers()
    assert shop.do(worker, "look") == ("", shop.pid(worker), signal.SIG_DFL)


def test_a_file_in_the_folder_does_not_stand_in_for_a_module_of_ours(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("taskrun", "random", "pickle", "socket", "select", "sessions"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    monkeypatch.chdir(tmp_path)
    shop = make()
    (worker,) = shop.workers()
    assert shop.do(worker, "add", 1, 1) == 2


def test_a_task_file_that_starts_threads_gets_fresh_workers(make: Make) -> None:
    shop = make(
        """
        threading.Thread(target=threading.Event().wait, daemon=True).start()

        @task
        def threads(): return len(sys._current_frames())
        """
    )
    (worker,) = shop.workers()
    assert shop.do(worker, "threads") == 3  # main, control, and the file's own


def test_gpu_numbers_are_told_to_libraries_for_the_call_only(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shop = make(
        """
        @task
        def variables():
            names = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
            return [os.environ.get(name) for name in names], current().resources
        """
    )
    (worker,) = shop.workers()
    units = {"gpu": [0, 3], "cpu": 4}
    assert shop.do(worker, "variables", units=units) == (["0,3", "4"], units)
    assert shop.do(worker, "variables") == ([None, "1"], {})


def test_progress_reaches_the_observer(make: Make) -> None:
    shop = make(
        """
        @task
        def steps():
            current().progress(1, 3)
            current().progress(3, 3)
        """
    )
    (worker,) = shop.workers()
    call = shop.start(worker, "steps")
    shop.report(call)
    assert shop.watcher.progress[-1] == (call, 3, 3)


def test_a_task_file_that_fails_in_the_workers_is_said_once_and_is_the_calls_outcome(
    make: Make, tmp_path: Path
) -> None:
    shop = make("raise OSError('no such device')")
    first, second = shop.workers(2)
    for worker in (first, second):
        error = shop.error(shop.start(worker, "add", 1, 2))
        assert isinstance(error, errors.LoadError)
        assert "no such device" in str(error)
    (notice,) = shop.watcher.notices
    assert "OSError: no such device" in notice


# -- how workers end ------------------------------------------------------------------

DEATHS = [
    ("end_by", (signal.SIGKILL,), "killed by SIGKILL"),
    ("end_by", (signal.SIGTERM,), "killed by SIGTERM"),
    ("leave", (3,), "exited with status 3"),
    ("leave", (0,), "exited with status 0 in the middle of the call"),
    ("crash", (), "killed by SIGSEGV"),
]


@pytest.mark.parametrize(("name", "args", "reason"), DEATHS)
def test_a_worker_that_dies_names_the_reason_and_the_call_it_was_in(
    shop: Workshop, name: str, args: tuple[int, ...], reason: str
) -> None:
    (worker,) = shop.workers()
    before, deadly, after = shop.make("same", 1), shop.make(name, *args), shop.make("same", 2)
    shop.assign(worker, before, deadly, after)
    lost = shop.await_event(m.WorkerLost)
    assert (lost.worker, lost.reason, lost.executing) == (worker, reason, (deadly.id, 1))
    assert shop.value(before) == 1
    assert (after.id, 1) not in shop.reports
    (again,) = shop.workers()
    assert shop.do(again, "same", 2) == 2


def test_an_idle_worker_that_is_killed_was_in_no_call(shop: Workshop) -> None:
    (worker,) = shop.workers()
    shop.do(worker, "same", 1)
    os.kill(shop.pid(worker), signal.SIGKILL)
    lost = shop.await_event(m.WorkerLost)
    assert (lost.executing, lost.last_output) == (None, "")


def test_a_worker_killed_while_it_receives_50_mb_had_not_begun(shop: Workshop) -> None:
    (worker,) = shop.workers()
    os.kill(shop.pid(worker), signal.SIGSTOP)
    shop.start(worker, "size", bytes(50_000_000))
    shop.reactor.run_once(0)  # as much is written as there is room for
    os.kill(shop.pid(worker), signal.SIGKILL)
    assert shop.await_event(m.WorkerLost).executing is None


def test_a_worker_killed_while_it_sends_50_mb_had_not_ended(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PoolEngine, "_begin_blobs", lambda engine, notice: Place((), ""))  # by Pipe
    shop = make()
    (worker,) = shop.workers()
    call = shop.start(worker, "zeros", 50_000_000)
    shop.reactor.run_once(0)
    worker_process = psutil.Process(shop.pid(worker))
    deadline = time.monotonic() + 20
    while worker_process.status() != psutil.STATUS_SLEEPING or worker_process.memory_info().rss < (
        50_000_000
    ):  # it sleeps in write(), since nobody reads
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.05)
    os.kill(worker_process.pid, signal.SIGKILL)
    lost = shop.await_event(m.WorkerLost)
    assert lost.executing == (call.id, 1)
    assert (call.id, 1) not in shop.reports


@pytest.mark.parametrize("position", [0, 1, 50, 137, 299])
def test_exactly_what_ended_before_a_death_among_tiny_calls_has_ended(
    shop: Workshop, position: int
) -> None:
    (worker,) = shop.workers()
    calls = [shop.make("same", number) for number in range(300)]
    calls[position] = shop.make("end_by", signal.SIGKILL)
    shop.assign(worker, *calls)
    lost = shop.await_event(m.WorkerLost)
    assert lost.executing == (calls[position].id, 1)
    assert list(shop.reports) == [(call.id, 1) for call in calls[:position]]


def test_a_kill_from_outside_at_any_moment_costs_one_call_at_most(shop: Workshop) -> None:
    for round in range(20):
        (worker,) = shop.workers()
        calls = [shop.make("same", number) for number in range(2000)]
        before = len(shop.reports)
        shop.assign(worker, *calls)
        shop.reactor.run_once(0)
        time.sleep(0.0005 * round)
        os.kill(shop.pid(worker), signal.SIGKILL)
        lost = shop.await_event(m.WorkerLost, round + 1)
        ended = list(shop.reports)[before:]
        assert ended == [(call.id, 1) for call in calls[: len(ended)]]
        next_one = (calls[len(ended)].id, 1) if len(ended) < len(calls) else None
        assert lost.executing in (None, next_one)


def test_the_last_output_of_a_lost_worker_is_the_calls_own(shop: Workshop) -> None:
    (worker,) = shop.workers()
    shop.do(worker, "shout", "from before")
    call = shop.start(worker, "shout_and_die", "famous last words " * 200)
    lost = shop.await_event(m.WorkerLost)
    assert lost.last_output.endswith("famous last words \n")
    assert len(lost.last_output) == 2048
    assert shop.written(call).count(b"famous") == 200
    assert call in shop.watcher.ended


def test_a_worker_that_sends_garbage_is_killed_and_nobody_else_is_hurt(make: Make) -> None:
    shop = make(
        """
        import stat

        @task
        def garble():
            for fd in map(int, os.listdir("/proc/self/fd")):
                try:
                    is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
                except OSError:
                    continue
                if is_socket:
                    os.write(fd, b"\\xff" * 64)
            time.sleep(60)
        """
    )
    bad, good = shop.workers(2)
    call = shop.start(bad, "garble")
    lost = shop.await_event(m.WorkerLost)
    assert (lost.worker, lost.executing) == (bad, (call.id, 1))
    assert "could not be read" in lost.reason
    assert shop.do(good, "add", 1, 2) == 3


def test_a_task_that_closes_every_descriptor_costs_its_worker_only(make: Make) -> None:
    shop = make(
        """
        @task
        def close_all(): os.closerange(3, 4096)
        """
    )
    bad, good = shop.workers(2)
    call = shop.start(bad, "close_all")
    lost = shop.await_event(m.WorkerLost)
    assert (lost.worker, lost.executing) == (bad, (call.id, 1))
    assert "a call closed file descriptors that are its worker's own" in lost.last_output
    assert shop.do(good, "add", 1, 2) == 3


def test_workers_that_cannot_start_end_the_run_instead_of_looping(make: Make) -> None:
    shop = make(environment={"PYTHONHOME": "/nowhere"}, start_method="spawn")

    def again(event: m.Event) -> None:
        if isinstance(event, m.WorkerLost):
            shop.engine.perform(m.StartWorkers(1))

    shop.on_event = again
    shop.engine.perform(m.StartWorkers(1))
    assert "before they can take a call" in shop.await_event(m.GiveUp).reason


def test_workers_that_the_machine_denies_do_not_end_a_run_that_has_others(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied() -> None:
        raise OSError(24, "Too many open files")

    shop = make()
    (worker,) = shop.workers()
    monkeypatch.setattr("taskrun.engines.wires.Pipe", denied)
    shop.engine.perform(m.StartWorkers(20))
    shop.until(lambda: len(shop.all(m.WorkerLost)) == 20)
    assert set(shop.all(m.NoMoreWorkers)) == {m.NoMoreWorkers("process", 1)}
    assert not shop.all(m.GiveUp)
    (notice,) = shop.watcher.notices
    assert notice.startswith("some workers cannot be started (Too many open files)")
    assert shop.do(worker, "add", 1, 2) == 3


def test_a_template_that_dies_takes_its_workers_along_and_is_replaced(make: Make) -> None:
    shop = make()
    (worker,) = shop.workers()
    call = shop.start(worker, "nap", 60)
    template = psutil.Process(shop.pid(worker)).parent()
    assert template is not None
    shop.until(lambda: shop.engine._links[worker].executing)  # type: ignore[attr-defined]
    template.kill()
    lost = shop.await_event(m.WorkerLost)
    assert lost.executing == (call.id, 1)
    assert "killed by SIGKILL" in lost.reason
    assert gone(shop.pid(worker))
    (again,) = shop.workers()
    assert shop.do(again, "add", 1, 2) == 3


def test_a_worker_whose_end_is_told_late_is_still_said_to_have_been_killed(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskrun.engines.local.HANGING", 0.01)
    (worker,) = shop.workers()
    shop.start(worker, "nap", 60)
    shop.until(lambda: shop.engine._links[worker].executing)  # type: ignore[attr-defined]
    link = shop.engine._links[worker]  # type: ignore[attr-defined]
    template = psutil.Process(shop.pid(worker)).parent()
    assert template is not None
    template.suspend()
    os.kill(shop.pid(worker), signal.SIGKILL)
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        shop.reactor.run_once(0.01)
    assert link.rejected is None
    template.resume()
    assert "killed by SIGKILL" in shop.await_event(m.WorkerLost).reason


def test_a_call_that_cannot_be_sent_ends_alone(shop: Workshop) -> None:
    (worker,) = shop.workers()
    bad = shop.make("same", 1, index=lambda: None)
    good = shop.make("same", 2)
    shop.assign(worker, bad, good)
    assert shop.value(good) == 2
    assert "cannot be pickled" in str(shop.error(bad))


# -- nothing is left ------------------------------------------------------------------


def descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            pass  # the one that listed them
    return found


def children() -> set[int]:
    """All processes below this one; multiprocessing keeps one for itself once it was used."""
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_closing_leaves_no_descriptor_and_no_process(make: Make) -> None:
    before = descriptors()
    others = children()
    shop = make(FORKING)
    workers = shop.workers(3)
    shop.do(workers[0], "outlive", True)
    shop.start(workers[1], "nap", 60)
    os.kill(shop.pid(workers[2]), signal.SIGKILL)
    shop.await_event(m.WorkerLost)
    below = children() - others
    assert len(below) >= 4
    shop.close()
    assert gone(*below, seconds=1)
    assert descriptors() <= before


def test_killing_ends_what_runs_at_once(make: Make, tmp_path: Path) -> None:
    shop = make(INTERRUPTIBLE)
    (worker,) = shop.workers()
    call = shop.start(worker, "immune", str(tmp_path / "begun"))
    shop.reactor.run_once(0)
    await_file(tmp_path / "begun")
    shop.engine.kill()
    assert shop.await_event(m.WorkerLost).executing == (call.id, 1)


def test_closing_while_the_task_file_is_imported_does_not_wait_for_it(make: Make) -> None:
    others = children()
    shop = make("time.sleep(60)")
    shop.engine.perform(m.StartWorkers(2))
    shop.reactor.run_once(0)
    start = time.monotonic()
    shop.close()
    assert time.monotonic() - start < 3
    assert not children() - others


COORDINATOR = """
import sys, time
sys.path[:0] = {path!r}
from workshop import Workshop
from taskrun.engines.pool import PoolEngine
if __name__ == "__main__":
    shop = Workshop(PoolEngine(module="chores", file={file!r}, start_method={method!r}), "chores")
    if {when!r} == "importing":
        shop.engine.perform(__import__("taskrun.messages").messages.StartWorkers(2))
        shop.until(lambda: False, 60)
    first, second = shop.workers(2)
    for own_session in (0, 1):
        shop.do(first, "outlive", own_session)
    call = shop.start(first, "subprocesses", {begun!r})
    shop.start(second, "spin", {begun!r} + "2")
    shop.until(lambda: False, 60)
"""


@pytest.mark.parametrize(
    ("start_method", "when"),
    [("forkserver", "running"), ("spawn", "running"), ("forkserver", "importing")],
)
def test_a_coordinator_killed_with_9_leaves_no_process_behind(
    tmp_path: Path, start_method: str, when: str
) -> None:
    source = CHORES + FORKING + INTERRUPTIBLE
    if when == "importing":
        source += f"\nsubprocess.Popen(['sleep', '300'])\nopen({str(tmp_path / 'begun')!r}, 'w')"
        source += "\ntime.sleep(60)"
    _, file = task_file(tmp_path, source)
    script = tmp_path / "coordinator.py"
    script.write_text(
        COORDINATOR.format(
            path=[str(Path(__file__).parent)], file=file, method=start_method,
            begun=str(tmp_path / "begun"), when=when,
        )
    )  # fmt: skip
    coordinator = subprocess.Popen([sys.executable, str(script)])
    try:
        await_file(tmp_path / "begun")
        if when == "running":
            await_file(tmp_path / "begun2")
        below = psutil.Process(coordinator.pid).children(recursive=True)
        assert len(below) >= (8 if when == "running" else 2)
        coordinator.send_signal(signal.SIGKILL)
        assert gone(*[process.pid for process in below], seconds=2)
    finally:
        coordinator.kill()
        coordinator.wait(10)
