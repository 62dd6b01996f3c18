"""A server of runs, as people start it: submit, follow, attach, cancel, and what may break."""

from __future__ import annotations

import json
import os
import pty
import signal
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from harness import TASKRUN, Ended, Running, Runs, started, until_it_is_full, wait_until

import taskrun
from taskrun import transport
from taskrun.addresses import parse, shown
from taskrun.network.bundles import digest_of, make_bundle
from taskrun.network.joining import versions
from taskrun.reactor import Reactor
from taskrun.serving import talk
from taskrun.serving.client import submission
from taskrun.serving.server import Server
from taskrun.transport import dial_blocking

pytestmark = pytest.mark.timeout(120)

KEY = "0123456789abcdef" * 4

TASKS = """
@task
def work(n=each(range(8))):
    mark(os.path.join({folder!r}, f"begun{{n}}"))
    print("begin", n, flush=True)
    while not os.path.exists(os.path.join({folder!r}, "go on")): time.sleep(0.01)
    return n

@task
def total(all=result(work)): print(sum(all))
"""

LONG = """
@task
def long(n=each(range(9))):
    while True: time.sleep(0.01)
"""


class Site:
    """A server, and those who come to it."""

    def __init__(self, runs: Runs, runtime: str) -> None:
        self.runs = runs
        self.folder = runs.folder
        key = self.folder / "key"
        key.write_text(KEY)
        key.chmod(0o600)
        self.variables = {
            "TASKRUN_AUTHKEY_FILE": str(key),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "XDG_RUNTIME_DIR": runtime,
        }
        self.server: Running
        self.address = ""

    def serve(self, jobs: int = 4, *words: str) -> Running:
        self.server = self.runs.start(
            "serve", "--listen", "127.0.0.1:0", "-j", str(jobs), *words, env=self.variables
        )
        self.address = self.server.await_line("listening on", err=True).split()[-1]
        return self.server

    def write(self, source: str = TASKS) -> str:
        return str(self.runs.write(source.replace("{folder!r}", repr(str(self.folder)))
                                   .replace("{{", "{").replace("}}", "}")))  # fmt: skip

    def submit(self, *words: str, source: str = TASKS, **how: Any) -> Running:
        """Submit a task file and follow it."""
        return self.runs.start(
            "exec", "--address", self.address, self.write(source), *words,
            env=self.variables, **how,
        )  # fmt: skip

    def detach(self, *words: str, source: str = TASKS) -> str:
        """Submit a task file; gives the run's name."""
        return self.submit("--detach", *words, source=source).end().check().out.strip()

    def ask(self, command: str, *words: str) -> Ended:
        return self.runs.run(command, self.address, *words, env=self.variables)

    def attach(self, run: str) -> Running:
        return self.runs.start("attach", run, self.address, env=self.variables)

    def status(self) -> Any:
        return json.loads(self.ask("status", "--json").check().out)

    def run(self, name: str) -> Any:
        return next(run for run in self.status()["runs"] if run["run"] == name)

    def await_begun(self, count: int) -> None:
        wait_until(lambda: len(list(self.folder.glob("begun*"))) >= count)

    def go_on(self) -> None:
        (self.folder / "go on").touch()


@pytest.fixture
def site(tmp_path: Path, socket_folder: Path) -> Iterator[Site]:
    for runs in started(tmp_path):
        yield Site(runs, str(socket_folder))


# -- what it does ---------------------------------------------------------------------


def test_a_submitted_run_looks_and_ends_as_if_it_ran_here(site: Site) -> None:
    site.serve()
    site.go_on()
    ended = site.submit("-k").end().check()
    assert "total | 28" in ended.out and "work[0] | begin 0" in ended.out
    assert "9 calls in" in ended.err and "all ok" in ended.err


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_run_is_followed_to_its_end_where_its_output_can_go_nowhere(
    site: Site, closed: str
) -> None:
    site.serve()
    site.go_on()
    program = ("sh", "-c", f'exec {TASKRUN} "$@" {closed}', "sh")
    ended = site.submit("-k", program=program).end().check()
    assert ("total | 28" in ended.out) == (closed == "2>&-")
    assert ("all ok" in ended.err) == (closed == ">&-")


