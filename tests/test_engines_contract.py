"""What every engine does: the same task file, on each of them, with the same outcome."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import Ended, Runs, started, wait_until

pytestmark = pytest.mark.timeout(120)

THREADS = "concurrent.futures:ThreadPoolExecutor"
PROCESSES = "concurrent.futures:ProcessPoolExecutor"
LOKY = "loky:get_reusable_executor"
NEEDS = {LOKY: "loky", "dask": "distributed", "ray": "ray"}
ENGINES = ["own", "inline", "fake", THREADS, PROCESSES, LOKY, "dask", "ray"]


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a Ray cluster on this machine, and what its clients have to know: to start
    one takes ten seconds, so that the tests here share it."""
    if importlib.util.find_spec("grpc") is None:
        pytest.skip("ray[client] is not installed")
    port, client_port = free_port(), free_port()
    known = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    folder = tmp_path_factory.mktemp("ray")
    with open(folder / "log", "wb") as log:
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
             "--node-ip-address=127.0.0.1", "--num-cpus=2", f"--port={port}",
             f"--ray-client-server-port={client_port}", "--include-dashboard=false",
             "--disable-usage-stats"],
            env={**os.environ, **known}, cwd=folder, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_until(lambda: accepts(client_port), 60, "Ray does not listen")
        yield f"ray://127.0.0.1:{client_port}", known
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        _, alive = psutil.wait_procs([*children, psutil.Process(head.pid)], 10)
        for process in alive:
            process.kill()
        head.wait(10)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Bench:
    """Runs task files on one engine."""

    def __init__(self, runs: Runs, engine: str, env: dict[str, str]) -> None:
        self.runs = runs
        self.engine = engine
        self.env = env

    @property
    def words(self) -> list[str]:
        return {"own": [], "inline": ["--inline"]}.get(self.engine, ["--engine", self.engine])

    def exec(self, source: str, *words: str, **how: Any) -> Ended:
        how = {"deadline": 60.0, "env": self.env, **how}
        return self.runs.exec(source, *self.words, "-j", "2", *words, **how)

    def json(self, source: str, *words: str, **how: Any) -> Ended:
        return self.exec(source, "--json", *words, **how)


@pytest.fixture(params=ENGINES)
def bench(request: pytest.FixtureRequest, runs: Runs) -> Bench:
    package = NEEDS.get(request.param)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if request.param == "ray":
        return Bench(runs, *request.getfixturevalue("ray_cluster"))
    return Bench(runs, request.param, {})


def test_values_go_from_call_to_call(bench: Bench) -> None:
    ended = bench.exec(
        """
        @task
        def numbers(): return list(range(20))

        @task
        def square(n=each(numbers)): return n * n

        @task
        def total(squares=result(square)): print("total", sum(squares))
        """
    ).check()
    assert "total 2470" in ended.out


def test_coroutines_and_generators_run_to_their_end(bench: Bench) -> None:
    ended = bench.exec(
        """
        import asyncio

        @task
        def letters():
            yield from "abc"

        @task
        async def upper(letter=each(letters)):
            await asyncio.sleep(0.01)
            return letter.upper()

        @task
        def word(letters=result(upper)): print("".join(letters))
        """
    ).check()
    assert "ABC" in ended.out


def test_a_failure_is_told_with_its_traceback_and_output(bench: Bench) -> None:
    ended = bench.exec(
        """
        @task
        def broken():
            print("about to fail")
            raise ValueError("bad row")
        """
    ).check(1)
    assert "ValueError: bad row" in ended.err + ended.out
    assert "about to fail" in ended.err + ended.out
    assert "in broken" in ended.err + ended.out


def test_a_failed_call_is_tried_again(bench: Bench) -> None:
    ended = bench.json(
        """
        @task(retries=2)
        def flaky():
            if current().attempt < 3: raise OSError("not yet")
        """
    ).check()
    assert ended.states == {"flaky": "ok"}


def test_an_unpicklable_result_and_a_strange_exception_are_outcomes(bench: Bench) -> None:
    ended = bench.json(
        """
        class Strange(Exception):
            def __init__(self, one, two): super().__init__(f"{one} and {two}")

        @task
        def lock(): return threading.Lock()

        @task
        def use(lock=result(lock)): pass

        @task
        def strange(): raise Strange("this", "that")
        """,
        "-k",
    )
    assert ended.status == 1, ended.err
    assert ended.failure("lock")["type"] == "ResultError"
    assert "this and that" in ended.failure("strange")["message"]


def test_submitted_calls_run_and_their_values_come_back(bench: Bench) -> None:
    ended = bench.exec(
        """
        @task
        def add(x, y): return x + y

        @task
        def tree():
            first, second = add.submit(1, 2), add.submit(3, 4)
            return [add.submit(first, second), add.submit(first, 10)]

        @task
        def show(tree=result(tree)): print("sums", tree)
        """,
        "show",
    ).check()
    assert "sums [10, 13]" in ended.out


def test_large_values_arrive_whole(bench: Bench) -> None:
    ended = bench.exec(
        """
        @task
        def zeros(): return bytes(3_000_000)

        @task
        def ones(data=result(zeros)): return data.replace(b"\\0", b"1")

        @task
        def parts(): return [bytes([n]) * 300_000 for n in range(3)]

        @task
        def length(part=each(parts)): return len(set(part)), part[0], len(part)

        @task
        def count(data=result(ones), lengths=result(length)):
            print("counted", len(data), data.count(b"1"), lengths)
        """
    ).check()
    assert "counted 3000000 3000000 [(1, 0, 300000), (1, 1, 300000), (1, 2, 300000)]" in ended.out


def test_what_calls_write_is_theirs(bench: Bench) -> None:
    if bench.engine == "inline":
        pytest.skip("inline captures nothing")
    ended = bench.exec(
        """
        @task
        def speak(n=each(range(4))):
            sys.stdout.reconfigure(encoding="utf-8", line_buffering=True)
            print("hello", n)
            print("aside", n, file=sys.stderr)
            sh("echo from a shell {n}")
        """
    ).check()
    for n in range(4):
        assert f"speak[{n}] | hello {n}" in ended.out
        assert f"speak[{n}] | from a shell {n}" in ended.out
        assert f"speak[{n}] | aside {n}" in ended.err


def test_current_says_who_a_call_is(bench: Bench) -> None:
    ended = bench.exec(
        """
        @task
        def who(n=each(range(2))):
            print(current().task, current().call, current().attempt, current().pid == os.getpid())
        """
    ).check()
    for n in range(2):
        assert f"who who[{n}] 1 True" in ended.out


def test_what_cannot_run_after_a_failure_is_skipped(bench: Bench) -> None:
    ended = bench.json(
        """
        @task
        def broken(): raise RuntimeError("no")

        @task
        def after(x=result(broken)): pass

        @task
        def tolerant(x=result(broken, errors="keep")): assert isinstance(x, RuntimeError)
        """,
        "-k",
    )
    assert ended.status == 1
    assert ended.states == {"broken": "failed", "after": "skipped", "tolerant": "ok"}


def test_calls_share_state(bench: Bench) -> None:
    ended = bench.exec(
        """
        from taskrun import state
        seen = state.dict("seen")
        turn = state.lock("turn")

        @task
        def note(n=each(range(6))):
            with turn: seen[n] = n * n

        @task(after=[note])
        def read(): print("seen", sorted(seen.items()))
        """
    ).check()
    assert "seen [(0, 0), (1, 1), (2, 4), (3, 9), (4, 16), (5, 25)]" in ended.out
