"""Large data between processes: what is copied, what is shared, and that nothing is left."""

from __future__ import annotations

import array
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from taskrun import Executor, Pool, blobs, places
from taskrun.blobs import THRESHOLD, Blob, Draft, Portable, Shared
from taskrun.pooling import remote
from taskrun.values import decode, encode

pytestmark = pytest.mark.timeout(120)

LARGE = 3 * THRESHOLD + 5


class Buffer:
    """Something with a large buffer, as arrays have it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Buffer, (pickle.PickleBuffer(self.data),)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    assert files() == []
    yield
    deadline = time.monotonic() + 20
    while files() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert files() == []


def files() -> list[str]:
    """The blobs of this process."""
    found = []
    for folder in places.own().folders:
        if os.path.isdir(folder):
            found += [os.path.join(folder, name) for name in os.listdir(folder)]
    return found


def dumps(obj: Any) -> Portable:
    draft = Draft()
    pickle.Pickler(draft, 5, buffer_callback=draft.keep).dump(obj)
    return draft.sealed()


# -- pickles --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        b"x" * LARGE,
        bytearray(b"y" * LARGE),
        "é" * LARGE,
        list(range(LARGE)),
        [b"a", b"b" * LARGE, b"c", bytearray(LARGE), {"d": b"e" * THRESHOLD}],
        array.array("d", range(LARGE)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_large_goes_into_files_and_comes_back_equal(value: Any) -> None:
    data = dumps(value)
    assert isinstance(data, Shared) and files()
    assert len(pickle.dumps(data)) < 4096
    again = blobs.loads(data)
    assert type(again) is type(value) and again == value


def test_what_is_small_is_a_plain_pickle() -> None:
    value = [b"x" * 1000, {"a": (1, 2.5)}, Buffer(bytearray(1000))]
    data = dumps(value)
    assert type(data) is bytes
    assert blobs.loads(data)[:2] == value[:2]


@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize("length", [0, 65_535, 65_536, 200_000, THRESHOLD - 1, THRESHOLD, LARGE])
def test_buffers_of_any_length_come_back_equal(length: int, kind: Any) -> None:
    values = [kind(os.urandom(length)) for _ in range(3)]
    again = blobs.loads(dumps([Buffer(value) for value in values]))
    assert [bytes(made.data) for made in again] == [bytes(value) for value in values]


def test_a_buffer_is_mapped_not_copied_and_may_be_written_to() -> None:
    data = dumps(Buffer(bytearray(LARGE)))
    first, second = blobs.loads(data).data, blobs.loads(data).data
    memoryview(first)[0] = 7
    assert (memoryview(first)[0], memoryview(second)[0]) == (7, 0)
    assert memoryview(blobs.loads(data).data)[0] == 0


def test_a_buffer_that_cannot_be_written_to_stays_so() -> None:
    data = dumps(Buffer(bytes(LARGE)))
    assert memoryview(blobs.loads(data).data).readonly


def test_a_mapping_outlives_its_file() -> None:
    data = dumps(Buffer(bytearray(b"z" * LARGE)))
    view = memoryview(blobs.loads(data).data)
    del data
    assert not files()
    assert bytes(view[-3:]) == b"zzz"


def test_the_same_data_are_written_once_as_long_as_they_are_there() -> None:
    original = bytearray(os.urandom(LARGE))
    first, second = dumps(("a", original)), dumps(["b", bytes(original)])
    assert len(files()) == 1
    assert (blobs.loads(first)[1], blobs.loads(second)[1]) == (original, original)


def test_data_that_were_changed_meanwhile_are_written_again() -> None:
    original = bytearray(os.urandom(LARGE))
    first = dumps(original)
    original[LARGE // 2 + 100] ^= 1  # where no sample is taken
    second = dumps(original)
    assert len(files()) == 2
    assert blobs.loads(first) != blobs.loads(second) == original


def test_where_very_many_are_mapped_they_are_copied_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blobs, "_most", len(blobs._maps) + 1)
    data = dumps(Buffer(bytearray(b"q" * LARGE)))
    kept = [blobs.loads(data) for _ in range(3)]
    assert [type(one.data).__name__ for one in kept] == ["mmap", "bytearray", "bytearray"]
    assert bytes(kept[2].data) == b"q" * LARGE


def test_a_value_that_is_large_travels_as_a_reference() -> None:
    encoded, keys = encode({"data": b"x" * LARGE})
    assert isinstance(encoded, Shared) and keys == ()
    assert decode(encoded) == {"data": b"x" * LARGE}


def test_what_goes_far_takes_its_data_along() -> None:
    data = dumps(("x", b"y" * LARGE))
    with blobs.far():
        sent = pickle.dumps(data)
    assert len(sent) > LARGE
    del data
    assert blobs.loads(pickle.loads(sent)) == ("x", b"y" * LARGE)


def test_a_pickling_that_fails_leaves_nothing() -> None:
    with pytest.raises(Exception, match="cannot be pickled"):
        encode([b"x" * LARGE, Unpicklable()])


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("no")


# -- where there is no room -----------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in place of the shared memory."""
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.setenv("TASKRUN_SHM", str(memory))
    monkeypatch.setenv("TMPDIR", str(disk))
    monkeypatch.setattr(places, "_own", None)
    monkeypatch.setattr(places, "_notice", None)
    monkeypatch.setattr(places, "_complained", False)
    yield memory
    places.leave()