SPEAKS = """
@task
def speak():
    for n in range(5000): print(n, "x" * 60)
"""


def test_a_run_is_followed_through_a_pipe_that_somebody_has_made_non_blocking(site: Site) -> None:
    site.serve()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(reader, "rb") as stdout:
        with open(writer, "wb") as other_end:
            client = site.submit("--output=raw", source=SPEAKS, stdout=other_end)
            until_it_is_full(other_end)
        assert stdout.read().splitlines() == [b"%d %s" % (n, b"x" * 60) for n in range(5000)]
        client.end().check()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_reader_that_reads_nothing_does_not_keep_a_signal_from_being_taken(
    site: Site, number: int
) -> None:
    site.serve()
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb") as stdout:
        client = site.submit("--output=raw", source=SPEAKS + LONG, stdout=stdout)
        until_it_is_full(stdout)
        client.signal(number)
        assert client.end(15).status == (130 if number == signal.SIGINT else 143)
    if number == signal.SIGINT:
        assert site.run("r1")["status"] == 130


def test_who_has_no_reader_any_more_is_told_that_the_run_goes_on(site: Site) -> None:
    site.serve()
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as stdout:
        ended = site.submit(stdout=stdout).end().check(3)
    assert "cannot write to stdout: Broken pipe; r1 goes on; taskrun attach r1" in ended.err
    assert site.run("r1")["state"] == "running"


def test_what_the_environment_says_for_runs_of_this_machine_keeps_none_from_a_server(
    site: Site, tmp_path: Path
) -> None:
    site.serve()
    site.go_on()
    site.variables.update(
        TASKRUN_JOBLOG=str(tmp_path / "log"), TASKRUN_STATE=str(tmp_path / "kept")
    )
    site.submit("-k").end().check()
    assert not (tmp_path / "log").exists() and not (tmp_path / "kept").exists()


def test_the_modules_beside_the_task_file_travel_and_the_server_imports_none(site: Site) -> None:
    (site.folder / "helper.py").write_text("print('imported')\ndef square(x): return x * x\n")
    server = site.serve()
    source = """
    import helper
    @task
    def nine(n: int = 2): print(helper.square(n), os.getcwd())
    """
    ended = site.submit("-p", "n=3", source=source).end().check()
    assert "nine | 9 " in ended.out and str(site.folder / "cache") in ended.out
    server.signal(signal.SIGTERM)
    assert "imported" not in server.end().err


def test_a_server_at_the_path_of_a_socket_says_so_and_its_runs_do_not(
    site: Site, socket_folder: Path
) -> None:
    site.serve(1, "--listen", f"unix:{socket_folder}/server")
    assert site.address == f"unix:{socket_folder}/server"
    ended = site.submit(source="@task\ndef good(): pass").end().check()
    assert "all ok" in ended.err and "listening" not in ended.err


def test_a_failing_run_has_its_own_exit_status(site: Site) -> None:
    site.serve()
    ended = site.submit(source="@task\ndef bad(): raise ValueError('so bad')").end().check(1)
    assert "so bad" in ended.err


@pytest.mark.parametrize(
    ("source", "words", "said"),
    [
        ("this is no Python", (), "SyntaxError"),
        ("@task\ndef good(): pass", ("goood",), "there is no task 'goood'"),
        ("@task\ndef good(): pass", ("--joblog", "log"), "--joblog is not for a run of a server"),
        ("@task\ndef good(): pass", ("--bundle", "nothing*"), "there is no such file"),
    ],
)
def test_what_cannot_be_run_is_its_users_error(
    site: Site, source: str, words: tuple[str, ...], said: str
) -> None:
    site.serve()
    ended = site.submit(*words, source=source).end().check(2)
    assert said in ended.err


def test_json_events_come_through_whole(site: Site) -> None:
    site.serve()
    site.go_on()
    ended = site.submit("--json").end().check()
    assert ended.states["total"] == "succeeded" or ended.states["total"] == "ok"


def test_attaching_shows_a_run_from_its_beginning_to_two_at_once(site: Site) -> None:
    site.serve()
    run = site.detach()
    site.await_begun(4)
    both = [site.attach(run) for _ in range(2)]
    for one in both:
        one.await_line("work[0] | begin 0")
    site.go_on()
    for one in both:
        assert "total | 28" in one.end().check().out
    assert "total | 28" in site.attach(run).end().check().out  # when it is over, too
    assert "there is no run 'r9'" in site.attach("r9").end().check(2).err


