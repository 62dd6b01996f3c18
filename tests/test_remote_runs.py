"""Whole runs over nodes, as people start them: `exec --listen` here, `worker` there."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Ended, Running, Runs, started, wait_until

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parent.parent
LEASE = ("--lease", "1.5")


class Site:
    """Runs that listen, and nodes for them."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        key = runs.folder / "key"
        key.write_text("0123456789abcdef" * 4)
        key.chmod(0o600)
        self.variables = {
            "TASKRUN_AUTHKEY_FILE": str(key),
            "XDG_CACHE_HOME": str(runs.folder / "cache"),
        }

    def listen(self, *words: str, address: str = "127.0.0.1:0", jobs: int = 0) -> Running:
        """Start a run that listens."""
        return self.runs.start(
            "exec", *words, "-j", str(jobs), "--listen", address, env=self.variables
        )

    def write_and_listen(self, source: str, *words: str, jobs: int = 0) -> Running:
        """The same, of a task file."""
        return self.listen(str(self.runs.write(source)), *words, jobs=jobs)

    def node(self, run: Running | str, jobs: int = 2, *words: str, name: str = "lab") -> Running:
        """Start a node for it, in another folder."""
        address = run if isinstance(run, str) else address_of(run)
        elsewhere = self.runs.folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        return self.runs.start(
            "worker", address, "-j", str(jobs), "--name", name, *words, env=self.variables,
            cwd=elsewhere,
        )  # fmt: skip

    def over_nodes(self, source: str, *words: str, nodes: int = 1) -> Ended:
        """Run a task file over nodes that have nothing to do with its folder."""
        run = self.write_and_listen(source, *words)
        for number in range(nodes):
            self.node(run, name=f"lab{number}")
        return run.end()


def address_of(run: Running) -> str:
    line = run.await_line("listening on", err=True)
    return line.split()[-1]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    for runs in started(tmp_path):
        yield Site(runs)


# -- what runs ------------------------------------------------------------------------


def test_a_run_over_a_node_gives_what_it_gives_here(site: Site) -> None:
    (site.runs.folder / "helper.py").write_text("def square(x): return x * x\n")
    source = """
    import helper

    @task
    def square(x=each(range(300))): return helper.square(x)

    @task
    def total(squares=result(square)): print(sum(squares), len(squares))
    """
    here = site.runs.exec(source, "-j", "2").check()
    there = site.over_nodes(source, nodes=2).check()
    assert there.out == here.out


def test_calls_may_submit_calls_and_wait_for_them_on_nodes(site: Site) -> None:
    source = """
    @task(default=False)
    def fib(n):
        if n < 2: return n
        one, two = fib.submit(n - 1), fib.submit(n - 2)
        return one.result() + two.result()

    @task
    def main(): print(fib.submit(9).result())
    """
    assert site.over_nodes(source).check().out.strip().endswith("34")


def test_shared_state_is_the_same_for_calls_here_and_there(site: Site) -> None:
    source = """
    counted = state.counter("counted")
    where = state.dict("where")
    lock = state.lock("lock")

    @task
    def count(x=each(range(60))):
        with lock: where[x] = current().node
        counted.add(1)
        while len(set(where.values())) < 2: time.sleep(0.01)

    @task
    def show(done=result(count)): print(counted.get(), len(where), sorted(set(where.values())))
    """
    run = site.write_and_listen(source, jobs=1)
    site.node(run, 1)
    ended = run.end().check()
    assert "60 60 " in ended.out
    assert "lab" in ended.out


def test_output_and_the_job_log_say_where_it_was(site: Site) -> None:
    source = """
    @task(label="greet {x}")
    def hello(x=each(range(3))):
        print("hello from", current().node); os.system("echo below"); current().progress(1, 2)
    """
    log = site.runs.folder / "log"
    ended = site.over_nodes(source, "--joblog", str(log)).check()
    assert ended.out.count("hello from lab0") == 3
    assert re.findall(r"^greet \d \| below$", ended.out, re.M)
    workers = {line.split("\t")[4] for line in log.read_text().splitlines()[1:]}
    assert all(re.fullmatch(r"lab0/w\d+", worker) for worker in workers)


def test_large_values_pass_between_calls_on_nodes(site: Site) -> None:
    source = """
    @task
    def make(): return bytearray(3_000_000)

    @task
    def change(data=result(make), x=each(range(4))):
        data[0] = x + 1  # its own copy
        return len(data), data[0], bytes(data)

    @task
    def show(parts=result(change)): print([part[:2] for part in parts], len(parts[0][2]))
    """
    run = site.write_and_listen(source, jobs=1)
    site.node(run, 2)
    said = "[(3000000, 1), (3000000, 2), (3000000, 3), (3000000, 4)] 3000000"
    assert said in run.end().check().out


def test_a_failure_on_a_node_is_shown_with_its_traceback(site: Site) -> None:
    ended = site.over_nodes("""
    @task
    def bad(): raise ValueError("no good")
    """)
    assert ended.status == 1
    assert "ValueError: no good" in ended.err
    assert "in bad" in ended.err


