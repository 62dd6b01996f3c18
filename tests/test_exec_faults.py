"""What goes wrong below a run, end to end: every fault is an outcome, and nothing is left."""

from __future__ import annotations

import os
import re
import resource
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import Running, Runs, lines_of, started, wait_until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


def template_of(running: Running) -> psutil.Process:
    """The process that starts the workers."""
    (template,) = [p for p, parent in running.parents().items() if parent == running.process.pid]
    return template


# -- workers that die -----------------------------------------------------------------

DEATHS = """
import ctypes, faulthandler
faulthandler.disable()

WAYS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "abort": os.abort,
    "segv": lambda: ctypes.string_at(0),
    "exit_0": lambda: os._exit(0),
    "exit_7": lambda: os._exit(7),
    "group": lambda: os.killpg(0, signal.SIGKILL),
    "exec": lambda: os.execvp("sh", ["sh", "-c", "echo replaced; exit 5"]),
    "close": lambda: os.closerange(3, 1000),
}
SAYS = {
    "kill": "SIGKILL", "term": "SIGTERM", "abort": "SIGABRT", "segv": "SIGSEGV",
    "exit_0": "exited with status 0", "exit_7": "exited with status 7", "group": "SIGKILL",
    "exec": "", "close": "",
}
"""


def test_a_dead_worker_costs_the_call_it_was_in_and_names_it(runs: Runs) -> None:
    source = (
        DEATHS
        + """
@task
def die(way=each(WAYS)):
    print("last words of", way, flush=True)
    WAYS[way]()
    time.sleep(60)

@task
def fine(n=each(range(300))): return n

@task
def total(all=result(fine)): return sum(all)
"""
    )
    ended = runs.json(source, "-k", "-j3", deadline=60).check(1)
    assert {name for name, state in ended.states.items() if state != "ok"} == {
        f"die[{n}]" for n in range(9)
    }
    ways = re.findall(r'"(\w+)": ("[^"]*")', DEATHS.partition("SAYS")[2])
    for number, (way, says) in enumerate(ways):
        failure = ended.failure(f"die[{number}]")
        if way != "close":  # it may also be told as what the operating system said
            assert failure["type"].endswith("WorkerLost"), failure
        assert says.strip('"') in failure["message"]
        if way not in ("exec", "close"):
            assert f"last words of {way}" in failure["message"]


def test_a_lost_attempt_took_as_long_as_it_ran(runs: Runs) -> None:
    source = """
        @task
        def die():
            time.sleep(1.45)
            os._exit(3)
        """
    (ended,) = (e for e in runs.json(source).check(1).events if e["event"] == "attempt_ended")
    assert 1.4 < ended["seconds"] < 10


def test_what_is_lost_while_it_waits_names_the_call_that_took_it_along(runs: Runs) -> None:
    """Past four workers a slot, those that wait execute what they wait for themselves."""
    source = """
        @task
        def deep(n):
            if n == 0: os._exit(9)
            return deep.submit(n - 1).result()

        @task
        def root(): return deep.submit(7)
        """
    ended = runs.exec(source, "-j1")
    assert ended.status == 1
    said = [line for line in ended.err.splitlines() if "WorkerLost: the worker that" in line]
    own = [line for line in said if "executed deep#7 (attempt 1) exited with status 9" in line]
    taken = [line for line in said if "exited with status 9 in deep#7, while deep#" in line]
    assert own and taken
    assert not any(" in deep#7" in line for line in own)


def test_a_worker_that_is_killed_while_idle_is_replaced(runs: Runs) -> None:
    source = """
        @task(priority=1)
        def quick(n=each(range(2))):
            with open(f"pid{n}", "w") as f: f.write(str(os.getpid()))
            time.sleep(0.3)

        @task
        def long(x=result(quick)):
            mark("waiting")
            while not os.path.exists("go"): time.sleep(0.01)

        @task
        def more(n=each(range(10)), x=result(long)): return n
        """
    running = runs.start_exec(source, "-j2", "--json")
    running.await_file(runs.folder / "waiting")
    pids = {int((runs.folder / f"pid{n}").read_text()) for n in range(2)}
    busy = int(re.search(r'"worker":"w(\d)".*long', running.await_line('"title":"long"'))[1])  # type: ignore[index]
    workers = {
        int(match[1]): int(match[2])
        for line in running.out
        if (match := re.search(r'"worker":"w(\d+)","what":"started, pid (\d+)', line))
    }
    (idle,) = [pid for worker, pid in workers.items() if worker != busy]
    assert pids <= set(workers.values())
    os.kill(idle, signal.SIGKILL)
    running.await_line("lost, killed by SIGKILL")
    (runs.folder / "go").touch()
    assert set(running.end().check().states.values()) == {"ok"}