def test_two_runs_at_once_get_half_of_the_slots_each(site: Site) -> None:
    site.serve(4)
    first = site.detach()
    site.await_begun(4)
    second = site.detach()
    assert [site.run(name)["slots"] for name in (first, second)] == [2, 2]
    site.go_on()
    site.attach(first).end().check()
    site.attach(second).end().check()


def test_a_run_that_is_alone_again_gets_all_slots(site: Site) -> None:
    site.serve(4)
    first = site.detach(source=LONG)
    second = site.detach()
    site.await_begun(2)
    wait_until(lambda: site.run(second)["slots"] == 2)
    assert not (site.folder / "begun2").exists()
    site.ask("cancel", first).check()
    site.await_begun(4)
    assert site.run(first)["status"] == 130
    assert "stopped: taskrun cancel" in site.attach(first).end().err
    site.go_on()
    site.attach(second).end().check()


def test_a_run_waits_where_there_is_no_slot_for_it(site: Site) -> None:
    site.serve(1)
    first, second = site.detach(), site.detach()
    site.await_begun(1)
    assert [site.run(name)["state"] for name in (first, second)] == ["running", "waiting"]
    assert "r2 is waiting" in site.ask("status", second).check(2).err
    site.go_on()
    ended = site.attach(second).end().check()
    assert "total | 28" in ended.out
    assert "r2 waits for a slot: others have all of them" in ended.err


def test_who_submits_where_there_are_no_slots_at_all_is_told_so(site: Site) -> None:
    site.serve(0)
    site.submit().await_line("r1 waits for a slot: there is none until a node joins", err=True)


def test_status_and_steering_reach_a_run_of_the_server(site: Site) -> None:
    site.serve(2)
    run = site.detach("-k")
    site.await_begun(2)
    shown = site.ask("status").check().out
    assert run in shown and "running" in shown
    assert json.loads(site.ask("status", run, "--json").check().out)["total"] == 9
    assert "waits for work" in site.ask("explain", run, "total").check().out
    assert "time.sleep(0.01)" in site.ask("stack", run, "work[0]").check().out
    site.ask("cancel", run, "work[7]").check()
    site.ask("pause", run).check()
    site.ask("unpause", run).check()
    site.go_on()
    assert "1 cancelled" in site.attach(run).end().err
    assert "has ended" in site.ask("cancel", run).check(2).err
    other = site.detach(source=LONG)
    stopped = json.loads(site.ask("cancel", other, "--json").check().out)
    assert stopped == {"run": other, "text": f"{other} is being stopped"}


def test_the_address_of_a_server_and_its_only_run_may_be_left_out(site: Site) -> None:
    site.serve(2)

    def ask(command: str, *words: str) -> Ended:
        here = {**site.variables, "TASKRUN_ADDRESS": site.address}
        return site.runs.run(command, *words, env=here)

    assert "no run is alive here" in ask("pause").check(2).err
    run = site.detach("-k")
    site.await_begun(2)
    assert json.loads(ask("status", run, "--json").check().out)["total"] == 9
    for words in ((run, "work[0]"), ("work[0]",), (site.address, "work[0]")):
        assert "work[0] runs" in ask("explain", *words).check().out
        assert "time.sleep(0.01)" in ask("stack", *words).check().out
    for words in ((), (run,), (site.address,)):
        ask("pause", *words).check()
        ask("unpause", *words).check()
    assert "there is no run 'x9' here" in ask("pause", "x9").check(2).err
    other = site.detach("-k")
    assert f"several runs, {run}, {other}: say which one" in ask("pause").check(2).err
    ask("pause", run).check()
    ask("cancel", run).check()


def test_a_run_whose_process_is_stopped_is_said_not_to_answer(site: Site) -> None:
    site.serve()
    site.detach(source=LONG)
    wait_until(lambda: site.run("r1")["now"])
    pid = site.run("r1")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        asked = site.ask("explain", "r1", "long[0]")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert asked.status == 2 and "r1 does not answer" in asked.err
    assert "long[0] runs" in site.ask("explain", "r1", "long[0]").check().out


