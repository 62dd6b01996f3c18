"""``taskrun.run``: runs from scripts, threads, notebooks, and from inside a task."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Runs, started

import taskrun
from taskrun import task
from taskrun.errors import UsageError

pytestmark = pytest.mark.timeout(120)

TASKS = """
@task
def numbers(count: int = 3): return list(range(count))

@task
def double(n=each(numbers)): return 2 * n

@task
def total(all=result(double)): return sum(all)

@task(default=False)
def bad(x=result(total)):
    raise ValueError("no good")
"""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    for runs in started(tmp_path):
        runs.write(TASKS)
        yield runs


def test_a_script_runs_a_file_and_gets_the_values(runs: Runs) -> None:
    ended = runs.script(
        """
        import taskrun
        print(taskrun.run("tasks.py", "total", output="quiet"))
        print(taskrun.run("tasks.py", "double", "total", params={"count": 4}, output="quiet"))
        print(taskrun.run("tasks.py", "double", inline=True, jobs=1, output="quiet"))
        """
    )
    lines = ended.check().out.splitlines()
    assert ended.err == "" and lines[0] == "6"
    assert eval(lines[1]) == {"double": [0, 2, 4, 6], "total": 12}
    assert lines[2] == "[0, 2, 4]"


OWN = """
import threading, os
from taskrun import *

class Point:
    def __init__(self, x): self.x = x

OFFSET = 100

@task
def points(): return [Point(n) for n in range(3)]

@task
def shifted(p=each(points)): return Point(p.x + OFFSET)

@task
def together(all=result(shifted)): return [p.x for p in all], os.getpid()

@task
def child(n): return n + OFFSET

@task
def parent(): return [child.submit(n) for n in range(3)]
"""

MAIN = """
values, pid = run(together, output="quiet")
assert pid != os.getpid()
print(values, run(parent, output="quiet"))
"""


def test_tasks_of_a_script_run_by_value_and_the_script_is_not_run_again(runs: Runs) -> None:
    ended = runs.script(f"{OWN}\nprint('begins')\n{MAIN}")
    assert ended.check().out == "begins\n[100, 101, 102] [100, 101, 102]\n"


def test_a_traceback_shows_the_lines_of_a_task_that_went_by_value(runs: Runs) -> None:
    source = """
        from taskrun import run, task

        def make(text):
            @task(name="made")
            def inner():
                return (lambda: int(text))()
            return inner

        if __name__ == "__main__":
            try:
                run(make("x"))
            except Exception as error:
                print(error.__cause__.__traceback__.tb_frame.f_code.co_filename)
        """
    ended = runs.script(source).check()
    assert 'script.py", line 7, in inner\n      return (lambda: int(text))()\n' in ended.err
    assert ended.out == f"{runs.folder}/script.py\n"


def test_a_notebook_has_no_file(runs: Runs) -> None:
    done = subprocess.run(
        [sys.executable, "-"],
        input=OWN + MAIN,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=runs.folder,
    )
    assert done.stdout == "[100, 101, 102] [100, 101, 102]\n", done.stderr


def test_runs_in_threads_do_not_meet(runs: Runs) -> None:
    source = f"""{OWN}
got = []

def one():
    got.append(run(together, output="quiet")[0])