BIG = """
class Load:
    "50 MB that say when they are on their way, and wait to be killed there."
    def __init__(self): self.data = b"x" * 50_000_000
    def __reduce__(self): return (unload, (self.data,))

def unload(data):
    if not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return len(data)

@task(retries=RETRIES)
def source(): return Load()

@task(retries=RETRIES)
def use(size=result(source)): return size

@task
def show(n=result(use)): print(n)
"""


@pytest.mark.parametrize(("retries", "status"), [(1, 0), (0, 1)])
def test_a_worker_killed_while_it_receives_50_mb(runs: Runs, retries: int, status: int) -> None:
    source = BIG.replace("RETRIES", str(retries))
    ended = runs.json(source, "-k", "-j2").check(status)
    assert ended.states["use"] == ("ok" if retries else "failed")
    if not retries:
        assert ended.failure("use")["type"].endswith("WorkerLost")


@pytest.mark.parametrize("moment", [0, 0.02, 0.05])
def test_a_worker_killed_from_outside_while_it_sends_50_mb(runs: Runs, moment: float) -> None:
    source = """
        @task(retries=3)
        def source():
            data = os.urandom(50_000_000)
            mark(f"sending{current().attempt}", str(os.getpid()))
            return data

        @task
        def show(x=result(source)): print(len(x))
        """
    running = runs.start_exec(source, "-j1", "--output=raw")
    pid = int(running.await_file(runs.folder / "sending1"))
    time.sleep(moment)  # seconds; how far it has come then is up to the machine
    try:
        psutil.Process(pid).kill()
    except psutil.NoSuchProcess:
        pass  # it had nothing left to do
    assert running.end().check().out == "50000000\n"


def test_calls_survive_a_hail_of_kills(runs: Runs) -> None:
    source = """
        @task(retries=20)
        def work(n=each(range(60))):
            with open(f"pid", "w") as f: f.write(str(os.getpid()))
            end = time.monotonic() + 0.02
            while time.monotonic() < end: pass
            return n

        @task
        def total(all=result(work)): print(sum(all), len(all))
        """
    running = runs.start_exec(source, "-j2", "--output=raw")
    running.await_file(runs.folder / "pid")
    kills = 0
    while running.process.poll() is None and kills < 12:
        victims = [p for p, parent in running.parents().items() if parent != running.process.pid]
        for victim in victims[:1]:
            try:
                victim.kill()
                kills += 1
            except psutil.NoSuchProcess:
                pass
        try:
            running.process.wait(0.1)
        except Exception:
            continue
    ended = running.end(60).check()
    assert ended.out == "1770 60\n"
    assert kills


def test_workers_that_never_live_end_the_run_with_status_3(runs: Runs) -> None:
    source = """
        if os.path.exists("imported"): os._exit(9)
        open("imported", "w").close()

        @task
        def work(n=each(range(10))): return n
        """
    for method in ("forkserver", "spawn"):
        (runs.folder / "imported").unlink(missing_ok=True)
        ended = runs.exec(source, "--start-method", method)
        assert ended.check(3).seconds < 20
        assert "exited with status 9" in ended.err


# -- output ---------------------------------------------------------------------------


