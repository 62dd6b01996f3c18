"""What calls in own workers write, and whose it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from workshop import (
    Make,
    Workshop,
)

from taskrun import messages as m

pytestmark = pytest.mark.timeout(120)


# -- output ---------------------------------------------------------------------------

LOUD = """
import ctypes

libc = ctypes.CDLL(None)
with_the_gil = ctypes.PyDLL(None)

@task
def everyone(x):
    print("python", x)
    print("error", x, file=sys.stderr)
    sys.stdout.write(f"no newline {x}")
    sys.stdout.flush()
    libc.write(1, b" c level", 8)
    subprocess.run(["echo", f" subprocess {x}"])

@task
def flood(x):
    line = "x" * 99 + "\\n"
    for _ in range(x): sys.stdout.write(line)

@task
def flood_with_the_gil(x):
    block = b"y" * 65536
    for _ in range(x): with_the_gil.write(1, block, 65536)

@task
def replace(): sys.stdout = open(os.devnull, "w")

@task
def close_object(): sys.stdout.close(); sys.stderr.close()

@task
def detach(): sys.stdout.detach()

@task
def close_descriptors(): os.close(1); os.close(2)

@task
def redirect(): os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

@task
def unblock():
    os.set_blocking(1, False)
    sys.stdout.write("z" * 3_000_000) if 0 else None

@task
def nul(x): os.write(1, b"\\0" * x)

@task
def live(x):
    print("before the file")
    while not os.path.exists(x): time.sleep(0.01)
"""


def test_output_of_python_c_and_subprocesses_is_the_calls(make: Make) -> None:
    shop = make(LOUD)
    (worker,) = shop.workers()
    calls = [shop.make("everyone", number) for number in range(20)]
    shop.assign(worker, *calls)
    for number, call in enumerate(calls):
        assert shop.report(call).wrote
        assert shop.written(call).decode() == (
            f"python {number}\nno newline {number} c level subprocess {number}\n"
        )
        assert shop.written(call, "stderr").decode() == f"error {number}\n"
    assert shop.watcher.ended == calls
    assert not shop.written(None)


def test_output_is_told_before_the_end_of_its_call(shop: Workshop) -> None:
    (worker,) = shop.workers()
    calls = [shop.make("shout", number) for number in range(50)]
    ids = {call.id: call for call in calls}

    def check(event: m.Event) -> None:
        if isinstance(event, m.Finished):
            for report in event.reports:
                call = ids[report[0]]
                assert shop.written(call) == shop.written(call, "stderr")
                assert shop.written(call) and call in shop.watcher.ended

    shop.on_event = check
    shop.assign(worker, *calls)
    for call in calls:
        shop.report(call)


def test_calls_that_write_nothing_cost_no_marks(shop: Workshop) -> None:
    (worker,) = shop.workers()
    shop.do(worker, "shout", "something")
    calls = [shop.make("same", number) for number in range(500)]
    shop.assign(worker, *calls)
    assert sum(shop.report(call).wrote for call in calls) < 50


def test_output_is_shown_while_its_call_runs(make: Make, tmp_path: Path) -> None:
    shop = make(LOUD)
    (worker,) = shop.workers()
    calls = [shop.make("shout", 1), shop.make("live", str(tmp_path / "go on"))]
    shop.assign(worker, *calls)
    shop.until(lambda: shop.written(calls[1]) == b"before the file\n")
    (tmp_path / "go on").touch()
    shop.report(calls[1])


def test_a_hundred_megabytes_stream_through_in_little_memory(make: Make) -> None:
    shop = make(LOUD)
    (worker,) = shop.workers()
    shop.watcher.keep = False
    shop.do(worker, "flood", 10)
    before = psutil.Process().memory_info().rss
    most = 0

    def measure(call: Any, stream: str, data: bytes, worker: str) -> None:
        nonlocal most
        shop.watcher.size += len(data)
        most = max(most, psutil.Process().memory_info().rss)

    shop.watcher.size = 0
    shop.watcher.output = measure  # type: ignore[method-assign]
    shop.report(shop.start(worker, "flood", 1_000_000))
    assert shop.watcher.size == 100_000_000
    assert most - before < 20_000_000


def test_a_noisy_worker_does_not_keep_another_waiting(make: Make) -> None:
    shop = make(LOUD)
    noisy, quiet = shop.workers(2)
    shop.watcher.keep = False
    call = shop.start(noisy, "flood", 500_000)
    shop.until(lambda: shop.watcher.size > 1_000_000)
    for number in range(20):
        assert shop.do(quiet, "same", number) == number
    assert (call.id, 1) not in shop.reports
    shop.report(call)


def test_c_code_that_prints_while_it_holds_the_interpreter_is_read(make: Make) -> None:
    shop = make(LOUD)
    (worker,) = shop.workers()
    call = shop.start(worker, "flood_with_the_gil", 100)
    shop.report(call)
    assert shop.written(call) == b"y" * 6_553_600


@pytest.mark.parametrize(
    "name", ["replace", "close_object", "detach", "close_descriptors", "redirect", "unblock"]
)
def test_what_a_task_does_to_its_stdout_ends_with_the_call(make: Make, name: str) -> None:
    shop = make(LOUD)
    (worker,) = shop.workers()
    spoiler, call = shop.make(name), shop.make("everyone", 1)
    shop.assign(worker, spoiler, call)
    shop.report(call)
    assert shop.report(spoiler).kind == "value"
    assert shop.written(call).decode() == "python 1\nno newline 1 c level subprocess 1\n"
    assert shop.written(call, "stderr") == b"error 1\n"


@pytest.mark.parametrize("count", [1, 2, 17, 5000])
def test_bytes_that_look_like_the_beginning_of_a_mark_are_output(make: Make, count: int) -> None:
    shop = make(LOUD)
    (worker,) = shop.workers()
    call = shop.start(worker, "nul", count)
    shop.report(call)
    assert shop.written(call) == b"\0" * count


def test_eight_workers_print_at_once_and_every_line_is_whole_and_attributed(make: Make) -> None:
    shop = make(
        """
        @task
        def lines(x):
            for number in range(10_000): print(f"call {x} line {number}")
        """
    )
    workers = shop.workers(8)
    calls = [shop.start(worker, "lines", number) for number, worker in enumerate(workers)]
    for number, call in enumerate(calls):
        shop.report(call)
        expected = "".join(f"call {number} line {line}\n" for line in range(10_000))
        assert shop.written(call).decode() == expected


def test_what_a_thread_writes_between_calls_belongs_to_nobody(make: Make) -> None:
    shop = make(
        """
        @task
        def haunt(): threading.Timer(0.1, os.write, [1, b"boo"]).start()
        """
    )
    (worker,) = shop.workers()
    call = shop.start(worker, "haunt")
    shop.report(call)
    shop.until(lambda: shop.written(None) == b"boo")
    assert shop.do(worker, "same", 1) == 1
    assert not shop.written(call)
