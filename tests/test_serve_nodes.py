"""Nodes of a server: they take part in all its runs, and come and go."""

from __future__ import annotations

import json
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from grid import Proxy
from harness import Running, started, wait_until
from test_serve import KEY, LONG, TASKS, Site

from taskrun.addresses import parse
from taskrun.network.channels import Offer
from taskrun.network.joining import Hello, Hosting, Refused, hello_frame, read_answer
from taskrun.transport import dial_blocking

pytestmark = pytest.mark.timeout(120)

WHERE = (
    TASKS
    + """
@task
def where(all=result(work)): print("on", current().node)
"""
)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    runtime = tempfile.mkdtemp(dir="/tmp")  # the path of a socket must be short
    for runs in started(tmp_path):
        yield Site(runs, runtime)
    shutil.rmtree(runtime)


def join(site: Site, jobs: int = 2, name: str = "lab") -> Running:
    return site.runs.start(
        "worker", site.address, "-j", str(jobs), "--name", name, env=site.variables
    )


def node(site: Site, name: str = "lab") -> Any:
    return next((node for node in site.status()["nodes"] if node["node"] == name), None)


def test_what_bundle_names_reaches_a_node_and_a_folder_without_files_is_no_error_there(
    site: Site,
) -> None:
    for name in ("data/deep", "empty"):
        (site.folder / name).mkdir(parents=True)
    (site.folder / "data" / "deep" / "words.txt").write_text("seven words")
    site.serve(0)
    join(site)
    source = "@task\ndef read(): print(open('data/deep/words.txt').read())"
    ended = site.submit("--bundle", "empty", "--bundle", "data", source=source).end().check()
    assert "read | seven words" in ended.out


def test_a_run_is_executed_on_a_node_where_the_server_has_no_slots(site: Site) -> None:
    site.serve(0)
    client = site.submit(source=WHERE)
    wait_until(lambda: site.status()["runs"])
    assert site.run("r1")["state"] == "waiting"
    lab = join(site)
    site.await_begun(2)
    site.go_on()
    ended = client.end().check()
    assert "total | 28" in ended.out and "where | on lab" in ended.out
    assert node(site)["slots"] == 2
    lab.signal(signal.SIGTERM)
    assert lab.end().status == 0
    wait_until(lambda: node(site) is None)


LANES = """
import time
from pathlib import Path
from taskrun import current, each, result, task

HERE = Path(HERE_IS)

@task
def plain(n=each(range(4))):
    return current().node

@task(lane="thread")
def waits(n=each(range(100))):  # 32 in a worker
    while not (HERE / "go").exists():
        time.sleep(0.02)
    return current().node

@task
def total(plain=result(plain), waits=result(waits)):
    print("plain on", sorted(set(plain)), "waits on", sorted(set(waits)))
"""


def test_a_node_of_one_lane_takes_calls_of_that_lane_alone_from_all_runs_that_have_some(
    site: Site,
) -> None:
    site.serve(3)
    lab = site.runs.start(
        "worker", site.address, "-j", "2", "--name", "lab", "--lane", "thread", env=site.variables
    )
    wait_until(lambda: node(site))
    assert (node(site)["lanes"], site.status()["slots"]) == (["thread"], 3)
    source = LANES.replace("HERE_IS", repr(str(site.folder)))
    first = site.detach(source=source)
    second = site.detach(source=source)
    third = site.detach()
    # One worker each: they have equal parts, and who has no such calls has none.
    wait_until(lambda: node(site)["runs"] == {first: 1, second: 1})
    busy = {first, second}

    def at_work(place: str) -> set[str]:
        workers = node(site, place)["workers"]
        return {each["run"] for each in workers if each["lane"] == "thread" and each["calls"]}

    for place in ("lab", "local"):
        wait_until(lambda place=place: at_work(place) >= busy)
    (site.folder / "go").touch()
    site.go_on()
    for run in (first, second, third):
        wait_until(lambda run=run: site.run(run)["state"] == "ended")
        assert site.run(run)["status"] == 0
    for run in (first, second):
        said = site.attach(run).end().check().out
        assert "plain on ['local'] waits on ['lab', 'local']" in said
    wait_until(lambda: not node(site)["runs"])
    lab.signal(signal.SIGTERM)
    assert lab.end().status == 0


