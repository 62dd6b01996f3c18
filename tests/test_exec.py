"""What a task file means, through real runs of the command line."""

from __future__ import annotations

import csv
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import TASKRUN, Ended, Runs, lines_of, started, wait_until

from taskrun import loading

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


# -- where parameters come from -------------------------------------------------------

SOURCES = """
LITERAL = ["x", "y"]
SAME = [1, 2, 3]

@task
def numbers(): return [3, 1, 2]

@task
def double(n=each(numbers)):
    time.sleep(n * 0.05)
    return 2 * n

@task
def triple(n=each(numbers), d=each(double)): return n, d

@task
def in_order(all=result(double)): print(all)

@task
def together(all=result(triple)): print(all)

@task
def cell(row=each(range(2)), column=each(LITERAL)): return f"{row}{column}"

@task
def cells(all=result(cell)): print(all)

@task
def squares(width=each(SAME), height=each(SAME)): return width * height

@task
def lists(n=each(numbers)): return list(range(n))

@task
def flattened(item=each(lists, flat=True)): return item

@task
def flat(all=result(flattened)): print(all)

@task
def generated():
    yield "a"
    yield "b"

@task
def item(letter=each(generated)): return letter.upper()

@task
async def awaited(n=each(numbers)):
    import asyncio
    await asyncio.sleep(0.01)
    return n + 1

@task
async def agenerated():
    for n in range(3): yield n

@task
def the_rest(s=result(squares), i=result(item), a=result(awaited), g=result(agenerated)):
    print(s, i, a, g)

@task
def of_dict(): return {"k1": 1, "k2": 2}

@task
def key(k=each(of_dict)): return k

@task
def nothing(): return []

@task
def never(x=each(nothing)): raise AssertionError

@task
def of_nothing(all=result(never), keys=result(key)): print(all, keys)

@task
def product_of_fans(d=each(double), letter=each(item)): return f"{d}{letter}"

@task
def products(all=result(product_of_fans)): print(all)
"""


@pytest.mark.parametrize("how", [["-j4"], ["-j1"], ["--inline"], ["-j2", "--start-method=spawn"]])
def test_values_go_from_task_to_task_as_the_defaults_say(runs: Runs, how: list[str]) -> None:
    out = runs.exec(SOURCES, "--output=raw", *how).check().out
    assert sorted(out.splitlines()) == sorted(
        [
            "[6, 2, 4]",
            "[(3, 6), (1, 2), (2, 4)]",
            "['0x', '0y', '1x', '1y']",
            "[0, 1, 2, 0, 0, 1]",
            "[1, 4, 9] ['A', 'B'] [4, 2, 3] [0, 1, 2]",
            "[] ['k1', 'k2']",
            "['6A', '6B', '2A', '2B', '4A', '4B']",
        ]
    )


@pytest.mark.parametrize("how", [["-j2"], ["--inline"]])
def test_what_a_generator_yields_before_it_fails_is_there(runs: Runs, how: list[str]) -> None:
    source = """
        @task
        def numbers():
            yield from range(3)
            raise ValueError("no more")

        @task
        def twice(n=each(numbers)): return 2 * n

        @task
        def total(all=result(twice, errors="skip")): print(all)
        """
    assert runs.exec(source, "--output=raw", *how).check().out == "[0, 2, 4]\n"


def test_an_item_goes_on_without_waiting_for_the_others(runs: Runs) -> None:
    ended = runs.exec(
        """
        @task
        def first(n=each(range(2))):
            while n == 1 and not os.path.exists("second"): time.sleep(0.01)
            return n

        @task
        def second(n=each(first)):
            open("second", "w").close()
        """,
        "-j2",
    )
    ended.check()


@pytest.mark.parametrize("value", ["'text'", "b'bytes'", "3", "None"])
def test_each_needs_items(runs: Runs, value: str) -> None:
    source = f"@task\ndef one(): return {value}\n@task\ndef many(x=each(one)): pass\n"
    ended = runs.json(source).check(1)
    assert ended.failure("one")["type"].endswith("ResultError")
    assert "each() needs the items" in ended.failure("one")["message"]


def test_after_orders_without_data_and_pulls_in(runs: Runs) -> None:
    source = """
        @task(default=False)
        def first():
            time.sleep(0.1)
            print("first")

        @task(after=[first])
        def second(): print("second")

        @task
        def other(): print("other")
        """
    assert lines_of(runs.exec(source, "second").check().out, "first") == ["first"]
    ended = runs.exec(source, "second", "--output=raw").check()
    assert ended.out == "first\nsecond\n"


def test_what_is_made_per_worker_is_made_once_and_finished(runs: Runs) -> None:
    ended = runs.exec(
        """
        def client():
            print("made")
            yield os.getpid()
            print("finished")

        @task
        def work(n=each(range(20)), pid=per_worker(client)):
            assert pid == os.getpid()
        """,
        "-j2",
        "--output=raw",
    )
    words = ended.check().out.split()
    assert words.count("made") == words.count("finished") in (1, 2)


@pytest.mark.parametrize("options", [("-j1",), ("--inline",)], ids=["workers", "inline"])
@pytest.mark.parametrize("raised", ["sys.exit('left')", "1 / 0", "raise KeyboardInterrupt"])
def test_what_cannot_be_finished_keeps_nothing_else_from_it(
    runs: Runs, raised: str, options: tuple[str, ...]
) -> None:
    ended = runs.exec(
        f"""
        def first():
            yield 1
            print("finished")

        def second():
            yield 2
            {raised}

        @task
        def work(one=per_worker(first), two=per_worker(second)): print("done")
        """,
        *options,
        "--output=raw",
    )
    assert ended.check().out == "done\nfinished\n"
    assert f"in second\n    {raised}" in ended.err
    assert "in close" not in ended.err
    assert "1 call in" in ended.err


