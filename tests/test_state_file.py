"""Shared state in a file: kept from run to run, whatever ends a run."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from multiprocessing import managers
from pathlib import Path
from typing import Any

import pytest
from harness import Runs, lines_of, started, wait_until
from state_support import FORK, Live, own_runtime

from taskrun import connect
from taskrun.errors import RunError, UsageError
from taskrun.manager import SyncManager
from taskrun.reactor import Reactor
from taskrun.state.connecting import Connected
from taskrun.state.file import StateFile, _Tracked
from taskrun.state.store import Store

__all__ = ["own_runtime"]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def runs(tmp_path: Path, own_runtime: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


def kept_in(path: Path, look: Callable[[Connected], Any]) -> Any:
    """What ``look`` sees of the state in a file."""
    live = Live(file=str(path))
    try:
        return look(live.connect())
    finally:
        live.close()


HELD = """
@task
def work():
    state.dict("pages").update({"a": [1, 2], ("x", 1): {"k": "v"}})
    state.counter("n").add(5)
    state.set("s").update("ab")
    print("filled")
    print(state.queue("go").get())
"""

KEEPS = """
d, l, s, q = state.dict("d"), state.list("l"), state.set("s"), state.queue("q")
@task
def work():
    d.update({"a": [1], ("t", 1): 2, "gone": 3}); del d["gone"]; d["a"] = [1, 2]
    l.extend(range(5)); l.insert(0, "first"); del l[3]; l.append("last")
    s.update("abc"); s.discard("b")
    q.put_many("xyz"); q.get()
    state.counter("n").add(1); state.event("e").set()
"""
SHOWS = """
@task
def work():
    print(state.dict("d").copy(), state.list("l").copy(), sorted(state.set("s")))
    print([state.queue("q").get() for _ in range(2)], state.counter("n").add(1),
          state.event("e").is_set())
"""


def test_state_is_kept_in_a_file(runs: Runs) -> None:
    runs.exec(KEEPS, "--state", "kept.db").check()
    for more in (2, 3):
        done = runs.exec(SHOWS if more == 2 else SHOWS.replace("range(2)", "range(0)"),
                         "--state", "kept.db").check()  # fmt: skip
        assert lines_of(done.out, "work") == [
            "{'a': [1, 2], ('t', 1): 2} ['first', 0, 1, 3, 4, 'last'] ['a', 'c']",
            f"{['y', 'z'] if more == 2 else []} {more} True",
        ]


def test_of_two_equal_keys_the_one_that_is_in_the_dict_is_kept(
    own_runtime: Path, tmp_path: Path
) -> None:
    for key in (1, True, 1.0):
        kept_in(tmp_path / "kept.db", lambda run, key=key: run.dict("d").update({key: "a"}))

    def again(run: Connected) -> list[Any]:
        d = run.dict("d")
        d[True] = "b"
        before = list(d.items())
        del d[1]
        d[True] = "c"
        return [*before, *d.items()]

    assert repr(kept_in(tmp_path / "kept.db", again)) == "[(1, 'b'), (True, 'c')]"
    assert kept_in(tmp_path / "kept.db", lambda run: repr(run.dict("d").copy())) == "{True: 'c'}"


def test_a_killed_run_loses_at_most_the_last_second(runs: Runs) -> None:
    run = runs.start_exec(
        """
        @task
        def work():
            for number in range(10_000):
                state.counter("n").set(number)
                print(number, time.monotonic(), flush=True)
                time.sleep(0.02)
        """,
        "--state", "kept.db", "--output", "raw",
    )  # fmt: skip
    run.await_line("120 ")
    run.signal(signal.SIGKILL)
    run.process.wait(20)
    run.assert_gone()
    times = {int(line.split()[0]): float(line.split()[1]) for line in run.out if " " in line}
    done = runs.exec("@task\ndef work(): print(state.counter('n').get())", "--state", "kept.db")
    kept = int(lines_of(done.check().out, "work")[0])
    assert kept and times[max(times)] - times[kept] < 1.0


def test_a_file_that_is_no_state_file_is_refused(runs: Runs, tmp_path: Path) -> None:
    source = "@task\ndef work(): print('ran')\n"
    (tmp_path / "text").write_text("this is no database, whatever it may be " * 100)
    assert (
        "cannot be used: file is not a database"
        in runs.exec(source, "--state", "text").check(2).err
    )
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("create table t (x)")
    other.close()
    assert "not a state file" in runs.exec(source, "--state", "other.db").check(2).err
    runs.exec(KEEPS, "--state", "kept.db").check()
    with sqlite3.connect(tmp_path / "kept.db") as kept:
        kept.execute("update item set value = x'00'")
    kept.close()
    assert "is damaged" in runs.exec(source, "--state", "kept.db").check(2).err
    assert "no/x.db cannot be used" in runs.exec(source, "--state", "no/x.db").check(2).err


def test_no_path_keeps_state_without_a_file(runs: Runs, tmp_path: Path) -> None:
    done = runs.exec(KEEPS, "--state", "").check(2)
    assert "the path of the state file is empty" in done.err
    runs.exec(KEEPS, "--state", ":memory:").check()
    runs.exec(SHOWS, "--state", ":memory:").check()
    assert (tmp_path / ":memory:").exists()


def test_a_file_belongs_to_one_run_at_a_time(runs: Runs) -> None:
    run = runs.start_exec(HELD, "-j1", "--state", "kept.db")
    run.await_line("filled")
    done = runs.run("exec", "tasks.py", "--state", "kept.db").check(2)
    assert "is used by another run" in done.err
    with connect() as seen:
        seen.queue("go").put(1)
    run.end().check()


# -- a full disk ----------------------------------------------------------------------


def fill_the_disk(full: bool) -> None:
    """What is beyond 128 KiB of a file can or cannot be written by this process."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17 if full else hard, hard))


