"""dask on a taskrun Pool."""

from __future__ import annotations

import multiprocessing
import operator
import os
import signal
import threading
from typing import Any

import pytest

dask = pytest.importorskip("dask", reason="dask is not installed")

import taskrun  # noqa: E402
from taskrun import Executor, Pool  # noqa: E402
from taskrun.errors import WorkerLost  # noqa: E402

pytestmark = pytest.mark.timeout(120)


def compute(*collections: Any, **options: Any) -> Any:
    return dask.compute(*collections, scheduler=taskrun.dask_get, num_workers=2, **options)


@dask.delayed
def add(a: Any, b: Any) -> Any:
    return a + b


@dask.delayed
def pid(*_: Any) -> int:
    return os.getpid()


@dask.delayed
def fail() -> None:
    raise KeyError("not there")


@dask.delayed
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_delayed_graphs() -> None:
    total = add(0, 0)
    for number in range(20):
        total = add(total, number)
    assert compute(total, add("a", "b")) == (190, "ab")
    assert compute([add(1, 2), {"x": add(3, 4)}]) == ([3, {"x": 7}],)


def test_tasks_run_in_other_processes() -> None:
    assert os.getpid() not in compute(*[pid(n) for n in range(4)])


def test_bags() -> None:
    bag = pytest.importorskip("dask.bag", reason="dask.bag is not installed")
    numbers = bag.from_sequence(range(100), npartitions=5)
    even = numbers.filter(lambda x: x % 2 == 0).map(lambda x: x * x)
    assert compute(even.sum()) == (sum(x * x for x in range(0, 100, 2)),)
    words = bag.from_sequence(["a", "b", "a", "c", "b", "a"], npartitions=3)
    assert sorted(compute(words.frequencies())[0]) == [("a", 3), ("b", 2), ("c", 1)]
    grouped = compute(words.groupby(lambda word: word))[0]
    assert {key: len(values) for key, values in grouped} == {"a": 3, "b": 2, "c": 1}


def test_arrays_large_ones_included() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    array = pytest.importorskip("dask.array", reason="dask.array is not installed")
    values = numpy.arange(1_000_000.0).reshape(1000, 1000)
    chunked = array.from_array(values, chunks=(500, 500))
    (found,) = compute((chunked + chunked.T).sum(axis=0))
    numpy.testing.assert_allclose(found, (values + values.T).sum(axis=0))
    (whole,) = compute(chunked * 2)
    numpy.testing.assert_array_equal(whole, values * 2)


def test_an_error_is_raised_as_it_was() -> None:
    with pytest.raises(KeyError, match="not there") as caught:
        compute(add(1, fail()))
    assert "def fail" in str(caught.value.__cause__) or "fail" in str(caught.value.__cause__)


def test_a_worker_that_dies_is_an_error() -> None:
    with pytest.raises(WorkerLost, match="SIGKILL"):
        compute(add(1, die()))


def test_several_at_a_time_on_one_executor() -> None:
    results: dict[int, Any] = {}

    def get(number: int, executor: Executor) -> None:
        total = add(number, 0)
        for step in range(10):
            total = add(total, step)
        results[number] = dask.compute(total, scheduler=taskrun.dask_get, pool=executor)

    with Executor(2) as executor:
        threads = [threading.Thread(target=get, args=(n, executor)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert results == {number: (number + 45,) for number in range(6)}


def test_a_plain_graph_by_its_keys() -> None:
    graph = {"a": 1, "b": (operator.add, "a", 2), "c": (sum, ["a", "b"])}
    assert taskrun.dask_get(graph, "c", num_workers=1) == 4
    assert taskrun.dask_get(graph, [["a", "b"], "c"], num_workers=1) == ((1, 3), 4)


@pytest.mark.parametrize("kind", [Pool, Executor])
def test_dasks_own_scheduler_takes_a_pool_and_an_executor(kind: Any) -> None:
    with kind(2) as made, dask.config.set(pool=made, scheduler="processes"):
        assert dask.compute(add(1, add(2, 3))) == (6,)
        assert os.getpid() not in dask.compute(*[pid(n) for n in range(4)])


@pytest.mark.parametrize("kind", [Pool, Executor])
def test_a_pool_of_the_configuration_is_used(kind: Any) -> None:
    with kind(1) as made, dask.config.set(pool=made, scheduler=taskrun.dask_get):
        pool = made if kind is Pool else made._pool
        assert set(dask.compute(pid(1), pid(2))) == {pool.workers()[0].pid}


def test_no_two_workers_have_the_same_random_numbers() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    numpy.random.seed(1)

    @dask.delayed(pure=False)
    def numbers(_: int) -> tuple[int, ...]:
        return tuple(numpy.random.randint(0, 1_000_000) for _ in range(5))

    found = compute(*[numbers(n) for n in range(16)], chunksize=1)
    assert len(set(found)) == 16


def test_an_initializer_is_called_in_each_worker() -> None:
    def initialize() -> None:
        os.environ["TASKRUN_TEST_MARK"] = "yes"

    @dask.delayed(pure=False)
    def mark() -> str | None:
        return os.environ.get("TASKRUN_TEST_MARK")

    read = mark()
    assert compute(read, initializer=initialize) == ("yes",)
    with dask.config.set({"multiprocessing.initializer": initialize}):
        assert compute(read) == ("yes",)
    assert compute(read) == (None,)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_start_as_the_configuration_of_dask_says(method: str) -> None:
    @dask.delayed(pure=False)
    def started() -> str:
        return multiprocessing.current_process().name

    with dask.config.set({"multiprocessing.context": method}):
        (name,) = compute(started())
    # Spawned ones would not agree on the hashes of strings.
    assert name.startswith("ForkPool" if method == "fork" else "ForkServerPool")