def test_what_a_task_does_to_its_stdout_ends_with_the_call(runs: Runs) -> None:
    source = r"""
        import io
        WAYS = {
            "close": lambda: sys.stdout.close(),
            "close_fd": lambda: os.close(1),
            "close_all": lambda: (os.close(0), os.close(1), os.close(2)),
            "replace": lambda: setattr(sys, "stdout", io.StringIO()),
            "none": lambda: setattr(sys, "stdout", None),
            "delete": lambda: delattr(sys, "stdout"),
            "to_null": lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 1),
            "detach": lambda: sys.stdout.detach(),
            "nonblocking": lambda: os.set_blocking(1, False),
            "reconfigure": lambda: sys.stdout.reconfigure(encoding="utf-16"),
            "wrap": lambda: io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8"),
        }

        @task
        def spoil(way=each(WAYS)):
            print("before", way)
            WAYS[way]()

        @task
        def speak(n=each(range(11)), x=result(spoil)): print("after", n)
        """
    for how in ("-j1", "-j3"):
        ended = runs.exec(source, how).check()
        said = [line.partition(" | ")[2] for line in ended.out.splitlines()]
        assert sum(line.startswith("before") for line in said) == 11
        assert sum(line.startswith("after") for line in said) == 11


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_task_may_reconfigure_its_stdout_and_no_other_is_touched(runs: Runs, method: str) -> None:
    source = r"""
        @task
        def first():
            for stream in (sys.stdout, sys.stderr):
                assert not stream.seekable()
                stream.reconfigure(encoding="ascii", newline="\r\n")
            print("one")
            try: print("\xe9")
            except UnicodeEncodeError: print("two")

        @task(after=[first])
        def second(): print("\xe9", "\udcff")
        """
    ended = runs.exec(source, "-j1", "--output=raw", "--start-method", method)
    assert ended.check().out == "one\r\ntwo\r\n\xe9 \\udcff\n"


def test_a_pipe_in_the_place_of_stdout_takes_nothing_of_other_calls(runs: Runs) -> None:
    """However short the calls are: thousands of them, in turns."""
    source = """
        import socket
        ENDS = [*os.pipe(), *(end.detach() for end in socket.socketpair())]

        @task
        def work(n=each(range(6000))):
            if n % 20 == 7: os.dup2(ENDS[1 + n % 40 // 20], 1)
            if n % 20 == 8: print("line", n)
        """
    ended = runs.exec(source, "-j1").check()
    said = {line.partition(" | ")[2] for line in ended.out.splitlines() if " | " in line}
    assert said == {f"line {n}" for n in range(8, 6000, 20)}


def test_a_hundred_megabytes_of_output_pass_through_in_flat_memory(runs: Runs) -> None:
    source = """
        @task
        def pour(n=each(range(2))):
            line = "x" * 99 + "\\n"
            for _ in range(500): sys.stdout.write(line * 1000)
        """
    running = runs.start_exec(
        source,
        "-j2",
        stdout=open(runs.folder / "out", "wb"),  # noqa: SIM115
    )
    most = 0
    coordinator = psutil.Process(running.process.pid)
    while running.process.poll() is None:
        try:
            most = max(most, coordinator.memory_info().rss)
        except psutil.Error:
            break
    ended = running.end(60).check()
    size = (runs.folder / "out").stat().st_size
    assert size == 2 * 500 * 1000 * (100 + len("pour[0] | "))
    assert most < 150_000_000, f"{most:,} bytes"
    assert ended.seconds < 60


NOISE = r"""
import ctypes, subprocess
libc = ctypes.CDLL(None)
LONG = "y" * 5000

@task
def shout(count: int, n=each(range(8))):
    for i in range(count):
        print(f"<{n} py {i}>")
        os.write(1, f"<{n} os {i}>\n".encode())
        if i % 100 == 0: print(f"<{n} long {i} {LONG}>")
        if i % 500 == 0:
            libc.puts(f"<{n} c {i}>".encode()); libc.fflush(None)
            sys.stdout.flush()
            sh("for j in $(seq 25); do echo '<'{n} sh {i} $j'>'; done")
        sys.stdout.flush() if i % 7 == 0 else None
        print(f"<{n} err {i}>", file=sys.stderr)
"""


def expected_noise(n: int, count: int) -> list[str]:
    lines = []
    for i in range(count):
        lines += [f"<{n} py {i}>", f"<{n} os {i}>"]
        lines += [f"<{n} long {i} {'y' * 5000}>"] if i % 100 == 0 else []
        if i % 500 == 0:
            lines += [f"<{n} c {i}>", *(f"<{n} sh {i} {j}>" for j in range(1, 26))]
    return sorted(lines)


