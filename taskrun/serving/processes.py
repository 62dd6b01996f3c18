"""What each process that a server starts is given, beside its arguments."""

from __future__ import annotations

import os
from typing import Final

from taskrun.workers.jobs import Folder

LOST: Final = 3  # the exit status of one that was killed, and of a Pool that was not closed


def write_key(folder: Folder, key: bytes) -> str:
    """The path of a new file in ``folder`` with ``key`` in it, which nobody else can read.
    Raises OSError where there is no room for one."""
    path = os.path.join(folder.path, "key")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)
    return path


def environment(key_file: str) -> dict[str, str]:
    """What the server has, without what was said to the server itself."""
    own = {name: text for name, text in os.environ.items() if not name.startswith("TASKRUN_")}
    return {**own, "TASKRUN_AUTHKEY_FILE": key_file}