def kept_through_a_full_disk(path: str) -> None:
    live = Live(file=path)
    connected = live.connect()
    d, items, n = connected.dict("d"), connected.list("l"), connected.counter("n")
    d["old"] = 1
    items.extend(range(5))
    fill_the_disk(True)
    d.update({number: b"x" * 1000 for number in range(1000)})
    items[3] = "three"
    n.add(1)
    wait_until(lambda: any("not kept for now" in notice for notice in live.notices))
    del d["old"], d[7], items[4]
    d["new"] = 2
    n.add(1)
    fill_the_disk(False)
    wait_until(lambda: any("is kept again" in notice for notice in live.notices))
    was = d.copy(), items.copy(), n.get()
    live.close()
    again = Live(file=path)
    connected = again.connect()
    kept = connected.dict("d").copy(), connected.list("l").copy(), connected.counter("n").get()
    again.close()
    assert len(kept[0]) == 1000 and kept == was
    assert len(live.notices) == 2


def test_what_a_full_disk_keeps_out_of_the_file_is_written_later(
    tmp_path: Path, own_runtime: Path
) -> None:
    child = FORK.Process(target=kept_through_a_full_disk, args=(str(tmp_path / "kept.db"),))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_run_whose_state_cannot_be_kept_ends_with_an_error(runs: Runs) -> None:
    source = """
    import resource

    @task
    def work(fails: bool = False):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
        state.dict("d").update({number: b"x" * 1000 for number in range(1000)})
        assert not fails
    """
    done = runs.exec(source, "--inline", "--state", "kept.db").check(3)
    assert "error: the last changes of the state could not be written: kept.db" in done.err
    done = runs.exec(source, "--inline", "--state", "kept.db", "-p", "fails=yes").check(1)
    assert "the last changes of the state could not be written: kept.db" in done.err
    assert "Traceback" not in done.err.replace("Traceback (most recent call last):", "", 2)


# -- what cannot be written, or not be read -------------------------------------------