@pytest.mark.parametrize(("mode", "count"), [("line", 5000), ("group", 2000), ("json", 2000)])
def test_eight_noisy_workers_tear_and_lose_no_line(runs: Runs, mode: str, count: int) -> None:
    how = ["--json"] if mode == "json" else [f"--output={mode}"]
    ended = runs.exec(NOISE, "-j8", "-p", f"count={count}", *how, deadline=90).check()
    for n in range(8):
        if mode == "line":
            said = lines_of(ended.out, f"shout[{n}]")
            errors = lines_of(ended.err, f"shout[{n}]")
        elif mode == "group":
            block = re.search(rf"^--- shout\[{n}\].*\n((?:[^-].*\n)*)", ended.out, re.M)
            assert block is not None
            said = block[1].splitlines()
            errors = re.findall(rf"^<{n} err \d+>$", ended.err, re.M)
        else:
            texts: dict[str, str] = {"stdout": "", "stderr": ""}
            for event in ended.events:
                if event["event"] == "output" and event["id"] == n:
                    texts[event["stream"]] += event["text"]
            said, errors = texts["stdout"].splitlines(), texts["stderr"].splitlines()
        assert sorted(said) == expected_noise(n, count)
        assert errors == [f"<{n} err {i}>" for i in range(count)]


# -- what calls leave behind ----------------------------------------------------------


def test_a_child_that_outlives_its_call_ends_with_the_run(runs: Runs) -> None:
    source = """
        import subprocess

        def daemon():
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    for fd in range(3): os.close(fd)
                    mark("daemon", str(os.getpid()))
                    time.sleep(300)
                os._exit(0)

        @task
        def leave(n=each(range(3))):
            if n == 0 and os.fork() == 0: time.sleep(300)
            if n == 1: subprocess.Popen(["sleep", "300"], start_new_session=True)
            if n == 2:
                daemon()
                while not os.path.exists("daemon"): time.sleep(0.01)
            return n

        @task
        def total(all=result(leave)): print(all)
        """
    ended = runs.exec(source, "-j2", "--output=raw").check()
    assert ended.out == "[0, 1, 2]\n"
    assert ended.seconds < 15


def test_threads_that_never_end_do_not_keep_the_run(runs: Runs) -> None:
    source = """
        @task
        def start(n=each(range(4))):
            for daemon in (True, False):
                threading.Thread(target=time.sleep, args=(300,), daemon=daemon).start()

            def spin():
                while True: pass
            if n == 0: threading.Thread(target=spin).start()

        @task
        def total(all=result(start)): print(len(all))
        """
    ended = runs.exec(source, "-j2", "--output=raw").check()
    assert ended.out == "4\n"
    assert ended.seconds < 15


MADE = {
    "semaphore": """
        def make():
            lock = get_context("spawn").Lock()
            return lock, "/dev/shm/sem." + lock._semlock.name.lstrip("/")
        """,
    "manager": """
        def make():
            manager = get_context("spawn").Manager()
            return manager, os.path.dirname(manager.address)
        """,
}
TASKS = {
    "imported": "made = make(); mark('made', made[1])\n@task\ndef work(): pass",
    "kept": """
@task
def work():
    global made
    made = make()
    mark("made", made[1])
    assert os.path.exists(made[1])
""",
}
TASKS["kept, in a thread"] = TASKS["kept"].replace("@task", "@task(lane='thread')")


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize("when", TASKS)
@pytest.mark.parametrize("what", MADE)
def test_what_multiprocessing_has_made_ends_with_the_run(
    runs: Runs, what: str, when: str, method: str
) -> None:
    # The coordinator, which imports the file as well, makes one, too: the last is a worker's.
    source = "from multiprocessing import get_context\n" + textwrap.dedent(MADE[what])
    ended = runs.exec(source + TASKS[when], "--start-method", method).check()
    made = Path((runs.folder / "made").read_text())
    assert not made.exists()
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("way", ["timeout", "killed", "template"])
def test_shared_memory_of_a_worker_that_is_killed_ends_with_the_run(runs: Runs, way: str) -> None:
    source = """
        from multiprocessing.shared_memory import SharedMemory

        @task(timeout=TIMEOUT)
        def work():
            memory = SharedMemory(create=True, size=30_000_000)
            mark("made", memory.name)
            while True:
                try: time.sleep(60)
                except BaseException: pass
        """.replace("TIMEOUT", "1" if way == "timeout" else "None")
    running = runs.start_exec(source)
    name = running.await_file(runs.folder / "made")
    made = Path("/dev/shm", name)
    if way == "killed":
        running.signal(signal.SIGKILL)
    elif way == "template":
        template_of(running).kill()
    running.end()
    assert not made.exists()


# -- a coordinator that is killed -----------------------------------------------------

