"""Several hosts: network namespaces, each with its own address, and TLS between them.

    coordinator 10.77.0.1 --- bridge --- 10.77.0.2, .3, .4 nodes

Only root can make them.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import TASKRUN, Running, Runs, started, wait_until

from taskrun import addresses

pytestmark = pytest.mark.timeout(120)

LEASE = "2"
_numbers = itertools.count(1)

WORK = """
@task(retries=3)
def work(x=each(range(24))):
    time.sleep(0.2)
    return current().node

@task
def show(nodes=result(work)): print("nodes", sorted(set(nodes)), len(nodes))
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def why_not() -> str:
    """Why no namespaces can be made here; "" where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command ip is missing (apt install iproute2)"
    name = f"taskrun-probe-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made here: {error.stderr.decode().strip()}"
    return ""


class Hosts:
    """A coordinator's host and those of nodes, by number; 1 is the coordinator's."""

    def __init__(self, runs: Runs, count: int) -> None:
        self.runs = runs
        self._id = f"{os.getpid() % 100_000}x{next(_numbers)}"
        self._made: list[str] = []
        key = runs.folder / "key"
        key.write_text("0123456789abcdef" * 4)
        key.chmod(0o600)
        self.variables = {"TASKRUN_AUTHKEY_FILE": str(key)}
        self.switch = self._namespace(0)
        self._inside(self.switch, "link", "add", "br0", "type", "bridge")
        self._inside(self.switch, "link", "set", "br0", "up")
        for number in range(1, count + 1):
            self._connect(number)

    def _namespace(self, number: int) -> str:
        name = f"taskrun-{self._id}-{number}"
        ip("netns", "add", name)
        self._made.append(name)
        self._inside(name, "link", "set", "lo", "up")
        return name

    def _inside(self, namespace: str, *words: str) -> None:
        ip("-n", namespace, *words)

    def _connect(self, number: int) -> None:
        name = self._namespace(number)
        port = f"p{number}"
        self._inside(name, "link", "add", "eth0", "type", "veth", "peer", "name", port,
                     "netns", self.switch)  # fmt: skip
        self._inside(name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
        self._inside(name, "link", "set", "eth0", "up")
        self._inside(self.switch, "link", "set", port, "master", "br0", "up")

    def unplug(self, number: int) -> None:
        """Nothing comes to or from a host any more, and nobody is told."""
        self._inside(self.switch, "link", "set", f"p{number}", "down")

    def plug(self, number: int) -> None:
        """Undo :meth:`unplug`."""
        self._inside(self.switch, "link", "set", f"p{number}", "up")

    def shape(self, number: int, *how: str) -> None:
        """Delay or lose what leaves a host.  Skips the test where the kernel cannot."""
        name = f"taskrun-{self._id}-{number}"
        done = subprocess.run(
            ["tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "netem", *how],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"no delay and loss in this kernel (tc netem): {done.stderr.strip()}")

    def start(self, number: int, *words: str, program: tuple[str, ...] = (TASKRUN,)) -> Running:
        """Start taskrun, or another program, on a host."""
        name = f"taskrun-{self._id}-{number}"
        variables = {"XDG_CACHE_HOME": str(self.runs.folder / f"cache{number}")}
        return self.runs.start(
            *words, program=("ip", "netns", "exec", name, *program),
            env={**self.variables, **variables},
        )  # fmt: skip

    def have(self, address: str, number: int) -> None:
        """Give a host one more address, of IPv6.  Skips the test where there is none."""
        try:
            self._inside(f"taskrun-{self._id}-{number}", "addr", "add", f"{address}/64",
                         "dev", "eth0", "nodad")  # fmt: skip
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no IPv6 here: {error.stderr.decode().strip()}")

    def listen(self, source: str, *words: str, at: str = "0.0.0.0:7077") -> Running:
        """Start a run on the coordinator's host."""
        file = str(self.runs.write(source))
        run = self.start(1, "exec", file, "-j", "0", "--listen", at, "--lease", LEASE, *words)
        run.await_line("listening on", err=True)
        return run

    def node(self, number: int, jobs: int = 2) -> Running:
        """Start a node."""
        return self.start(
            number, "worker", "10.77.0.1:7077", "-j", str(jobs), "--name", f"host{number}"
        )

    def close(self) -> None:
        for name in self._made:
            ip("netns", "del", name)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    for runs in started(tmp_path):
        made = Hosts(runs, 4)
        try:
            yield made
        finally:
            for running in runs._started:
                running.kill()
            made.close()


def test_three_nodes_work_for_a_coordinator_over_tls(hosts: Hosts) -> None:
    run = hosts.listen(WORK)
    for number in (2, 3, 4):
        hosts.node(number)
    assert "nodes ['host2', 'host3', 'host4'] 24" in run.end(60).check().out