def test_parameters_of_every_type_arrive_converted(runs: Runs) -> None:
    source = """
        import enum
        from pathlib import Path
        from typing import Literal

        class Colour(enum.Enum):
            RED = "r"

        @task
        def show(i: int, f: float = 1.0, b: bool = False, s: str = "", p: Path = Path("."),
                 l: Literal["a", "b"] = "a", e: Colour = Colour.RED, n: list[int] = [],
                 o: int | None = None, plain=5):
            print(i, f, b, repr(s), repr(p), l, e, n, o, repr(plain))
        """
    words = ["i=3", "show.f=2.5", "b=yes", "s=é =", "p=a b", "l=b", "e=RED", "n=1,2", "o=7"]
    options = [part for word in [*words, "plain=6"] for part in ("-p", word)]
    ended = runs.exec(source, *options, "--output=raw")
    assert ended.check().out == "3 2.5 True 'é =' PosixPath('a b') b Colour.RED [1, 2] 7 6\n"
    for wrong in ("i=x", "l=c", "e=BLUE", "b=perhaps", "n=1,x", "j=1"):
        ended = runs.exec(source, "-p", "i=1", "-p", wrong)
        assert (ended.status, ended.out) == (2, "")
        assert len(ended.err.splitlines()) == 1
    assert "needs" in runs.exec(source, "show").check(2).err


def test_a_parameter_may_be_longer_than_what_is_read_at_a_time(runs: Runs) -> None:
    source = "@task\ndef show(text: str): print(len(text))\n"
    ended = runs.exec(source, "-p", f"text={'x' * 120_000}").check()
    assert "120000" in ended.out


# -- failures and what they do --------------------------------------------------------

FAILING = """
@task
def source(): return list(range(4))

@task
def fetch(n=each(source)):
    if n == 2: raise ValueError("bad row")
    return n

@task
def strict(all=result(fetch)): print("strict")

@task
def skipping(all=result(fetch, errors="skip")): print("skipping", all)

@task
def keeping(all=result(fetch, errors="keep")): print("keeping", all)
"""


def test_a_failure_skips_what_needs_it_and_not_what_tolerates_it(runs: Runs) -> None:
    ended = runs.exec(FAILING, "-k", "--output=raw").check(1)
    assert sorted(ended.out.splitlines()) == [
        "keeping [0, 1, ValueError('bad row'), 3]",
        "skipping [0, 1, 3]",
    ]
    assert "strict: 1 skipped, because fetch[2] failed" in ended.err


@pytest.mark.parametrize("target", ["skipping", "keeping"])
def test_a_failure_that_all_its_users_tolerate_is_no_failure_of_the_run(
    runs: Runs, target: str
) -> None:
    ended = runs.exec(FAILING, target).check(0)
    assert "tolerated" in ended.err
    assert "ValueError: bad row" in ended.err


def test_without_k_nothing_new_starts_and_what_runs_ends(runs: Runs) -> None:
    source = """
        @task(priority=2)
        def long():
            mark("running")
            while not os.path.exists("failed"): time.sleep(0.01)
            time.sleep(0.2)
            print("ended by itself")

        @task(priority=1)
        def bad():
            while not os.path.exists("running"): time.sleep(0.01)
            open("failed", "w").close()
            raise ValueError

        @task
        def later(n=each(range(5))): time.sleep(0.01)
        """
    ended = runs.json(source, "-j2").check(1)
    assert ended.states["long"] == "ok"
    assert {ended.states[f"later[{n}]"] for n in range(5)} == {"cancelled"}


def test_fail_fast_ends_what_runs(runs: Runs) -> None:
    source = """
        @task
        def long():
            mark("running")
            time.sleep(60)

        @task
        def bad():
            while not os.path.exists("running"): time.sleep(0.01)
            raise ValueError
        """
    ended = runs.json(source, "-j2", "--fail-fast").check(1)
    assert ended.states == {"long": "cancelled", "bad": "failed"}
    assert ended.seconds < 20


def test_always_runs_however_its_inputs_ended(runs: Runs) -> None:
    source = """
        @task
        def bad(): raise ValueError("no")

        @task
        def never(x=result(bad)): print("never")

        @task(always=True)
        def teardown(b=result(bad), n=result(never)): print(repr(b), type(n).__name__)

        @task(always=True, after=[bad])
        def after(): print("after")
        """
    ended = runs.exec(source, "--output=raw").check(1)
    assert sorted(ended.out.splitlines()) == ["ValueError('no') CallSkipped", "after"]


def test_skip_and_retry_are_said_by_raising(runs: Runs) -> None:
    source = """
        @task
        def skipped(): raise Skip("nothing to do")

        @task
        def user(x=result(skipped)): pass

        @task
        def anyway(x=result(skipped, errors="skip")): print("got", x)

        @task
        def patient():
            if current().attempt < 4: raise Retry("not yet", after=0.05)
            return current().attempt

        @task(retries=1)
        def impatient(): raise Retry("never", after=0.01)
        """
    ended = runs.json(source, "-k").check(1)
    assert ended.states == {
        "skipped": "skipped", "user": "skipped", "anyway": "ok", "patient": "ok",
        "impatient": "failed",
    }  # fmt: skip
    attempts = [e for e in ended.events if e["event"] == "attempt_ended"]
    assert [e["outcome"] for e in attempts].count("retry") == 3 + 2
    assert "nothing to do" in ended.failure("skipped")["message"]


