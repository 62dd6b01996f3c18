"""What a child of multiprocessing does when it ends, for processes that leave by os._exit()."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from typing import Any, Final

SECONDS: Final = 1.0  # for all of it: a Queue may wait for a reader that never comes


def clean_up() -> None:
    """Remove what objects of multiprocessing have outside this process: semaphores, managers
    and their folders.

    Its children are not waited for: they end with the worker, however long they would take.
    """
    util: Any = sys.modules.get("multiprocessing.util")
    if not getattr(util, "_finalizer_registry", None):  # not there, or just being imported
        return
    thread = threading.Thread(target=util._run_finalizers, daemon=True)
    with suppress(RuntimeError):  # no thread is to be had: resource trackers do their part
        thread.start()
        thread.join(SECONDS)


def let_go_of_trackers() -> None:
    """As far as this process is concerned, resource trackers may end; see ``sessions``."""
    for name, module in list(sys.modules.items()):
        if name.endswith(".resource_tracker"):
            fd = getattr(getattr(module, "_resource_tracker", None), "_fd", None)
            if fd is not None:
                with suppress(OSError):
                    os.close(fd)
