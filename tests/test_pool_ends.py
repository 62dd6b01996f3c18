"""What workers of a Pool do at their end, as children of multiprocessing do."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from waiting import until

from taskrun import Pool
from taskrun.workers import leaving

pytestmark = pytest.mark.timeout(60)

SECONDS = 20.0
METHODS = ["fork", "spawn", "forkserver"]


def write_when(gate: str, written: str) -> None:
    until(Path(gate).exists)
    Path(written).touch()


def leave_a_thread(gate: str, written: str) -> None:
    threading.Thread(target=write_when, args=(gate, written)).start()


def leave_an_executor(gate: str, written: str) -> None:
    threads = ThreadPoolExecutor(1)
    threads.submit(write_when, gate, written)
    threads.submit(lambda: Path(written).touch())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("leave", [leave_a_thread, leave_an_executor])
def test_a_worker_waits_for_its_threads(leave: object, method: str, tmp_path: Path) -> None:
    gate, written = tmp_path / "gate", tmp_path / "written"
    pool = Pool(1, context=multiprocessing.get_context(method))
    pool.apply(leave, (str(gate), str(written)))  # type: ignore[arg-type]
    pool.close()
    gate.touch()
    pool.join()
    assert written.exists()


def leave_a_thread_that_stays() -> None:
    threading.Thread(target=time.sleep, args=(60,)).start()


def test_a_pool_that_is_terminated_waits_for_no_thread_of_a_worker() -> None:
    with Pool(1) as pool:
        pool.apply(leave_a_thread_that_stays)
        began = time.monotonic()
    pool.join()
    assert time.monotonic() - began < 1.0


def exit_on_term() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))


def test_a_handler_that_exits_ends_an_idle_worker_without_a_word(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Pool(1, exit_on_term) as pool:
        pid = pool.apply(os.getpid)
        (worker,) = pool.workers()
        worker.terminate()
        worker.join(SECONDS)
        assert not worker.is_alive()
        assert pool.apply(os.getpid) != pid
    pool.join()
    assert capfd.readouterr() == ("", "")


def touch_at_exit(written: str) -> None:
    atexit.register(Path(written).touch)


@pytest.mark.parametrize(("method", "called"), [("fork", 0), ("spawn", 1), ("forkserver", 0)])
def test_functions_of_atexit_are_called_where_the_standard_library_calls_them(
    method: str, called: int, tmp_path: Path
) -> None:
    with Pool(1, context=multiprocessing.get_context(method)) as pool:
        pool.apply(touch_at_exit, (str(tmp_path / "written"),))
        pool.close()
        pool.join()
    assert len(list(tmp_path.iterdir())) == called


def test_what_is_being_imported_when_a_process_ends_has_left_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "multiprocessing.util", ModuleType("multiprocessing.util"))
    leaving.clean_up()