threads = [threading.Thread(target=one) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(got == [[100, 101, 102]] * 3)
"""
    assert runs.script(source).check().out == "True\n"


def test_a_failure_raises_with_its_cause(runs: Runs) -> None:
    ended = runs.script(
        """
        import taskrun
        from taskrun.errors import RunFailed
        try:
            taskrun.run("tasks.py", "bad", output="quiet")
        except RunFailed as error:
            print(error)
            print(repr(error.__cause__), isinstance(error, taskrun.TaskrunError))
            frame = error.__cause__.__traceback__
            while frame.tb_next: frame = frame.tb_next
            print(frame.tb_frame.f_code.co_name)
        """
    )
    assert ended.check().out.splitlines() == [
        "bad failed: ValueError: no good",
        "ValueError('no good') True",
        "bad",
    ]


def test_what_cannot_be_run_is_a_usage_error(runs: Runs) -> None:
    ended = runs.script(
        """
        import taskrun, threading
        from taskrun.errors import UsageError
        lock = threading.Lock()

        def locked():
            @taskrun.task
            def work(): return lock_
            lock_ = lock
            return work

        for what, more in [((), {}), (("nowhere.py",), {}), (("tasks.py", "totl"), {}),
                           (("tasks.py", "total"), {"params": {"nothing": 1}}),
                           ((locked(),), {}),
                           (("tasks.py", "total"), {"params": {"count": lock}})]:
            try:
                print("ran", taskrun.run(*what, **more))
            except taskrun.TaskrunError as error:
                print(type(error).__name__, error)
        """
    )
    lines = ended.check().out.splitlines()
    assert len(lines) == 6, ended.out
    assert all(line.startswith(("UsageError", "ResultError", "ArgumentError")) for line in lines)
    assert "did you mean" in lines[2]
    assert "cannot be pickled" in lines[4]
    assert "cannot be pickled" in lines[5]


def test_what_there_is_to_be_shared_out_is_said_as_on_the_command_line(runs: Runs) -> None:
    ended = runs.script(
        """
        import taskrun
        from taskrun.errors import UsageError

        @taskrun.task(resources={"gpu": 1, "memory": "3G"})
        def work(): return taskrun.current().resources

        print(taskrun.run(work, resources={"gpu": "2", "memory": "16G"}, output="quiet"))
        for resources in ({"memory": "16X"}, {"gpu": -1}, {"gpu": 1.5}, {"gpu": None},
                          {"cpu": 2}, 3):
            try:
                taskrun.run(work, resources=resources)
            except UsageError as error:
                print(error)
        """
    )
    assert ended.check().out.splitlines() == [
        "{'gpu': [0], 'memory': 3000000000.0}",
        "run(resources=...): memory must be a number or a size such as 512M, 4G or 1.5GiB, "
        "not '16X'",
        "run(resources=...): gpu must be a number, 0 or more, not -1",
        "run(resources=...): gpu must be a whole number, at most 100,000",
        "run(resources=...): gpu must be a number, not None",
        "run(resources=...): how many cores are used is said by -j",
        "run(resources=...) is a dict, by names, not 3",
    ]


@pytest.mark.parametrize("option", ["params", "resources", "lane_jobs", "listen", "engine"])
def test_an_option_of_another_type_is_named(option: str) -> None:
    @taskrun.task
    def work() -> None:
        pass

    with pytest.raises(UsageError, match=rf"run\({option}=...\) is a (dict|str).*, not 5"):
        taskrun.run(work, **{option: 5})


def test_so_many_workers_as_lane_jobs_says(runs: Runs) -> None:
    ended = runs.script(
        """
        import asyncio, os, taskrun
        from taskrun import each, state
        from taskrun.errors import UsageError

        @taskrun.task
        async def meet(n=each(range(60))):
            pids = state.set("pids")
            pids.add(os.getpid())
            async with asyncio.timeout(30):
                while len(pids) < 2: await asyncio.sleep(0.05)

        taskrun.run(meet, jobs=1, lane_jobs={"async": 2}, output="quiet")
        for jobs in ({"asinc": 2}, {"process": 2}, {"async": 0}, {"async": True}):
            try:
                taskrun.run(meet, lane_jobs=jobs)
            except UsageError as error:
                print(error)
        """
    )
    assert ended.check().out.splitlines() == [
        "run(lane_jobs=...): there is no lane 'asinc'; did you mean async?",
        "run(lane_jobs=...): how many processes there are is said by -j",
        "run(lane_jobs=...): async has at least 1 worker, not 0",
        "run(lane_jobs=...): async has at least 1 worker, not True",
    ]


def test_a_run_inside_a_task_is_a_run_of_its_own(runs: Runs) -> None:
    runs.write(
        """
        import taskrun

        @task
        def outer(n=each(range(2))):
            return taskrun.run("tasks.py", "total", params={"count": n + 2}, output="quiet")

        @task
        def show(all=result(outer)): print(all)
        """,
        "outer.py",
    )
    for how in ("-j2", "--inline"):
        assert runs.run("exec", "outer.py", how, "--output=raw").check().out == "[2, 6]\n"


def test_ctrl_c_in_a_library_run_is_a_keyboard_interrupt(runs: Runs) -> None:
    source = """
        import taskrun, os, signal, time
        @taskrun.task
        def work():
            with open("begun", "w") as file: file.write("1")
            time.sleep(300)
        before = signal.getsignal(signal.SIGINT)
        try: taskrun.run(work, output="quiet")
        except KeyboardInterrupt: print("interrupted", signal.getsignal(signal.SIGINT) is before)
        """
    path = runs.write(source, "script.py", head="")
    running = runs.start(program=(sys.executable, str(path)))
    running.await_file(runs.folder / "begun")
    running.signal(2)
    assert running.end().check().out == "interrupted True\n"


def test_runs_in_several_threads_leave_the_garbage_collector_as_it_was(runs: Runs) -> None:
    ended = runs.script(
        """
        import gc, threading, taskrun

        @taskrun.task
        def double(n=taskrun.each(range(3))): return 2 * n

        def one(): values.append(taskrun.run(double, jobs=1, output="quiet"))

        before, values = gc.get_threshold(), []
        for _ in range(2):
            threads = [threading.Thread(target=one) for _ in range(5)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
        print(values == [[0, 2, 4]] * 10, gc.get_threshold() == before)
        """
    )
    assert ended.check().out == "True True\n"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"jobs": 0}, "run(jobs=...) is a number of workers, 1 or more, not 0"),
        ({"jobs": "4"}, "run(jobs=...) is a number of workers, 1 or more, not '4'"),
        ({"output": "loud"}, "run(output=...) is one of line, group, raw, quiet, not 'loud'"),
        (
            {"inline": True, "engine": "dask"},
            "run(inline=True) and run(engine=...) exclude each other",
        ),
        ({"policy": "go"}, "run(policy=...) is one of stop, keep-going, fail-fast, not 'go'"),
    ],
)
def test_an_option_that_does_not_fit_is_an_error_that_says_what_does(
    wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        taskrun.run(task(name="one")(lambda: 1), **wrong)
    assert str(caught.value) == says


def test_what_is_no_task_is_named() -> None:
    one = task(name="one")(lambda: 1)
    with pytest.raises(UsageError, match=r"names of tasks, not \(list\)"):
        taskrun.run([one])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"not \(str, Task\)"):
        taskrun.run("tasks.py", one)


def test_a_file_that_runs_itself_when_it_is_imported_is_an_error(runs: Runs) -> None:
    source = """
        import taskrun
        @task
        def double(n=each([1, 2])): return 2 * n

        taskrun.run(double, jobs=1, output="quiet")
        """
    runs.write(source, "again.py")
    assert "put it under  if __name__ == '__main__':" in runs.run("exec", "again.py").check(2).err