def test_a_name_that_is_no_unicode_is_kept(own_runtime: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    for number in (1, 2):
        assert kept_in(tmp_path / "kept.db", lambda run: run.counter(name).add(1)) == number
        kept_in(tmp_path / "kept.db", lambda run: run.counter("caf\xe9").add(5))
    assert kept_in(tmp_path / "kept.db", lambda run: run.counter("caf\xe9").get()) == 10


def test_an_object_that_cannot_be_written_keeps_no_other_out_of_the_file(
    own_runtime: Path, tmp_path: Path
) -> None:
    live = Live(file=str(tmp_path / "kept.db"))
    live.service._file._database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
    connected = live.connect()
    connected.dict("large").update({"a": bytes(20_000), "b": 1})
    connected.counter("n").add(1)
    wait_until(lambda: any("'large' is not kept" in notice for notice in live.notices))
    connected.dict("large")["b"] = 2
    connected.counter("m").add(1)
    with pytest.raises(RunError, match=r"could not be written: .*kept\.db: 'large': .*too big"):
        live.service._file.close()
    live.service._file = None
    live.close()
    assert len(live.notices) == 1
    names = [("m", "counter", 1), ("n", "counter", 1)]
    assert kept_in(tmp_path / "kept.db", lambda run: run.names()) == names
    # What comes into the file later has a number of its own.
    kept_in(tmp_path / "kept.db", lambda run: run.dict("d").update({"a": 1}))
    assert kept_in(
        tmp_path / "kept.db", lambda run: (run.dict("d").copy(), run.counter("m").get())
    ) == ({"a": 1}, 1)


def test_an_object_that_could_not_be_written_is_when_it_has_changed(
    own_runtime: Path, tmp_path: Path
) -> None:
    live = Live(file=str(tmp_path / "kept.db"))
    live.service._file._database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
    d = live.connect().dict("d")
    d.update({"a": bytes(20_000), "b": 1})
    wait_until(lambda: live.notices)
    d["a"] = 2
    wait_until(lambda: any("'d' is kept again" in notice for notice in live.notices))
    live.close()
    assert kept_in(tmp_path / "kept.db", lambda run: run.dict("d").copy()) == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    "damage",
    [
        "update object set kind = 'lock'",
        "update object set kind = 'hologram'",
        "update object set name = x'ff'",
        "update object set options = x'4b052e'",
        "update item set value = x'636e6f70650a6e6f70650a2e'",  # nope.nope
        "update item set value = x'636275696c74696e730a657869740a2874522e'",  # would exit
        "update item set key = x'80'",
        "update item set key = null",
        "drop table item",
    ],
)
def test_whatever_is_damaged_in_a_file_is_a_usage_error_that_names_it(
    own_runtime: Path, tmp_path: Path, damage: str
) -> None:
    path = str(tmp_path / "kept.db")
    kept_in(tmp_path / "kept.db", lambda run: run.dict("d").update({"a": 1}))
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(damage)
    with contextlib.closing(Reactor()) as reactor:
        file = StateFile(path, Store(), reactor, print)
        with pytest.raises(UsageError, match=r"the state file .*kept\.db is damaged: ."):
            file.start()
        file.close()


@pytest.mark.parametrize("kind", [managers.SyncManager, SyncManager])
def test_a_proxy_that_is_collected_while_the_state_is_written_does_not_stop_the_run(
    kind: Any, own_runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = Live(file=str(tmp_path / "kept.db"))
    taken, threads = _Tracked.taken, set()

    def collect(tracked: Any) -> Any:
        threads.add(threading.current_thread().name)  # it has the store to itself
        gc.collect()
        return taken(tracked)

    monkeypatch.setattr(_Tracked, "taken", collect)
    gc.disable()
    try:
        client = kind(address=live.service.address, authkey=live.service.authkey)
        client.connect()
        cycle: list[Any] = [client.list()]
        cycle.append(cycle)
        del cycle
        ours = live.connect()
        ours.dict("d")["key"] = 1
        wait_until(lambda: threads)
        assert ours.dict("d")["key"] == 1
    finally:
        gc.enable()
        live.close()
    assert "state file" in threads