def refuse(path: Path) -> None:
    """Let nothing be written there, not even by root."""
    (path / f"taskrun-{os.getuid()}-data").write_text("not a folder")


def test_without_room_in_memory_the_disk_is_used_and_one_warning_says_so(elsewhere: Path) -> None:
    refuse(elsewhere)
    with pytest.warns(RuntimeWarning, match=f"cannot go to {elsewhere}"):
        data = dumps(b"x" * LARGE)
    assert [os.path.dirname(path) for path in files()] == [places.own().folders[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert blobs.loads(dumps(b"y" * LARGE)) == b"y" * LARGE
    assert blobs.loads(data) == b"x" * LARGE


def test_without_room_anywhere_the_data_travel_in_the_pickle(elsewhere: Path) -> None:
    refuse(elsewhere)
    refuse(elsewhere.parent / "disk")
    with pytest.warns(RuntimeWarning):
        data = dumps(b"x" * LARGE)
    assert not files()
    assert blobs.loads(pickle.loads(pickle.dumps(data))) == b"x" * LARGE


def test_a_worker_without_room_is_told_of_by_one_warning(elsewhere: Path) -> None:
    refuse(elsewhere)
    with pytest.warns(RuntimeWarning) as said, Pool(2) as pool:
        values = pool.map(bytes, [LARGE] * 4, chunksize=1)
    assert values == [bytes(LARGE)] * 4
    assert len([one for one in said if "large data cannot go to" in str(one.message)]) == 1


def test_a_folder_that_others_may_look_into_is_not_used(elsewhere: Path) -> None:
    base = elsewhere / f"taskrun-{os.getuid()}-data"
    base.mkdir()
    base.chmod(0o755)
    with pytest.warns(RuntimeWarning, match="large data cannot go to"):
        data = dumps(b"x" * LARGE)
    assert all(str(elsewhere) not in path for path in files())
    del data


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a file system needs root")
def test_a_small_memory_file_system_is_not_filled(elsewhere: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "none", elsewhere])
    if mounted.returncode:
        pytest.skip("root may not mount a file system here")
    try:
        with pytest.warns(RuntimeWarning, match="cannot go to"):
            data = [dumps(os.urandom(3_000_000)) for _ in range(4)]
        disk = [path for path in files() if str(elsewhere) not in path]
        assert len(disk) == 2
        assert [len(blobs.loads(one)) for one in data] == [3_000_000] * 4
        del data
        places.leave()
    finally:
        subprocess.run(["umount", elsewhere], check=True)


# -- in a pool ------------------------------------------------------------------------


def length(data: Any) -> int:
    return len(data)


def blobs_there(data: Any) -> int:
    """How many the parent has made."""
    return len([name for name in os.listdir(places.current().folders[0]) if name[0] == "c"])


def zeros(size: int) -> array.array[float]:
    return array.array("b", bytes(size))


def add(data: Any, number: int) -> int:
    return len(data) + number


def die_after(size: int) -> None:
    kept = dumps(bytes(size))
    assert isinstance(kept, Shared)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_large_arguments_and_results_of_a_pool(method: str) -> None:
    import multiprocessing

    with Pool(2, context=multiprocessing.get_context(method)) as pool:
        assert pool.apply(length, (b"x" * LARGE,)) == LARGE
        assert pool.map(length, [bytearray(LARGE)] * 4) == [LARGE] * 4
        assert pool.apply(zeros, (LARGE,)) == zeros(LARGE)
        assert [len(one) for one in pool.imap(bytes, [LARGE] * 3)] == [LARGE] * 3


def test_an_argument_of_many_calls_is_there_once() -> None:
    data = os.urandom(LARGE)
    with Pool(2) as pool:
        assert set(pool.map(blobs_there, [data] * 6, chunksize=1)) == {1}
        results = [pool.apply_async(blobs_there, (data,)) for _ in range(6)]
        assert max(result.get(60) for result in results) == 1


@pytest.mark.parametrize("chunksize", [1, 3])
def test_what_is_large_in_a_partial_is_there_once_and_not_for_ever(chunksize: int) -> None:
    with Pool(2) as pool:
        function = partial(add, os.urandom(LARGE))
        assert pool.map(function, range(9), chunksize) == [LARGE + n for n in range(9)]
        assert list(pool.imap(function, range(9), chunksize)) == [LARGE + n for n in range(9)]
        assert pool.apply(function, (1,)) == LARGE + 1
        await_no_files()


def test_what_is_large_in_a_closure_is_there_once_and_not_for_ever() -> None:
    data = os.urandom(LARGE)
    with Pool(2) as pool:
        assert pool.map(lambda n: len(data) + n, range(9)) == [LARGE + n for n in range(9)]
        assert pool.starmap(lambda n, m: len(data) + m, [(1, 2)] * 3) == [LARGE + 2] * 3
        await_no_files()


def test_a_result_can_be_had_when_its_pool_is_gone() -> None:
    with Pool(1) as pool:
        result = pool.apply_async(bytes, (LARGE,))
        pool.close()
        pool.join()
    assert result.get() == bytes(LARGE)


def test_a_result_that_nobody_wants_is_removed() -> None:
    with Pool(1) as pool:
        pool.apply_async(bytes, (LARGE,)).wait(30)
        await_no_files()


def test_what_a_killed_worker_had_written_is_removed() -> None:
    with Pool(1) as pool:
        with pytest.raises(Exception, match="SIGKILL"):
            pool.apply(die_after, (LARGE,))
        await_no_files()


def test_an_executor_takes_and_gives_large_data() -> None:
    with Executor(2) as executor:
        assert executor.submit(length, b"x" * LARGE).result(60) == LARGE
        assert list(executor.map(bytes, [LARGE] * 2)) == [bytes(LARGE)] * 2


def await_no_files() -> None:
    deadline = time.monotonic() + 20
    while files() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not files()


# -- numpy and its kin ----------------------------------------------------------------


def changed(values: Any) -> Any:
    values[0] = 99
    return values


def test_an_array_is_mapped_in_both_directions_and_may_be_changed() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    for order in "CF":
        values = numpy.array(numpy.arange(300_000.0).reshape(300, 1000), order=order)
        with Pool(2) as pool:
            result = pool.apply(changed, (values,))
        assert values[0, 0] == 0 and (result[0] == 99).all() and (result[1:] == values[1:]).all()
        assert result.flags[f"{order}_CONTIGUOUS"]
        result += 1


def added_to(values: Any) -> Any:
    values += 1
    values.setflags(write=False)
    return values


@pytest.mark.parametrize("count", [10, 300_000])
@pytest.mark.parametrize("function", [added_to, lambda values: added_to(values)])
def test_a_read_only_array_may_be_changed_where_it_arrives(count: int, function: Any) -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    kinds = [("f8", "C"), ("f8", "F"), ("M8[ns]", "C"), (">i4", "C")]
    with Pool(1) as pool:
        for kind, order in kinds:
            values = numpy.array(numpy.arange(count).astype(kind).reshape(5, -1), order=order)
            values.setflags(write=False)
            result = pool.apply(function, (values,))
            assert (result == values + 1).all() and result.dtype == values.dtype
            assert result.flags.writeable and result.flags[f"{order}_CONTIGUOUS"]
            assert not values.flags.writeable


def test_read_only_arrays_of_all_kinds_are_rebuilt() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    record = numpy.dtype([("name", "U3"), ("at", "i4", (2,))], align=True)
    kinds = [
        numpy.zeros(3, record), numpy.array(5), numpy.zeros((0, 3)), numpy.array([None, "x"]),
        numpy.arange(10)[::2], numpy.broadcast_to(numpy.arange(3), (2, 3)), numpy.array([True]),
        numpy.frombuffer(b"abcdefgh", "V3", 2), numpy.zeros(2, "V0"),
    ]  # fmt: skip
    for values in kinds:
        values.setflags(write=False)
        found = blobs.loads(remote.dumps(values))
        assert found.dtype == values.dtype and found.shape == values.shape
        assert found.flags.writeable and (found == values).all()


def test_a_frame_travels() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({"a": range(200_000), "b": [1.5] * 200_000})
    with Pool(1) as pool:
        assert pool.apply(pandas.DataFrame.copy, (frame,)).equals(frame)


def test_an_arrow_table_travels() -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = arrow.table({"a": list(range(200_000))})
    with Pool(1) as pool:
        assert pool.apply(arrow.Table.combine_chunks, (table,)).equals(table)


# -- what is left behind --------------------------------------------------------------

SCRIPT = """
import os, sys, time
from taskrun import Pool, blobs
def slow(data):
    time.sleep(600)
def hold(data):
    print("ready", flush=True)
    time.sleep(600)
if __name__ == "__main__":
    pool = Pool(2)
    pool.apply_async(hold, (bytes(5_000_000),))
    time.sleep(600)
"""


@pytest.mark.usefixtures("elsewhere")  # where nobody else starts meanwhile, and tidies up
def test_after_kill_minus_9_of_everything_the_next_start_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        folder = _folder_of(process.pid)
        assert os.listdir(folder)
        _kill_below(process.pid)
        process.wait(30)
    assert os.path.isdir(folder)
    with Pool(1) as pool:
        assert pool.apply(abs, (-1,)) == 1
        assert not os.path.exists(folder)


def test_after_kill_minus_9_of_the_parent_alone_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        folder = _folder_of(process.pid)
        process.kill()
        process.wait(30)
    deadline = time.monotonic() + 20
    while os.path.exists(folder):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _folder_of(pid: int) -> str:
    base = os.path.dirname(places.own().folders[0])
    (name,) = [name for name in os.listdir(base) if name.startswith(f"{pid}-")]
    return os.path.join(base, name)


def _kill_below(pid: int) -> None:
    """Kill a process and its descendants, the template that would tidy up first."""
    import psutil

    below = psutil.Process(pid).children(recursive=True)
    for process in [*below, psutil.Process(pid)]:
        process.send_signal(signal.SIGSTOP)
    for process in [*below, psutil.Process(pid)]:
        process.kill()
    psutil.wait_procs(below, 20)


def test_the_folder_of_a_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    data = dumps(b"x" * LARGE)
    places.sweep_around(places.own())
    assert blobs.loads(data) == b"x" * LARGE


def test_a_worker_on_another_machine_puts_its_data_into_the_pickle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = places.own()
    strange = [folder.replace(f"{os.getpid()}-", "1-7") for folder in here.folders]
    monkeypatch.setattr(places, "_settled", None)
    places.settle(places.Place(tuple(strange), "w1"))
    assert places.current() == places.Place((), "w1")
    data = dumps(b"x" * LARGE)
    assert not files()
    assert blobs.loads(pickle.loads(pickle.dumps(data))) == b"x" * LARGE
    places.settle(here)
    assert places.current() == here


def test_a_forked_child_removes_nothing_of_its_parents() -> None:
    data = dumps(b"x" * LARGE)
    pid = os.fork()
    if pid == 0:
        del data
        places.leave()
        os._exit(0)
    os.waitpid(pid, 0)
    assert blobs.loads(data) == b"x" * LARGE


# -- in a run -------------------------------------------------------------------------

TASKS = """
from taskrun import task, each, result
import os

@task
def big(n=each([1, 2, 3])):
    return bytes([n]) * 2_000_000

@task
def size(data=each(big)):
    return len(data)

@task
def whole(all=result(big), sizes=result(size)):
    future = add.submit(all[0], all[1])
    return future

@task(default=False)
def add(a, b):
    return a[:1] + b[:1] + a * 2
"""


def test_large_values_go_through_a_run_as_references(tmp_path: Path) -> None:
    from taskrun import run

    path = tmp_path / "tasks.py"
    path.write_text(textwrap.dedent(TASKS))
    done = run(str(path), jobs=2)
    assert done["size"] == [2_000_000] * 3
    assert done["whole"] == b"\1\2" + b"\1" * 4_000_000


STREAM = """
import os
from taskrun import task, each, result, places

@task
def big(n=each(range(30))):
    return bytes([n]) * 2_000_000

@task
def size(data=each(big)):
    return len(os.listdir(places.current().folders[0]))

@task
def left(most=result(size)):
    return max(most), len(os.listdir(places.current().folders[0]))
"""


def test_a_run_lets_large_values_go_as_soon_as_nobody_needs_them(tmp_path: Path) -> None:
    from taskrun import run

    path = tmp_path / "tasks.py"
    path.write_text(STREAM)
    most, left = run(str(path), "left", jobs=2)
    assert left == 0
    assert most < 30


def nested_sum(size: int) -> tuple[int, list[str]]:
    with Pool(1) as pool:
        found = pool.apply(length, (bytes(size),))
    return found, list(places.own().folders)


def test_a_pool_in_a_worker_leaves_nothing_when_the_worker_ends() -> None:
    with Pool(1) as pool:
        found, folders = pool.apply(nested_sum, (LARGE,))
        assert found == LARGE
        pool.close()
        pool.join()
    assert not [folder for folder in folders if os.path.exists(folder)]


def test_a_blob_is_removed_with_its_last_reference() -> None:
    data = dumps(b"x" * LARGE)
    assert isinstance(data, Shared)
    (blob,) = [part for part in data.stream if isinstance(part, Blob)]
    again = pickle.loads(pickle.dumps(data))
    assert [part for part in again.stream if isinstance(part, Blob)] == [blob]
    del data, blob
    assert files()
    del again
    assert not files()