def test_what_listens_without_tls_beyond_this_machine_is_looked_at_and_steered_so(
    site: Site,
) -> None:
    site.serve(2, "--listen", "0.0.0.0:0", "--insecure-plain")
    run = site.detach("-k", "--insecure-plain")
    for refused in (site.ask("status"), site.ask("state")):
        assert "--insecure-plain, which has to be said here as well" in refused.err
    site.await_begun(2)

    def ask(command: str, *words: str, status: int = 0) -> Ended:
        return site.ask(command, *words, "--insecure-plain").check(status)

    assert "work[0] runs" in ask("explain", run, "work[0]").out
    assert "time.sleep(0.01)" in ask("stack", run, "work[0]").out
    for command in ("status", "pause", "unpause"):
        ask(command, run)
    ask("tell", run, "work[0]", "hello")
    assert "there is no node 'lab'" in ask("drain", "lab", status=2).err
    with taskrun.connect(site.address, KEY, insecure_plain=True) as live:
        live.counter("n").add(3)
    assert ask("state", "get", "n").out == "3\n"
    site.variables["TASKRUN_INSECURE_PLAIN"] = "1"
    site.ask("cancel", run).check()


def test_watching_a_run_of_the_server_ends_with_it(site: Site) -> None:
    site.serve()
    run = site.detach()
    site.await_begun(4)
    watching = site.runs.start("status", site.address, run, "--watch", env=site.variables)
    watching.await_line("calls ended")
    site.go_on()
    watching.end().check()
    again = site.ask("status", run, "--watch").check(2)
    assert f"{run} has ended" in again.err


def test_all_runs_reach_the_state_of_the_server(site: Site) -> None:
    site.serve()
    source = """
    import taskrun
    @task
    def add(address: str):
        with taskrun.connect(address) as server: print(server.counter("n").add(1))
    """
    for _ in range(2):
        site.submit("-p", f"address={site.address}", source=source).end().check()
    assert "2" in site.ask("state", "get", "n").check().out


def test_the_state_of_a_run_is_reached_by_the_address_of_its_server(site: Site) -> None:
    site.serve()
    source = TASKS.replace("    print", "    seen.add(n); print")
    run = site.detach(source="from taskrun import state\nseen = state.set('seen')\n" + source)
    site.await_begun(4)
    wait_until(lambda: "4 items" in site.ask("state", "--run", run, "list").check().out)
    wanted = json.loads(site.ask("state", "get", "seen", "--json", "--run", run).check().out)
    assert wanted == [0, 1, 2, 3]
    assert "nothing is named 'seen'" in site.ask("state", "get", "seen").check(2).err
    watching = site.runs.start("state", "--run", run, site.address, "watch", env=site.variables)
    with taskrun.connect(site.address, KEY, run=run) as live:
        wait_until(lambda: live.counter("n").add() and watching.out)
        assert live.queue("q").put(b"x" * 3_000_000) is None
        assert len(live.queue("q").get()) == 3_000_000
    site.go_on()
    assert watching.end().check()
    site.attach(run).end().check()
    assert f"{run} is ended" in site.ask("state", "--run", run).check(2).err
    assert "there is no run 'x'" in site.ask("state", "--run", "x").check(2).err


# -- what may break -------------------------------------------------------------------


def test_a_run_goes_on_when_its_submitting_client_is_killed(site: Site) -> None:
    site.serve()
    client = site.submit()
    client.await_line("begin 3")
    client.signal(signal.SIGKILL)
    client.process.wait(10)
    site.go_on()
    assert "total | 28" in site.attach("r1").end().check().out


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 6, f"signal {signal.SIGRTMIN + 6}")],
)
def test_a_killed_coordinator_costs_its_own_run_only(site: Site, number: int, said: str) -> None:
    site.serve(4)
    client = site.submit()
    site.await_begun(4)
    other = site.detach()
    wait_until(lambda: site.run(other)["state"] == "running")
    os.kill(site.run("r1")["pid"], number)
    ended = client.end()
    assert ended.status == 3 and f"the process of r1 was killed by {said}" in ended.err
    site.go_on()
    assert "total | 28" in site.attach(other).end().check().out


