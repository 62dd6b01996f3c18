"""What a run needs in a process that is not ours, done once: where modules are found, the
task file, the variables of numeric libraries."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from typing import Any, Final

from taskrun.workers.briefs import Brief, TaskFile
from taskrun.workers.settings import Preloaded, Settings, preload

PATIENCE: Final = 1.0  # seconds between looks at who the parent is, where it cannot be watched

_watched: set[int] = set()
_contents: dict[str, bytes] = {}
"""The task files that were imported here: module -> source."""


def prepare(brief: Brief) -> Preloaded:
    """Make this process one where calls of a run can be executed."""
    end_with(brief.coordinator)
    sys.path.extend(path for path in brief.path if path not in sys.path)
    os.environ.update(brief.environment)
    if brief.folder is not None:
        try:
            os.chdir(brief.folder)
        except OSError:
            pass  # it was deleted; the coordinator goes on in it as well
    return Preloaded(None) if brief.file is None else _import(brief.file, _path_of(brief))


def end_with(coordinator: int | None) -> None:
    """End this process, and what its calls have started, when the coordinator is gone (None: it
    goes on).  What executes a call may never look whether somebody waits for it."""
    if coordinator is not None and coordinator != os.getpid() and coordinator not in _watched:
        _watched.add(coordinator)
        threading.Thread(target=_await_end_of, args=[coordinator], daemon=True).start()


def _await_end_of(coordinator: int) -> None:
    if hasattr(os, "pidfd_open"):
        try:
            with open(os.pidfd_open(coordinator), "rb") as watched:
                select.select([watched], [], [])
        except ProcessLookupError:
            pass  # gone already
        except OSError:
            return  # the system does not let us watch it
    else:
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(PATIENCE)
    shell = sys.modules.get("taskrun.shell")
    if shell is not None:
        shell.kill_groups()
    os._exit(1)


def _import(file: TaskFile, path: str) -> Preloaded:
    module = file.module
    known = sys.modules.get(module)
    if known is not None and _is_current(file, known, path):
        return Preloaded(None)
    _contents[module] = file.source
    return preload(
        Settings(
            argv=[], path=[], cwd=None, module=module, file=path, environment={},
            start_method="", set_by_user={}, node="", coordinator=0,
        )
    )  # fmt: skip


def _is_current(file: TaskFile, known: Any, path: str) -> bool:
    """Whether the module is the task file as it is now: an engine's worker may outlive runs."""
    if file.module in _contents:
        return _contents[file.module] == file.source
    return bool(getattr(known, "__file__", None) == path)


def _path_of(brief: Brief) -> str:
    """Where the task file is: in the place of its own, where this machine has that, or among the
    files that have travelled."""
    assert brief.file is not None
    if brief.bundle is None:
        return _alone(brief.file)
    from taskrun.workers import luggage

    digest, name = brief.bundle
    return os.path.join(luggage.lay_out(digest, os.path.dirname(brief.file.path)), name)


def _alone(file: TaskFile) -> str:
    """The task file; a copy of it where this machine does not have it, or not as it was."""
    try:
        with open(file.path, "rb") as found:
            if found.read() == file.source:
                return file.path
    except OSError:
        pass  # not on this machine
    import tempfile

    folder = tempfile.mkdtemp(prefix="taskrun-file-")
    copy = os.path.join(folder, os.path.basename(file.path))
    with open(copy, "wb") as made:
        made.write(file.source)
    return copy
