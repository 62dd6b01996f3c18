"""The parts of a worker, each alone: outcomes, arguments, submissions, output marks."""
# ruff: noqa: B008 - that is how tasks say where a parameter comes from

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taskrun import context, sessions
from taskrun import messages as m
from taskrun.api import each, per_worker, result, task
from taskrun.context import Future
from taskrun.engines.capture import Stream
from taskrun.engines.nursery import Nursery, how_it_ended
from taskrun.errors import CallError, Interrupted, LoadError, Retry, Skip
from taskrun.ledger import Ledger, shared_file
from taskrun.model import Failure, Task
from taskrun.reactor import Reactor
from taskrun.values import decode, dumps_arguments, encode, encode_failure
from taskrun.workers import native
from taskrun.workers.capture import MARK_BYTES, Written, mark
from taskrun.workers.execute import Executor, Running
from taskrun.workers.recipes import Home, missing_arguments
from taskrun.workers.scope import WorkerContext
from taskrun.workers.settings import Preloaded, environment_additions, python_command

# -- an executor without a process ----------------------------------------------------


class OpenHome(Home):
    """Finds the very tasks that a test made."""

    def __init__(self) -> None:
        super().__init__(None, Preloaded(None))
        self.tasks: dict[Any, Task] = {}

    def find(self, reference: Any, blob: bytes | None) -> Task:
        return self.tasks.get(reference) or super().find(reference, blob)