def test_what_goes_wrong_as_a_run_ends_is_told_and_costs_no_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    looked_at: list[str] = []

    def look() -> None:
        looked_at.append("r2")

    def fail() -> None:
        raise OSError("its folder is gone")

    service: Any = SimpleNamespace(roles={}, authkey=KEY.encode())
    runs: Any = {"r1": SimpleNamespace(look=fail), "r2": SimpleNamespace(look=look)}
    reactor = Reactor()
    server = Server(reactor, 1, {}, lambda *what, **more: service, print, 15.0)
    server.runs = runs
    server._reap()
    reactor.close()
    assert looked_at == ["r2"] and "its folder is gone" in capsys.readouterr().err


def test_nothing_is_left_two_seconds_after_the_server_was_killed(site: Site) -> None:
    server = site.serve(4)
    client = site.submit()
    site.await_begun(4)
    server.signal(signal.SIGKILL)
    server.process.wait(10)
    server.assert_gone(2.0)
    ended = client.end()
    assert ended.status == 3 and "lost the server" in ended.err and "Traceback" not in ended.err


def test_a_server_that_is_told_to_end_ends_its_runs_first(site: Site) -> None:
    server = site.serve(4)
    client = site.submit()
    site.await_begun(4)
    server.signal(signal.SIGTERM)
    assert server.end().status == 0
    assert client.end().status == 143


def test_whoever_has_another_key_is_refused(site: Site) -> None:
    site.serve()
    other = site.folder / "other"
    other.write_text("f" * 64)
    other.chmod(0o600)
    ended = site.submit("--authkey-file", str(other)).end().check(2)
    assert "does not accept this authkey" in ended.err and "ffff" not in ended.err


def test_ctrl_c_off_a_terminal_cancels_the_run(site: Site) -> None:
    site.serve()
    client = site.submit()
    client.await_line("begin 3")
    client.signal(signal.SIGINT)
    ended = client.end()
    assert ended.status == 130 and "stopped: Ctrl-C" in ended.err
    assert site.run("r1")["status"] == 130


@pytest.mark.parametrize(("answer", "status"), [(b"d\n", 0), (b"c\n", 130)])
def test_ctrl_c_on_a_terminal_asks(site: Site, answer: bytes, status: int) -> None:
    site.serve()
    ours, theirs = pty.openpty()
    client = site.submit(stdin=theirs, stderr=theirs)
    try:
        client.await_line("begin 3")
        client.signal(signal.SIGINT)
        seen = b""
        while b"leaves it alone: " not in seen:
            seen += os.read(ours, 4096)
        os.write(ours, answer)
        assert client.end().status == status
    finally:
        os.close(ours)
        os.close(theirs)
    if status == 0:
        assert site.run("r1")["state"] == "running"


@pytest.mark.parametrize("words", [(), ("--detach",)])
def test_ctrl_c_before_the_server_has_said_which_run_it_is_cancels_it(
    site: Site, words: tuple[str, ...]
) -> None:
    reactor, heard, peers = Reactor(), list[bytes](), list[Any]()

    def on_connection(peer: Any) -> None:
        peers.append(peer)
        peer.listen(lambda frame: heard.append(bytes(frame)), lambda reason: None)

    def await_frames(count: int) -> None:
        assert reactor.run_until(lambda: len(heard) >= count, monotonic() + 20)

    listener = transport.listen(("127.0.0.1", 0), KEY.encode(), reactor, on_connection)
    try:
        site.address = shown(listener.address)
        client = site.submit(*words)
        await_frames(2)  # what is wanted, and the bundle
        client.signal(signal.SIGINT)
        client.await_line("has not answered yet", err=True)
        peers[0].send(talk.said(run="r1"))
        await_frames(3)
        assert talk.heard(heard[2]) == {"do": "interrupt"}
        peers[0].send(talk.said(ended=130))
        reactor.run_until(lambda: peers[0].closed, monotonic() + 20)
        assert client.end().status == 130
    finally:
        listener.close()
        reactor.close()


