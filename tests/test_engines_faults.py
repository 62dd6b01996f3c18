"""Engines that are not ours, when something goes wrong: what the run says, and what is left."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from harness import Running, Runs, started, wait_until

from taskrun import errors
from taskrun.engines.choosing import check
from taskrun.workers.briefs import VERSION
from taskrun.workers.chunks import execute

pytestmark = pytest.mark.timeout(120)

THREADS = "concurrent.futures:ThreadPoolExecutor"
PROCESSES = "concurrent.futures:ProcessPoolExecutor"
LOKY = "loky:get_reusable_executor"
NEEDS = {LOKY: "loky", "dask": "distributed", "ray": "ray"}


def needed(engine: str) -> pytest.ParameterSet:
    package = NEEDS.get(engine)
    missing = package is not None and importlib.util.find_spec(package) is None
    skip = pytest.mark.skipif(missing, reason=f"{package} is not installed")
    return pytest.param(engine, marks=skip)


with_processes = pytest.mark.parametrize("engine", [*map(needed, (PROCESSES, LOKY, "dask"))])
with_all = pytest.mark.parametrize("engine", [*map(needed, (PROCESSES, LOKY, "dask", "ray"))])
with_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="distributed is not installed"
)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


# -- workers that die -----------------------------------------------------------------


@with_all
def test_a_call_whose_worker_is_killed_is_tried_again_or_named_and_the_run_goes_on(
    runs: Runs, engine: str
) -> None:
    ended = runs.json(
        """
        @task(retries=1)
        def die_once():
            if current().attempt == 1:
                print("the last words", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return "alive"

        @task(after=[die_once])
        def die(): os._exit(3)

        @task(retries=5)  # an executor that loses a worker ends the others
        def many(n=each(range(50))): return n

        @task
        def total(values=result(many)): assert sum(values) == 1225
        """,
        "--engine", engine, "-j", "2", "-k", deadline=60,
    )  # fmt: skip
    assert ended.status == 1, ended.err
    assert ended.states["die_once"] == ended.states["total"] == "ok"
    assert ended.failure("die")["type"] == "WorkerLost"
    assert "die" in ended.failure("die")["message"]
    assert [state for name, state in ended.states.items() if state != "ok"] == ["failed"]


@with_processes
def test_a_worker_that_dies_loses_only_the_call_it_was_in(runs: Runs, engine: str) -> None:
    ended = runs.json(
        """
        @task
        def some(n=each(range(400))):
            with open(f"{n}.begun", "a") as file: file.write("x")
            if n == 250: os.kill(os.getpid(), signal.SIGKILL)
            return n
        """,
        "--engine", engine, "-j", "1", "-k", deadline=60,
    )  # fmt: skip
    failed = [name for name, state in ended.states.items() if state != "ok"]
    assert failed == ["some[250]"], ended.err
    begun = [(runs.folder / f"{n}.begun").read_text() for n in range(400)]
    assert begun == ["x"] * 400


@with_processes
def test_calls_whose_large_values_a_dead_worker_had_are_lost_and_not_executed_again(
    runs: Runs, engine: str
) -> None:
    ended = runs.json(
        """
        @task
        def some(n=each(range(40))):
            with open(f"{n}.begun", "a") as file: file.write("x")
            if n == 16: os.kill(os.getpid(), signal.SIGKILL)
            return bytes(300_000)

        @task
        def count(values=result(some, errors="keep")): return len(values)
        """,
        "--engine", engine, "-j", "1", "-k", deadline=60,
    )  # fmt: skip
    assert ended.failure("some[16]")["type"] == "WorkerLost"
    begun = [(runs.folder / f"{n}.begun").read_text() for n in range(40)]
    assert begun == ["x"] * 40


@with_dask
def test_what_a_call_returned_is_heard_or_lost_when_its_dask_worker_dies_but_it_is_executed_once(
    runs: Runs,
) -> None:
    ended = runs.json(
        """
        @task
        def returns(n=each(range(4))):
            with open(f"{n}.begun", "a") as file: file.write("x")

        @task(priority=-1)
        def dies(n=each(range(2))): os._exit(3)
        """,
        "--engine", "dask", "-j", "1", "-k", deadline=90,
    )  # fmt: skip
    assert ended.status == 1, ended.err
    assert {ended.states[f"dies[{n}]"] for n in range(2)} == {"failed"}
    assert [(runs.folder / f"{n}.begun").read_text() for n in range(4)] == ["x"] * 4


@with_dask
def test_a_dask_worker_that_dies_last_of_all_does_not_keep_the_run_from_its_summary(
    runs: Runs,
) -> None:
    ended = runs.exec(
        """
        @task
        def dies(): os._exit(3)
        """,
        "--engine", "dask", "-j", "2", deadline=60,
    ).check(1)  # fmt: skip
    assert "Traceback" not in ended.err
    assert "1 failed" in ended.err + ended.out


# -- timeouts and cancelling ----------------------------------------------------------


@pytest.mark.parametrize("engine", [THREADS, *map(needed, (PROCESSES, "dask"))])
def test_the_time_of_a_call_begins_when_its_process_has_imported_the_task_file(
    runs: Runs, engine: str
) -> None:
    runs.exec(
        """
        time.sleep(2.0)  # as large libraries take

        @task(timeout=1.5)
        def quick(n=each(range(2))): return n
        """,
        "--engine", engine, "-j", "2", deadline=60,
    ).check()  # fmt: skip


@pytest.mark.parametrize("engine", [THREADS, *map(needed, (PROCESSES, "dask"))])
def test_a_timeout_ends_a_call_and_what_it_started(runs: Runs, engine: str) -> None:
    ended = runs.json(
        """
        @task(timeout=0.7)
        def slow():
            print("began", flush=True)
            sh("sleep 300")

        @task(timeout=30)
        def quick(): return os.getpid()

        @task
        def same(first=result(quick)): assert first != os.getppid()
        """,
        "--engine", engine, "-j", "2", "-k", deadline=60,
    )  # fmt: skip
    assert ended.status == 1, ended.err
    assert ended.failure("slow")["type"] == "CallTimeout"
    assert ended.states["quick"] == ended.states["same"] == "ok"


@pytest.mark.parametrize("engine", [THREADS, *map(needed, (PROCESSES, LOKY, "dask"))])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_cancellable_calls_and_leaves_nothing(
    runs: Runs, engine: str, number: signal.Signals
) -> None:
    running = runs.start_exec(
        """
        @task(cancellable=True)
        def long(n=each(range(2))):
            try:
                mark(f"began{n}")
                doze()
            finally: mark(f"tidied{n}")
        """,
        "--engine", engine, "-j", "2",
    )  # fmt: skip
    for n in range(2):
        wait_until(lambda n=n: (runs.folder / f"began{n}").exists())
    running.signal(number)
    ended = running.end(20)
    assert ended.status == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], ended.err
    assert "Traceback" not in ended.err
    for n in range(2):
        assert (runs.folder / f"tidied{n}").exists()


@with_all
def test_ctrl_c_ends_other_calls_too_where_their_processes_are_ours(
    runs: Runs, engine: str
) -> None:
    running = runs.start_exec(
        """
        @task
        def long(n=each(range(2))):
            mark(f"began{n}")
            doze()
        """,
        "--engine", engine, "-j", "2",
    )  # fmt: skip
    for n in range(2):
        wait_until(lambda n=n: (runs.folder / f"began{n}").exists())
    running.signal(signal.SIGINT)
    assert running.end(30).status == 130


@with_all
def test_kill_9_of_the_coordinator_leaves_nothing(runs: Runs, engine: str) -> None:
    running = runs.start_exec(
        """
        @task(cancellable=True)
        def long():
            mark("began")
            doze()
        """,
        "--engine", engine, "-j", "1",
    )  # fmt: skip
    wait_until((runs.folder / "began").exists)
    running.process.kill()
    running.process.wait(10)
    running.assert_gone(15)


@pytest.mark.parametrize("engine", [needed("ray")])
def test_no_process_of_a_ray_of_its_own_outlives_a_run(runs: Runs, engine: str) -> None:
    runs.exec("@task\ndef one(): pass\n", "--engine", engine, "-j", "1", deadline=90).check()
    left = [process.info for process in psutil.process_iter(["cmdline", "cwd"])]
    assert [info["cmdline"] for info in left if info["cwd"] == str(runs.folder)] == []


def test_what_a_killed_coordinator_noted_is_removed_by_the_next(runs: Runs) -> None:
    memory = runs.folder / "memory"
    memory.mkdir()
    env = {"TASKRUN_SHM": str(memory), "TMPDIR": str(memory)}
    source = """
        @task
        def long():
            if not os.path.exists("began"):
                mark("began")
                doze()
        """
    running = runs.start_exec(source, "--engine", PROCESSES, "-j", "1", env=env)
    wait_until((runs.folder / "began").exists)
    running.process.kill()
    running.process.wait(10)
    running.assert_gone(15)
    left = sorted(path.name for path in memory.rglob("*") if path.is_file())
    assert len(left) == 2 and left[1].startswith(f"{left[0]}-"), left
    runs.exec(source, "--engine", PROCESSES, "-j", "1", env=env, deadline=60).check()
    assert not list(memory.rglob("*"))


def test_what_runs_in_a_thread_is_named_as_still_running(runs: Runs) -> None:
    running = runs.start_exec(
        """
        @task
        def long():
            mark("began")
            time.sleep(6)
        """,
        "--engine", THREADS, "-j", "1",
    )  # fmt: skip
    wait_until((runs.folder / "began").exists)
    running.signal(signal.SIGINT)
    ended = running.end(20)
    assert ended.status == 130
    assert "long is still running on " + THREADS in ended.err


def test_a_pool_of_processes_that_does_not_end_as_it_should_is_named(runs: Runs) -> None:
    (runs.folder / "odd.py").write_text(
        "from concurrent.futures import ProcessPoolExecutor\n"
        "class Odd(ProcessPoolExecutor):\n"
        "    def shutdown(self, wait=True, *, cancel_futures=False):\n"
        "        super().shutdown(wait, cancel_futures=cancel_futures)\n"
        "        raise RuntimeError('odd')\n"
    )
    env = {"PYTHONPATH": str(runs.folder)}
    ended = runs.exec(
        "@task\ndef one(n=each(range(4))): pass\n", "--engine", "odd:Odd", "-j", "2", env=env
    ).check()
    assert "odd:Odd did not end as it should: RuntimeError: odd\n" in ended.err
    assert "Traceback" not in ended.err


# -- what an engine cannot do ---------------------------------------------------------


def test_waiting_for_a_call_is_refused_where_no_slot_can_be_lent(runs: Runs) -> None:
    ended = runs.exec(
        """
        import asyncio

        @task(default=False)
        def one(): return 1

        @task
        def waits(): return one.submit().result()

        @task
        async def awaits(): return await one.submit()
        """,
        "--engine", THREADS, "-k",
    )  # fmt: skip
    assert ended.status == 1
    assert ended.err.count("no slot to lend: return the future") >= 2


def test_a_resource_that_nobody_has_is_said_at_once(runs: Runs) -> None:
    ended = runs.exec(
        """
        @task(resources={"gpu": 1})
        def needy(): pass
        """,
        "--engine", THREADS,
    ).check(3)  # fmt: skip
    assert "needy needs gpu=1 (there is none)" in ended.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dusk", "did you mean dask?"),
        ("dask://", "the address is missing"),
        ("http://here:1", "it is dask, dask://HOST:PORT"),
        ("nothing", "MODULE:FACTORY"),
    ],
)
def test_an_engine_that_cannot_be_is_a_usage_error(text: str, said: str) -> None:
    with pytest.raises(errors.UsageError, match=said.replace("?", "[?]")):
        check(text)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("no_such_module:Executor", "No module named 'no_such_module'"),
        ("concurrent.futures:ThreadExecutor", "there is no ThreadExecutor in concurrent.futures"),
        ("builtins:dict", "which is no executor: it has no submit()"),
    ],
)
def test_a_factory_that_makes_no_executor_is_said(runs: Runs, engine: str, said: str) -> None:
    ended = runs.exec("@task\ndef one(): pass\n", "--engine", engine)
    assert ended.status in (2, 3)
    assert said in ended.err


def test_a_missing_package_is_an_error_that_names_the_pip_command(runs: Runs) -> None:
    hide = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "distributed" else find(name, *rest)
from taskrun.cli.main import main
raise SystemExit(main())
"""
    (runs.folder / "hidden.py").write_text(hide)
    runs.write("@task\ndef one(): pass\n")
    ended = runs.run(
        "exec", "tasks.py", "--engine", "dask", program=(sys.executable, "hidden.py")
    ).check(2)
    assert "pip install 'taskrun[dask]'" in ended.err


def test_a_worker_with_another_version_refuses_and_names_both() -> None:
    with pytest.raises(errors.RunError) as refused:
        execute("taskrun 9.9, Python 3.99", b"", b"")
    assert "taskrun 9.9, Python 3.99" in str(refused.value)
    assert VERSION in str(refused.value)


# -- a Dask scheduler that is not ours ------------------------------------------------


class Cluster:
    """A Dask scheduler and its workers, as others start them."""

    def __init__(self, folder: Path, *options: str, workers: int = 2) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.folder = folder
        words = "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard"
        self.scheduler = self._start("scheduler", *words)
        self.workers = [
            self._start("worker", f"tcp://{self.address}", "--nthreads", "1", "--no-dashboard",
                        "--local-directory", str(folder), *options)
            for _ in range(workers)
        ]  # fmt: skip

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *words],
            cwd=self.folder,
            env={**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Meanwhile no worker does anything; all have joined."""
        for worker in self.workers:
            wait_until(
                lambda one=worker: any(self.knows(child.pid) for child in _children(one)), 40
            )
        alive = [
            one
            for worker in self.workers
            for one in (psutil.Process(worker.pid), *_children(worker))
        ]
        for process in alive:
            process.suspend()
        try:
            yield
        finally:
            for process in alive:
                process.resume()

    def knows(self, pid: int) -> bool:
        """Whether a process is connected to the scheduler."""
        ends = psutil.Process(pid).net_connections("tcp")
        return any(end.raddr and end.raddr.port == self.port for end in ends)

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            children = _children(process)
            process.kill()
            process.wait(10)
            for child in children:
                if child.is_running():
                    child.kill()


def _children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("dask"), "--resources", "lathe=1")
    yield made
    made.close()


@with_dask
def test_a_file_runs_on_a_scheduler_that_is_there(runs: Runs, cluster: Cluster) -> None:
    ended = runs.exec(
        """
        from taskrun import state
        seen = state.counter("seen")

        @task
        def data(): return bytes(3_000_000)

        @task(timeout=20)
        def size(data=result(data)): seen.add(1); return len(data)

        @task(resources={"lathe": 1})
        def turned(n=each(range(4))): print("turned", n); seen.add(1); return n

        @task
        def total(size=result(size), turned=result(turned)):
            print("total", size, sum(turned), seen.get())
        """,
        "--engine", f"dask://{cluster.address}", "--resource", "lathe=2", deadline=60,
    ).check()  # fmt: skip
    assert "total | total 3000000 6 5" in ended.out
    assert "turned[3] | turned 3" in ended.out


TRAVELLER = """
from pathlib import Path
from taskrun import state
import helper

@task
def moved(): helper.check()

@task(timeout=20, after=[moved])
def kept(): helper.check()
"""

HELPER = """
from pathlib import Path
from parts.one import ONE

def check():
    here = Path(__file__).parent
    print("travelled", {number} + ONE, (here / "data.csv").read_text(), here.name[:5])
"""


@with_dask
def test_modules_and_named_files_beside_the_task_file_travel(runs: Runs, cluster: Cluster) -> None:
    parts, hidden = runs.folder / "parts", runs.folder.parent / f"{runs.folder.name}-hidden"
    parts.mkdir()
    (parts / "__init__.py").touch()
    (parts / "one.py").write_text("ONE = 1")
    cache = cluster.folder / "cache"
    for number in (41, 51):  # the workers, which stay, get the new ones
        (runs.folder / "helper.py").write_text(HELPER.format(number=number))
        (runs.folder / "data.csv").write_text(f"a{number}")
        with cluster.stopped():
            running = runs.start_exec(
                TRAVELLER, "--engine", f"dask://{cluster.address}", "--bundle", "*.csv"
            )
            wait_until(lambda running=running: cluster.knows(running.process.pid), 30)
            runs.folder.rename(hidden)
        try:
            ended = running.end(60).check()
        finally:
            hidden.rename(runs.folder)
        said = {line.split("travelled ")[1] for line in ended.out.splitlines() if "travel" in line}
        (folder,) = {word.split()[-1] for word in said}
        assert said == {f"{number + 1} a{number} {folder}"}
        assert any(path.name.startswith(folder) for path in (cache / "taskrun/files").iterdir())


@with_dask
def test_a_resource_that_no_dask_worker_has_is_said(runs: Runs, cluster: Cluster) -> None:
    ended = runs.exec(
        """
        @task(resources={"press": 1})
        def pressed(): pass
        """,
        "--engine", f"dask://{cluster.address}", "--resource", "press=1", deadline=60,
    ).check(1)  # fmt: skip
    assert "needs press=1 (there is none): nobody on dask://" in ended.err


@with_dask
def test_a_killed_dask_worker_costs_the_call_an_attempt_that_is_counted(
    runs: Runs, cluster: Cluster
) -> None:
    ended = runs.json(
        """
        @task
        def die():
            with open(os.environ["FOLDER"] + "/attempts", "a") as file: file.write("x")
            os._exit(3)
        """.replace('os.environ["FOLDER"]', repr(str(runs.folder))),
        "--engine", f"dask://{cluster.address}", deadline=60,
    )  # fmt: skip
    assert ended.failure("die")["type"] == "WorkerLost"
    assert (runs.folder / "attempts").read_text() == "x"


LONG = """
@task(cancellable={cancellable})
def long():
    mark({name!r} + "began")
    try: doze()
    finally: mark({name!r} + "tidied")
"""


def start_long(runs: Runs, cluster: Cluster, name: str, *, cancellable: bool = True) -> Running:
    """Start a run on ``cluster``, and wait until its call marks that it is at work."""
    source = LONG.format(name=f"{runs.folder}/{name}", cancellable=cancellable)
    running = runs.start_exec(source, "--engine", f"dask://{cluster.address}")
    wait_until((runs.folder / f"{name}began").exists, 40)
    return running


@with_dask
def test_a_call_that_a_cluster_goes_on_with_is_named_as_still_running(
    runs: Runs, cluster: Cluster
) -> None:
    running = start_long(runs, cluster, "", cancellable=False)
    running.signal(signal.SIGINT)
    ended = running.end(20)
    assert ended.status == 130
    assert f"long is still running on dask://{cluster.address}" in ended.err
    assert not (runs.folder / "tidied").exists()


@with_dask
def test_what_ends_a_run_on_a_cluster_leaves_the_calls_of_others_alone(
    runs: Runs, cluster: Cluster
) -> None:
    one, other = (start_long(runs, cluster, name) for name in ("one-", "other-"))
    one.signal(signal.SIGINT)
    assert one.end(20).status == 130
    assert (runs.folder / "one-tidied").exists()
    assert not (runs.folder / "other-tidied").exists()
    other.signal(signal.SIGINT)
    assert other.end(20).status == 130
    assert (runs.folder / "other-tidied").exists()


@with_dask
def test_cancellable_calls_on_a_cluster_end_when_their_coordinator_is_killed(
    runs: Runs, cluster: Cluster
) -> None:
    running = start_long(runs, cluster, "")
    running.process.kill()
    wait_until((runs.folder / "tidied").exists)


@with_dask
def test_a_killed_scheduler_is_a_clear_failure_within_ten_seconds(
    runs: Runs, cluster: Cluster
) -> None:
    folder = runs.folder
    running = runs.start_exec(
        f"""
        @task
        def long():
            open({str(folder / "began")!r}, "w").close()
            time.sleep(20)
        """,
        "--engine", f"dask://{cluster.address}",
    )  # fmt: skip
    wait_until((folder / "began").exists)
    cluster.scheduler.kill()
    ended = running.end(15)
    assert ended.status == 3, ended.err
    assert f"the Dask scheduler at dask://{cluster.address} is gone" in ended.err


@with_dask
def test_tls_without_certificates_says_which_settings_name_them(runs: Runs) -> None:
    ended = runs.exec("@task\ndef one(): pass\n", "--engine", "tls://127.0.0.1:1", deadline=25)
    assert ended.status == 3
    assert "DASK_DISTRIBUTED__COMM__TLS__CA_FILE" in ended.err
    assert "Traceback" not in ended.err


@with_dask
def test_an_unreachable_scheduler_is_named_within_its_time(runs: Runs) -> None:
    port = free_port()
    ended = runs.exec(
        "@task\ndef one(): pass\n", "--engine", f"dask://127.0.0.1:{port}", deadline=25
    )
    assert ended.status == 3
    assert f"the Dask scheduler at dask://127.0.0.1:{port} cannot be reached" in ended.err
