"""The load test of the examples: its parts, and the whole of it with few sockets."""

from __future__ import annotations

import asyncio
import http.server
import importlib.util
import pickle
import re
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "loadtest"
MODULES = ("clients", "descriptors", "figures", "echoing")
SECONDS = 60  # the deadline of each run
SERVERS = ("select", "selectors", "asyncio")

needs_hdrhistogram = pytest.mark.skipif(
    not importlib.util.find_spec("hdrh"), reason="hdrhistogram is not installed"
)
needs_aiohttp = pytest.mark.skipif(
    not importlib.util.find_spec("aiohttp"), reason="aiohttp is not installed"
)


@pytest.fixture
def example() -> Iterator[Any]:
    """The example's modules, and its task file as ``tasks``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        spec = importlib.util.spec_from_file_location("example_loadtest", FOLDER / "tasks.py")
        assert spec is not None and spec.loader is not None
        tasks = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tasks)
        yield SimpleNamespace(tasks=tasks, **{name: sys.modules[name] for name in MODULES})
        for name in MODULES:
            del sys.modules[name]


@contextmanager
def serving(name: str, sockets: int = 100) -> Iterator[tuple[str, int]]:
    """One of the example's servers; fails if it does not end with its input."""
    program = [sys.executable, str(FOLDER / "echoing.py"), name, str(sockets)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield "127.0.0.1", int(process.stdout.readline())
            process.communicate(timeout=SECONDS)
            assert process.returncode == 0
        finally:
            process.kill()


def execute(cwd: Path, *parameters: str) -> subprocess.CompletedProcess[str]:
    options = [word for parameter in parameters for word in ("-p", parameter)]
    program = [sys.executable, "-m", "taskrun", "exec", str(FOLDER / "tasks.py"), "-j", "2"]
    return subprocess.run(
        [*program, "--output", "raw", *options],
        cwd=cwd, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip


# -- servers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_keeps_the_parts_of_each_client_apart(name: str) -> None:
    with serving(name) as place:
        clients = [socket.create_connection(place, timeout=SECONDS) for _ in range(3)]
        for part in ("{0} one, ", "{0} two, ", "{0} three\n"):
            for number, client in enumerate(clients):
                client.sendall(part.format(number).encode())
        for number, client in enumerate(clients):
            with client, client.makefile() as file:
                assert file.readline() == f"{number} one, {number} two, {number} three\n"


@pytest.mark.parametrize("name", SERVERS)
def test_a_client_that_leaves_in_the_middle_does_no_harm(name: str) -> None:
    with serving(name) as place:
        for _ in range(3):
            with socket.create_connection(place, timeout=SECONDS) as client:
                client.sendall(b"half a ")
        with socket.create_connection(place, timeout=SECONDS) as client:
            client.sendall(b"whole\n")
            assert client.recv(100) == b"whole\n"


def test_the_select_server_hangs_up_where_select_ends_and_goes_on() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1400:
        pytest.skip(f"a process may have {hard} descriptors here, and this takes 1,400")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1400), hard))
    try:
        with serving("select", 1200) as place:
            clients = [socket.create_connection(place, timeout=SECONDS) for _ in range(1100)]
            clients[0].sendall(b"x\n")
            assert clients[0].recv(10) == b"x\n"
            assert clients[-1].recv(10) == b""
            for client in clients:
                client.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- clients --------------------------------------------------------------------------


@needs_hdrhistogram
def test_wrong_answers_and_hanging_up_are_counted_by_name(example: Any) -> None:
    async def test() -> tuple[Any, Any]:
        async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(b"a lie\n")
            writer.close()

        async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.close()

        results = []
        for behaviour in (lie, leave):
            async with await asyncio.start_server(behaviour, "127.0.0.1", 0) as server:
                port = server.sockets[0].getsockname()[1]
                target = f"tcp://127.0.0.1:{port}"
                results.append(await example.clients.load(target, 3, 5.0, lambda load: None))
        return results[0], results[1]

    lied, left = asyncio.run(asyncio.wait_for(test(), SECONDS))
    assert lied.errors == {"wrong answer": 3} and lied.requests == 0
    assert left.errors == {"the server has hung up": 3}


