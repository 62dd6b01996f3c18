"""Task files: how they are found and imported, and what can be wrong with them."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taskrun.errors import LoadError, UsageError
from taskrun.loading import find_file, gather, import_file, load, module_name, where

HEAD = "from taskrun import task, each, result\n"


@pytest.fixture(autouse=True)
def clean_imports() -> Iterator[None]:
    modules, path = dict(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - set(modules):
        if not name.startswith("taskrun."):  # parts of it are there already
            del sys.modules[name]
    sys.modules.update(modules)
    sys.path[:] = path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "jobs.py") -> Path:
    path = folder / name
    path.write_text(HEAD + text)
    return path


# -- importing ------------------------------------------------------------------------


def test_tasks_are_found_in_the_order_of_the_file(folder: Path) -> None:
    write(folder, "@task\ndef b(): ...\n@task\ndef a(x=result(b)): ...\n@task\ndef c(): ...\n")
    loaded = load("jobs.py")
    assert list(loaded.tasks) == ["b", "a", "c"]
    assert loaded.file == str(folder / "jobs.py") and loaded.module == "jobs"


def test_tasks_that_a_loop_makes_are_all_found(folder: Path) -> None:
    write(folder, "for n in 'xy':\n    @task(name=f'load-{n}')\n    def load(n=n): return n\n")
    assert list(load("jobs.py").tasks) == ["load-x", "load-y"]


def test_imported_tasks_and_what_they_need_take_part_but_not_their_neighbours(
    folder: Path,
) -> None:
    write(folder, "@task\ndef raw(): ...\n@task\ndef tidy(x=result(raw)): ...\n"
          "@task\ndef other(): ...\n", "helpers.py")  # fmt: skip
    write(folder, "from helpers import tidy\n@task\ndef end(x=result(tidy)): ...\n")
    assert set(load("jobs.py").tasks) == {"raw", "tidy", "end"}


def test_the_folder_of_the_file_can_be_imported_from(folder: Path) -> None:
    below = folder / "below"
    below.mkdir()
    write(below, "", "beside.py")
    write(below, "import beside\n@task\ndef a(): ...\n")
    load("below/jobs.py")
    assert sys.path[0] == str(below.resolve())


def test_what_the_file_defines_can_be_pickled_while_it_is_imported(folder: Path) -> None:
    write(folder, "import pickle\nclass Row: ...\nROW = pickle.loads(pickle.dumps(Row()))\n"
          "@task\ndef a(): ...\n")  # fmt: skip
    namespace = load("jobs.py").namespace
    assert namespace is not None
    assert type(pickle.loads(pickle.dumps(namespace.ROW))) is namespace.Row


def test_importing_leaves_no_bytecode_beside_the_file(folder: Path) -> None:
    load(write(folder, "@task\ndef a(): ...\n"))
    assert [path.name for path in folder.iterdir()] == ["jobs.py"]


def test_a_file_that_changed_is_imported_anew(folder: Path) -> None:
    load(write(folder, "@task\ndef a(): ...\n"))
    assert list(load(write(folder, "@task\ndef b(): ...\n")).tasks) == ["b"]


def test_a_file_whose_name_another_module_has_gets_a_name_of_its_own(folder: Path) -> None:
    for name in ("json.py", "taskrun.py", "class.py", "two words.py", "pytest.py"):
        found = module_name(folder / name)
        assert found == module_name(folder / name)
        assert found.isidentifier() and found != name.removesuffix(".py")
    assert module_name(folder / "jobs.py") == "jobs"


def test_a_file_named_like_a_standard_module_does_not_replace_it(folder: Path) -> None:
    import json

    write(folder, "@task\ndef a(): ...\n", "json.py")
    assert list(load("json.py").tasks) == ["a"]
    assert sys.modules["json"] is json


def test_what_lies_beside_the_file_replaces_no_standard_module_that_others_need(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, "1 / 0\n", "stringprep.py")
    write(folder, "ours = 1\n", "sched.py")  # nothing of ours needs it
    write(folder, "import sched, stringprep\nsched.ours\n@task\ndef a(): ...\n")
    for name in ("sched", "stringprep"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert list(load("jobs.py").tasks) == ["a"]
    assert hasattr(sys.modules["stringprep"], "in_table_a1")
    monkeypatch.delitem(sys.modules, "sched")


def test_a_file_may_have_no_tasks_where_that_is_allowed(folder: Path) -> None:
    write(folder, "def plain(x): ...\n")
    assert load("jobs.py", may_be_empty=True).tasks == {}
    with pytest.raises(UsageError, match=r"jobs\.py defines no tasks: mark a function with @task"):
        load("jobs.py")


# -- finding --------------------------------------------------------------------------


@pytest.mark.parametrize("find", [find_file, lambda: load("tasks.py")])
def test_in_a_folder_that_was_deleted_no_file_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, find: Any
) -> None:
    deleted = tmp_path / "deleted"
    deleted.mkdir()
    monkeypatch.chdir(deleted)
    deleted.rmdir()
    with pytest.raises(UsageError, match="was deleted"):
        find()


def test_the_nearest_tasks_file_upwards_is_found(folder: Path) -> None:
    write(folder, "", "tasks.py")
    deep = folder / "a" / "b"
    deep.mkdir(parents=True)
    assert find_file(deep) == str(folder / "tasks.py")
    write(deep, "", "tasks.py")
    assert find_file(deep) == str(deep / "tasks.py")


def test_a_missing_tasks_file_is_told_with_where_it_was_looked_for(folder: Path) -> None:
    with pytest.raises(UsageError, match=f"no tasks.py in {folder} or above"):
        find_file()


def test_a_file_that_is_none_is_told_with_what_is_near(folder: Path) -> None:
    write(folder, "", "tasks.py")
    (folder / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"no file taks\.py; did you mean tasks\.py\?"):
        load("taks.py")
    with pytest.raises(UsageError, match=r"is a folder: .*did you mean tasks\.py\?"):
        load(".")
    with pytest.raises(UsageError, match=r"notes\.txt is not a Python file"):
        load("notes.txt")
    with pytest.raises(UsageError, match=r"no file nowhere/x\.py$"):
        load("nowhere/x.py")
    (folder / "link.py").symlink_to("gone.py")
    with pytest.raises(UsageError, match=r"link\.py is a link to gone\.py, where there is no file"):
        load("link.py")
    os.mkfifo(folder / "pipe.py")
    with pytest.raises(UsageError, match=r"pipe\.py is a device or a pipe"):
        load("pipe.py")


# -- errors while importing -----------------------------------------------------------


def error_of(folder: Path, text: str) -> LoadError:
    with pytest.raises(LoadError) as raised:
        load(write(folder, text))
    return raised.value


def test_a_syntax_error_is_shown_as_python_shows_it(folder: Path) -> None:
    error = error_of(folder, "def broken(:\n    pass\n")
    assert error.traceback_text.startswith(f'  File "{folder}/jobs.py", line 2\n    def broken(:')
    assert "SyntaxError" in error.traceback_text and "Traceback" not in error.traceback_text


def test_text_that_cannot_be_compiled_at_all_is_an_error_of_the_file(folder: Path) -> None:
    assert "jobs.py cannot be imported" in str(error_of(folder, "x = 'a\0b'\n"))
    (folder / "latin.py").write_bytes(b"x = '\xe9'\n")
    with pytest.raises(LoadError, match=r"latin\.py cannot be imported: SyntaxError"):
        load("latin.py")


def test_an_exception_shows_the_users_own_frames_only(folder: Path) -> None:
    error = error_of(folder, "def boom():\n    raise ValueError('bad')\n\nboom()\n")
    lines = error.traceback_text.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert [line for line in lines if "File" in line] == [
        f'  File "{folder}/jobs.py", line 5, in <module>',
        f'  File "{folder}/jobs.py", line 3, in boom',
    ]
    assert str(error) == "jobs.py cannot be imported: ValueError: bad"
    assert "jobs" not in sys.modules


def test_a_mistake_in_a_decorator_ends_at_the_users_line(folder: Path) -> None:
    text = error_of(folder, "@task(retries=-1)\ndef a(): ...\n").traceback_text
    assert "@task(retries=-1)" in text and "ValueError: retries must be 0 or more" in text
    assert "api.py" not in text


def test_causes_are_shown_without_our_frames_too(folder: Path) -> None:
    text = error_of(
        folder,
        "try:\n    task(retries=-1)\nexcept ValueError as e:\n    raise KeyError('x') from e\n",
    ).traceback_text
    assert "direct cause" in text and "KeyError: 'x'" in text and "api.py" not in text


def test_an_error_in_a_module_that_the_file_imports_shows_both_files(folder: Path) -> None:
    write(folder, "1 / 0\n", "helpers.py")
    text = error_of(folder, "import helpers\n").traceback_text
    assert "jobs.py" in text and "helpers.py" in text and "importlib" not in text


@pytest.mark.parametrize("source", ["from .helpers import x\n", "from . import helpers\n"])
def test_a_relative_import_is_told_how_files_beside_a_task_file_are_imported(
    folder: Path, source: str
) -> None:
    write(folder, "x = 1\n", "helpers.py")
    error = error_of(folder, source)
    assert "modules of no package: import them absolutely" in str(error)
    assert source.strip() in error.traceback_text


def test_sys_exit_while_importing_is_told(folder: Path) -> None:
    error = error_of(folder, "import sys\nsys.exit(3)\n")
    assert "ended with sys.exit(3) while it was imported" in str(error)
    assert "__main__" in str(error)


def test_an_interrupt_while_importing_passes(folder: Path) -> None:
    path = write(folder, "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        import_file(path, "jobs")
    assert "jobs" not in sys.modules


def test_a_file_that_cannot_be_read_is_told(folder: Path) -> None:
    with pytest.raises(LoadError, match=r"gone\.py cannot be read: No such file"):
        import_file(folder / "gone.py", "gone")


# -- names ----------------------------------------------------------------------------


def test_two_tasks_of_one_name_are_told_with_both_places(folder: Path) -> None:
    write(folder, "@task\ndef a(): ...\n\n@task\ndef a(): ...\n")
    with pytest.raises(UsageError, match=r"named 'a', at jobs\.py:2 and jobs\.py:5: rename"):
        load("jobs.py")


def test_a_task_that_needs_one_that_was_defined_again_is_named(folder: Path) -> None:
    write(folder, "@task\ndef a(): ...\n@task\ndef b(x=result(a)): ...\n@task\ndef a(): ...\n")
    with pytest.raises(UsageError, match=r"b needs the one at jobs\.py:2"):
        load("jobs.py")


def test_a_task_under_two_names_is_one_task(folder: Path) -> None:
    write(folder, "@task\ndef a(): ...\nalias = a\n")
    tasks = load("jobs.py").tasks
    assert list(tasks) == ["a"] and where(tasks["a"]) == "jobs.py:2"
    assert gather([tasks["a"], tasks["a"]]) == tasks