@pytest.mark.parametrize(
    ("after", "error"),
    [
        ('"1"', "TypeError"), ("None", "TypeError"), ("True", "TypeError"),
        ("float('inf')", "ValueError"), ("float('nan')", "ValueError"), ("-1", "ValueError"),
    ],
)  # fmt: skip
def test_a_retry_after_what_is_no_time_is_an_error_of_its_own_line(
    runs: Runs, after: str, error: str
) -> None:
    source = f"""
        @task
        def later(n=each(range(3))):
            if n == 1:
                raise Retry("wait", after={after})
            print("said by", n)
        """
    ended = runs.exec(source, "-k", "-j1").check(1)
    assert f'raise Retry("wait", after={after})' in ended.err
    assert f"{error}: Retry(after=)" in ended.err
    assert "said by 2" in ended.out
    assert "switched off" not in ended.err


def test_retries_back_off_and_stop_at_their_limit(runs: Runs) -> None:
    source = """
        @task(retries=3, backoff=0.1)
        def flaky():
            if current().attempt < 4: raise OSError("again")

        @task(retries=2, retry_on=(OSError,))
        def wrong_kind(): raise ValueError

        @task(retries=2)
        def hopeless(): raise ValueError(current().attempt)
        """
    ended = runs.json(source, "-k").check(1)
    names = {c["id"]: c["call"] for e in ended.events for c in e.get("calls", [])}
    ends = [e for e in ended.events if e["event"] == "attempt_ended"]
    again = {name: [e["again"] for e in ends if names[e["id"]] == name] for name in names.values()}
    assert len(again["wrong_kind"]) == 1
    assert len(again["hopeless"]) == 3
    first, second, third, last = again["flaky"]
    assert last is None
    assert 0 < first < second < third < 1.0
    assert ended.failure("hopeless")["message"] == "3"


def test_a_timeout_ends_the_attempt_with_its_grandchildren(runs: Runs) -> None:
    source = """
        import subprocess

        @task(timeout=0.5)
        def in_shell(): sh("sleep 300 & sleep 300")

        @task(timeout=0.5)
        def below():
            subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 300 & wait; sleep 300"])
            time.sleep(300)

        @task(timeout=0.5, retries=1)
        def twice():
            if current().attempt == 1: time.sleep(300)

        @task(after=[in_shell, below], always=True)
        def look(): pass
        """
    running = runs.start_exec(source, "-j4", "-k", "--json")
    running.await_line('"twice"')
    ended = running.end()
    assert ended.check(1).states == {
        "in_shell": "failed", "below": "failed", "twice": "ok", "look": "ok",
    }  # fmt: skip
    assert ended.failure("in_shell")["type"].endswith("CallTimeout")
    assert ended.seconds < 10


def test_the_grandchildren_of_a_timed_out_call_are_gone_while_the_run_goes_on(runs: Runs) -> None:
    source = """
        import subprocess

        @task(timeout=0.3)
        def below():
            subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 30.1 & wait; sleep 30.1"])
            sh("sleep 30.1")

        @task(always=True)
        def long(x=result(below)):
            mark("ended")
            while not os.path.exists("go"): time.sleep(0.01)
        """
    running = runs.start_exec(source)
    running.await_file(runs.folder / "ended")
    wait_until(lambda: "sleep 30.1" not in " ".join(running.commands()))
    (runs.folder / "go").touch()
    running.end().check(1)


# -- outcomes that are hard to carry --------------------------------------------------

OUTCOMES = """
import os, signal, sys, threading

class Unpicklable(Exception):
    def __init__(self): super().__init__("has a lock"); self.lock = threading.Lock()

class CannotRebuild(Exception):
    def __init__(self, a, b): super().__init__(f"{a} and {b}")

class RaisesOnRebuild(Exception):
    def __reduce__(self): return (int, ("x",))

class EndsOnRebuild(Exception):
    def __reduce__(self): return (sys.exit, (3,))

class BadText(Exception):
    def __str__(self): raise RuntimeError("no text")

class BadRepr:
    def __repr__(self): raise RuntimeError("no repr")

class Killer:
    def __reduce__(self): os.kill(os.getpid(), signal.SIGKILL)

class Exits:
    def __reduce__(self): sys.exit(0)

class Own(BaseException): pass

def raise_(error): raise error

def chain():
    try:
        try: {}["key"]
        except KeyError as e: raise TypeError("middle") from e
    except TypeError: raise ValueError("last")

def deep():
    value = []
    for _ in range(100_000): value = [value]
    return value

def recurse(): recurse()

CASES = {
    "lock": lambda: threading.Lock(),
    "generator": lambda: (n for n in [1]),
    "unpicklable": lambda: raise_(Unpicklable()),
    "cannot_rebuild": lambda: raise_(CannotRebuild(1, 2)),
    "raises_on_rebuild": lambda: raise_(RaisesOnRebuild("text")),
    "ends_on_rebuild": lambda: raise_(EndsOnRebuild("text")),
    "bad_text": lambda: raise_(BadText()),
    "own": lambda: raise_(Own("mine")),
    "interrupt": lambda: raise_(KeyboardInterrupt()),
    "generator_exit": lambda: raise_(GeneratorExit()),
    "stop_iteration": lambda: raise_(StopIteration(3)),
    "exit_0": lambda: sys.exit(0),
    "exit_none": lambda: sys.exit(),
    "exit_text": lambda: sys.exit("text"),
    "recursion": recurse,
    "memory": lambda: bytearray(1 << 62),
    "deep": deep,
    "group": lambda: raise_(ExceptionGroup("many", [ValueError(1), OSError(2, "two")])),
    "base_group": lambda: raise_(BaseExceptionGroup("many", [KeyboardInterrupt()])),
    "chain": chain,
    "killer": lambda: Killer(),
    "exits": lambda: Exits(),
    "cancelled": lambda: raise_(__import__("asyncio").CancelledError()),
    "unicode": lambda: raise_(ValueError("\\ud800 é \\x00")),
}

@task
def end(name=each(CASES)): return CASES[name]()

@task
def unreadable(): return BadRepr()

@task
def user(x=result(unreadable)): return x

@task
def fine(n=each(range(20))): return n
"""