class Bench:
    """An executor, and a line to nobody that remembers what was told."""

    def __init__(self, set_by_user: dict[str, frozenset[str]] | None = None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.steps: list[tuple[Any, ...]] = []
        self.arriving: list[Any] = []  # what converse() delivers, one step at a time
        self.home = OpenHome()
        self.executor = Executor(self, self.home, self, self)
        self.context = WorkerContext(
            self.executor, self, worker="w1", node="here", set_by_user=set_by_user or {}
        )

    def tell(self, record: tuple[Any, ...]) -> None:
        self.told.append(record)
        self.steps.append(("tell", record[0]))

    def flush(self) -> None:
        return None

    def give_all_back(self) -> None:
        self.steps.append(("give back",))

    def flush_soon(self) -> None:
        return None

    def begin(self, call: int, attempt: int, resumed: int = 0) -> None:
        self.steps.append(("begin", call))

    def ended(self, call: int, attempt: int, *, ended: bool = True) -> bool:
        return False

    def listen(self, loop: Any, heard: Any) -> None:
        raise AssertionError("nothing here awaits")

    def stop_listening(self, loop: Any) -> None:
        raise AssertionError("nothing here awaits")

    def converse(self, running: Running, wait: Any, satisfied: Any, deadline: Any) -> bool:
        self.tell(wait)
        while not satisfied():
            if not self.arriving:
                return False
            self.arriving.pop(0)()
        return True

    def learn(self, made: Task, names: Any, flags: int = 0, **constants: Any) -> int:
        reference = b"%d" % len(self.home.tasks)
        self.home.tasks[reference] = made
        recipe = 100 + len(self.home.tasks)
        encoded = {name: encode(value)[0] for name, value in constants.items()}
        self.executor.learn((m.TASK, recipe, made.name, reference, b"", names, encoded, flags))
        return recipe

    def run(
        self, made: Task, *args: Any, names: Any = (), flags: int = 0, wire: Any = None, **more: Any
    ) -> m.Report:
        recipe = self.learn(made, names, flags, **more)
        encoded = tuple(encode(arg)[0] for arg in args) if wire is None else wire
        token = context.activate(self.context)
        try:
            self.executor.execute((m.CALL, 7, 1, recipe, None, encoded, None))
        finally:
            context.deactivate(token)
        return m.Report(*self.told[-1][1:])

    def value(self, made: Task, *args: Any, **options: Any) -> Any:
        report = self.run(made, *args, **options)
        assert report.kind == "value", report
        return decode(report.payload)


@pytest.fixture
def bench() -> Bench:
    return Bench()


# -- outcomes -------------------------------------------------------------------------


def raising(error: BaseException, **options: Any) -> Task:
    @task(**options)
    def raises() -> None:
        raise error

    return raises


def test_an_outcome_is_kept_before_the_next_call_begins(bench: Bench) -> None:
    bench.value(_one)
    bench.value(_one)
    assert bench.steps == 2 * [("begin", 7), ("tell", m.ENDED)]


@task
def _one() -> int:
    return 1


def test_skip_and_retry_are_outcomes_of_their_own(bench: Bench) -> None:
    skipped = bench.run(raising(Skip("nothing to do")))
    assert (skipped.kind, skipped.payload) == ("skip", "nothing to do")
    again = bench.run(raising(Retry("later", after=2.5)))
    after, failure = again.payload
    assert (again.kind, after, failure.message) == ("retry", 2.5, "later")


@pytest.mark.parametrize(
    ("error", "options", "retryable"),
    [
        (ValueError("x"), {}, True),
        (ValueError("x"), {"retry_on": OSError}, False),
        (ConnectionResetError("x"), {"retry_on": OSError}, True),
        (SystemExit(1), {}, False),
        (KeyboardInterrupt(), {}, False),
        (LoadError("x"), {}, False),
    ],
)
def test_what_may_be_retried_is_said_with_the_failure(
    bench: Bench, error: BaseException, options: dict[str, Any], retryable: bool
) -> None:
    report = bench.run(raising(error, **options))
    assert report.kind == "error"
    assert report.payload[1] is retryable


def test_a_failure_that_stops_the_run_is_told_and_then_nothing_more_is_begun(bench: Bench) -> None:
    bench.run(raising(ValueError("x")), flags=m.STOPS)
    assert bench.steps[-2:] == [("tell", m.ENDED), ("give back",)]
    bench.steps.clear()
    bench.run(raising(ValueError("x")))
    bench.run(raising(Skip("x")), flags=m.STOPS)
    bench.value(_one, flags=m.STOPS)
    assert ("give back",) not in bench.steps


def test_items_come_along_where_they_are_wanted(bench: Bench) -> None:
    @task
    def several() -> Any:
        return [1, [2], "three"]

    report = bench.run(several, flags=m.WANT_ITEMS | m.DROP_VALUE)
    assert report.payload is None
    assert [decode(item) for item in report.items or ()] == [1, [2], "three"]
    assert bench.run(several).items is None


@pytest.mark.parametrize("value", ["text", b"bytes", 5, None])
def test_a_value_without_items_is_an_error_that_names_its_task(bench: Bench, value: Any) -> None:
    @task
    def single() -> Any:
        return value

    failure, _ = bench.run(single, flags=m.WANT_ITEMS).payload
    assert failure.type_name == "ResultError"
    assert failure.message.startswith("single: each() needs the items")


def test_a_value_to_be_shown_comes_as_text(bench: Bench) -> None:
    @task
    def shown(value: Any) -> Any:
        return value

    def text(value: Any) -> Any:
        return bench.value(shown, value, names=("value",), flags=m.RENDER)

    assert (text(3), text([1, 2]), text(None)) == ("3", "[1, 2]", None)


def test_a_dropped_value_must_still_be_able_to_travel(bench: Bench) -> None:
    @task
    def unfit() -> Any:
        return (number for number in range(3))

    failure, _ = bench.run(unfit, flags=m.DROP_VALUE).payload
    assert failure.type_name == "ResultError"
    assert bench.run(_one, flags=m.DROP_VALUE).payload is None


def test_an_interrupt_that_came_early_ends_the_call_before_its_code_runs(bench: Bench) -> None:
    ran: list[int] = []

    @task
    def never() -> None:
        ran.append(1)

    bench.executor.interrupt(7, 1, "cancelled")
    failure, retryable = bench.run(never).payload
    assert (failure.kind, retryable, ran) == ("cancelled", False, [])


def test_a_signal_raises_only_in_the_attempt_that_is_to_end(bench: Bench) -> None:
    executor = bench.executor
    executor.on_interrupt(2, None)  # nothing runs

    @task
    def asks_for_it() -> str:
        executor.on_interrupt(2, None)  # it is not meant
        executor.interrupt(7, 1, "cancelled")
        executor.on_interrupt(2, None)
        return "not reached"

    failure, _ = bench.run(asks_for_it).payload
    assert failure.kind == "cancelled"


def test_an_interrupt_is_raised_once(bench: Bench) -> None:
    executor = bench.executor

    @task
    def cleans_up() -> str:
        executor.interrupt(7, 1, "cancelled")
        try:
            executor.on_interrupt(2, None)
        except Interrupted:
            executor.on_interrupt(2, None)  # not again while it cleans up
        return "clean"

    assert bench.value(cleans_up) == "clean"


# -- arguments ------------------------------------------------------------------------


def test_arguments_come_from_names_constants_and_per_worker(bench: Bench) -> None:
    made: list[str] = []

    def connect() -> str:
        made.append("made")
        return "connection"

    @task
    def takes(depth=1, page=each([1]), *, seed="a", client=per_worker(connect)):  # type: ignore
        return depth, page, seed, client

    for page in ("one", ["two"]):
        value = bench.value(takes, page, names=("page",), seed="b")
        assert value == (1, page, "b", "connection")


def test_a_value_per_worker_that_is_never_yielded_is_an_error_that_says_where(
    bench: Bench,
) -> None:
    def empty():  # type: ignore[no-untyped-def]
        yield from ()

    @task
    def takes(client=per_worker(empty)): ...  # type: ignore[no-untyped-def]

    failure, again = bench.run(takes).payload
    assert not again
    assert failure.type_name.endswith("ArgumentError")
    assert failure.message.startswith("per_worker(empty) yielded nothing: empty, at ")
    assert "test_workers.py:" in failure.message


def test_positional_only_run_parameters_are_filled(bench: Bench) -> None:
    @task
    def takes(seed, depth=2, /, page=each([1])):  # type: ignore[no-untyped-def]
        return seed, depth, page

    assert bench.value(takes, 5, names=("page",), seed=1) == (1, 2, 5)


def test_a_submitted_calls_own_arguments_win_over_run_parameters(bench: Bench) -> None:
    @task
    def takes(first, second="default", third="default"):  # type: ignore[no-untyped-def]
        return first, second, third

    wire = (dumps_arguments((1,), {"third": 3})[0], {})
    value = bench.value(takes, names=None, wire=wire, second="set", third="set", first="set")
    assert value == (1, "set", 3)


def test_an_argument_that_cannot_be_unpickled_is_named(bench: Bench) -> None:
    @task
    def takes(page=each([1])):  # type: ignore[no-untyped-def]
        return page

    failure, retryable = bench.run(takes, names=("page",), wire=(b"no pickle",)).payload
    assert failure.type_name == "ArgumentError"
    assert "'page' of takes" in failure.message
    assert not retryable


def test_a_task_that_is_not_there_is_the_outcome_of_its_calls(bench: Bench) -> None:
    for reference in (("no_such_module", "f"), ("os", "no_such_function"), ("os", "sep")):
        bench.executor.learn((m.TASK, 50, "f", reference, None, (), {}, 0))
        bench.executor.execute((m.CALL, 7, 1, 50, None, (), None))
        failure, _ = bench.told[-1][4]
        assert failure.type_name == "LoadError"


def test_a_plain_function_is_as_good_as_a_task(bench: Bench) -> None:
    bench.executor.learn((m.TASK, 50, "basename", ("os", "path.basename"), None, ("p",), {}, 0))
    bench.executor.execute((m.CALL, 7, 1, 50, None, ("/a/b",), None))
    assert bench.told[-1][3:5] == ("value", "b")


@task
def source() -> int:
    return 1


@task
def target(a, b=result(source), c=3, d=per_worker(list)):  # type: ignore[no-untyped-def]
    return a, b, c, d


@pytest.mark.parametrize(
    ("given", "args", "kwargs", "reason"),
    [
        ((), (1, 2), {}, None),
        ((), (1,), {"b": 2, "c": 4}, None),
        (("a",), (), {"b": 2}, None),
        ((), (), {"b": 2}, "missing argument 'a'"),
        ((), (1,), {}, "missing argument 'b'; each() and result() fill in nothing"),
        ((), (), {}, "missing arguments 'a', 'b'"),
        ((), (1, 2, 3, 4, 5), {}, "too many positional arguments"),
        ((), (1, 2), {"e": 1}, "got an unexpected keyword argument 'e'"),
        ((), (1,), {"a": 1, "b": 2}, "multiple values for argument 'a'"),
    ],
)
def test_a_submission_must_fit_its_task(
    given: tuple[str, ...], args: Any, kwargs: Any, reason: str | None
) -> None:
    found = missing_arguments(target, frozenset(given), args, kwargs)
    assert found is None if reason is None else reason in (found or "")


# -- submitting and waiting -----------------------------------------------------------


def test_keys_tell_equal_submissions_apart_and_are_the_same_next_time(bench: Bench) -> None:
    @task
    def parent() -> None:
        for arg in (1, 2, 1, 1):
            _double.submit(arg)

    def keys() -> list[bytes]:
        bench.told.clear()
        bench.run(parent)
        return [record[3] for record in bench.told if record[0] == m.SUBMIT]

    first = keys()
    assert len(set(first)) == 4
    assert keys() == first


@task
def _double(x: int) -> int:
    return x * 2


def test_waiting_for_what_is_there_asks_nobody(bench: Bench) -> None:
    @task
    def parent() -> Any:
        future = _double.submit(4)
        bench.arriving.append(lambda: bench.context.deliver(7, {future.key: 8}))
        return future.result(), future.result(), future.done()

    assert bench.value(parent) == (8, 8, True)
    assert [record[0] for record in bench.told].count(m.WAIT) == 1


def test_a_future_of_another_call_cannot_be_waited_for_or_passed_on(bench: Bench) -> None:
    kept: list[Future] = []

    @task
    def first() -> None:
        kept.append(_double.submit(1))

    @task
    def second(how: str) -> Any:
        return kept[0].result() if how == "wait" else _double.submit(kept[0])

    bench.run(first)
    for how in ("wait", "pass"):
        failure, _ = bench.run(second, how, names=("how",)).payload
        assert failure.type_name == "RuntimeError"
        assert "another call" in failure.message


def test_outcomes_go_to_the_attempt_they_are_for(bench: Bench) -> None:
    """Two calls on one stack may have submitted the same, under the same key."""
    seen: dict[str, Any] = {}

    @task
    def inner() -> None:
        future = _double.submit(1)
        seen["inner key"] = future.key
        bench.context.deliver(7, {future.key: "outer's"})
        seen["inner done"] = future.done()
        bench.context.deliver(8, {future.key: "inner's"})
        seen["inner"] = future.result()

    inner_recipe = bench.learn(inner, ())

    @task
    def outer() -> Any:
        future = _double.submit(1)
        seen["outer key"] = future.key
        nested = (m.NESTED, 8, 1, inner_recipe, None, (), None)
        bench.arriving.append(lambda: bench.executor.execute_nested(nested))
        return future.result()

    assert bench.value(outer) == "outer's"
    assert seen["inner key"] == seen["outer key"]
    assert (seen["inner done"], seen["inner"]) == (False, "inner's")


def test_a_value_that_cannot_be_unpickled_fails_its_future(bench: Bench) -> None:
    @task
    def parent() -> str:
        future = _double.submit(1)
        bench.arriving.append(lambda: bench.context.deliver(7, {future.key: b"no pickle"}))
        with pytest.raises(CallError, match="cannot be unpickled here"):
            future.result()
        return "caught"

    assert bench.value(parent) == "caught"


def test_a_failure_that_is_delivered_is_raised(bench: Bench) -> None:
    failure = encode_failure(ZeroDivisionError("no"))

    @task
    def parent() -> str:
        future = _double.submit(1)
        bench.arriving.append(lambda: bench.context.deliver(None, {future.key: failure}))
        with pytest.raises(ZeroDivisionError):
            future.result()
        return "caught"

    assert isinstance(failure, Failure)
    assert bench.value(parent) == "caught"


# -- whose output it is ---------------------------------------------------------------


class Scribe:
    """A worker's output Pipe, written to as a worker does, and read at random times."""

    def __init__(self, dice: random.Random) -> None:
        fd = shared_file()
        self.theirs, self.ours = Ledger(fd), Ledger(fd)
        os.close(fd)
        self.reader, self.writer = os.pipe()
        self.other = os.pipe()  # nothing is written to stderr
        os.set_blocking(self.reader, False)
        self.token = os.urandom(8).hex().encode()
        self.got: dict[Any, bytes] = defaultdict(bytes)
        self.stream = Stream(self.reader, 0, self.token, self.ours, self._emit)
        self.dice = dice
        self.written = Written(self.theirs, (self.writer, self.other[1]))

    def _emit(self, to: Any, name: str, data: bytes) -> None:
        assert name == "stdout" and data
        self.got[to] += data

    def write(self, data: bytes) -> None:
        os.write(self.writer, data)
        self.maybe_read()

    def mark(self, call: int, attempt: int) -> None:
        data = mark(self.token, call, attempt, ended=True)
        os.write(self.other[1], data)
        os.write(self.writer, data)

    def maybe_read(self) -> None:
        if self.dice.random() < 0.4:
            self.stream.read()

    def touched(self) -> bool:
        if self.dice.random() < 0.5:
            self.maybe_read()
        return self.written.has_grown()

    def close(self) -> None:
        self.theirs.close()
        self.ours.close()
        for fd in (self.reader, self.writer, *self.other):
            os.close(fd)


@pytest.mark.parametrize("seed", range(60))
def test_every_byte_is_attributed_to_its_call_whenever_the_pipe_is_read(seed: int) -> None:
    dice = random.Random(seed)
    scribe = Scribe(dice)
    expected: dict[Any, bytes] = defaultdict(bytes)
    for call in range(200):
        attempt = dice.randint(1, 3)
        scribe.theirs.begin(call, attempt)
        scribe.maybe_read()
        for _ in range(dice.choice([0, 0, 0, 1, 1, 2, 5])):
            length = dice.choice([1, 1, 5, 40, 3000])
            data = bytes(dice.choices(b"\0ab\n" + scribe.token[:2], k=length))
            scribe.write(data)
            expected[call, attempt] += data
        if scribe.touched():
            scribe.mark(call, attempt)
            scribe.maybe_read()
            if dice.random() < 0.5:
                scribe.stream.read_to_mark((call, attempt))
                assert scribe.got[call, attempt] == expected[call, attempt]
        scribe.theirs.end()
        scribe.maybe_read()
    scribe.stream.read_the_last(None)
    assert {to: data for to, data in scribe.got.items() if data} == {
        to: data for to, data in expected.items() if data
    }
    scribe.close()


def test_a_call_whose_output_was_not_touched_needs_no_mark() -> None:
    scribe = Scribe(random.Random(0))
    scribe.theirs.begin(1, 1)
    os.write(scribe.writer, b"something")
    scribe.stream.read()
    assert scribe.touched()
    scribe.mark(1, 1)
    assert not scribe.touched()  # though nobody has read the mark yet
    scribe.stream.read()
    assert not scribe.touched()
    scribe.close()


def test_what_is_written_behind_a_mark_is_noticed_however_much_was_taken_meanwhile() -> None:
    scribe = Scribe(random.Random(0))
    scribe.theirs.begin(1, 1)
    os.write(scribe.writer, b"x" * MARK_BYTES)
    assert scribe.touched()
    scribe.mark(1, 1)
    scribe.stream.read()
    os.write(scribe.writer, b"y" * MARK_BYTES)  # as much as there was behind the last
    assert scribe.touched()
    scribe.close()


@pytest.mark.parametrize("around", [None, (1, 1)])
def test_a_call_that_begins_and_ends_during_a_read_is_not_overlooked(around: Any) -> None:
    """Before and after the read the worker is idle, or in the same waiting call."""
    scribe = Scribe(random.Random(0))
    if around:
        scribe.theirs.begin(*around)
    read = scribe.stream._read

    def read_meanwhile() -> bytes:
        scribe.theirs.begin(2, 1)
        os.write(scribe.writer, b"quick")
        data = read()
        assert scribe.theirs.taken(0) & 1  # it sees that a read is under way, and marks
        scribe.mark(2, 1)
        scribe.theirs.begin(*around, 1) if around else scribe.theirs.end()
        return data

    scribe.stream._read = read_meanwhile  # type: ignore[method-assign]
    scribe.stream.read()
    assert not scribe.got and scribe.stream.undecided
    scribe.stream._read = read  # type: ignore[method-assign]
    scribe.stream.read()
    assert scribe.got == {(2, 1): b"quick"}
    scribe.close()


def test_what_a_dead_worker_left_unmarked_is_the_executing_calls() -> None:
    scribe = Scribe(random.Random(0))
    scribe.theirs.begin(5, 2)
    begin_of_mark = mark(scribe.token, 5, 2, ended=True)[:9]
    os.write(scribe.writer, b"last words" + begin_of_mark)
    scribe.stream.read_the_last((5, 2))
    assert scribe.got == {(5, 2): b"last words" + begin_of_mark}
    scribe.close()


def test_a_mark_is_short_enough_to_be_written_in_one_piece() -> None:
    assert len(mark(b"t" * 16, 1 << 60, 1 << 31, ended=True)) == MARK_BYTES < 512


# -- processes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exited with status 0"),
        (3, "exited with status 3"),
        (-9, "killed by SIGKILL"),
        (-11, "killed by SIGSEGV"),
        (-63, "killed by signal 63"),
        ("not started: no room", "not started: no room"),
    ],
)
def test_an_exit_status_is_said_in_words(status: Any, words: str) -> None:
    assert how_it_ended(status) == words


