"""What travels with a task file, and how a node keeps it."""

from __future__ import annotations

import os
import stat
import time
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from taskrun import errors
from taskrun.blobs import Shared
from taskrun.network import bundles
from taskrun.network import channels as ch
from taskrun.network.bundles import Cache, make_bundle, unpack
from taskrun.network.parcels import LARGE, Parcels, Shelf
from taskrun.workers import luggage


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")


def names(data: bytes) -> list[str]:
    return zipfile.ZipFile(BytesIO(data)).namelist()


# -- making ---------------------------------------------------------------------------


def test_modules_and_packages_beside_the_task_file_travel_and_nothing_else(tmp_path: Path) -> None:
    write(
        tmp_path, "tasks.py", "helper.py", "pack/__init__.py", "pack/deep/module.py",
        "pack/words.txt", "data.csv", "notes/draft.txt", ".git/config", ".hidden.py",
        "pack/__pycache__/module.pyc", "pack/.cache/x", "env/pyvenv.cfg", "env/__init__.py",
        "pack/own-env/pyvenv.cfg", "pack/own-env/lib.py",
    )  # fmt: skip
    bundle = make_bundle(str(tmp_path / "tasks.py"))
    assert bundle.file == "tasks.py"
    assert names(bundle.data) == [
        "helper.py", "pack/__init__.py", "pack/deep/module.py", "pack/words.txt", "tasks.py",
    ]  # fmt: skip


def test_of_packages_without_init_the_modules_travel(tmp_path: Path) -> None:
    write(
        tmp_path, "tasks.py", "fast.so", "lib/one.py", "lib/deep/two.py", "lib/data.csv",
        "data/a.csv", "data/read.txt", "not-a-name/x.py", "lib/.git/hook.py", "own/pyvenv.cfg",
        "own/x.py", "org/unit/three.py", "data/not-a-name/y.py",
    )  # fmt: skip
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    assert names(make_bundle(str(tmp_path / "tasks.py")).data) == [
        "fast.so", "lib/deep/two.py", "lib/one.py", "org/unit/three.py", "tasks.py",
    ]  # fmt: skip


def test_a_name_that_is_not_in_utf_8_is_an_error_that_shows_it(tmp_path: Path) -> None:
    write(tmp_path, "tasks.py")
    (tmp_path / os.fsdecode(b"w\xff.py")).touch()
    with pytest.raises(errors.UsageError, match=r"w\\udcff.py' cannot travel"):
        make_bundle(str(tmp_path / "tasks.py"))


def test_what_is_no_file_does_not_travel_nor_keep_anybody_waiting(tmp_path: Path) -> None:
    write(tmp_path, "tasks.py")
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "gone.py").symlink_to("nowhere")
    (tmp_path / "itself.py").symlink_to("itself.py")
    assert names(make_bundle(str(tmp_path / "tasks.py")).data) == ["tasks.py"]
    with pytest.raises(errors.UsageError, match=r"pipe.py is neither a file nor a folder"):
        make_bundle(str(tmp_path / "tasks.py"), ["pipe*"])


def test_data_files_travel_where_a_pattern_names_them(tmp_path: Path) -> None:
    write(tmp_path, "tasks.py", "data/a.csv", "data/deep/b.csv", "data/c.txt", "more/d", "e.txt")
    file = str(tmp_path / "tasks.py")
    assert names(make_bundle(file, ["data/**/*.csv", "more"]).data) == [
        "data/a.csv", "data/deep/b.csv", "more/d", "tasks.py",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("*.nothing", "there is no such file"), ("../x", "beside"), ("/etc/passwd", "beside")],
)
def test_a_pattern_that_cannot_be_meant_is_an_error(
    tmp_path: Path, pattern: str, reason: str
) -> None:
    write(tmp_path, "tasks.py")
    with pytest.raises(errors.UsageError, match=reason):
        make_bundle(str(tmp_path / "tasks.py"), [pattern])