NAMED = {
    "lock": ("ResultError", "cannot be pickled"),
    "generator": ("ResultError", "cannot be pickled"),
    "unpicklable": ("Unpicklable", "has a lock"),
    "cannot_rebuild": ("CannotRebuild", "1 and 2"),
    "raises_on_rebuild": ("RaisesOnRebuild", "text"),
    "ends_on_rebuild": ("EndsOnRebuild", "text"),
    "bad_text": ("BadText", ""),
    "own": ("TaskExit", "Own('mine')"),
    "interrupt": ("TaskExit", "KeyboardInterrupt()"),
    "generator_exit": ("TaskExit", "GeneratorExit()"),
    "stop_iteration": ("StopIteration", "3"),
    "exit_0": ("TaskExit", "sys.exit(0)"),
    "exit_none": ("TaskExit", "sys.exit(None)"),
    "exit_text": ("TaskExit", "sys.exit('text')"),
    "recursion": ("RecursionError", "maximum recursion depth"),
    "memory": ("MemoryError", ""),
    "deep": ("ResultError", "recursion"),
    "group": ("ExceptionGroup", "many (2 sub-exceptions)"),
    "base_group": ("TaskExit", "many"),
    "chain": ("ValueError", "last"),
    "killer": ("WorkerLost", "SIGKILL"),
    "exits": ("TaskExit", "sys.exit(0)"),
    "cancelled": ("TaskExit", "CancelledError()"),
    "unicode": ("ValueError", "é"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    for runs in started(tmp_path_factory.mktemp("outcomes")):
        yield runs.json(OUTCOMES, "-k", "-j2", deadline=60).check(1)


@pytest.mark.parametrize("name", NAMED)
def test_every_end_of_a_call_is_an_error_with_a_name(outcomes: Ended, name: str) -> None:
    type_name, message = NAMED[name]
    failure = outcomes.failure(f"end[{list(NAMED).index(name)}]")
    assert failure["type"].rpartition(".")[2] == type_name
    assert message in failure["message"]
    assert "site-packages/taskrun" not in failure["traceback"]


def test_all_else_goes_on_beside_calls_that_end_badly(outcomes: Ended) -> None:
    assert all(outcomes.states[f"fine[{n}]"] == "ok" for n in range(20))
    assert outcomes.states["user"] == "ok"


def test_a_traceback_has_its_causes_and_groups(outcomes: Ended) -> None:
    chain = outcomes.failure(f"end[{list(NAMED).index('chain')}]")["traceback"]
    for part in ("KeyError: 'key'", "direct cause", "TypeError: middle", "During handling"):
        assert part in chain
    group = outcomes.failure(f"end[{list(NAMED).index('group')}]")["traceback"]
    assert "ValueError: 1" in group
    assert "[Errno 2] two" in group


# -- calls that make calls ------------------------------------------------------------


def test_futures_are_arguments_and_results_at_any_depth(runs: Runs) -> None:
    source = """
        @task
        def add(*numbers): return sum(numbers)

        @task
        def of(data): return {"got": data}

        @task
        def root():
            one, two = add.submit(1), add.submit(2)
            three = add.submit(one, two)
            return {"a": [three, (of.submit({"x": [one, {"y": two}]}),)], "b": three}

        @task
        def show(r=result(root)): print(r)
        """
    expected = "{'a': [3, ({'got': {'x': [1, {'y': 2}]}},)], 'b': 3}\n"
    for how in ("-j1", "-j3", "--inline"):
        assert runs.exec(source, how, "--output=raw").check().out == expected


RECURSIVE = """
@task
def fib(n):
    if n < 2: return n
    left, right = fib.submit(n - 1), fib.submit(n - 2)
    return left.result() + right.result()

@task
def chain(n): return 0 if n == 0 else 1 + chain.submit(n - 1).result()

@task
def sums(n):
    if n == 0: return 1
    return sum(future.result() for future in as_completed(sums.submit(n - 1) for _ in range(3)))

@task
def many():
    print(fib.submit(FIB).result(), chain.submit(200).result(), sums.submit(4).result())
"""


@pytest.mark.parametrize(("how", "fib"), [("-j1", 15), ("-j2", 15), ("--inline", 11)])
def test_calls_that_wait_for_calls_lend_their_slots(runs: Runs, how: str, fib: int) -> None:
    source = RECURSIVE.replace("FIB", str(fib))
    ended = runs.exec(source, how, "--output=raw", deadline=90)
    assert ended.check().out == f"{({11: 89, 15: 610})[fib]} 200 81\n"


def test_arguments_that_cannot_be_unpickled_are_the_failure_of_their_call(runs: Runs) -> None:
    source = """
        class Odd:
            def __reduce__(self): return int, ("x",)

        @task
        def child(x): return x

        @task
        def parent(): child.submit(Odd()).exception()
        """
    ended = runs.exec(source, "--json").check()
    failure = ended.failure("child#0")
    assert failure["type"].endswith("ArgumentError")
    assert failure["message"].startswith("the arguments of child cannot be unpickled in the worker")


def test_a_failed_child_raises_where_it_is_asked_and_may_be_caught(runs: Runs) -> None:
    source = """
        @task
        def bad(n): raise KeyError(n)

        @task
        def catches():
            try: bad.submit(1).result()
            except KeyError as e: print("caught", e, type(bad.submit(2).exception()).__name__)

        @task
        def returns(): return [bad.submit(3)]
        """
    ended = runs.exec(source, "catches", "--output=raw").check(0)
    assert ended.out == "caught 1 KeyError\n"
    assert runs.json(source, "returns").check(1).states["returns"] == "failed"


def test_a_retried_parent_takes_over_its_children_and_the_rest_is_cancelled(runs: Runs) -> None:
    source = """
        @task
        def child(n):
            with open(f"child{n}", "a") as f: f.write("x")
            return n

        @task
        def stray(): time.sleep(60)

        @task(retries=1)
        def parent():
            futures = [child.submit(n) for n in range(5)]
            values = [future.result() for future in futures]
            if current().attempt == 1:
                stray.submit()
                raise OSError("again")
            return values
        """
    ended = runs.json(source, "parent", "-j2").check(0)
    assert ended.states.pop("stray#5", None) in ("cancelled", None)
    assert all((runs.folder / f"child{n}").read_text() == "x" for n in range(5))
    assert ended.seconds < 20


def test_async_tasks_await_futures(runs: Runs) -> None:
    source = """
        import asyncio

        @task
        def work(n): return n * n

        @task
        async def root():
            values = await asyncio.gather(*(wait(n) for n in range(10)))
            print(sum(values))

        async def wait(n): return await work.submit(n)
        """
    for how in ("-j1", "-j2", "--inline"):
        assert runs.exec(source, "root", how, "--output=raw").check().out == "285\n"


# -- resources ------------------------------------------------------------------------


def test_resources_are_held_and_numbered(runs: Runs) -> None:
    source = """
        @task(resources={"gpu": 1})
        def train(n=each(range(8))):
            unit, = current().resources["gpu"]
            assert os.environ["CUDA_VISIBLE_DEVICES"] == str(unit)
            path = f"gpu{unit}"
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            time.sleep(0.02)
            os.unlink(path)
            return unit

        @task(resources={"cpu": 2})
        def wide(n=each(range(3))):
            assert os.environ["OMP_NUM_THREADS"] == "2", os.environ["OMP_NUM_THREADS"]
            os.close(os.open("wide", os.O_CREAT | os.O_EXCL))
            time.sleep(0.02)
            os.unlink("wide")

        @task(resources={"memory": "1M"})
        def narrow(): assert "CUDA_VISIBLE_DEVICES" not in os.environ

        @task
        def units(all=result(train)): print(sorted(set(all)))
        """
    ended = runs.exec(source, "-j3", "--resource", "gpu=2", "--output=raw")
    assert ended.check().out == "[0, 1]\n"


@pytest.mark.parametrize("wants", ['{"gpu": 1}', '{"cpu": 9}', '{"memory": "999T"}'])
def test_what_nobody_has_is_said_before_anything_runs(runs: Runs, wants: str) -> None:
    source = f"""
        @task
        def first(): print("ran")

        @task(resources={wants}, after=[first])
        def greedy(): pass
        """
    ended = runs.exec(source, "-j2")
    assert ended.check(3).out == ""
    assert "greedy" in ended.err


# -- inside a task --------------------------------------------------------------------


def test_a_call_knows_who_and_where_it_is(runs: Runs) -> None:
    source = """
        @task(label="number {n:02d}")
        def work(n=each([7])):
            c = current()
            print(c.task, c.call, c.attempt, c.worker, c.pid == os.getpid(), c.ppid == os.getppid())
            c.progress(1, 2)

        @task
        def user(x=result(work)): pass
        """
    ended = runs.json(source, "-j1").check()
    (output,) = [e["text"] for e in ended.events if e["event"] == "output"]
    assert output == "work work[0] 1 w1 True True\n"
    assert [e["title"] for e in ended.events if e["event"] == "call_began"] == ["number 07"]
    (progress,) = [e for e in ended.events if e["event"] == "progress"]
    assert (progress["done"], progress["total"]) == (1, 2)
    assert lines_of(runs.exec(source).check().out, "number 07")


@pytest.mark.parametrize("how", ["-j1", "-j2", "--inline"])
def test_where_a_call_goes_is_its_own_affair(runs: Runs, how: str) -> None:
    ended = runs.exec(
        """
        import shutil, tempfile

        @task
        def wanders(n=each(range(6))):
            os.chdir(tempfile.mkdtemp(dir="."))
            there = os.getcwd()
            seen = looks.submit(n).result()
            if n % 2: shutil.rmtree(there)
            else: assert os.getcwd() == there
            return seen

        @task
        def looks(n):
            here = os.getcwd()
            os.chdir("/")
            return here

        @task
        async def coroutine(x=result(wanders)):
            return os.getcwd()

        @task
        def total(seen=result(wanders), last=result(coroutine)):
            print(*{*seen, last, os.getcwd()})
        """,
        how,
        "--output=raw",
    ).check()
    assert ended.out == f"{runs.folder}\n"


def test_a_label_may_be_huge_or_strange(runs: Runs) -> None:
    source = """
        @task(label="{text}")
        def odd(text=each(["x" * 100_000, "a\\nb\\x1b[31m", "\\ud800", ""])): print("line")

        """
    ended = runs.exec(source, "-k")
    assert ended.check().out.count("line\n") == 4
    assert max(map(len, ended.out.splitlines())) < 1000
    assert "\x1b" not in ended.out


@pytest.mark.parametrize("how", [["-j2"], ["--inline"]])
def test_a_label_that_cannot_be_filled_in_costs_no_call(runs: Runs, how: list[str]) -> None:
    source = """
        @task(label="{row[name]}")
        def show(row=each([{"name": "first"}, {"nom": "second"}])): print(row)
        """
    ended = runs.exec(source, *how).check()
    assert "the label '{row[name]}' cannot be filled in: KeyError: 'name'\n" in ended.err
    assert ended.out.count("second") == 1 and "2 calls in" in ended.err


@pytest.mark.parametrize("how", ["-j1", "--inline"])
def test_a_process_that_a_call_has_forked_can_be_terminated(runs: Runs, how: str) -> None:
    runs.exec(
        """
        import multiprocessing

        @task
        def ends_it():
            def sleep(): mark("begun"), time.sleep(60)

            child = multiprocessing.get_context("fork").Process(target=sleep)
            child.start()
            while not os.path.exists("begun"): time.sleep(0.01)
            child.terminate()
            child.join(20)
            assert child.exitcode == -signal.SIGTERM, child.exitcode
        """,
        how,
    ).check()


def test_inline_executes_calls_that_need_several_cpus(runs: Runs) -> None:
    source = """
        @task(resources={"cpu": 3})
        def wide(n=each(range(3))): print(current().resources)

        @task
        def narrow(n=each(range(3))): print(wide.submit(n).result())
        """
    ended = runs.exec(source, "--inline", "-j3").check()
    assert ended.out.count("{'cpu': 3.0}\n") == 6 and ended.out.count("None\n") == 3
    assert "wide needs cpu=3 (of 2)" in runs.exec(source, "--inline", "-j2").check(3).err


def test_sh_is_captured_attributed_and_quoted(runs: Runs) -> None:
    source = """
        @task
        def shell(name: str = "a b; c"):
            done = sh("echo {name}; echo error >&2; cat", input="given\\n", words=["x y", "z"])
            print(repr(done.stdout), repr(done.stderr))
            print(sh("printf '%s|' {words}", words=["x y", "z"]).stdout)
            try: sh("false | true")
            except Exception as e: print(type(e).__name__)
            print(sh("exit 3", check=False).returncode)
        """
    ended = runs.exec(source, "-j1").check()
    assert lines_of(ended.out, "shell") == [
        "a b; c", "given", "'a b; c\\ngiven\\n' 'error\\n'", "x y|z|x y|z|",
        "CalledProcessError", "3",
    ]  # fmt: skip
    assert lines_of(ended.err, "shell") == ["error"]


def test_a_task_has_no_stdin_to_wait_for(runs: Runs) -> None:
    source = """
        @task
        def ask(): print(repr(sys.stdin.read()), sh("cat").stdout == "")

        @task
        def answer(): return input("name? ")
        """
    running = runs.start_exec(source, "-k", "--json", stdin=subprocess.PIPE)
    ended = running.end()
    assert ended.check(1).failure("answer")["type"] == "EOFError"


def test_inline_has_stdin_and_one_process(runs: Runs) -> None:
    source = """
        @task
        def ask(): print(input("name? "), os.getpid() == int(os.environ.get("PID", 0)) or "")
        """
    path = str(runs.write(source))
    ended = runs.run("exec", path, "--inline", input=b"Ann\n").check()
    assert ended.out == "name? Ann \n"


# -- where tasks live -----------------------------------------------------------------


def test_inline_says_that_it_ends_no_call_in_time(runs: Runs) -> None:
    source = """
        @task(timeout=0.01, default=True)
        def work():
            time.sleep(0.05)
            return later.submit().result()
        @task(timeout=9)
        def later(): return "done"
    """
    err = runs.exec(source, "--inline").check(1).err
    assert "--inline ends no call of work at its timeout of 0.01 s, unless it waits" in err
    err = runs.exec(source.replace("0.01", "0.9"), "--inline").check(0).err
    assert err.count("--inline ends no call of") == 2


def test_tasks_of_other_modules_in_loops_and_in_closures_run(runs: Runs) -> None:
    runs.write(
        """
        @task
        def base(): return 10
        def helper(x): return x + 1
        """,
        "beside.py",
    )
    source = """
        from dataclasses import dataclass
        from beside import base, helper
        import beside

        @dataclass
        class Row:
            x: int

        made = {}
        for name in ("red", "green"):
            @task(name=name)
            def colour(n=result(base), name=name): return Row(helper(n)), name
            made[name] = colour

        def factory(k):
            @task(name=f"times{k}")
            def times(row=result(made["red"])): return (lambda x: x.x * k)(row[0])
            return times

        two, three = factory(2), factory(3)

        @task
        def show(a=result(two), b=result(three), g=result(made["green"])): print(a, b, g)
        """
    for how in (["-j2"], ["--inline"], ["--start-method=spawn"]):
        assert runs.exec(source, "--output=raw", *how).check().out == "22 33 (Row(x=11), 'green')\n"


@pytest.mark.parametrize(
    "name", ["random.py", "json.py", "taskrun.py", "my-tasks.py", "__main__.py"]
)
def test_a_task_file_may_have_any_name(runs: Runs, name: str) -> None:
    source = """
        class Point:
            def __init__(self, x): self.x = x

        @task
        def first(): return Point(3)

        @task
        def second(p=result(first)):
            import random, json, selectors
            print(p.x, isinstance(p, Point))
        """
    path = runs.write(source, name)
    for how in (["-j2", "--json"], ["--inline"]):
        ended = runs.run("exec", str(path), *how)
        assert "3 True" in ended.check().out


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("raise KeyError('at import')\n", "KeyError: 'at import'"),
        ("import sys; sys.exit(7)\n", "exit"),
        ("import nowhere_to_be_found\n", "ModuleNotFoundError"),
        ("raise KeyboardInterrupt\n", ""),
        ("", "defines no tasks"),
        ("\0", "null bytes"),
        ("# coding: nonsense\n", "nonsense"),
    ],
)
def test_a_file_that_cannot_be_imported_is_its_authors_error(
    runs: Runs, source: str, shown: str
) -> None:
    path = runs.write(source, head="")
    ended = runs.run("exec", str(path))
    ended.check(130 if "KeyboardInterrupt" in source else 2)
    assert shown in ended.err
    assert ended.out == ""


