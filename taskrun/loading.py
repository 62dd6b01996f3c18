"""A task file, imported: the same way in the coordinator, the template and the workers.

A task file is a module like any other: it has one name everywhere, the folder it is in
comes first on ``sys.path``, and it is in ``sys.modules`` before its code runs, so that
whatever is pickled by reference to it is found again.  No bytecode is written for it: it
is compiled as seldom as a script is, and nothing is left beside it.
"""
# Every process imports this file, and pathlib would cost it time:

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from inspect import unwrap
from types import ModuleType
from typing import TYPE_CHECKING

from taskrun.context import an_import
from taskrun.errors import LoadError, UsageError
from taskrun.model import Task, nearest

if TYPE_CHECKING:
    from traceback import TracebackException

DEFAULT_FILE = "tasks.py"

# What taskrun, and what that imports, comes to need of the standard library, here or there,
# sooner or later.
_COUNTED_ON = frozenset(
    """
    array ast asyncio base64 binascii bisect bz2 concurrent copy ctypes dataclasses datetime
    email fcntl fnmatch gettext hashlib heapq hmac inspect ipaddress json locale logging lzma
    mmap multiprocessing pathlib pickle platform queue random resource secrets select selectors
    shlex shutil signal socket ssl string stringprep struct subprocess tempfile termios textwrap
    traceback typing unicodedata urllib uuid weakref zipfile zlib
    """.split()
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Tasks by name, in the order of the file.

    ``file`` (absolute) and ``module`` (its name in every process) are None, and
    ``namespace`` too, where the tasks came from no file.
    """

    tasks: dict[str, Task]
    file: str | None = None
    module: str | None = None
    namespace: ModuleType | None = field(default=None, repr=False)


def load(path: str | os.PathLike[str], *, may_be_empty: bool = False) -> Loaded:
    """Import a task file and take the tasks in it.

    Raises LoadError where importing it fails, UsageError where there is no such file, no
    task in it (unless ``may_be_empty``), or two tasks of one name.
    """
    from taskrun.api import collecting  # a worker that imports a file has no use for it

    file = check_file(path)
    module = module_name(file)
    with collecting() as made:
        namespace = import_file(file, module)
    reachable = [value for value in vars(namespace).values() if isinstance(value, Task)]
    public = {id(task) for task in reachable}
    own = [task for task in made if task.module == module or id(task) in public]
    tasks = gather([*own, *reachable])
    if not tasks and not may_be_empty:
        raise UsageError(
            f"{shown(file)} defines no tasks: mark a function with @task (from taskrun import task)"
        )
    return Loaded(tasks, file, module, namespace)


def gather(tasks: Iterable[Task]) -> dict[str, Task]:
    """``tasks`` and all that they need, by name; raises UsageError for two of one name."""
    named: dict[str, Task] = {}
    needed_by: dict[int, Task] = {}
    seen: set[int] = set()
    waiting = list(tasks)
    for task in waiting:  # grows meanwhile
        if id(task) in seen:
            continue
        seen.add(id(task))
        if named.setdefault(task.name, task) is not task:
            raise _two_of_one_name(named[task.name], task, needed_by)
        for other in task.inputs():
            needed_by.setdefault(id(other), task)
            waiting.append(other)
    return named


def _two_of_one_name(first: Task, second: Task, needed_by: dict[int, Task]) -> UsageError:
    places = f"{where(first)} and {where(second)}"
    stale = next((one for one in (first, second) if id(one) in needed_by), None)
    hint = f"; {needed_by[id(stale)].name} needs the one at {where(stale)}" if stale else ""
    return UsageError(
        f"two tasks are named {first.name!r}, at {places}{hint}: rename one, or give it name="
    )


def where(task: Task) -> str:
    """Where a task is written: ``tasks.py:12``."""
    code = getattr(unwrap(task.function), "__code__", None)
    if code is None:
        return f"module {task.module}"
    return f"{shown(code.co_filename)}:{code.co_firstlineno}"


# -- finding --------------------------------------------------------------------------


def find_file(start: str | os.PathLike[str] | None = None, meant: str = "") -> str:
    """The nearest ``tasks.py``, from the folder ``start`` (here) upwards; else UsageError,
    with the file whose name is near to ``meant``."""
    first = folder = _absolute(start or os.curdir)
    while True:
        candidate = os.path.join(folder, DEFAULT_FILE)
        if os.path.isfile(candidate):
            return candidate
        if folder == os.path.dirname(folder):
            raise UsageError(
                f"there is no {DEFAULT_FILE} in {first} or above it: name the file to use"
                f"{_file_hint(first, meant)}"
            )
        folder = os.path.dirname(folder)


def check_file(path: str | os.PathLike[str]) -> str:
    """The absolute path of a Python file; raises UsageError where ``path`` is none."""
    name = os.fspath(path)
    file = _absolute(name)
    if os.path.isdir(file):
        raise UsageError(f"{name} is a folder: name a file in it{_file_hint(file, DEFAULT_FILE)}")
    if os.path.islink(file) and not os.path.exists(file):
        raise UsageError(f"{name} is a link to {os.readlink(file)}, where there is no file")
    if not os.path.exists(file):
        hint = _file_hint(os.path.dirname(file), os.path.basename(file))
        raise UsageError(f"there is no file {name}{hint}")
    if not file.endswith(".py"):
        raise UsageError(f"{name} is not a Python file: its name must end in .py")
    if not os.path.isfile(file):
        raise UsageError(f"{name} is a device or a pipe: name a Python file")
    return file


def _absolute(path: str | os.PathLike[str]) -> str:
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise UsageError(
            "the folder that you are in was deleted: go to another one, or name the whole path"
        ) from None


def _file_hint(folder: str, name: str) -> str:
    try:
        with os.scandir(folder) as entries:
            files = [one.name for one in entries if one.name.endswith(".py") and one.is_file()]
    except OSError:
        return ""  # there is no such folder, or none that we may read
    stems = [file.removesuffix(".py") for file in files]
    stem = name.removesuffix(".py")
    near = stem if stem in stems else nearest(stem, stems)
    return f"; did you mean {shown(os.path.join(folder, near))}.py?" if near else ""


def shown(path: str) -> str:
    """``path`` as people like to read it: relative where it is below this folder."""
    try:
        here = os.path.join(os.getcwd(), "")
    except FileNotFoundError:
        return path  # this folder was deleted
    return path.removeprefix(here)


def module_name(path: str | os.PathLike[str]) -> str:
    """The name under which a task file is imported, in this process and in all workers.

    Its stem; where that is no identifier, or the name of another module, a name made of
    the path.
    """
    from keyword import iskeyword
    from zlib import crc32

    file = os.path.abspath(path)
    stem = os.path.basename(file).removesuffix(".py")
    if stem.isidentifier() and not iskeyword(stem) and not _is_taken(stem, file):
        return stem
    safe = "".join(letter if letter.isalnum() else "_" for letter in stem)
    return f"taskfile_{safe}_{crc32(os.fsencode(file)):08x}"


def _is_taken(name: str, file: str) -> bool:
    if name in sys.stdlib_module_names or name == "taskrun":
        return True
    other = sys.modules.get(name)
    return other is not None and getattr(other, "__file__", None) != file


# -- importing ------------------------------------------------------------------------


def import_file(path: str | os.PathLike[str], module: str) -> ModuleType:
    """Import the Python file ``path`` under the name ``module``, anew.

    Raises LoadError, with the user's traceback, for whatever the file raises; only
    KeyboardInterrupt passes.
    """
    file = os.path.abspath(path)
    folder = os.path.dirname(os.path.realpath(file))  # as for a script
    if folder not in sys.path:
        sys.path.insert(0, folder)
    keep_the_librarys(file, module)
    namespace = _new_module(file, module)
    source = _read(file)
    before = sys.modules.get(module)
    sys.modules[module] = namespace
    try:
        with an_import():
            exec(compile(source, file, "exec", dont_inherit=True), vars(namespace))
    except BaseException as error:
        _put_back(module, before)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _load_error(file, error) from error
    return namespace


def keep_the_librarys(file: str, module: str) -> None:
    """Have modules of the standard library that others count on found there, whatever is called
    so in the folder of the task file: ``random.py``, which may be the task file itself."""
    stem = os.path.basename(file).removesuffix(".py")
    named = {stem} if stem in sys.stdlib_module_names and stem != module else set()
    finder = _StillTheLibrarys(_COUNTED_ON | named, os.path.dirname(os.path.realpath(file)))
    if finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)


@dataclass(frozen=True, slots=True)
class _StillTheLibrarys:
    names: frozenset[str]
    folder: str

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        beside = os.path.join(self.folder, name)
        if name not in self.names or not (os.path.exists(f"{beside}.py") or os.path.exists(beside)):
            return None
        elsewhere = [entry for entry in sys.path if os.path.realpath(entry) != self.folder]
        return PathFinder.find_spec(name, elsewhere)


def _new_module(file: str, module: str) -> ModuleType:
    spec = spec_from_file_location(module, file, loader=SourceFileLoader(module, file))
    assert spec is not None
    return module_from_spec(spec)


def _read(file: str) -> bytes:
    try:
        with open(file, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise LoadError(f"{shown(file)} cannot be read: {error.strerror}") from None


def _put_back(module: str, before: ModuleType | None) -> None:
    if before is None:
        sys.modules.pop(module, None)
    else:
        sys.modules[module] = before


def _load_error(file: str, error: BaseException) -> LoadError:
    text = _own_traceback(error)
    if isinstance(error, SystemExit):
        return LoadError(
            f"{shown(file)} ended with sys.exit({error.code!r}) while it was imported: put "
            "what a script does under  if __name__ == '__main__':",
            text,
        )
    from taskrun.failures import guarded  # its str() is the user's code, too

    last = f"{type(error).__name__}: {guarded(error, str)}".splitlines()[0]
    if isinstance(error, ImportError) and "no known parent package" in last:
        last += (
            "; a task file and the files beside it are modules of no package: import them "
            "absolutely, as in  from helpers import ..."
        )
    return LoadError(f"{shown(file)} cannot be imported: {last}", text)


def _own_traceback(error: BaseException) -> str:
    """The traceback as Python shows it, with the user's frames only."""
    from traceback import TracebackException

    report = TracebackException.from_exception(error)
    if not any(not _is_ours(frame.filename) for frame in report.stack):
        return "".join(report.format_exception_only())  # nothing of the file has run
    seen: set[int] = set()
    waiting: list[TracebackException | None] = [report]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.stack[:] = [frame for frame in one.stack if not _is_ours(frame.filename)]
        waiting += [one.__cause__, one.__context__, *(one.exceptions or ())]
    return "".join(report.format())


def _is_ours(filename: str) -> bool:
    return filename.startswith((_HERE, "<frozen importlib"))


_HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