def test_folders_that_are_links_travel_with_what_they_lead_to(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    write(folder, "tasks.py", "pack/__init__.py", "data/a.csv")
    write(tmp_path, "shared/part/b.py", "shared/c.csv")
    (folder / "pack" / "one").symlink_to(tmp_path / "shared")
    (folder / "pack" / "same").symlink_to(tmp_path / "shared")
    (folder / "data" / "more").symlink_to(tmp_path / "shared" / "part")
    assert names(make_bundle(str(folder / "tasks.py"), ["data"]).data) == [
        "data/a.csv", "data/more/b.py", "pack/__init__.py", "pack/one/c.csv",
        "pack/one/part/b.py", "pack/same/c.csv", "pack/same/part/b.py", "tasks.py",
    ]  # fmt: skip


def test_folders_that_lead_back_to_themselves_come_to_an_end(tmp_path: Path) -> None:
    write(tmp_path, "tasks.py", "pack/__init__.py", "pack/deep/x.py", "away/y.py")
    (tmp_path / "pack" / "all").symlink_to("..")
    (tmp_path / "pack" / "root").symlink_to("/")
    (tmp_path / "pack" / "deep" / "self").symlink_to(".")
    (tmp_path / "pack" / "deep" / "away").symlink_to(tmp_path / "away")
    (tmp_path / "away" / "back").symlink_to(tmp_path / "pack")
    assert names(make_bundle(str(tmp_path / "tasks.py")).data) == [
        "away/back/__init__.py", "away/back/deep/x.py", "away/y.py",
        "pack/__init__.py", "pack/deep/away/y.py", "pack/deep/x.py", "tasks.py",
    ]  # fmt: skip


def test_the_same_files_make_the_same_bundle_whenever_they_were_written(tmp_path: Path) -> None:
    made = []
    for folder, when in (("one", 1_000_000_000), ("two", 1_700_000_000)):
        write(tmp_path / folder, "tasks.py", "helper.py")
        os.utime(tmp_path / folder / "helper.py", (when, when))
        made.append(make_bundle(str(tmp_path / folder / "tasks.py")))
    assert made[0] == made[1]
    (tmp_path / "two" / "helper.py").write_text("changed = True\n")
    assert make_bundle(str(tmp_path / "two" / "tasks.py")).digest != made[0].digest


def test_too_much_is_an_error_that_names_the_largest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "MOST_BYTES", 1000)
    write(tmp_path, "tasks.py")
    (tmp_path / "large.bin").write_bytes(bytes(2000))
    with pytest.raises(errors.UsageError, match=r"the largest are large\.bin"):
        make_bundle(str(tmp_path / "tasks.py"), ["large.bin"])


# -- keeping --------------------------------------------------------------------------


def test_a_bundle_is_kept_for_this_user_alone_and_found_again(tmp_path: Path) -> None:
    write(tmp_path, "tasks.py", "run.sh")
    (tmp_path / "run.sh").chmod(0o755)
    bundle = make_bundle(str(tmp_path / "tasks.py"), ["run.sh"])
    cache = Cache(str(tmp_path / "cache" / "bundles"))
    assert cache.find(bundle.digest) is None
    path = cache.keep(bundle.digest, bundle.data)
    assert cache.find(bundle.digest) == path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(cache.folder).st_mode) == 0o700
    unpack(path, str(tmp_path / "there"))
    assert sorted(os.listdir(tmp_path / "there")) == ["run.sh", "tasks.py"]
    assert os.access(tmp_path / "there" / "run.sh", os.X_OK)


def test_a_bundle_that_no_run_has_had_for_long_makes_way_for_a_new_one(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "bundles"))
    used, unused = (
        Path(cache.keep(bundles.digest_of(data), data)) for data in (b"used", b"unused")
    )
    begun = Path(f"{unused}.12345")
    begun.touch()
    long_ago = time.time() - bundles.UNUSED - 60
    for path in (used, unused, begun):
        os.utime(path, (long_ago, long_ago))
    assert cache.find(bundles.digest_of(b"used")) == str(used)
    new = Path(cache.keep(bundles.digest_of(b"new"), b"new"))
    assert sorted(tmp_path.glob("bundles/*")) == sorted([used, new])