def test_threads_and_prints_of_a_task_file_do_no_harm(runs: Runs) -> None:
    source = """
        print("imported")
        threading.Thread(target=time.sleep, args=(300,), daemon=True).start()

        @task
        def work(n=each(range(10))): return os.getpid()

        @task
        def total(pids=result(work)): print("pids", len(pids))
        """
    ended = runs.exec(source, "-j2").check()
    assert ended.out.count("pids 10") == 1
    assert ended.out.count("imported") <= 3


def test_a_file_that_guards_nothing_is_not_executed_again_and_again(runs: Runs) -> None:
    source = """
        with open("imports", "a") as f: f.write("x")

        @task
        def work(n=each(range(100))): return n
        """
    runs.exec(source, "-j4").check()
    assert len((runs.folder / "imports").read_text()) == 2  # the coordinator and the template


# -- large runs -----------------------------------------------------------------------


def test_a_fan_out_of_fan_outs_of_50_000_items(runs: Runs) -> None:
    source = """
        @task
        def outer(): return range(50)

        @task
        def middle(n=each(outer)): return [n * 1000 + i for i in range(1000)]

        @task
        def inner(x=each(middle, flat=True)): return x % 7

        @task
        def total(all=result(inner)): print(len(all), sum(all))
        """
    ended = runs.exec(source, "-j2", "--output=raw", deadline=90).check()
    assert ended.out == f"50000 {sum(x % 7 for x in range(50000))}\n"