def test_a_partition_shorter_than_the_lease_costs_nothing(hosts: Hosts) -> None:
    run = hosts.listen(WORK)
    hosts.node(2)
    run.await_line("host2 joined", err=True)
    hosts.unplug(2)
    time.sleep(0.8)  # nobody knows of it, so there is nothing to wait for
    hosts.plug(2)
    ended = run.end(60).check()
    assert "nodes ['host2'] 24" in ended.out
    assert "lost" not in ended.err


def test_a_partition_longer_than_the_lease_moves_the_calls(hosts: Hosts) -> None:
    run = hosts.listen(WORK)
    away, _ = hosts.node(2), hosts.node(3)
    for number in (2, 3):
        run.await_line(f"host{number} joined", err=True)
    hosts.unplug(2)
    run.await_line("node host2 is lost", err=True)
    assert len(away.others()) == 0  # it has ended its calls by then
    hosts.plug(2)
    ended = run.end(60).check()
    assert re_nodes(ended.out) == 24


def test_a_host_that_is_switched_off_is_lost_and_the_run_goes_on(hosts: Hosts) -> None:
    run = hosts.listen(WORK)
    off, _ = hosts.node(2), hosts.node(3)
    for number in (2, 3):
        run.await_line(f"host{number} joined", err=True)
    hosts.unplug(2)
    for process in off.processes():
        process.send_signal(signal.SIGKILL)
    assert re_nodes(run.end(60).check().out) == 24


def test_a_coordinator_that_is_killed_and_started_again_gets_its_nodes_back(hosts: Hosts) -> None:
    run = hosts.listen(WORK)
    for number in (2, 3):
        hosts.node(number)
        run.await_line(f"host{number} joined", err=True)
    for process in run.processes():
        process.kill()
    again = hosts.listen(WORK)
    assert re_nodes(again.end(60).check().out) == 24


def test_a_line_that_delays_and_loses_changes_no_result(hosts: Hosts) -> None:
    for number in (1, 2, 3):
        hosts.shape(number, "delay", "25ms", "loss", "5%")
    run = hosts.listen(WORK.replace("0.2", "0.01"))
    for number in (2, 3):
        hosts.node(number)
    assert re_nodes(run.end(100).check().out) == 24


def test_a_slow_host_does_not_keep_the_others_waiting(hosts: Hosts) -> None:
    hosts.shape(2, "delay", "300ms")
    run = hosts.listen(WORK)
    hosts.node(2)
    hosts.node(3)
    assert re_nodes(run.end(100).check().out) == 24


STATE = """
import taskrun
from taskrun import state

seen, gate = state.set("seen"), state.event("gate")

@task
def work(x=each(range(4))):
    with taskrun.connect("10.77.0.1:7077") as server: server.counter("all").add(x)
    seen.add(x)
    gate.wait(30)
    print(f"{current().node} went on")
"""

OPEN = """
import taskrun
with taskrun.connect("10.77.0.1:7077", run="r1") as run: run.event("gate").set()
"""


def test_the_state_of_a_server_and_its_runs_is_reached_by_its_address_alone(hosts: Hosts) -> None:
    hosts.start(1, "serve", "-j", "0", "--listen", "0.0.0.0:7077").await_line("listening", err=True)
    hide = f'mount -t tmpfs -o mode=0700 none {addresses.runtime_folder()} && exec "$@"'
    hosts.start(
        2, "worker", "10.77.0.1:7077", "-j", "4", "--name", "host2",
        program=("sh", "-c", hide, "sh", TASKRUN),
    )  # fmt: skip
    file = str(hosts.runs.write(STATE))
    client = hosts.start(3, "exec", file, "--address", "10.77.0.1:7077")
    client.await_line("host2 joined", err=True)

    def look(*words: str) -> str:
        return hosts.start(3, "state", "10.77.0.1:7077", *words, "--json").end().check().out

    wait_until(lambda: '"seen": [0, 1, 2, 3]' in look("--run", "r1", "dump"))
    assert look("get", "all") == "6\n"
    script = hosts.runs.write(OPEN, "open.py", head="")
    hosts.start(3, str(script), program=(sys.executable,)).end().check()
    assert client.end().check().out.count("host2 went on") == 4


def test_an_address_of_one_network_only_can_be_listened_on(hosts: Hosts) -> None:
    hosts.have("fe80::77", 1)
    hosts.have("fe80::78", 2)
    source = "@task\ndef where(): print('on', current().node)"
    run = hosts.listen(source, at="[fe80::77%eth0]:7077")
    assert "tls://[fe80::77%eth0]:7077" in run.await_line("listening on", err=True)
    hosts.start(2, "worker", "[fe80::77%eth0]:7077", "-j", "1", "--name", "host2")
    assert "where | on host2" in run.end().check().out


def re_nodes(out: str) -> int:
    """How many calls ended, according to the last line."""
    return int(next(line for line in out.splitlines() if "nodes [" in line).split()[-1])
