"""Shared state in real runs: every worker sees it, waits lend the slot, deaths release."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import Runs, lines_of, started, wait_until
from state_support import own_runtime

from taskrun import addresses, connect
from taskrun.errors import StateError, StateLost, UsageError

__all__ = ["own_runtime"]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def runs(tmp_path: Path, own_runtime: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


EVERYTHING = """
d, l, s, c = state.dict("d"), state.list("l"), state.set("s"), state.counter("c")
lock = state.lock("lock")

@task
def work(i=each(range(12))):
    for _ in range(20):
        c.add(1)
        d.update_at("n", lambda n: n + 1, 0)
    l.append(i)
    with lock:
        d["locked"] = d.get("locked", 0) + 1
    return s.add(i % 5)

@task
async def later(i=each(range(3))):
    async with lock:
        d["locked"] = d.get("locked", 0) + 1  # it may be the first

@task(after=[later])
def total(new=result(work)):
    print(sum(new), c.get(), d["n"], sorted(l) == list(range(12)), d["locked"], s == set(range(5)))
"""


@pytest.mark.parametrize("how", [["-j", "4"], ["--inline"], ["-j2", "--start-method", "spawn"]])
def test_every_worker_sees_the_same_state(runs: Runs, how: list[str]) -> None:
    done = runs.exec(EVERYTHING, "--output", "raw", *how).check()
    assert done.out == "5 240 240 True 15 True\n"


def test_threads_and_forked_children_of_a_call_see_it_too(runs: Runs) -> None:
    done = runs.exec(
        """
        c = state.counter("c")
        @task
        def work():
            c.add(1)
            thread = threading.Thread(target=c.add, args=(10,))
            thread.start()
            thread.join()
            pid = os.fork()
            if pid == 0:
                c.add(100)
                os._exit(0)
            os.waitpid(pid, 0)
            print(c.add(1000))
        """
    ).check()
    assert lines_of(done.out, "work") == ["1111"]


def test_use_while_the_file_is_imported_is_an_error_that_says_so(runs: Runs) -> None:
    done = runs.exec("state.dict('d')['k'] = 1\n@task\ndef work(): pass\n").check(2)
    assert "StateError: shared state is used while the task file is imported" in done.err


def test_waiting_calls_lend_their_slots(runs: Runs) -> None:
    done = runs.exec(
        """
        q, e, b = state.queue("q"), state.event("e"), state.barrier("b", 3)
        @task
        def takes(): e.set(); return q.get()
        @task
        async def also_takes(): return await q.get_async()
        @task
        def gives(): e.wait(); q.put(1); q.put(2)
        @task
        def meets(i=each(range(3))): return b.wait()
        @task
        def total(a=result(takes), b=result(also_takes), c=result(meets), g=result(gives)):
            print(a + b, sorted(c))
        """,
        "-j1",
    ).check()
    assert lines_of(done.out, "total") == ["3 [0, 1, 2]"]


@pytest.mark.parametrize("slots", [1, 2])
def test_calls_that_wait_for_each_other_are_not_executed_on_top_of_each_other(
    runs: Runs, slots: int
) -> None:
    done = runs.exec(
        """
        todo, done, go = state.queue("todo", 2), state.queue("done", 2), state.event("go")
        @task(priority=2)
        def early(part=each(range(6))): go.wait()
        @task(priority=1)
        def feed(part=each(range(6))):
            for i in range(10): todo.put(i)
            go.set()
        @task
        def square(part=each(range(6))):
            for i in range(10): done.put(todo.get() ** 2)
        @task
        def collect(part=each(range(6))): return [done.get() for _ in range(10)]
        @task
        def total(parts=result(collect)): print(sum(map(sum, parts)))
        """,
        f"-j{slots}",
    ).check()
    assert lines_of(done.out, "total") == [str(6 * sum(i * i for i in range(10)))]


def test_more_calls_may_wait_than_there_are_spare_workers(runs: Runs) -> None:
    done = runs.exec(
        """
        q = state.queue("q")
        @task(priority=1)
        def takes(i=each(range(80))): return q.get()
        @task
        def gives(): q.put_many(range(80))
        @task(after=[gives])
        def total(got=result(takes)): print(sorted(got) == list(range(80)))
        """,
        "-j1",
    ).check()
    assert lines_of(done.out, "total") == ["True"]


def test_more_calls_may_wait_for_a_lock_than_there_are_spare_workers(runs: Runs) -> None:
    done = runs.exec(
        """
        lock, c = state.lock("l"), state.counter("c")
        @task
        def plain(i=each(range(160))):
            with lock:
                time.sleep(0.01)
                return c.set(c.get() + 1)
        @task
        async def coroutine(i=each(range(12))):
            async with lock:
                time.sleep(0.01)
                return c.set(c.get() + 1)
        @task
        def total(a=result(plain), b=result(coroutine)): print(c.get(), sorted(a + b)[-1])
        """,
        "-j2",
    ).check()
    assert lines_of(done.out, "total") == ["172 171"]


def test_a_timeout_ends_a_wait(runs: Runs) -> None:
    done = runs.exec(
        """
        @task(timeout=0.3)
        def waits(): state.queue("q").get()
        """,
        "-j1",
    ).check(1)
    assert "ran longer than 0.3 s" in done.err


def test_a_wait_in_a_task_may_be_longer_than_the_system_can_count(runs: Runs) -> None:
    done = runs.exec(
        """
        q = state.queue("q")
        @task
        def waits(i=each(range(2))): print(q.get(timeout=40 * 86_400))
        @task(lane="thread")
        def waits_too(): print(q.get(timeout=40 * 86_400))
        @task
        def gives():
            for _ in range(3): q.put("came")
        """,
        "-j1", "--output", "raw",
    ).check()  # fmt: skip
    assert done.out == "came\n" * 3


def test_a_killed_worker_holds_no_lock(runs: Runs) -> None:
    done = runs.exec(
        """
        lock, permits = state.lock("l"), state.semaphore("s", 1)
        @task(retries=1)
        def dies():
            if current().attempt == 1:
                lock.acquire()
                permits.acquire()
                os.kill(os.getpid(), signal.SIGKILL)
            with lock, permits:
                print("held again")
        """
    ).check()
    assert lines_of(done.out, "dies") == ["held again"]


def test_a_call_that_ends_holds_no_lock(runs: Runs) -> None:
    done = runs.exec(
        """
        lock = state.lock("l")
        @task
        def forgets(i=each(range(3))): return lock.acquire(timeout=20)
        @task
        def total(got=result(forgets)): print(got, lock.locked())
        """,
        "-j1",
    ).check()
    assert lines_of(done.out, "total") == ["[True, True, True] False"]


def test_a_lock_held_beneath_in_the_same_worker_is_an_error(runs: Runs) -> None:
    done = runs.exec(
        """
        lock = state.lock("l")
        @task(default=False)
        def inner(): lock.acquire()
        @task
        def outer():
            with lock:
                inner.submit().result()
        """,
        "--inline",
    )
    assert done.status == 1 and "held by a call that waits for this one" in done.err


# -- from another terminal ------------------------------------------------------------

HELD = """
@task
def work():
    state.dict("pages").update({"a": [1, 2], ("x", 1): {"k": "v"}})
    state.counter("n").add(5)
    state.set("s").update("ab")
    print("filled")
    print(state.queue("go").get())