def test_a_chain_of_2000_tasks(runs: Runs) -> None:
    source = """
        previous = None
        for number in range(2000):
            if previous is None:
                @task(name="t0")
                def previous(): return 0
            else:
                @task(name=f"t{number}")
                def previous(x=result(previous)): return x + 1

        @task
        def show(x=result(previous)): print(x)
        """
    ended = runs.exec(source, "-j2", "--output=raw", deadline=60).check()
    assert ended.out == "1999\n"


# -- what a run leaves for programs ---------------------------------------------------


def test_the_job_log_has_a_row_per_attempt(runs: Runs) -> None:
    source = """
        @task(retries=2)
        def flaky(n=each(range(3))):
            if current().attempt <= n: raise OSError("tab\\there")
            return n
        """
    runs.exec(source, "-j2", "--joblog=jobs.tsv").check()
    with open(runs.folder / "jobs.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [int(row["seq"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    ends = sorted((row["call"], int(row["attempt"]), row["outcome"]) for row in rows)
    assert ends == [
        (f"flaky[{n}]", a, "value" if a > n else "error") for n in range(3) for a in range(1, n + 2)
    ]
    assert {row["message"] for row in rows if row["outcome"] == "error"} == {"tab\\there"}


def test_events_come_in_their_order_and_nothing_else_is_on_stdout(runs: Runs) -> None:
    source = """
        print("at import")

        @task
        def speak(n=each(range(5))):
            print("out", n)
            os.write(1, b"raw\\n")
            sh("echo shell")
            if n == 3: raise ValueError
        """
    ended = runs.json(source, "-k", "-j2").check(1)
    events = ended.events
    assert (events[0]["event"], events[-1]["event"]) == ("run_started", "run_ended")
    assert events[-1]["counts"] == {"ok": 4, "failed": 1, "skipped": 0, "cancelled": 0}
    for number in range(5):
        mine = [e["event"] for e in events if e.get("id") == number]
        assert mine[-2:] == ["attempt_ended", "call_ended"]
        assert mine.index("output") < mine.index("attempt_ended")
        text = "".join(e["text"] for e in events if e["event"] == "output" and e["id"] == number)
        assert text == f"out {number}\nraw\nshell\n"


MODES = """
@task
def speak(n=each(range(3))):
    for part in range(3):
        print("part", part, flush=True)
        print("error", part, file=sys.stderr, flush=True)
        time.sleep(0.02)
"""


def test_the_modes_of_output(runs: Runs) -> None:
    line = runs.exec(MODES, "-j3").check()
    assert all(len(lines_of(line.out, f"speak[{n}]")) == 3 for n in range(3))
    assert all(len(lines_of(line.err, f"speak[{n}]")) == 3 for n in range(3))
    group = runs.exec(MODES, "-j3", "--output=group").check().out.splitlines()
    blocks = [list(block) for _, block in itertools.groupby(group, lambda x: x.startswith("---"))]
    assert [len(block) for block in blocks] == [1, 3] * 3
    raw = runs.exec(MODES, "-j3", "--output=raw").check()
    assert sorted(raw.out.splitlines()) == sorted(["part 0", "part 1", "part 2"] * 3)
    quiet = runs.exec(MODES, "-j3", "--output=quiet").check()
    assert quiet.out == quiet.err == ""


def test_quiet_shows_failures_and_the_last_line_of_the_summary_alone(runs: Runs) -> None:
    source = """
        @task
        def good(): print("fine")

        @task
        def bad():
            print("odd row")
            raise ValueError("no good")
        """
    shown = runs.exec(source, "-k", "-j1", "--output=quiet").check(1).err.splitlines()
    assert shown[0].startswith("FAILED bad") and "    | odd row" in shown
    assert sum("FAILED" in line for line in shown) == 1
    assert not any("fine" in line for line in shown)
    assert shown[-1].startswith("2 calls in ") and shown[-1].endswith(": 1 ok, 1 failed")


def test_output_of_any_bytes_is_passed_on(runs: Runs) -> None:
    source = r"""
        @task
        def speak():
            print("é \U0001f600", flush=True)
            os.write(1, b"\xff\xfe\n")
            print("\ud800")
            os.write(1, b"\0nul\r\nno newline")
        """
    for how in ("--output=line", "--json", "--output=group", "--output=raw"):
        ended = runs.exec(source, how, env={"LC_ALL": "C.UTF-8"}).check()
        assert "é \U0001f600" in ended.out
        assert "no newline" in ended.out


# -- surroundings ---------------------------------------------------------------------


def test_a_reader_that_goes_away_stops_the_run_and_is_no_traceback(runs: Runs) -> None:
    source = """
        @task
        def speak(n=each(range(1000))):
            print("line", n)
            time.sleep(0.01)
        """
    runs.write(source)
    head = subprocess.run(
        f"{TASKRUN} exec tasks.py -j2 | head -1; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=runs.folder, capture_output=True, timeout=30,
    )  # fmt: skip
    first, status = head.stdout.decode().splitlines()
    assert first.startswith("speak")
    assert status != "0"
    assert b"Traceback" not in head.stderr


def test_a_full_disk_is_said(runs: Runs) -> None:
    source = """
        @task
        def speak(n=each(range(20))): print("line" * 1000)
        """
    with open("/dev/full", "wb") as full:
        ended = runs.exec(source, "-j2", stdout=full)
        assert ended.status not in (0, 130)
        assert "No space left" in ended.err
        assert "Traceback" not in ended.err
        ended = runs.exec(source, "-j2", stdout=full, stderr=full)
        assert ended.status not in (0, 130)
    (runs.folder / "old.tsv").write_text("kept")
    ended = runs.exec(source, "--joblog=old.tsv", "--listen=192.0.2.1:7").check(2)
    assert "cannot listen" in ended.err and (runs.folder / "old.tsv").read_text() == "kept"
    ended = runs.exec(source, "-j2", "--joblog=/dev/full").check()
    assert "No space left" in ended.err
    assert "Traceback" not in ended.err


def test_a_working_directory_may_be_read_only_or_gone(runs: Runs, tmp_path: Path) -> None:
    path = str(runs.write("@task\ndef work(n=each(range(5))): print(n)\n"))
    folder = tmp_path / "gone"
    folder.mkdir()
    shell = f'cd {folder} && rmdir {folder} && exec {TASKRUN} exec "{path}"'
    done = subprocess.run(["sh", "-c", shell], capture_output=True, timeout=30, text=True)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 5), done.stderr
    os.chmod(tmp_path, 0o555)
    try:
        runs.run("exec", path).check()
    finally:
        os.chmod(tmp_path, 0o755)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tasks.py"]


