"""A Pool whose workers a server lends: on its own machine, and on the nodes that joined it."""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Running, started, wait_until
from test_serve import KEY, Site

from taskrun import Executor, Pool, state
from taskrun.errors import CallCancelled, CallTimeout, DialError, RunError, UsageError, WorkerLost
from taskrun.network import joining
from taskrun.serving import lent as lent_pools
from taskrun.serving.lent import LentPool

pytestmark = pytest.mark.timeout(120)
DEADLINE = 30.0  # seconds


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Where a test has a server of its own."""
    yield from sites(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """With a server of two slots, for the tests that do it no harm."""
    for made in sites(tmp_path_factory.mktemp("shared")):
        made.serve(2)
        yield made


def sites(folder: Path) -> Iterator[Site]:
    runtime = tempfile.mkdtemp(dir="/tmp")  # the path of a socket must be short
    for runs in started(folder):
        yield Site(runs, runtime)
    shutil.rmtree(runtime)


def lent(site: Site, processes: int | None = None, **options: Any) -> Pool:
    return Pool(processes, address=site.address, authkey=KEY.encode(), **options)


def join(site: Site, jobs: int = 2, name: str = "lab") -> Running:
    node = site.runs.start(
        "worker", site.address, "-j", str(jobs), "--name", name, env=site.variables
    )
    wait_until(lambda: any(node["node"] == name for node in site.status()["nodes"]))
    return node


def waiting(go: Path, begun: Path) -> Callable[[], Any]:
    """A call that says that it has begun, and ends when it may."""
    before, end = str(begun), str(go)

    def wait() -> str:
        import os
        import time

        with open(before, "a") as file:
            file.write(f"{os.getpid()}\n")
        while not os.path.exists(end):
            time.sleep(0.01)
        return "done"

    return wait


# -- the interface --------------------------------------------------------------------


def test_all_methods_of_a_pool_work_on_lent_workers(shared: Site) -> None:
    with lent(shared) as pool:
        assert pool.apply(operator.add, (2, 3)) == 5
        assert pool.map(lambda x: x * x, range(10)) == [x * x for x in range(10)]
        assert pool.starmap(operator.mul, [(2, 3), (4, 5)]) == [6, 20]
        assert list(pool.imap(abs, range(-3, 0))) == [3, 2, 1]
        assert sorted(pool.imap_unordered(lambda x: x + 1, range(2000))) == [*range(1, 2001)]
        assert pool.starmap_async(pow, [(2, 3)]).get(DEADLINE) == [8]
        said: list[Any] = []
        came = threading.Event()
        pool.apply_async(divmod, (7, 2), callback=said.append)
        pool.apply_async(divmod, (7, 0), error_callback=lambda e: (said.append(e), came.set()))
        assert came.wait(DEADLINE)
        wait_until(lambda: len(said) == 2)
        assert (3, 1) in said and any(isinstance(one, ZeroDivisionError) for one in said)
        result = pool.apply_async(os.getpid)
        pid = result.get(DEADLINE)
        assert result.outcome.pid == pid
        workers = {worker.pid: worker for worker in pool.workers()}
        assert workers[pid].name == result.outcome.worker and workers[pid].node == "local"
        assert workers[pid].is_alive() and repr(pool).endswith("pool_size=2>")
        with pytest.raises(ValueError, match="is on local: it cannot be ended from here"):
            workers[pid].kill()
        pool.close()
        pool.join()
    assert not workers[pid].is_alive()
    wait_until(lambda: shared.status()["runs"][-1]["state"] == "ended")
    wait_until(lambda: len(shared.server.processes()) == 1)


def test_a_script_finds_its_own_module_and_those_beside_it_and_its_output_comes_back(
    shared: Site,
) -> None:
    (shared.folder / "helper.py").write_text("def twice(x): return 2 * x\n")
    source = f"""
    import helper
    from taskrun import Pool, state

    class Pair:
        def __init__(self, a, b): self.a, self.b = a, b

    shared = 0

    def begin(value):
        global shared
        shared = value

    def work(pair):
        print("at work", flush=True)
        state.counter("calls").add(1)
        return Pair(pair.b + shared, helper.twice(pair.a))

    if __name__ == "__main__":
        with Pool(1, begin, (100,), address={shared.address!r}) as pool:
            pair = pool.apply(work, (Pair(1, 2),))
            print(type(pair) is Pair, pair.a, pair.b, state.counter("calls").get())
    """
    ended = shared.runs.script(source, env=shared.variables).check()
    assert ended.out.splitlines() == ["at work", "True 102 2 1"]


def test_an_executor_may_have_lent_workers(shared: Site) -> None:
    with Executor(
        1, address=shared.address, authkey=shared.variables["TASKRUN_AUTHKEY_FILE"]
    ) as made:
        assert made.submit(operator.add, 1, 2).result(DEADLINE) == 3
        assert list(made.map(abs, [-1, -2])) == [1, 2]


def test_workers_are_had_without_tls_where_both_sides_say_so(site: Site) -> None:
    site.serve(1, "--listen", "0.0.0.0:0", "--insecure-plain")
    with pytest.raises(DialError, match="insecure_plain=True"):
        lent(site)
    with lent(site, insecure_plain=True) as pool:
        assert pool.apply_async(operator.add, (1, 2)).get(DEADLINE) == 3
    how: dict[str, Any] = {"authkey": KEY.encode(), "insecure_plain": True}
    with Executor(1, address=site.address, **how) as executor:
        assert executor.submit(operator.add, 1, 2).result(DEADLINE) == 3


def test_calls_reach_the_state_of_the_process_that_has_the_pool(shared: Site) -> None:
    counter = state.counter("lent")
    with lent(shared) as pool:
        pool.map(lambda _: state.counter("lent").add(1), range(5), chunksize=1)
    assert counter.get() == 5


@pytest.mark.timeout(30)  # a server that stops passing on is noticed after ten seconds a time
def test_a_large_argument_and_a_large_result_cross(shared: Site) -> None:
    with lent(shared) as pool:
        assert pool.apply(len, (bytes(3_000_000),)) == 3_000_000
        assert len(pool.apply(bytes, (3_000_000,))) == 3_000_000


# -- calls that do not just end -------------------------------------------------------


def test_a_running_call_is_cancelled_and_one_that_takes_too_long_ends(
    shared: Site, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    with lent(shared) as pool:
        result = pool.apply_async(waiting(tmp_path / "never", begun))
        wait_until(begun.exists)
        result.cancel()
        with pytest.raises(CallCancelled):
            result.get(DEADLINE)
        with pytest.raises(CallTimeout):
            pool.apply(time.sleep, (60,), timeout=0.3)
        assert pool.apply(abs, (-1,)) == 1


def test_a_worker_that_dies_costs_its_call_which_is_tried_again_if_it_may(
    shared: Site, tmp_path: Path
) -> None:
    there = str(tmp_path / "there")

    def die_once() -> int:
        import os

        if not os.path.exists(there):
            with open(there, "w"):
                os._exit(7)
        return 1

    with lent(shared) as pool:
        with pytest.raises(WorkerLost, match="exited with status 3"):
            pool.apply(os._exit, (3,))
        assert pool.apply(die_once, retries=1) == 1


def test_a_worker_that_dies_is_said_to_have_written_what_it_wrote_last(shared: Site) -> None:
    def say_and_exit() -> None:
        import os
        import sys

        print("last words", file=sys.stderr, flush=True)
        os._exit(3)

    with lent(shared) as pool, pytest.raises(WorkerLost, match=r"output:\n.*last words"):
        pool.apply(say_and_exit)


def test_leaving_the_pool_ends_what_runs(shared: Site, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with lent(shared) as pool:
        result = pool.apply_async(waiting(tmp_path / "never", begun))
        wait_until(begun.exists)
    with pytest.raises(CallCancelled):
        result.get(DEADLINE)
    wait_until(lambda: len(shared.server.processes()) == 1)


# -- nodes ----------------------------------------------------------------------------


def test_the_nodes_of_the_server_execute_calls_and_come_and_go(site: Site) -> None:
    site.serve(0)
    with lent(site) as pool:
        first = pool.apply_async(os.getpid)
        lab = join(site)
        first.get(DEADLINE)
        assert {worker.node for worker in pool.workers()} == {"lab"}
        wait_until(lambda: repr(pool).endswith("pool_size=2>"))
        lab.signal(signal.SIGTERM)
        assert lab.end().status == 0
        second = pool.apply_async(os.getpid)
        join(site, 1, "hall")
        second.get(DEADLINE)
        assert [worker.node for worker in pool.workers()] == ["hall"]


def test_a_node_that_is_killed_costs_its_calls_unless_they_are_tried_again(site: Site) -> None:
    site.serve(0, "--lease", "1.5")
    lab = join(site)
    go, begun = site.folder / "go", site.folder / "begun"
    with lent(site) as pool:
        wait = waiting(go, begun)
        fails, again = pool.apply_async(wait), pool.apply_async(wait, retries=1)
        wait_until(lambda: begun.exists() and len(begun.read_text().splitlines()) == 2)
        lab.signal(signal.SIGKILL)
        lab.process.wait(DEADLINE)
        with pytest.raises(WorkerLost, match="lost with the node lab"):
            fails.get(DEADLINE)
        join(site, 1, "hall")
        go.touch()
        assert again.get(DEADLINE) == "done"
        assert again.outcome.attempts == 2


def test_a_pool_shares_the_slots_with_runs_and_can_be_cancelled(site: Site) -> None:
    site.serve(4)
    with lent(site, 3) as pool:
        assert site.run("p1")["slots"] == 3 and "pid" in site.run("p1")["file"]
        run = site.detach()
        assert [site.run(name)["slots"] for name in ("p1", run)] == [2, 2]
        wait_until(lambda: repr(pool).endswith("pool_size=2>"))
        assert pool.map(abs, [-1, -2]) == [1, 2]
        assert "p1 is a Pool" in site.attach("p1").end().check(2).err
        result = pool.apply_async(time.sleep, (60,))
        site.ask("cancel", "p1").check()
        with pytest.raises(RunError, match="lends no more workers: p1 was stopped there"):
            result.get(DEADLINE)
        wait_until(lambda: site.run(run)["slots"] == 4)
        assert site.run("p1")["status"] == 130


# -- what goes wrong ------------------------------------------------------------------


def test_a_server_that_is_killed_ends_the_pool_with_an_error(site: Site) -> None:
    server = site.serve(1)
    begun = site.folder / "begun"
    with lent(site) as pool:
        result = pool.apply_async(waiting(site.folder / "never", begun))
        wait_until(begun.exists)
        server.signal(signal.SIGKILL)
        with pytest.raises(RunError, match="lost the server at"):
            result.get(DEADLINE)
    server.process.wait(DEADLINE)
    server.assert_gone()


def test_a_server_that_ends_in_order_says_so(site: Site) -> None:
    server = site.serve(1)
    with lent(site) as pool:
        pool.apply(abs, (1,))
        server.signal(signal.SIGTERM)
        assert server.end().status == 0
        with pytest.raises(RunError, match="lends no more workers"):
            pool.apply(abs, (1,))
    server.assert_gone()


def test_when_the_process_of_a_pool_is_killed_its_slots_are_free_again(site: Site) -> None:
    server = site.serve(1)
    begun = site.folder / "begun"
    source = f"""
    import time
    from taskrun import Pool

    def wait():
        open({str(begun)!r}, "w").close()
        time.sleep(60)

    if __name__ == "__main__":
        with Pool(address={site.address!r}) as pool:
            pool.apply(wait)
    """
    path = str(site.runs.write(source, "script.py", head=""))
    user = site.runs.start(program=(sys.executable, path), env=site.variables)
    wait_until(begun.exists)
    user.signal(signal.SIGKILL)
    user.process.wait(DEADLINE)
    wait_until(lambda: site.run("p1")["state"] == "ended")
    with lent(site) as pool:
        assert pool.apply(abs, (-1,)) == 1
    wait_until(lambda: len(server.processes()) == 1)


def test_what_cannot_be_reached_or_has_another_key_is_named(shared: Site) -> None:
    with pytest.raises(DialError, match="authkey"):
        Pool(address=shared.address, authkey=b"another key of sufficient length")
    with pytest.raises(UsageError, match="needs at least 16"):
        Pool(address=shared.address, authkey=b"short")
    with pytest.raises(UsageError, match="there is no authkey file"):
        Pool(address=shared.address, authkey=shared.folder / "nothing")
    with pytest.raises(UsageError, match="an address is HOST:PORT"):
        Pool(address="nonsense", authkey=KEY.encode())
    with pytest.raises(DialError, match="cannot be reached"):
        Pool(address=f"unix:{shared.folder}/nobody", authkey=KEY.encode())


def test_another_version_is_refused_with_both_named(
    shared: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = joining.versions()
    monkeypatch.setattr("taskrun.pooling.lending.versions", lambda: {**real, "python": [3, 99]})
    with pytest.raises(UsageError, match=r"it has Python 3\.99, and the coordinator Python"):
        lent(shared)
    monkeypatch.setattr("taskrun.pooling.lending.versions", lambda: {**real, "wire": 99})
    with pytest.raises(UsageError, match="speaks wire version 99"):
        lent(shared)


def test_what_cannot_work_on_other_machines_is_refused() -> None:
    import multiprocessing

    def refused(kind: type[Exception], text: str, **options: Any) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(pytest.raises(kind, match=text))
            Pool(1, **options)

    there = {"address": "127.0.0.1:1", "authkey": KEY.encode()}
    lock = multiprocessing.Lock()
    refused(UsageError, "cannot travel", initializer=print, initargs=(lock,), **there)
    refused(ValueError, "context says", context=multiprocessing.get_context("fork"), **there)
    refused(UsageError, "only workers of this machine", maxrss=("1G", "2G"), **there)
    refused(ValueError, "authkey is for address", authkey=KEY.encode())
    refused(ValueError, "insecure_plain is for address", insecure_plain=True)


def test_a_failing_initializer_ends_the_pool_with_what_it_raised(shared: Site) -> None:
    with lent(shared, initializer=int, initargs=("x",)) as pool, pytest.raises(ValueError):
        pool.apply(abs, (1,))


def test_of_a_pool_whose_key_cannot_be_written_no_folder_is_left_at_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nobody: Any = None

    def no_room(*args: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lent_pools, "write_key", no_room)
    with pytest.raises(OSError, match="No space left"):
        LentPool("p1", "a Pool", None, nobody, nobody, "", b"key", 1, nobody)
    assert not list((tmp_path / "taskrun" / "work").iterdir())
