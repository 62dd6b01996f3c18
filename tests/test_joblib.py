"""joblib on a taskrun Pool."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import until

joblib = pytest.importorskip("joblib", reason="joblib is not installed")

import taskrun.joblib  # noqa: E402 - it needs joblib, and registers the backend
from taskrun import Pool  # noqa: E402
from taskrun.errors import WorkerLost  # noqa: E402

pytestmark = pytest.mark.timeout(120)

SECONDS = 60.0


@pytest.fixture(autouse=True)
def on_taskrun() -> Iterator[Any]:
    with joblib.parallel_config(backend="taskrun", n_jobs=2) as config:
        yield config
    backend = config["backend"]
    assert isinstance(backend, taskrun.joblib.TaskrunBackend)
    backend._close()


def square(x: int) -> int:
    return x * x


def fail(x: int) -> int:
    if x == 7:
        raise ValueError("seven")
    return x


def die(x: int) -> int:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def run(function: Any, items: Any, **options: Any) -> Any:
    return joblib.Parallel(**options)(joblib.delayed(function)(item) for item in items)


def test_calls_run_in_workers_and_their_values_come_in_order() -> None:
    assert run(square, range(1000)) == [x * x for x in range(1000)]
    pids = set(run(pid_after, [0.05] * 8, batch_size=1))
    assert len(pids) == 2 and os.getpid() not in pids


def test_the_workers_stay_for_the_next_parallel() -> None:
    first = set(run(pid_after, [0.05] * 8, batch_size=1))
    assert set(run(pid_after, [0.05] * 8, batch_size=1)) == first


def test_local_functions_and_large_arguments_travel() -> None:
    data = os.urandom(2_000_000)
    assert run(lambda n: len(data) + n, range(4)) == [2_000_000 + n for n in range(4)]
    assert run(len, [data] * 3) == [2_000_000] * 3
    assert run(bytes, [2_000_000] * 3) == [bytes(2_000_000)] * 3


def use_a_pool(x: int) -> list[int]:
    with Pool(2) as pool:
        return pool.map(square, [x, x + 1])


def test_a_call_on_another_backend_may_have_a_pool() -> None:
    found = run(use_a_pool, [1, 5], backend="loky")
    assert found == [[1, 4], [25, 36]]


def test_an_error_is_raised_and_the_next_parallel_works() -> None:
    with pytest.raises(ValueError, match="seven"):
        run(fail, range(100))
    assert run(square, range(3)) == [0, 1, 4]


def test_a_worker_that_dies_is_an_error_and_the_next_parallel_works() -> None:
    with pytest.raises(WorkerLost, match="SIGKILL"):
        run(die, range(5), batch_size=1)
    assert run(square, range(3)) == [0, 1, 4]


def test_a_generator_gives_values_as_they_are_needed() -> None:
    assert list(run(square, range(20), return_as="generator")) == [x * x for x in range(20)]
    unordered = run(square, range(20), return_as="generator_unordered")
    assert sorted(unordered) == [x * x for x in range(20)]


def test_a_timeout_ends_the_parallel() -> None:
    began = time.monotonic()
    with pytest.raises((TimeoutError, multiprocessing.TimeoutError)):
        run(time.sleep, [60] * 4, timeout=0.2)
    assert time.monotonic() - began < 30


def test_a_parallel_in_a_call_works() -> None:
    def inner(x: int) -> int:
        return sum(joblib.Parallel(n_jobs=2)(joblib.delayed(square)(x) for x in range(x)))

    assert run(inner, [3, 4]) == [5, 14]


def square_on_loky(x: int) -> list[int]:
    return run(square, [x, x + 1], backend="loky", n_jobs=2)


def test_what_has_threads_in_this_process_works_in_calls_too() -> None:
    assert square_on_loky(1) == [1, 4]  # from now on loky has threads here
    assert run(square_on_loky, [1, 5]) == [[1, 4], [25, 36]]


def test_what_openmp_has_begun_in_this_process_does_not_hang_in_calls() -> None:
    ensemble = pytest.importorskip("sklearn.ensemble", reason="no scikit-learn")
    data = [[float(x), float(x % 7)] for x in range(200)]
    target = [x % 2 for x in range(200)]

    def fit(seed: int) -> int:
        model = ensemble.HistGradientBoostingClassifier(max_iter=2, random_state=seed)
        return len(model.fit(data, target).predict(data))

    assert fit(0) == 200
    with joblib.parallel_config(backend="taskrun", n_jobs=2, inner_max_num_threads=2):
        assert run(fit, [1, 2]) == [200, 200]


def mark(marks: dict[str, Any], key: str, value: Any, lock: Any = None) -> None:
    if lock is not None:
        with lock:
            pass
    os.environ[key] = marks[key] = value


def read(key: str) -> str | None:
    return os.environ.get(key)


def test_an_initializer_is_called_in_each_worker_first() -> None:
    args = {}, "TASKRUN_TEST_MARK"
    options: dict[str, Any] = {"initializer": mark, "initargs": (*args, "yes")}
    assert run(read, [args[1]] * 4, **options) == ["yes"] * 4
    with joblib.parallel_config(backend="taskrun", n_jobs=2, **options):
        assert run(read, [args[1]] * 4) == ["yes"] * 4
        options["initargs"] = (*args, "other", multiprocessing.get_context("spawn").Lock())
        assert run(read, [args[1]] * 4, **options) == ["other"] * 4
    with pytest.raises(BrokenProcessPool, match="nobody"):
        run(read, [args[1]] * 4, initializer=nobody)


def test_threads_that_are_asked_for_go_before_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS"]
    with joblib.parallel_config(backend="taskrun", n_jobs=2, inner_max_num_threads=3):
        assert run(read, names) == ["3", "3"]
    with joblib.parallel_config(backend="taskrun", n_jobs=2):
        assert run(read, names)[0] == "4"


def nobody() -> None:
    raise KeyError("nobody")


def interrupt(x: int) -> None:
    raise KeyboardInterrupt


def test_a_keyboard_interrupt_in_a_call_is_one_here() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(interrupt, [1, 2])
    assert run(square, range(3)) == [0, 1, 4]


def test_classes_of_main_travel_to_workers_and_back(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(MAIN)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout.splitlines() == ["Point 3", "Wrong(3)"], done.stderr


MAIN = """
import joblib
import taskrun.joblib