def test_a_call_that_takes_too_long_on_a_node_is_ended(site: Site) -> None:
    ended = site.over_nodes("""
    @task(timeout=0.3)
    def slow(): doze()
    """)
    assert ended.status == 1
    assert "ran longer than 0.3 s" in ended.err


@pytest.mark.parametrize("example", ["workflow", "state"])
def test_the_examples_run_over_a_node(site: Site, example: str) -> None:
    file = str(ROOT / "examples" / example / "tasks.py")
    data = ("--bundle", "*.json") if example == "workflow" else ()
    here = site.runs.run("exec", file, "-j", "2", "--output", "raw", deadline=60).check()
    run = site.listen(file, "--output", "raw", *data)
    site.node(run)
    there = run.end(60).check()
    # Times and folders differ, which call is first, and by which of two ways the longest path went.
    digits = re.compile(r"[\d.,]+|/\S+| > .* > ")
    assert sorted(digits.sub("#", line) for line in there.out.splitlines()) == sorted(
        digits.sub("#", line) for line in here.out.splitlines()
    )


# -- who comes and goes ---------------------------------------------------------------


def test_without_nodes_and_workers_it_says_what_it_waits_for(site: Site) -> None:
    run = site.write_and_listen("@task\ndef one(): pass\n")
    run.await_line("waiting for nodes", err=True)
    run.signal(signal.SIGINT)
    assert run.end().status == 130


def test_calls_of_a_lane_that_no_node_has_say_once_what_they_wait_for(site: Site) -> None:
    source = """
@task
async def coroutine(n=each(range(3))): ...

@task(lane="thread")
def thread(n=each(coroutine)): ...

@task
def process(n=each(thread)): ...
"""
    run = site.write_and_listen(source)
    address = address_of(run)

    def why(call: str) -> str:
        return site.runs.run("explain", address, call, env=site.variables).check().out

    assert "waits for a node that executes calls of the lane async: none is" in why("coroutine[0]")
    site.node(run, 1, "--lane", "async", name="lab1")
    run.await_line("no node executes calls of the lane thread: they wait for one", err=True)
    assert "waits for a node that executes calls of the lane thread: none is" in why("thread[1]")
    site.node(run, 1, "--lane", "thread", name="lab2")
    run.await_line("no node executes calls of the lane process: they wait for one", err=True)
    assert "waits for a node that executes calls of the lane process: none is" in why("process[2]")
    site.node(run, 1, name="lab3")
    done = run.end().check()
    assert done.err.count("no node executes calls of") == 2


def test_without_listening_nobody_would_do_the_work(site: Site) -> None:
    ended = site.runs.exec("@task\ndef one(): pass\n", "-j", "0")
    assert ended.status == 2
    assert "-j 0 leaves nobody to do the work" in ended.err


def test_a_node_that_joins_late_takes_its_share(site: Site) -> None:
    run = site.write_and_listen(
        """
        @task
        def work(x=each(range(40))):
            time.sleep(0.05)
            return current().node

        @task
        def show(nodes=result(work)): print(sorted(set(nodes)))
        """,
        jobs=1,
    )
    site.node(run, 3)
    assert "['lab', 'local']" in run.end().check().out


def test_a_node_that_is_told_to_leave_costs_no_call(site: Site) -> None:
    run = site.write_and_listen(
        """
        @task
        def work(x=each(range(30))):
            mark(f"begun-{x}")
            time.sleep(0.1)
        """.replace("begun-", f"{site.runs.folder}/begun-"),
    )
    leaving = site.node(run, 2, name="leaving")
    run.await_file(site.runs.folder / "begun-0")
    site.node(run, 2, name="staying")
    run.await_line("staying joined", err=True)
    leaving.signal(signal.SIGTERM)
    assert leaving.end().status == 0
    ended = run.end().check()
    assert "30 calls" in ended.err and "all ok" in ended.err


def test_a_node_that_is_killed_is_replaced_by_the_others(site: Site) -> None:
    run = site.write_and_listen(
        f"""
        @task(retries=2)
        def work(x=each(range(8))):
            mark(f"{site.runs.folder}/begun-{{x}}")
            time.sleep(0.3)
            return current().node

        @task
        def show(nodes=result(work)): print(nodes.count("staying") >= 6, len(nodes))
        """,
        *LEASE,
    )
    killed = site.node(run, 2, name="killed")
    run.await_file(site.runs.folder / "begun-1")
    site.node(run, 2, name="staying")
    killed.signal(signal.SIGKILL)
    ended = run.end(60).check()
    assert "True 8" in ended.out
    assert "node killed is lost" in ended.err
    killed.assert_gone()