def test_two_runs_share_a_node_and_the_server_and_one_gets_all_when_it_is_alone(
    site: Site,
) -> None:
    site.serve(2)
    join(site, 2)
    wait_until(lambda: node(site))
    first = site.detach(source=LONG)
    wait_until(lambda: site.run(first)["slots"] == 4)
    second = site.detach()
    assert [site.run(name)["slots"] for name in (first, second)] == [2, 2]
    site.ask("cancel", first).check()
    site.await_begun(4)
    assert site.run(second)["slots"] == 4
    site.go_on()
    assert "total | 28" in site.attach(second).end().check().out


def began(now: Any) -> list[Any]:
    """The calls that run, for sure."""
    return [call for call in now["running"] if call["begun"]]


def test_the_status_of_a_server_shows_what_runs_where_and_how_each_run_goes(site: Site) -> None:
    site.serve(1)
    join(site, 2)
    wait_until(lambda: node(site))
    first, second = site.detach("-k"), site.detach("-k")
    # The first one may have begun calls in all slots before the second one came.
    wait_until(lambda: {call["run"] for call in began(site.status())} == {first, second})
    wait_until(lambda: len(began(site.status())) >= 3)
    now = site.status()
    assert {run["now"]["total"] for run in now["runs"]} == {9} and now["slots"] == 3
    assert [machine["node"] for machine in now["nodes"]] == ["local", "lab"]
    assert sum(worker["calls"] for worker in node(site)["workers"]) >= 2
    shown = site.ask("status").check().out
    assert re.search(rf"{first} +running +\d +\d+ +0 of 9 ", shown)
    assert re.search(r"lab +here +2 +[2-9] +[2-9] +r1 1, r2 1", shown)
    assert len(re.findall(r"work\[\d\] +(?:r1|r2) +(?:lab/)?w\d+ +\d", shown)) >= 3
    assert re.search(r"work\[\d\] +r\d +lab/w\d+ +\d", shown)
    watching = site.runs.start("status", site.address, "--watch", env=site.variables)
    watching.await_line("0 of 9")
    site.go_on()
    watching.await_line("ended 0")
    watching.kill()


def test_status_shows_the_workers_of_a_node_that_has_another_name_in_the_run(site: Site) -> None:
    site.serve(0)
    lab = join(site, 1)
    wait_until(lambda: node(site))
    site.detach(source=LONG.replace("@task", "@task(retries=9)"))
    wait_until(lambda: node(site)["workers"])
    # The run waits for the lease of the part that is killed, and has the next one beside it.
    [supervisor] = psutil.Process(lab.process.pid).children()
    supervisor.kill()
    wait_until(lambda: "lab-2/" in str(node(site)["workers"]))


def test_slots_that_a_run_has_no_work_for_are_used_by_the_others(site: Site) -> None:
    site.serve(1)
    join(site, 3)
    wait_until(lambda: node(site))
    alone = """
    @task
    def alone():
        mark(os.path.join({folder!r}, "alone"))
        while not os.path.exists(os.path.join({folder!r}, "go on")): time.sleep(0.01)

    @task(after=[alone])
    def then(n=each(range(9))): pass
    """
    first = site.detach(source=alone)
    wait_until((site.folder / "alone").exists)
    second = site.detach()
    site.await_begun(3)
    wait_until(lambda: [site.run(run)["slots"] for run in (first, second)] == [1, 3])
    site.go_on()
    assert "10 calls in" in site.attach(first).end().check().err
    assert "total | 28" in site.attach(second).end().check().out