class Point:  # and no guard: nobody imports this file again
    def __init__(self, x):
        self.x = x

class Wrong(Exception):
    pass

def move(point):
    return Point(point.x + 1)

def fail(point):
    raise Wrong(point.x + 1)

with joblib.parallel_config(backend="taskrun", n_jobs=2):
    point = joblib.Parallel()([joblib.delayed(move)(Point(2))])[0]
    print(type(point).__name__ if isinstance(point, Point) else point, point.x)
    try:
        joblib.Parallel()([joblib.delayed(fail)(Point(2))])
    except Wrong as error:
        print(repr(error))
"""


def test_the_workers_of_a_parallel_of_its_own_end_with_it() -> None:
    before = psutil.Process().children(recursive=True)
    gc.disable()
    try:
        assert run(square, range(3), backend="taskrun", n_jobs=2) == [0, 1, 4]
        end = time.monotonic() + SECONDS
        while set(psutil.Process().children(recursive=True)) - set(before):
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        gc.enable()


def touch_at_exit(written: str) -> None:
    atexit.register(Path(written).touch)


def test_functions_of_atexit_are_called_when_a_worker_ends(tmp_path: Path) -> None:
    written = tmp_path / "written"
    with joblib.parallel_config(backend="taskrun", n_jobs=2):
        joblib.Parallel()([joblib.delayed(touch_at_exit)(str(written))] * 2)
    until(written.exists)


def test_a_generator_goes_on_when_another_parallel_of_its_config_is_over() -> None:
    # By then its batches are found too short, and it is to be said so.
    with joblib.parallel_config(backend="taskrun", n_jobs=2, verbose=10):
        items = run(square, range(3000), return_as="generator", pre_dispatch=4)
        assert next(items) == 0
        assert run(square, range(3)) == [0, 1, 4]
        assert list(items) == [x * x for x in range(1, 3000)]


@pytest.mark.parametrize(("asked", "given"), [(None, 1), (1, 1), (3, 3)])
def test_the_number_of_jobs(asked: int | None, given: int) -> None:
    backend = taskrun.joblib.TaskrunBackend()
    assert backend.effective_n_jobs(asked) == given
    assert backend.effective_n_jobs(-1) >= 1
    with pytest.raises(ValueError, match="n_jobs == 0"):
        backend.effective_n_jobs(0)


def test_a_grid_search_finds_what_it_finds_on_loky() -> None:
    selection = pytest.importorskip("sklearn.model_selection", reason="no scikit-learn")
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    images, digits = load_digits(return_X_y=True)
    found = {}
    for backend in ("taskrun", "loky"):
        search = selection.GridSearchCV(
            SVC(), {"C": [1, 10], "gamma": [0.001, 0.0005]}, n_jobs=2, cv=3
        )
        with joblib.parallel_config(backend=backend):
            search.fit(images[:600], digits[:600])
        found[backend] = search.best_params_, list(search.cv_results_["mean_test_score"])
    assert found["taskrun"] == found["loky"]