def test_a_process_of_an_engine_whose_bundle_was_removed_has_it_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    digest = bundles.digest_of(b"some")
    luggage.keep(digest, b"some")
    assert luggage.has(digest)
    os.unlink(Cache().find(digest) or "")
    with pytest.raises(errors.RunError, match="run it again"):
        luggage.lay_out(digest, "")
    assert not luggage.has(digest)


def test_what_is_no_bundle_is_a_value_error_whatever_is_wrong_with_it(tmp_path: Path) -> None:
    write(tmp_path, "tasks.py")
    whole = make_bundle(str(tmp_path / "tasks.py")).data
    for number, data in enumerate(
        (b"", b"junk", whole[:-30], whole.replace(b"tasks", b"tusks", 1))
    ):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(data)
        with pytest.raises(ValueError, match="that is no bundle"):
            unpack(str(path), str(tmp_path / str(number)))


def test_a_bundle_that_was_damaged_or_is_another_one_is_not_used(tmp_path: Path) -> None:
    write(tmp_path, "tasks.py")
    bundle = make_bundle(str(tmp_path / "tasks.py"))
    cache = Cache(str(tmp_path / "bundles"))
    path = Path(cache.keep(bundle.digest, bundle.data))
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.find(bundle.digest) is None
    with pytest.raises(ValueError, match="not the one that was announced"):
        cache.keep(bundle.digest, bundle.data[:-1])
    for digest in ("../../x", "a/b", ""):
        with pytest.raises(ValueError, match="no digest"):
            cache.find(digest)


# -- large values ---------------------------------------------------------------------


class Told:
    """A conversation that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[tuple[int, int, int]] = []

    def send(self, key: int, channel: int, data: bytes) -> None:
        self.said.append((channel, ch.number_of(key), len(data)))


def test_a_value_is_sent_once_and_forgotten_when_there_is_no_room_and_no_use() -> None:
    told, busy = Told(), {1}
    parcels = Parcels(told, "/there", busy.__contains__, most=3 * LARGE)  # type: ignore[arg-type]
    first, second, third = (bytes([n]) * 2 * LARGE for n in range(3))
    needs: list[int] = []
    for value in (first, [first, 5, {"a": first}], "small", first[:10]):
        parcels.wrap(value, 1, needs)
    assert needs == [0, 0, 0]
    assert told.said == [(ch.VALUE, 0, 2 * LARGE)]
    parcels.wrap(second, 2, needs)  # the first is in use, and stays
    parcels.wrap(first, 3, needs)
    assert [channel for channel, *_ in told.said] == [ch.VALUE, ch.VALUE]
    busy.clear()
    parcels.wrap(third, 4, needs)
    assert told.said[2:] == [(ch.FORGET, 1, 0), (ch.FORGET, 0, 0), (ch.VALUE, 2, 2 * LARGE)]
    assert needs[-3:] == [1, 0, 2]


def test_only_what_is_large_in_a_value_becomes_a_parcel() -> None:
    told = Told()
    parcels = Parcels(told, "/there", lambda call: True)  # type: ignore[arg-type]
    needs: list[int] = []
    value = Shared((b"small",), (bytes(LARGE), b"tiny"))
    wrapped = parcels.wrap(value, 1, needs)
    assert wrapped.stream == (b"small",)
    assert wrapped.buffers[1] == b"tiny"
    assert needs == [0]
    same = ([1, "two", b"three"], {"four": (5,)})
    assert parcels.wrap(same, 1, needs) == same


def test_a_shelf_knows_what_is_there(tmp_path: Path) -> None:
    shelf = Shelf(str(tmp_path))
    shelf.put(3, b"data")
    assert shelf.has([3]) and shelf.has([])
    assert not shelf.has([3, 4])
    shelf.forget(3)
    assert not shelf.has([3])
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    write(tmp_path, "tasks.py")
    (tmp_path / "helper.py").symlink_to(tmp_path / "helper.py")
    with pytest.raises(errors.UsageError, match=r"helper\.py cannot travel to other machines"):
        make_bundle(str(tmp_path / "tasks.py"), ["helper.py"])
