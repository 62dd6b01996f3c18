"""What a run needs in a process that is not ours, done once: where modules are found, the
task file, the variables of numeric libraries."""

from __future__ import annotations

import os
import sys
from typing import Any

from taskrun.workers.settings import Preloaded, Settings, preload

_contents: dict[str, bytes] = {}
"""The task files that were imported here: module -> source."""


def prepare(brief: Any) -> Preloaded:
    """Make this process one where calls of a run can be executed (see ``guest.Brief``)."""
    sys.path.extend(path for path in brief.path if path not in sys.path)
    os.environ.update(brief.environment)
    if brief.folder is not None:
        try:
            os.chdir(brief.folder)
        except OSError:
            pass  # it was deleted; the coordinator goes on in it as well
    if brief.file is None:
        return Preloaded(None)
    return _import(brief, _path_of(brief))


def _import(brief: Any, path: str) -> Preloaded:
    module = brief.module
    known = sys.modules.get(module)
    if known is not None and _is_current(brief, known, path):
        return Preloaded(None)
    _contents[module] = brief.source
    return preload(
        Settings(
            argv=[], path=[], cwd=None, module=module, file=path, environment={},
            start_method="", set_by_user={}, node="", coordinator=0,
        )
    )  # fmt: skip


def _is_current(brief: Any, known: Any, path: str) -> bool:
    """Whether the module is the task file as it is now: an engine's worker may outlive runs."""
    if brief.module in _contents:
        return bool(_contents[brief.module] == brief.source)
    return bool(getattr(known, "__file__", None) == path)


def _path_of(brief: Any) -> str:
    """The task file, or a copy of it where this machine does not have it."""
    try:
        with open(brief.file, "rb") as file:
            if file.read() == brief.source:
                return str(brief.file)
    except OSError:
        pass  # not on this machine
    import tempfile

    folder = tempfile.mkdtemp(prefix="taskrun-file-")
    copy = os.path.join(folder, os.path.basename(brief.file))
    with open(copy, "wb") as file:
        file.write(brief.source)
    return copy