def test_a_node_without_room_for_the_files_says_so_and_comes_again_after_a_while(
    site: Site,
) -> None:
    site.variables["XDG_CACHE_HOME"] = str(site.runs.write("", name="cache.py"))
    run = site.write_and_listen("@task\ndef one(): print('done')\n")
    lab = site.node(run)
    said = lab.await_line("tries again in", err=True)
    assert "the files of the run cannot be laid out" in said and "Not a directory" in said
    assert "node lab cannot take part" in run.await_line("cannot be laid out", err=True)
    lab.await_line("tries again in 2 s", err=True)
    (site.runs.folder / "cache.py").unlink()
    assert "one | done" in run.end().check().out
    lab.await_line("the run has ended", err=True)


def test_without_retries_the_calls_of_a_lost_node_fail_and_name_it(site: Site) -> None:
    run = site.write_and_listen(
        f"""
        @task
        def work(): mark("{site.runs.folder}/begun"); doze()
        """,
        *LEASE,
    )
    node = site.node(run, 1)
    run.await_file(site.runs.folder / "begun")
    node.signal(signal.SIGKILL)
    ended = run.end()
    assert ended.status == 1
    assert "was lost with the node lab: nothing was heard of it for 1.5 s" in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_ends_its_calls_on_nodes(site: Site, number: int) -> None:
    flag = site.runs.folder / "begun"
    run = site.write_and_listen(f"""
    @task
    def work():
        mark("{flag}")
        sh("sleep 300")
    """)
    node = site.node(run, 1)
    run.await_file(flag)
    workers = wait_until(lambda: [one for one in node.others() if "sleep" in one.name()])
    run.signal(number)
    assert run.end().status == 128 + number
    wait_until(lambda: not any(process.is_running() for process in workers), 5)
    assert node.process.poll() is None


def test_a_coordinator_that_is_killed_and_started_again_gets_its_node_back(site: Site) -> None:
    flag = site.runs.folder / "begun"
    source = f"""
    @task
    def work(x=each(range(4))):
        mark("{flag}")
        time.sleep(0.2)
    """
    run = site.write_and_listen(source, *LEASE)
    address = address_of(run)
    node = site.node(address, 2)
    run.await_file(flag)
    before = {process.pid for process in node.others()}
    run.signal(signal.SIGKILL)
    run.process.wait(10)
    again = site.listen(str(site.runs.folder / "tasks.py"), *LEASE, address=address)
    again.end(30).check()
    wait_until(lambda: before.isdisjoint(process.pid for process in node.others()), 5)
    node.signal(signal.SIGTERM)
    assert node.end().status == 0


def test_a_worker_on_a_node_that_is_killed_costs_one_attempt(site: Site) -> None:
    flag = site.runs.folder / "pid"
    run = site.write_and_listen(f"""
    @task(retries=1)
    def work():
        if not os.path.exists("{flag}.killed"):
            mark("{flag}.part", str(os.getpid())); os.rename("{flag}.part", "{flag}")
            doze()

    @task
    def others(x=each(range(50))): return x
    """)
    site.node(run, 2)
    pid = int(run.await_file(flag))
    Path(f"{flag}.killed").touch()
    os.kill(pid, signal.SIGKILL)
    ended = run.end().check()
    assert "killed by SIGKILL" in ended.err


def test_a_node_takes_part_in_one_run_after_the_other(site: Site) -> None:
    source = "@task\ndef one(): return 1\n"
    first = site.write_and_listen(source)
    address = address_of(first)
    node = site.node(address, 1)
    first.end().check()
    node.await_line("the run has ended", err=True)
    began = time.monotonic()
    site.listen(str(site.runs.folder / "tasks.py"), address=address).end().check()
    assert time.monotonic() - began < 10
    node.signal(signal.SIGINT)
    assert node.end().status == 0


def test_a_call_goes_to_the_node_that_has_what_it_needs(site: Site) -> None:
    source = """
        @task(resources={"gpu": 1})
        def train(n=each(range(3))):
            return current().node, os.environ["CUDA_VISIBLE_DEVICES"]

        @task
        def report(all=result(train)): print(sorted(set(all)))
        """
    run = site.write_and_listen(source, jobs=1)
    run.await_line("train needs gpu=1 (there is none): waiting for a node that has it", err=True)
    site.node(run, 1, name="plain")
    run.await_line("plain joined", err=True)
    site.node(run, 2, "--resource", "gpu=1", name="fast")
    ended = run.end()
    assert ended.status == 0, ended.err
    assert "[('fast', '0')]" in ended.out


# -- how it looks ---------------------------------------------------------------------


def test_status_has_the_slots_of_this_machine_whoever_has_joined(site: Site) -> None:
    source = """
import time
from taskrun import each, task

@task
def long(n=each(range(9))): time.sleep(60)
"""
    run = site.write_and_listen(source, jobs=2)
    site.node(run, 3, "--lane", "thread", name="threads")
    site.node(run, 1, name="lab")

    def rows() -> list[str]:
        shown = site.runs.run("status", address_of(run), env=site.variables).out
        return [" ".join(line.split()[:-2]) for line in shown.splitlines()]

    node = "threads (lane thread) here 3"
    wait_until(lambda: {"local here 2", "lab here 1", node} <= set(rows()))
    run.signal(signal.SIGINT)
    assert run.end().status == 130