def test_a_run_uses_a_node_anew_where_a_call_of_its_own_still_runs(site: Site) -> None:
    site.serve(1)
    join(site, 2)
    wait_until(lambda: node(site))
    source = """
    @task
    def hold(n=each(range(3))):
        mark(os.path.join({folder!r}, f"held-{{current().node or 'here'}}-{{n}}"))
        while not os.path.exists(os.path.join({folder!r}, f"let{{n}}")): time.sleep(0.01)

    @task(priority=-1)
    def quick(n=each(range(9))): mark(os.path.join({folder!r}, f"quick{{n}}"))
    """
    first = site.detach(source=source)
    wait_until(lambda: len(list(site.folder.glob("held-*"))) == 3)
    others = [site.detach(source=LONG) for _ in range(2)]
    wait_until(lambda: node(site)["runs"] == dict.fromkeys(others, 1))
    staying, leaving = sorted(path.name[-1] for path in site.folder.glob("held-lab-*"))
    (site.folder / f"let{leaving}").touch()
    for other in others:
        site.ask("cancel", other).check()
    # The slot here has one of the calls as well.
    wait_until(lambda: len(list(site.folder.glob("quick*"))) == 9)
    assert not (site.folder / f"let{staying}").exists()
    for n in range(3):
        (site.folder / f"let{n}").touch()
    site.attach(first).end().check()


def test_one_run_after_the_other_uses_the_same_node(site: Site) -> None:
    site.serve(0)
    lab = join(site)
    site.go_on()
    for _ in range(3):
        assert "total | 28" in site.submit().end().check().out
    wait_until(lambda: len(lab.processes()) == 1)


def test_a_node_that_no_run_wants_for_a_while_leaves_by_itself_and_says_so_once(
    site: Site,
) -> None:
    site.serve(0)
    client = site.submit()
    lab = site.runs.start(
        "worker", site.address, "-j", "2", "--name", "lab", "--idle-exit", "0.5",
        env=site.variables,
    )  # fmt: skip
    site.await_begun(2)
    wait_until(lambda: site.run("r1")["now"]["seconds"] > 2)
    site.go_on()
    assert "total | 28" in client.end().check().out
    ended = lab.end()
    assert ended.status == 0 and ended.err.count("had nothing to do") == 1


def test_a_node_that_was_away_when_a_run_ended_is_told_so(site: Site) -> None:
    site.serve(1)
    site.submit(source="@task\ndef one(): pass\n").end().check()
    with dial_blocking(parse(site.address), KEY.encode(), b"node@r1") as wire:
        answer = read_answer(memoryview(bytes(wire.recv(10))))
    assert answer == Refused("r1 has ended", later=False)


@pytest.mark.parametrize("rubbish", [b"rubbish", b"[]", b"\xff", b"[" * 200_000])
def test_a_node_that_says_what_no_node_says_is_lost_and_the_server_goes_on(
    site: Site, rubbish: bytes
) -> None:
    server = site.serve(1)
    with dial_blocking(parse(site.address), KEY.encode(), b"node") as wire:
        wire.send(hello_frame(Hello(Offer("lab", 1, {}), "", 0)))
        assert isinstance(read_answer(memoryview(bytes(wire.recv(10)))), Hosting)
        wire.send(rubbish)
        server.await_line("node lab says what no node says", err=True)
    site.submit(source="@task\ndef one(): pass\n").end().check()


def test_a_node_that_is_drained_ends_its_calls_and_leaves(site: Site) -> None:
    site.serve(1)
    lab = join(site, 2)
    wait_until(lambda: node(site))
    run = site.detach()
    site.await_begun(3)
    assert "there is no node 'lib'" in site.ask("drain", "lib").check(2).err
    answer = json.loads(site.ask("drain", "lab", "--json").check().out)
    assert answer["node"] == "lab" and "takes no more calls" in answer["text"]
    wait_until(lambda: node(site)["state"] == "draining")
    assert lab.process.poll() is None  # its calls go on
    site.go_on()
    assert "total | 28" in site.attach(run).end().check().out
    assert lab.end().status == 0
    assert sum("leaves when it has ended" in line for line in lab.err) == 1