def test_a_thread_that_ends_before_it_begins_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_memory(function: object, args: object) -> None:
        threads.append(threading.Thread(target=len, args=[args], daemon=True))
        threads[0].start()

    threads: list[threading.Thread] = []
    monkeypatch.setattr(native, "start_new_thread", without_memory)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        native.start_thread(lambda: None)
    threads[0].join(20)
    assert not threads[0].is_alive()


@pytest.mark.skipif(not sessions.LINUX, reason="what has ended is read from /proc")
def test_a_process_whose_main_thread_alone_has_ended_is_alive() -> None:
    source = """
        import ctypes, sys, threading
        threading.Thread(target=sys.stdin.read).start()
        ctypes.CDLL(None).pthread_exit(None)
        """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)], stdin=subprocess.PIPE
    ) as process:
        await_state(process.pid, "Z")
        assert not sessions.has_ended(process.pid)
        assert process.pid in [each.pid for each in sessions.processes()]
        assert process.stdin is not None
        process.stdin.close()
        deadline = time.monotonic() + 10
        while not sessions.has_ended(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()


def await_state(pid: int, state: str) -> None:
    """Wait until /proc says that a process is in a state."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != state:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("end", ["seen", "killed", "abandoned"])
def test_a_template_whose_end_was_taken_by_nobody_has_ended(end: str) -> None:
    """As in a process that ignores SIGCHLD: its number may be somebody else's by then."""

    def launch(fd: int, ours: int) -> int:
        pid = os.posix_spawn("/bin/true", ["true"], {})
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, 0)  # it is gone
        return pid

    reactor, said = Reactor(), []
    settings: Any = ()
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        nursery = Nursery(
            settings, reactor, lambda worker: None, lambda message: None, said.append, launch
        )
        if end == "killed":
            nursery.kill()
        elif end == "abandoned":
            assert nursery.abandon(time.monotonic() + 10)
        else:
            assert reactor.run_until(lambda: bool(said), time.monotonic() + 10)
            assert said == ["ended"]
        assert nursery.pid is None
    finally:
        signal.signal(signal.SIGCHLD, before)
        reactor.close()


@pytest.fixture
def leader() -> Iterator[int]:
    """A process that leads a session of three."""
    import subprocess

    process = subprocess.Popen(
        ["bash", "-c", "sleep 300 & sleep 300 & echo; wait"],
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline()
    yield process.pid
    sessions.signal_session(process.pid, 9)
    process.wait(10)
    process.stdout.close()


def test_the_members_of_a_session_are_found_and_signalled(leader: int) -> None:
    found = sessions.members(leader)
    assert leader in found and len(found) == 3
    assert os.getpid() not in found
    sessions.signal_session(leader, 9)
    os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    assert sessions.send([leader + 4_000_000], 9) == 0  # nobody: no error either


def test_libraries_get_one_thread_unless_the_user_said_otherwise() -> None:
    additions = environment_additions({"OMP_NUM_THREADS": "4"})
    assert "OMP_NUM_THREADS" not in additions
    assert additions["OPENBLAS_NUM_THREADS"] == "1"


def test_a_worker_is_started_with_this_interpreter_and_its_options() -> None:
    command = python_command("pass")
    assert command[0] == sys.executable
    assert command[-2] == "-c" and command[-1].endswith("pass")
