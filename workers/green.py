"""The start of a green worker: gevent first, then everything else.

Run in a fresh interpreter.  What is imported before gevent has put its own in the place of
blocking modules is the least that tells this process what it is for.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import NoReturn

from taskrun.workers import native
from taskrun.workers.settings import Birth, Preloaded, Settings, apply

assert native  # it is imported first

_STDERR = 3  # among the descriptors of a worker


def spawned(fds: list[int]) -> NoReturn:
    """Be a green worker; see ``main.spawned``."""
    with open(fds.pop(), "rb") as told:
        settings, birth, parent = pickle.load(told)
    for fd in fds:
        os.set_inheritable(fd, False)
    os.dup2(fds[_STDERR], 2)  # why gevent cannot be imported is to be seen
    apply(settings)
    too_early = "ssl" in sys.modules  # classes of it are bound to what is not replaced
    try:
        from gevent import config, get_hub, monkey

        config.track_greenlet_tree = False  # it costs each greenlet a stack trace
        monkey.patch_all()
        get_hub()  # of the loop that the environment may name
    except Exception as error:
        sys.exit(f"lane='green' needs gevent, which fails: {type(error).__name__}: {error}")
    _run(settings, birth, fds, parent, too_early=too_early)


def _run(
    settings: Settings, birth: Birth, fds: list[int], parent: int, *, too_early: bool
) -> NoReturn:
    from taskrun.workers import main
    from taskrun.workers.capture import expect_pipes
    from taskrun.workers.settings import preload

    if settings.captured:
        expect_pipes()
    preloaded = preload(settings)
    wrong = _violated(too_early)
    if wrong is not None and preloaded.failure is None:
        preloaded = Preloaded((wrong, ""))
    main.run(settings, birth, fds, parent, preloaded)


def _violated(too_early: bool) -> str | None:
    """What keeps blocking code from switching here, if anything does."""
    if too_early:
        return (
            "lane='green' cannot patch ssl: it was imported before any code of taskrun, by a "
            "sitecustomize or a .pth file of this Python; import it later there"
        )
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.already_patched:
        return "lane='green' is gevent's, and the task file patches with eventlet: do without it"
    import socket
    import time

    for name, found in (("socket", socket.socket), ("time", time.sleep)):
        if not found.__module__.startswith("gevent"):
            return (
                f"lane='green' needs {name} as gevent has patched it, and the task file has put "
                "something else in its place"
            )
    return None