def test_options_are_variables_too(runs: Runs) -> None:
    source = """
        @task
        def work(n=each(range(4))):
            print(n)
            if n == 0: raise ValueError
        """
    env = {"TASKRUN_JOBS": "1", "TASKRUN_OUTPUT": "raw", "TASKRUN_KEEP_GOING": "1"}
    assert runs.exec(source, env=env).check(1).out == "0\n1\n2\n3\n"


def test_two_runs_at_once_in_one_folder_do_not_meet(runs: Runs) -> None:
    source = """
        @task
        def work(n=each(range(200))): return n

        @task
        def total(all=result(work)): print(sum(all))
        """
    path = str(runs.write(source))
    both = [runs.start("exec", path, "-j2", "--output=raw") for _ in range(2)]
    assert [running.end().check().out for running in both] == ["19900\n", "19900\n"]


def test_it_runs_as_a_module_from_elsewhere_with_folders_of_its_own_names(
    runs: Runs, tmp_path: Path
) -> None:
    runs.write("@task\ndef work(): print(os.getcwd())\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ended = runs.run(
        "exec",
        "../tasks.py",
        "--output=raw",
        cwd=elsewhere,
        program=(sys.executable, "-m", "taskrun"),
    )
    assert ended.check().out == f"{elsewhere}\n"
    for folder in ("taskrun", "workers"):
        (elsewhere / folder).mkdir()
    ended = runs.run("exec", "../tasks.py", "--output=raw", cwd=elsewhere)
    assert ended.check().out == f"{elsewhere}\n"


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_nothing_beside_the_file_stands_in_for_a_standard_module_that_taskrun_needs(
    runs: Runs, method: str
) -> None:
    for name in loading._COUNTED_ON:
        (runs.folder / f"{name}.py").write_text("raise RuntimeError(__name__)")
    source = """
        seen = state.dict("seen")

        @task(retries=1, timeout=20)
        def work(n=each(range(3))):
            seen[n] = print(sh("echo {n}").stdout, end="")
            if current().attempt == 1 and n == 1: os.kill(os.getpid(), 9)
            return lambda: bytes(1_000_000)

        @task(lane="thread")
        def threads(made=result(work)): return len(made[0]())

        @task
        async def waits(size=result(threads)): return await more.submit(size)

        @task
        def more(size): print(size)

        @task(after=[waits])
        def fails(): raise ValueError("told")
        """
    ended = runs.exec(source, "-j2", "-k", "--output=raw", "--start-method", method)
    assert set(ended.check(1).out.split()) == {"0", "1", "2", "1000000"}
    assert ended.err.count("ValueError: told") == 2


def test_a_run_leaves_nothing_behind(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> None:
    memory = tmp_path_factory.mktemp("memory")  # /dev/shm has what other runs have made
    runs.exec(SOURCES, "-j4", env={"TASKRUN_SHM": str(memory)}).check()
    assert not list(memory.iterdir())
    assert sorted(path.name for path in runs.folder.iterdir()) == ["tasks.py"]