@needs_hdrhistogram
def test_a_server_that_is_not_there_is_an_error_of_each_connection(example: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    target = f"tcp://127.0.0.1:{port}"
    found = asyncio.run(example.clients.load(target, 2, 1.0, lambda load: None))
    (count,) = found.errors.values()
    assert count == 2 and found.requests == 0


@needs_hdrhistogram
def test_percentiles_of_two_processes_are_those_of_all_their_requests(example: Any) -> None:
    loads = [example.figures.Load(seconds=1.0), example.figures.Load(seconds=2.0)]
    for milliseconds in range(1, 1001):
        load = loads[milliseconds > 900]  # one process had the fast ones
        load.latencies.record(milliseconds / 1000)
        load.requests += 1
    whole = example.figures.Load()
    for load in loads:
        whole.add(pickle.loads(pickle.dumps(load)))
    assert whole.latencies.at(50) == pytest.approx(0.5, rel=0.002)
    assert whole.latencies.at(99) == pytest.approx(0.99, rel=0.002)
    assert whole.latencies.at(100) == pytest.approx(1.0, rel=0.002)
    assert whole.rate == 500


@needs_hdrhistogram
def test_too_few_descriptors_are_an_error_that_says_what_to_do(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    example.descriptors.allow(100)
    with pytest.raises(example.descriptors.TooFewDescriptors) as caught:
        example.descriptors.allow(11_000)
    assert "11,000 sockets need 11,100 descriptors, and a process may have 4,096" in str(caught)
    assert "-p sockets=3996" in str(caught)


# -- which targets --------------------------------------------------------------------


@needs_hdrhistogram
@pytest.mark.parametrize(
    "target", ["tcp://127.0.0.1:7000", "http://localhost/", "https://127.9.9.9/x", "tcp://[::1]:7"]
)
def test_this_machine_may_be_loaded(example: Any, target: str) -> None:
    example.tasks.check_target(target, anywhere=False)


@needs_hdrhistogram
def test_another_machine_needs_an_explicit_yes(example: Any) -> None:
    with pytest.raises(example.tasks.NotThisMachine, match=r"192\.0\.2\.1 is another machine"):
        example.tasks.check_target("tcp://192.0.2.1:7000", anywhere=False)
    example.tasks.check_target("tcp://192.0.2.1:7000", anywhere=True)


@needs_hdrhistogram
@pytest.mark.parametrize("target", ["127.0.0.1:7000", "tcp://127.0.0.1", "ftp://localhost/"])
def test_what_is_no_target_is_refused(example: Any, target: str) -> None:
    with pytest.raises(ValueError, match="is neither"):
        example.tasks.check_target(target, anywhere=True)


# -- the whole ------------------------------------------------------------------------


@needs_hdrhistogram
@pytest.mark.parametrize(
    ("parameter", "says"),
    [
        ("connections=0", "connections=0: there must be 1 at least; set -p connections=..."),
        ("processes=0", "processes=0: there must be 1 at least"),
        ("sockets=-1", "sockets=-1: there must be 0 at least"),
        ("seconds=nan", "seconds=nan: it must be more than 0"),
    ],
)
def test_what_is_no_load_is_an_error_that_says_so(
    parameter: str, says: str, tmp_path: Path
) -> None:
    done = execute(tmp_path, parameter)
    assert done.returncode == 1
    assert f"ValueError: {says}" in done.stderr and "asyncio" not in done.stderr


@needs_hdrhistogram
def test_the_three_servers_hold_all_sockets(tmp_path: Path) -> None:
    done = execute(tmp_path, "sockets=300", "seconds=1.2", "connections=10")
    assert done.returncode == 0, done.stdout + done.stderr
    for server in SERVERS:
        row = re.search(rf"^{server} +([\d,]+)(?: +[\d.]+ ms){{5}} +0 +300$", done.stdout, re.M)
        assert row, done.stdout
        assert int(row[1].replace(",", "")) > 0
    assert re.search(r"^select +[\d,]+ requests/s +0 errors$", done.stdout, re.MULTILINE)


@needs_hdrhistogram
def test_a_run_against_another_machine_fails_before_anything_is_sent(tmp_path: Path) -> None:
    done = execute(tmp_path, "target=tcp://192.0.2.1:7000")
    assert done.returncode == 1
    assert "-p anywhere=true" in done.stderr
    assert "keep_busy" not in done.stderr


@needs_hdrhistogram
@needs_aiohttp
def test_a_web_server_is_loaded_and_its_errors_are_counted(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("hello")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words, directory=str(tmp_path))

        def log_message(self, *words: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = f"http://127.0.0.1:{server.server_port}"
        few = ("seconds=0.5", "connections=2")
        found = execute(tmp_path, f"target={target}/page.html", *few)
        missing = execute(tmp_path, f"target={target}/nothing.html", *few)
        server.shutdown()
    assert found.returncode == missing.returncode == 0, found.stderr + missing.stderr
    assert re.search(r"page\.html +[\d,]+(?: +[\d.]+ ms){5} +0 +-$", found.stdout, re.MULTILINE)
    assert "under load: 4 x status 404" in missing.stdout