def test_a_node_that_is_drained_while_it_is_away_leaves_when_it_is_back(site: Site) -> None:
    server = site.serve(0)
    proxy = Proxy(int(site.address.rpartition(":")[2]))
    try:
        lab = site.runs.start("worker", proxy.address, "--name", "lab", env=site.variables)
        wait_until(lambda: node(site))
        proxy.cut(refuse=True)
        server.await_line("node lab is away", err=True)
        site.ask("drain", "lab").check()
        proxy.mend()
        assert lab.end().status == 0
    finally:
        proxy.close()


def test_of_a_node_that_was_away_is_said_that_it_is_back(site: Site) -> None:
    server = site.serve(1)
    proxy = Proxy(int(site.address.rpartition(":")[2]))
    try:
        lab = site.runs.start(
            "worker", proxy.address, "-j", "1", "--name", "lab", env=site.variables
        )
        lab.await_line("joined a server as lab", err=True)
        proxy.cut(refuse=True)
        server.await_line("node lab is away", err=True)
        lab.await_line("lost the connection to the server", err=True)
        proxy.mend()
        lab.await_line("is back at the server", err=True)
        server.await_line("node lab is back", err=True)
    finally:
        proxy.close()


def test_a_node_that_is_killed_leaves_nothing_and_costs_its_calls_only(site: Site) -> None:
    site.serve(1, "--lease", "1.5")
    lab = join(site, 2)
    wait_until(lambda: node(site))
    source = TASKS.replace("@task\ndef work", "@task(retries=2)\ndef work")
    run = site.detach(source=source)
    site.await_begun(3)
    lab.signal(signal.SIGKILL)
    lab.process.wait(10)
    lab.assert_gone(2.0)
    wait_until(lambda: node(site) is None)
    site.go_on()
    assert "total | 28" in site.attach(run).end().check().out


def test_a_killed_server_is_missed_by_its_node_which_joins_the_next_one(site: Site) -> None:
    server = site.serve(0, "--lease", "1.5")
    lab = join(site)
    client = site.submit()
    site.await_begun(2)
    server.signal(signal.SIGKILL)
    assert client.end().status == 3
    server.assert_gone()
    lab.await_line("lost the connection to the server", err=True)
    wait_until(lambda: len(lab.processes()) == 1)
    again = site.runs.start("serve", "--listen", site.address, "-j", "0", env=site.variables)
    again.await_line("listening on", err=True)
    site.go_on()
    assert "total | 28" in site.submit().end().check().out


def test_an_interrupted_node_leaves_at_once_the_second_time(site: Site) -> None:
    site.serve(1)
    lab = join(site)
    wait_until(lambda: node(site))
    site.detach("-k")
    site.await_begun(3)
    lab.signal(signal.SIGINT)
    lab.await_line("again to leave at once", err=True)
    lab.signal(signal.SIGINT)
    assert lab.end().status == 130


def test_the_node_of_a_plain_run_is_listed_and_can_be_drained(site: Site) -> None:
    path = site.write()
    run = site.runs.start("exec", path, "-j", "1", "--listen", "127.0.0.1:0", env=site.variables)
    site.address = run.await_line("listening on", err=True).split()[-1]
    lab = join(site)
    site.await_begun(3)
    found = node(site)
    assert found["slots"] == 2 and found["state"] == "here" and len(found["workers"]) == 2
    shown = site.ask("status").check().out
    assert re.search(r"lab +here +2 +2 +2", shown) and re.search(r"local +here +1 +1 +1", shown)
    assert len(re.findall(r"work\[\d\] +lab/w\d", shown)) == 2
    there = next(call for call in site.status()["running"] if call["worker"].startswith("lab/"))
    assert f"on {there['worker']}:" in site.ask("stack", there["call"]).check().out
    site.ask("drain", "lab").check()
    wait_until(lambda: node(site)["state"] == "draining")
    site.go_on()
    assert "total | 28" in run.end().check().out
    assert lab.end().status == 0