"""


def test_a_live_run_is_seen_and_changed_from_outside(runs: Runs) -> None:
    run = runs.start_exec(HELD, "-j1")
    run.await_line("filled")
    with connect() as seen:
        assert seen.names() == [("go", "queue", 0), ("n", "counter", 1), ("pages", "dict", 2),
                                ("s", "set", 2)]  # fmt: skip
        assert seen.dict("pages")["a"] == [1, 2] and seen.value("s") == {"a", "b"}
        assert seen.counter("n").add(1) == 6
        seen.queue("go").put("from outside")
    done = run.end().check()
    assert lines_of(done.out, "work") == ["filled", "from outside"]
    with pytest.raises(UsageError, match="no run of yours is alive"):
        connect()


def test_taskrun_state_shows_a_live_run(runs: Runs) -> None:
    run = runs.start_exec(HELD, "-j1")
    run.await_line("filled")
    assert runs.run("state").check().out.split() == [
        "go", "queue", "0", "items", "n", "counter", "pages", "dict", "2", "items", "s", "set",
        "2", "items",
    ]  # fmt: skip
    assert runs.run("state", "get", "pages", "a").check().out == "[1, 2]\n"
    assert runs.run("state", "get", "pages", "('x', 1)").check().out == "{'k': 'v'}\n"
    assert runs.run("state", "get", "n").check().out == "5\n"
    address = addresses.shown(addresses.find())
    dumped = json.loads(runs.run("state", address, "dump", "--json").check().out)
    assert dumped["s"] == ["a", "b"] and dumped["pages"]["('x', 1)"] == {"k": "v"}
    assert "did you mean 'pages'?" in runs.run("state", "get", "page").check(2).err
    for key in ("{[1]: 2}", "(" * 100_000, "+" * 5000 + "1", "a"):
        assert "n has no item" in runs.run("state", "get", "n", key).check(2).err
    assert "state has no action 'lst'" in runs.run("state", "lst").check(2).err
    watch = runs.start("state", "watch")
    with connect() as seen:
        changes = iter(range(10_000))
        wait_until(lambda: seen.counter("n").set(next(changes)) is not None and watch.out)
        assert watch.out[0].startswith("n set ")
        seen.queue("go").put(None)
    run.end().check()
    watch.end().check()


def test_taskrun_state_names_the_call_that_holds_a_lock(runs: Runs) -> None:
    source = """
        @task(label="item {n}")
        def work(n=each([7])):
            with state.lock("l"):
                print("held")
                state.event("go").wait(60)
        """
    run = runs.start_exec(source, "-j1")
    run.await_line("held")
    shown = runs.run("state", "get", "l").check().out
    with connect() as live:
        live.event("go").set()
    assert shown == "{'holder': 'item 7, attempt 1', 'waiting': 0}\n"
    run.end().check()


def test_taskrun_state_writes_json_that_is_json_and_a_name_in_a_line(runs: Runs) -> None:
    source = """
        @task
        def work():
            state.counter("a\\nb").add(float("inf"))
            state.dict("d").update(x=float("nan"), y=[1.5])
            state.dict("same").update({1: "number", "1": "text", (1,): [{2: "n", "2": "t"}]})
            print("filled", flush=True)
            state.queue("go").get(timeout=60)
        """
    run = runs.start_exec(source, "-j1")
    run.await_line("filled")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    dumped = runs.run("state", "dump", "--json").check().out
    found = json.loads(dumped, parse_constant=refuse)
    listed = runs.run("state").check().out
    with connect() as live:
        live.queue("go").put(1)
    run.end().check()
    assert (found["a\nb"], found["d"]) == ("inf", {"x": "nan", "y": [1.5]})
    inner = [{"2 (int)": "n", "2": "t"}]
    assert found["same"] == {"1 (int)": "number", "1": "text", "(1,)": inner}
    assert listed.splitlines()[0].split() == ["a\\nb", "counter"]


def test_taskrun_state_shows_what_it_cannot_load(runs: Runs) -> None:
    run = runs.start_exec(
        """
        class Page: pass

        class Exit:
            def __reduce__(self): return sys.exit, (7,)

        @task
        def work():
            state.dict("pages").update(a=Page(), b=2)
            state.list("l").append(Page())
            state.list("exits").append(Exit())
            print("filled", flush=True)
            state.queue("go").get(timeout=60)
            state.dict("pages")["c"] = Page()
        """,
        "-j1",
    )
    run.await_line("filled")
    elsewhere = runs.folder / "elsewhere"
    elsewhere.mkdir()
    said = "<a value that cannot be loaded here: ModuleNotFoundError: No module named 'tasks'>"
    for words in (("get", "pages"), ("dump",), ("dump", "--json"), ("get", "pages", "a")):
        assert said in runs.run("state", *words, cwd=elsewhere).check().out
    for words in (("get", "exits"), ("dump",), ("dump", "--json")):
        shown = runs.run("state", *words, cwd=elsewhere).check().out
        assert "<a value that cannot be loaded here: SystemExit: 7>" in shown
    assert runs.run("state", "get", "pages", "b", cwd=elsewhere).check().out == "2\n"
    with connect() as seen:
        changes = seen.dict("pages").watch()
        seen.queue("go").put(1)
        assert next(changes).key == "c"
        changes.close()
    run.end().check()


def test_several_live_runs_must_be_told_apart(runs: Runs) -> None:
    both = [runs.start_exec(HELD, "-j1") for _ in range(2)]
    for run in both:
        run.await_line("filled")
    done = runs.run("state").check(2)
    assert "several runs of yours are alive" in done.err
    for run in both:
        assert f"run-{run.process.pid}.sock" in done.err
        with connect(f"unix:{addresses.runtime_folder()}/run-{run.process.pid}.sock") as seen:
            seen.queue("go").put(1)
        run.end().check()


def test_the_socket_of_a_run_that_is_killed_with_all_its_processes_is_removed_by_the_next(
    runs: Runs, own_runtime: Path
) -> None:
    run = runs.start_exec(HELD, "-j1")
    run.await_line("filled")
    [path] = (own_runtime / "taskrun").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    run.signal(signal.SIGSTOP)  # it is not to start a template in the place of the killed one
    for below in psutil.Process(run.process.pid).children(recursive=True):
        below.kill()
    run.signal(signal.SIGKILL)
    run.process.wait(20)
    run.assert_gone()
    assert path.exists()
    runs.exec("@task\ndef work(): pass\n").check()
    assert not list(path.parent.iterdir())


def test_waiting_outside_ends_with_the_run(runs: Runs) -> None:
    run = runs.start_exec(HELD, "-j1")
    run.await_line("filled")
    with connect() as seen, seen.dict("pages").watch() as changes:
        run.signal(signal.SIGKILL)
        # It may be dead before the connection for this wait is made.
        with pytest.raises(StateLost, match=r"is gone|cannot be reached"):
            seen.queue("never").get(timeout=60)
        assert list(changes) == []


def test_a_wrong_key_is_refused_and_not_shown(runs: Runs) -> None:
    run = runs.start_exec(HELD, "-j1", "--listen", "127.0.0.1:0")
    run.await_line("filled")
    line = run.await_line("listening on", err=True)
    with pytest.raises(StateError, match="does not accept this authkey") as caught:
        connect(line.split()[-1], b"not the key of this run")
    assert b"not the key" not in str(caught.value).encode()
    with connect(line.split()[-1]) as seen:
        seen.queue("go").put(1)
    run.end().check()


def test_what_is_no_address_cannot_be_listened_to(runs: Runs) -> None:
    for address in ("localhost", "tls://localhost", "127.0.0.1:port", "127.0.0.1:70000",
                    "http://localhost:7077", "local host:7077"):  # fmt: skip
        done = runs.exec("@task\ndef work(): pass\n", "--listen", address).check(2)
        assert "an address is HOST:PORT, tls://HOST:PORT or unix:PATH" in done.err


@pytest.mark.parametrize("address", ["tls://127.0.0.1:0", "0.0.0.0:0"])
def test_state_is_reached_by_tls_too(runs: Runs, address: str) -> None:
    run = runs.start_exec(HELD, "-j1", "--listen", address)
    run.await_line("filled")
    form, port = run.await_line("listening on", err=True).split()[-1].rsplit(":", 1)
    assert form.startswith("tls://")
    with pytest.raises(StateError, match="authkey") as caught:
        connect(f"tls://127.0.0.1:{port}", b"not the key of this run")
    assert b"not the key" not in str(caught.value).encode()
    with pytest.raises(StateError, match=f"write tls://127.0.0.1:{port}") as caught:
        connect(f"127.0.0.1:{port}")
    assert caught.value.exit_status == 2
    with connect(f"tls://127.0.0.1:{port}") as seen:
        seen.list("big").append("x" * 3_000_000)
        assert len(seen.list("big")[0]) == 3_000_000
        seen.queue("go").put(1)
    run.end().check()


def test_a_client_of_the_standard_library_reaches_named_objects(runs: Runs, tmp_path: Path) -> None:
    run = runs.start_exec(HELD, "-j1", "--listen", "127.0.0.1:0")
    run.await_line("filled")
    port = run.await_line("listening on", err=True).rpartition(":")[2]
    script = """
        import sys
        from multiprocessing.managers import DictProxy, ListProxy, SyncManager

        class Run(SyncManager):
            pass

        Run.register("state_dict", proxytype=DictProxy)
        Run.register("state_list", proxytype=ListProxy)
        Run.register("state_queue")
        Run.register("state_counter")
        key = open(sys.argv[2], "rb").read().strip()
        run = Run(("127.0.0.1", int(sys.argv[1])), authkey=key)
        run.connect()
        pages = run.state_dict("pages")
        pages["stock"] = {1}
        print(pages["a"], len(pages), sorted(map(str, pages.keys())), run.state_counter("n").add(2))
        items = run.state_list("l")
        items.extend([3, 1]); items.append(2); items.sort()
        print(items[:], [key for key in pages][0])
        run.state_queue("go").put({"stock": 1})
    """
    key = tmp_path / "config" / "taskrun" / "authkey"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_text().strip()) == 64
    done = runs.script(script, port, str(key), env={"PYTHONPATH": ""})
    assert done.out == "[1, 2] 3 [\"('x', 1)\", 'a', 'stock'] 7\n[1, 2, 3] a\n", done.err
    assert lines_of(run.end().check().out, "work") == ["filled", "{'stock': 1}"]


# -- keys -----------------------------------------------------------------------------


def test_the_authkey_of_the_environment_reaches_no_child(runs: Runs) -> None:
    key = "sixteen bytes and a few more"
    done = runs.exec(
        """
        @task
        def work():
            state.counter("c").add(1)
            print("TASKRUN_AUTHKEY" in os.environ)
            sh("env | grep -c AUTHKEY || true")
        """,
        env={"TASKRUN_AUTHKEY": key},
    ).check()
    assert lines_of(done.out, "work") == ["False", "0"]


def test_a_key_that_is_too_short_or_open_to_others_is_refused(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("short\n")
    path.chmod(0o600)
    source = "@task\ndef work(): pass\n"
    done = runs.exec(source, "--authkey-file", str(path)).check(2)
    assert f"the authkey in {path} has 5 bytes" in done.err
    path.write_text("long enough, but everybody can read it")
    path.chmod(0o644)
    done = runs.exec(source, "--authkey-file", str(path)).check(2)
    assert "can be read by others" in done.err and "everybody" not in done.err
    done = runs.exec(source, env={"TASKRUN_AUTHKEY_FILE": str(tmp_path / "none")}).check(2)
    assert "there is no authkey file" in done.err


def test_the_socket_folder_must_be_this_users_alone(runs: Runs, own_runtime: Path) -> None:
    folder = own_runtime / "taskrun"
    folder.mkdir(mode=0o755)
    os.chmod(folder, 0o755)
    done = runs.exec("@task\ndef work(): print(state.counter('c').add(1))").check()
    assert "cannot be found by others" in done.err and "open to others" in done.err
    assert lines_of(done.out, "work") == ["1"]


# -- the example ----------------------------------------------------------------------

EXAMPLE = Path(__file__).parent.parent / "examples" / "state" / "tasks.py"


def test_the_example_comes_out_exactly(runs: Runs) -> None:
    done = runs.run("exec", str(EXAMPLE), "-j", "4").check()
    assert lines_of(done.out, "check") == [
        "300 pages visited once each, 2100 links followed",
        "leaderboard: linus 12, ada 10, margaret 9, grace 9",
        "8 workers added up to 8000",
    ]


# -- from Python ----------------------------------------------------------------------


def test_a_run_from_python_keeps_state_in_a_file(runs: Runs) -> None:
    source = """
        import pathlib, taskrun
        from taskrun import state, task

        @task
        def work(): return state.counter("n").add(1)

        for inline in (False, True, False):
            print(taskrun.run(work, jobs=1, output="quiet", inline=inline,
                              state=pathlib.Path("kept.db")))
        for wrong in ({"state": "no/x.db"}, {"state": __file__}, {"listen": "anywhere"}):
            try:
                taskrun.run(work, output="quiet", **wrong)
            except taskrun.TaskrunError as error:
                print(type(error).__name__, error)
    """
    lines = runs.script(source).check().out.splitlines()
    assert lines[:3] == ["1", "2", "3"]
    assert len(lines) == 6 and all(line.startswith("UsageError") for line in lines[3:]), lines


def test_a_run_from_python_can_be_reached(runs: Runs) -> None:
    source = """
        import socket, taskrun
        from taskrun import state, task

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]

        @task
        def work(address):
            state.dict("d")["a"] = 1
            with taskrun.connect(address) as outside:
                return outside.dict("d").copy()

        address = f"127.0.0.1:{port}"
        print(taskrun.run(work, params={"address": address}, output="quiet", listen=address))
    """
    assert runs.script(source).check().out == "{'a': 1}\n"


# -- waits that nobody could end ------------------------------------------------------


def test_inline_a_wait_that_nobody_can_end_is_an_error(runs: Runs) -> None:
    done = runs.exec(
        """
        @task
        def consumer(): return state.queue("q").get()

        @task
        async def awaits(): return await state.queue("q").get_async()

        @task(default=False)
        def child():
            with state.semaphore("s", 1): print("never")

        @task
        def parent():
            with state.semaphore("s", 1): child.submit().result()

        @task
        def watcher():
            for change in state.dict("d").watch(): print(change)
        """,
        "--inline", "-k", "--state", "kept.db",
    )  # fmt: skip
    assert done.status == 1
    for what in ("queue.get of 'q'", "semaphore.acquire of 's'", "state.watch of 'd'"):
        assert f"{what} would wait for ever: nobody else is there" in done.err, what
    assert done.err.count("StateError: queue.get of 'q'") >= 2
    assert "never" not in done.out


def test_inline_calls_that_wait_are_served_by_those_on_top_of_them(runs: Runs) -> None:
    done = runs.exec(
        """
        @task
        def consumer(): print("got", state.queue("q").get())

        @task
        def producer(): state.queue("q").put("it")
        """,
        "--inline",
    )
    assert "got it" in done.check().out


def test_inline_a_thread_or_a_retry_may_end_a_wait(runs: Runs) -> None:
    done = runs.exec(
        """
        import threading
        from taskrun.state import local
        local.PATIENCE = 0.2

        @task(retries=1, backoff=1)
        def again():
            if current().attempt == 1: raise ValueError
            state.event("e").set()

        @task
        def waits_for_the_retry(): print("came", state.event("e").wait())

        @task
        def waits_for_a_thread():
            threading.Timer(1, lambda: state.queue("q").put("it")).start()
            print("got", state.queue("q").get())
        """,
        "--inline",
    )
    assert "came True" in done.check().out and "got it" in done.out


def test_outside_a_run_a_wait_that_nobody_can_end_is_an_error(runs: Runs) -> None:
    source = """
        from taskrun import state
        from taskrun.state import local

        local.PATIENCE = 0.1
        for wait in (state.queue("q").get, state.event("e").wait, state.barrier("b", 2).wait):
            try:
                wait()
            except Exception as error:
                print(type(error).__name__, error)
    """
    out = runs.script(source).check().out
    assert out.count("StateError") == out.count("would wait for ever") == 3