PHASES = {
    "importing": """
        import subprocess
        if os.path.exists("once"):
            subprocess.Popen(["sleep", "300"])
            mark("begun")
            time.sleep(300)
        open("once", "w").close()

        @task
        def work(): pass
        """,
    "idle": """
        @task
        def wait():
            mark("begun")
            raise Retry("later", after=300)
        """,
    "shell": """
        @task
        def shell(n=each(range(2))):
            sh("sleep 300 & (trap '' TERM INT; echo 1 > begun; sleep 300); wait")
        """,
    "daemons": """
        import subprocess

        @task
        def leave():
            subprocess.Popen(["setsid", "sh", "-c", "trap '' TERM HUP; sleep 300; sleep 300"])
            subprocess.Popen("nohup sleep 300 >/dev/null 2>&1 &", shell=True)
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    mark("begun")
                    time.sleep(300)
                os._exit(0)
            time.sleep(300)
        """,
    "holding": """
        import re
        @task
        def hold(n=each(range(2))):
            mark("begun")
            re.match(r"(a+)+$", "a" * 64 + "b")
        """,
    "deaf": """
        @task
        def ignore(n=each(range(2))):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            mark("begun")
            while True:
                try: time.sleep(300)
                except BaseException: pass
        """,
    "printing": """
        @task
        def pour(n=each(range(2))):
            mark("begun")
            while True: print("x" * 1000)
        """,
    "fanning": """
        @task
        def tiny(n=each(range(100_000))):
            if n == 1000: mark("begun")
        """,
    "waiting": """
        @task
        def child(n):
            mark("begun")
            time.sleep(300)
        @task
        def parent(n=each(range(2))): child.submit(n).result()
        """,
}


@pytest.mark.parametrize(
    ("phase", "method"),
    [(phase, "forkserver") for phase in PHASES]
    + [(phase, "spawn") for phase in ("importing", "shell", "daemons", "holding", "deaf")],
)
def test_a_coordinator_that_is_killed_leaves_no_process(
    runs: Runs, phase: str, method: str
) -> None:
    quiet = open(os.devnull, "wb")  # noqa: SIM115
    running = runs.start_exec(PHASES[phase], "-j2", "--start-method", method, stdout=quiet)
    running.await_file(runs.folder / "begun")
    assert len(running.processes()) >= 2
    running.signal(signal.SIGKILL)
    running.end()


@pytest.mark.parametrize("phase", ["importing", "shell"])
def test_a_coordinator_that_is_killed_leaves_no_socket(
    runs: Runs, socket_folder: Path, phase: str
) -> None:
    running = runs.start_exec(PHASES[phase], env={"XDG_RUNTIME_DIR": str(socket_folder)})
    running.await_file(runs.folder / "begun")
    (socket,) = (socket_folder / "taskrun").iterdir()
    running.signal(signal.SIGKILL)
    running.end()
    assert not socket.exists()


def test_a_template_that_is_killed_is_replaced(runs: Runs) -> None:
    source = """
        @task(retries=2)
        def work(n=each(range(4))):
            mark("begun")
            time.sleep(0.3)
            return n

        @task
        def total(all=result(work)): print(all)
        """
    running = runs.start_exec(source, "-j2", "--output=raw")
    running.await_file(runs.folder / "begun")
    template_of(running).kill()
    assert running.end().check().out == "[0, 1, 2, 3]\n"


def test_a_template_that_is_killed_while_its_workers_start_is_replaced(runs: Runs) -> None:
    source = """
        if os.path.exists("imported"):
            mark(f"starting.{os.getpid()}")
            while not os.path.exists("go on"): time.sleep(0.01)
        mark("imported")

        @task
        def work(n=each(range(8))): return n

        @task
        def total(all=result(work)): print(sum(all))
        """
    running = runs.start_exec(source, "-j8", "--output=raw", "--start-method=spawn")
    wait_until(lambda: len(list(runs.folder.glob("starting.*"))) == 8)
    template = template_of(running)
    workers = template.children()
    template.kill()
    psutil.wait_procs(workers, 20)
    (runs.folder / "go on").touch()
    assert running.end().check().out == "28\n"


STOPPED_TEMPLATE = """
@task(default=False)
def helper(): return 5

@task
def work():
    mark("begun")
    while not os.path.exists("go on"): time.sleep(0.01)
    print("helped", helper.submit().result())
"""


def test_a_template_that_is_stopped_goes_on_when_it_is_needed(runs: Runs) -> None:
    running = runs.start_exec(STOPPED_TEMPLATE, "-j1")
    running.await_file(runs.folder / "begun")
    template_of(running).suspend()
    (runs.folder / "go on").touch()
    ended = running.end()
    ended.check(0)
    assert "helped 5" in ended.out


