"""What runs of a server share beside slots: calls of two of them never hold the same GPU."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from grid import Proxy
from harness import Running, started, wait_until
from test_serve import Site

pytestmark = pytest.mark.timeout(120)

# Every call notes when it had which units, of which machine.
HEAD = """
import json

who = {who!r}

def note(seconds):
    began = time.monotonic()
    time.sleep(seconds)
    held = [(current().node, unit) for unit in current().resources["gpu"]]
    with open(os.path.join({folder!r}, f"notes-{{who}}-{{os.getpid()}}"), "a") as file:
        file.write(json.dumps([who, began, time.monotonic(), held]) + chr(10))

def hold():
    mark(os.path.join({folder!r}, f"held-{{who}}"))
    while not os.path.exists(os.path.join({folder!r}, f"let-{{who}}")): time.sleep(0.01)
    note(0)
"""

QUICK = """
@task(resources={{"gpu": 1}})
def quick(n=each(range(40))): note(0.01)
"""

MANY = QUICK.replace("40", "250")

PAIRS = """
@task(resources={{"gpu": 2}})
def pairs(n=each(range(3))): note(0.1)
"""

HOLDS = """
@task(resources={{"gpu": 1}}, retries=2)
def holds(): hold()
"""


class Note(NamedTuple):
    """A call of a run had these units."""

    who: str
    began: float
    ended: float
    units: list[Any]


@pytest.fixture
def site(tmp_path: Path, socket_folder: Path) -> Iterator[Site]:
    for runs in started(tmp_path):
        yield Site(runs, str(socket_folder))


def join(site: Site, gpus: int, *words: str, address: str = "") -> Running:
    lab = site.runs.start(
        "worker", address or site.address, "--name", "lab", "--resource", f"gpu={gpus}", *words,
        env=site.variables,
    )  # fmt: skip
    lab.await_line("joined a server", err=True)
    return lab


def submit(site: Site, who: str, source: str, *words: str) -> str:
    return site.detach(*words, source=HEAD.replace("{who!r}", repr(who)) + source)


def end(site: Site, *runs: str) -> None:
    for run in runs:
        site.attach(run).end(90).check()


def notes(site: Site) -> list[Note]:
    """What was noted; nobody had what somebody else had."""
    lines = [line for file in site.folder.glob("notes-*") for line in file.read_text().split("\n")]
    found = sorted((Note(*json.loads(line)) for line in lines if line), key=lambda each: each.began)
    for unit in {tuple(unit) for each in found for unit in each.units}:
        having = [each for each in found if list(unit) in each.units]
        for one, next in pairwise(having):
            assert one.ended <= next.began, (unit, one, next)
    return found


def await_held(site: Site, who: str) -> None:
    wait_until((site.folder / f"held-{who}").exists)


def serve_with_a_gpu(site: Site, where: str) -> None:
    """Two slots and one GPU, on the server's machine or on a node."""
    if where == "here":
        site.serve(2, "--resource", "gpu=1")
    else:
        site.serve(0)
        join(site, 1, "-j", "2")


def let_go(site: Site, who: str) -> None:
    (site.folder / f"let-{who}").touch()


@pytest.mark.parametrize("where", ["here", "on a node"])
def test_two_runs_take_turns_at_one_gpu_and_never_have_it_at_once(site: Site, where: str) -> None:
    serve_with_a_gpu(site, where)
    end(site, *[submit(site, who, MANY) for who in "ab"])
    found = notes(site)
    assert len(found) == 500
    assert {tuple(unit) for each in found for unit in each.units} == {
        ("local" if where == "here" else "lab", 0)
    }
    order = [each.who for each in found]
    assert order.index("b") < len(order) - 1 - order[::-1].index("a")  # both had their turns


def test_a_run_that_needs_two_gpus_gets_its_turn_beside_one_that_takes_them_one_by_one(
    site: Site,
) -> None:
    site.serve(4, "--resource", "gpu=2")
    end(site, *[submit(site, *each) for each in (("a", MANY), ("b", PAIRS))])
    found = notes(site)
    assert [each.who for each in found].count("b") == 3
    assert {tuple(unit) for each in found for unit in each.units} == {("local", 0), ("local", 1)}


def test_two_runs_that_want_the_same_have_a_gpu_each(site: Site) -> None:
    site.serve(4, "--resource", "gpu=2")
    first, second = submit(site, "a", HOLDS), submit(site, "b", HOLDS)
    for who in "ab":
        await_held(site, who)
    let_go(site, "a")
    let_go(site, "b")
    end(site, first, second)
    assert len({tuple(unit) for each in notes(site) for unit in each.units}) == 2


def test_explain_says_what_a_run_waits_for_that_others_have(site: Site) -> None:
    site.serve(4, "--resource", "gpu=1")
    first = submit(site, "a", HOLDS)
    await_held(site, "a")
    second = submit(site, "b", HOLDS)
    said = "waits until enough gpu is free: of gpu the server lends this run 0 of 1 for now"
    wait_until(lambda: said in site.ask("explain", second, "holds").out)
    for who in "ab":
        let_go(site, who)
    end(site, first, second)
    assert [each.who for each in notes(site)] == ["a", "b"]


@pytest.mark.parametrize("where", ["here", "on a node"])
def test_what_a_killed_run_had_comes_back(site: Site, where: str) -> None:
    serve_with_a_gpu(site, where)
    first = submit(site, "a", HOLDS)
    await_held(site, "a")
    second = submit(site, "b", QUICK)
    os.kill(site.run(first)["pid"], signal.SIGKILL)
    end(site, second)
    assert site.attach(first).end().status == 3
    assert [each.who for each in notes(site)] == 40 * ["b"]


def test_a_node_that_is_lost_and_comes_back_brings_its_gpu(site: Site) -> None:
    server = site.serve(0, "--lease", "1.5")
    proxy = Proxy(int(site.address.rpartition(":")[2]))
    try:
        join(site, 1, "-j", "2", address=proxy.address)
        first, second = submit(site, "a", HOLDS), submit(site, "b", QUICK)
        await_held(site, "a")
        proxy.cut(refuse=True)
        server.await_line("node lab is lost", err=True)
        proxy.mend()
        wait_until(lambda: sum("node lab joined" in line for line in server.err) == 2)
        let_go(site, "a")
        end(site, first, second)
    finally:
        proxy.close()
    # An attempt that was lost may have got as far as its note.
    assert {each.who for each in notes(site)} == {"a", "b"}


def test_what_a_run_may_use_is_not_for_it_to_say(site: Site) -> None:
    site.serve(1)
    ended = site.submit("--resource", "gpu=1", source=HEAD + QUICK).end().check(2)
    assert "--resource is not for a run of a server" in ended.err
    assert "taskrun serve --resource" in ended.err


def test_what_a_node_of_one_lane_has_is_not_lent_and_explain_does_not_count_on_it(
    site: Site,
) -> None:
    site.serve(1)
    join(site, 1, "-j", "1", "--lane", "thread")
    run = submit(site, "a", QUICK.replace("resources", 'lane="thread", resources'))
    wait_until(lambda: site.status()["nodes"][1]["runs"] == {run: 1})
    said = "waits for a node that has gpu=1"
    wait_until(lambda: said in site.ask("explain", run, "quick[0]").out)
    site.ask("cancel", run).check()
