"""The channel between a running call and whoever submitted it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Runs, started
from test_steering import socket_of

from taskrun import current
from taskrun.errors import ChannelClosed

pytestmark = pytest.mark.timeout(120)

BOTH_LANES = pytest.mark.parametrize("lane", ["process", "async"])


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


ECHO = {
    "process": """
from taskrun.errors import ChannelClosed

@task(default=False)
def echo():
    for message in current().channel:
        current().channel.send(("heard", message))
    return "closed"

@task
def submits():
    future = echo.submit()
    for message in ("a", {"b": 1}, b"c" * 100_000):
        future.channel.send(message)
    heard = [future.channel.recv()[1] for _ in range(3)]
    assert heard == ["a", {"b": 1}, b"c" * 100_000], heard
    future.channel.close()
    print(future.result())
""",
    "async": """
from taskrun.errors import ChannelClosed

@task(default=False)
async def echo():
    async for message in current().channel:
        current().channel.send(("heard", message))
    return "closed"

@task
async def submits():
    future = echo.submit()
    for message in ("a", {"b": 1}, b"c" * 100_000):
        future.channel.send(message)
    heard = [(await future.channel.recv_async())[1] for _ in range(3)]
    assert heard == ["a", {"b": 1}, b"c" * 100_000], heard
    future.channel.close()
    print(await future)
""",
}


@BOTH_LANES
def test_messages_go_both_ways_until_an_end_is_closed(runs: Runs, lane: str) -> None:
    ended = runs.exec(ECHO[lane], "-j1")
    assert ended.status == 0, ended.err
    assert "submits | closed" in ended.out


def test_the_end_of_the_call_is_noticed_by_the_submitter(runs: Runs) -> None:
    source = """
        from taskrun.errors import ChannelClosed

        @task(default=False)
        def says(what):
            current().channel.send(what)
            if what == "dies": os._exit(3)

        @task
        def submits():
            for what in ("ends", "dies"):
                future = says.submit(what)
                assert list(future.channel) == [what]
                try: future.channel.send("anybody?")
                except ChannelClosed: print("nobody after", what)
                assert isinstance(future.exception(), Exception) == (what == "dies")
        """
    ended = runs.exec(source, "-j2", "-k")
    assert ended.status == 0, ended.err
    assert "nobody after ends" in ended.out and "nobody after dies" in ended.out


def test_the_end_of_the_submitter_is_noticed_by_the_call(runs: Runs) -> None:
    source = """
        @task(default=False)
        def listens():
            mark("listens")
            print("heard", list(current().channel))

        @task
        def submits():
            future = listens.submit()
            while not os.path.exists("listens"): time.sleep(0.01)
            future.channel.send("once")
        """
    ended = runs.exec(source, "-j2")
    assert ended.status == 0, ended.err
    assert "heard ['once']" in ended.out


def test_a_channel_goes_on_with_the_next_attempt(runs: Runs) -> None:
    source = """
        @task(default=False, retries=1)
        def listens():
            if current().attempt == 1: os.kill(os.getpid(), 9)
            return current().channel.recv(timeout=10)

        @task
        def submits():
            future = listens.submit()
            future.channel.send("kept")
            print(future.result())
        """
    ended = runs.exec(source, "-j2")
    assert ended.status == 0, ended.err
    assert "submits | kept" in ended.out


def test_waiting_for_a_message_lends_the_slot_and_may_have_an_end(runs: Runs) -> None:
    source = """
        @task(default=False)
        def slow():
            current().channel.send("soon")
            time.sleep(0.5)

        @task
        def submits():
            future = slow.submit()
            assert future.channel.recv() == "soon"
            try: future.channel.recv(timeout=0.05)
            except TimeoutError: print("not yet")
        """
    ended = runs.exec(source, "-j1")
    assert ended.status == 0, ended.err
    assert "not yet" in ended.out


def test_a_call_may_be_told_something_from_a_terminal(runs: Runs) -> None:
    source = """
        @task
        def listens():
            mark("begun")
            print("told", current().channel.recv())

        @task
        def other(): pass
        """
    running = runs.start_exec(source, "-j2")
    running.await_file(runs.folder / "begun")
    address = f"unix:{socket_of(running)}"
    runs.run("tell", address, "listens", "go on").check()
    ended = running.end()
    assert ended.status == 0, ended.err
    assert "told go on" in ended.out


def test_a_call_that_has_ended_is_told_nothing(runs: Runs) -> None:
    source = """
        @task
        def quick(): pass

        @task(after=[quick])
        def waits():
            mark("begun")
            current().channel.recv()
        """
    running = runs.start_exec(source, "-j2")
    running.await_file(runs.folder / "begun")
    address = f"unix:{socket_of(running)}"
    refused = runs.run("tell", address, "quick", "hello")
    assert refused.status == 2 and "quick hears nothing more: it is ok" in refused.err
    runs.run("tell", address, "waits", "hello").check()
    assert running.end().status == 0


def test_outside_a_run_there_is_nobody_at_the_other_end() -> None:
    with pytest.raises(ChannelClosed):
        current().channel.recv()