def test_a_template_that_is_stopped_while_it_imports_the_file_goes_on(runs: Runs) -> None:
    ended = runs.exec(
        """
        if os.path.exists("once"):
            os.kill(os.getpid(), signal.SIGSTOP)
        open("once", "w").close()

        @task
        def work(): print("worked")
        """,
    )
    ended.check(0)
    assert "worked" in ended.out


def test_a_run_whose_processes_are_all_stopped_ends_at_the_first_signal(runs: Runs) -> None:
    running = runs.start_exec(STOPPED_TEMPLATE, "-j1")
    running.await_file(runs.folder / "begun")
    for process in running.others():
        process.suspend()
    running.signal(signal.SIGTERM)
    ended = running.end()
    ended.check(143)
    assert ended.seconds < 20


def test_what_a_template_leaves_when_it_is_killed_ends_and_nothing_else(runs: Runs) -> None:
    source = """
        import subprocess
        if not os.path.exists("own"):  # the coordinator is the first to import this
            mark("own", str(subprocess.Popen(["sleep", "300"]).pid))

        @task(retries=1)
        def work(n=each(range(2))):
            if current().attempt == 1:
                subprocess.Popen(["setsid", "sh", "-c", "trap '' TERM; sleep 300; sleep 300"])
                subprocess.Popen(["sleep", "300"], start_new_session=True)
                mark(f"begun{n}")
                doze()

        @task
        def last(after=result(work)):
            mark("last")
            while not os.path.exists("go"): time.sleep(0.01)
        """
    running = runs.start_exec(source, "-j2")
    for n in range(2):
        running.await_file(runs.folder / f"begun{n}")
    (template,) = [
        process
        for process, parent in running.parents().items()
        if parent == running.process.pid and process.cmdline()[0] != "sleep"
    ]
    template.kill()
    running.await_file(runs.folder / "last")
    own = psutil.Process(int((runs.folder / "own").read_text()))
    assert own.is_running() and own.status() != psutil.STATUS_ZOMBIE
    left = [process for process in running.others() if process.cmdline()[0] in ("sleep", "sh")]
    assert left == [own]
    own.kill()
    (runs.folder / "go").touch()
    running.end().check()


@pytest.mark.parametrize(
    "how", [("--start-method=forkserver",), ("--start-method=spawn",), ("--inline",)]
)
def test_who_starts_a_run_may_ignore_the_ends_of_children(runs: Runs, how: tuple[str, ...]) -> None:
    source = """
        import subprocess
        assert subprocess.call(["sh", "-c", "exit 3"]) == 3

        @task
        def work():
            print(subprocess.call(["sh", "-c", "exit 4"]), sh("exit 5", check=False).returncode)
        """
    ended = runs.exec(
        source,
        *how,
        "--output=raw",
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    ).check()
    assert ended.out == "4 5\n"
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("hard", [24, 512])
def test_with_few_descriptors_there_are_fewer_workers_or_more_descriptors(
    runs: Runs, hard: int
) -> None:
    source = """
        @task
        def child(n): return n

        @task
        def work(n=each(range(20))): return child.submit(n).result()
        """
    ended = runs.exec(
        source,
        "-j8",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, hard)),
    ).check()
    said = "some workers cannot be started (Too many open files)" in ended.err
    assert said == (hard == 24), ended.err


@pytest.mark.parametrize("few", range(5, 13))
def test_too_few_descriptors_for_any_worker_are_said(runs: Runs, few: int) -> None:
    ended = runs.exec(
        """
        @task
        def work(n=each(range(4))): return n
        """,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (few, few)),
    ).check(3)
    assert "Traceback" not in ended.err
    assert "file descriptors" in ended.err or "Too many open files" in ended.err


def test_memory_that_runs_out_in_a_worker_is_its_calls_outcome(runs: Runs) -> None:
    source = """
        import resource

        @task
        def greedy():
            resource.setrlimit(resource.RLIMIT_AS, (400_000_000, 400_000_000))
            return [bytearray(10_000_000) for _ in range(1000)]

        @task
        def fine(n=each(range(5))): return n
        """
    ended = runs.json(source, "-k", "-j2").check(1)
    assert ended.failure("greedy")["type"].rpartition(".")[2] in ("MemoryError", "WorkerLost")
    assert all(ended.states[f"fine[{n}]"] == "ok" for n in range(5))