def test_what_is_written_beyond_what_is_kept_is_counted(site: Site) -> None:
    site.serve()
    source = """
    @task
    def much():
        for n in range(40_000): print(n, "x" * 90)
    """
    run = site.detach(source=source)
    wait_until(lambda: site.run(run)["state"] == "ended", 60)
    ended = site.attach(run).end().check()
    skipped = next(line for line in ended.err.splitlines() if "lines were written before" in line)
    lost = int(skipped.split()[1].replace(",", ""))
    assert lost > 20_000
    assert lost + ended.out.count("\n") + ended.err.count("\n") - 1 == site.run(run)["lines"]
    assert "much | 39999 x" in ended.out


def test_a_request_that_means_nothing_is_refused_and_the_server_goes_on(site: Site) -> None:
    site.serve()
    host, port = site.address.split(":")
    where = (host, int(port))
    for garbage in (b"", b"\x00", b"\xff\xfe", b"\x00[]", b'\x00{"do": "fly"}', b"\x00{}",
                    b'\x00{"do": "attach"}'):  # fmt: skip
        with dial_blocking(where, KEY.encode(), b"submit") as wire:
            wire.send(garbage)
            assert b"error" in bytes(wire.recv(10))
    for do in (b"", b"[]", b'{"do": "fly"}', b'{"do": 3}', b'{"do": "cancel"}', b"null"):
        with dial_blocking(where, KEY.encode(), b"steer") as wire:
            wire.send(do)
            assert b"error" in bytes(wire.recv(10))
    with dial_blocking(where, KEY.encode(), b"submit") as wire:
        wire.send(b'\x00{"do": "submit", "file": "a.py", "digest": "x", "words": [], "jobs": null}')
        wire.send(b"\x03no archive")
        assert b"error" in bytes(wire.recv(10))
    assert site.status()["runs"] == []


def test_a_submission_that_cannot_be_begun_ends_nothing_but_itself(site: Site) -> None:
    site.serve()
    where = parse(site.address)
    bundle = make_bundle(site.write(LONG))
    broken = bundle._replace(data=b"junk", digest=digest_of(b"junk"))
    with dial_blocking(where, KEY.encode(), talk.SUBMIT) as wire:
        for frame in submission(broken, [], None):
            wire.send(frame)
        assert b"that is no bundle" in bytes(wire.recv(10))
    with dial_blocking(where, KEY.encode(), talk.SUBMIT) as wire:
        for frame in submission(bundle, ["no\0word"], None):
            wire.send(frame)
        said = [bytes(wire.recv(10)) for _ in range(3)]
    assert b"cannot be started: embedded null byte" in said[1] and b'"ended": 3' in said[2]
    assert [run["state"] for run in site.status()["runs"]] == ["ended"]


@pytest.mark.parametrize("stderr", ["no room", "no reader", "closed"])
def test_what_cannot_be_said_ends_neither_a_server_nor_a_node(
    site: Site, socket_folder: Path, stderr: str
) -> None:
    path = socket_folder / "server"
    reads, writes = os.pipe()
    os.close(reads)
    site.address = f"unix:{path}"
    with open(writes, "wb") as nobody, open("/dev/full", "wb") as full:
        file = full if stderr == "no room" else nobody
        how: dict[str, Any] = {"env": site.variables, "stderr": file}
        if stderr == "closed":
            how["program"] = ("sh", "-c", f'exec {TASKRUN} "$@" 2>&-', "sh")
        server = site.runs.start("serve", "--listen", site.address, "-j", "0", **how)
        wait_until(path.exists)
        node = site.runs.start("worker", site.address, "-j", "2", "--name", "lab", **how)
    site.go_on()
    assert "total | 28" in site.submit().end().check().out
    node.signal(signal.SIGTERM)
    node.end().check()
    server.signal(signal.SIGTERM)
    server.end().check()


def test_a_pool_that_says_what_no_pool_says_gives_its_slots_back(site: Site) -> None:
    site.serve()
    with dial_blocking(parse(site.address), KEY.encode(), talk.SUBMIT) as wire:
        wire.send(talk.said(do="lend", who="somebody", jobs=None, **versions()))
        assert b'"run": "p1"' in bytes(wire.recv(10))
        wire.send(b"rubbish")
        wait_until(lambda: site.run("p1")["state"] == "ended")
