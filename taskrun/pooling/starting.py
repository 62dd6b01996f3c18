"""How the workers of a Pool start: as a fork of the user's process, or afresh.

- ``fork``: the template is forked at ``Pool()``, before a thread of ours exists.  It has
  the user's globals, closures and locks, and so have the workers that it forks.
- ``forkserver``: the template is a fresh interpreter that has imported ``__main__`` as
  multiprocessing's children do; workers are forked from it.
- ``spawn``: so is every worker.

``Bare`` is forkserver without ``__main__``, for libraries that have functions travel by value.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing.context import ForkServerContext
from signal import SIGKILL
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import WeakValueDictionary

from taskrun.engines.links import Link
from taskrun.engines.nursery import Launch, launch_fresh
from taskrun.engines.pool import PoolEngine
from taskrun.messages import Event
from taskrun.observers import Observer
from taskrun.places import Place
from taskrun.pooling import memory, remote
from taskrun.pooling.functions import NAMED
from taskrun.reactor import Reactor
from taskrun.workers import template
from taskrun.workers.settings import FORK, FORKSERVER, SPAWN, Settings

if TYPE_CHECKING:
    from taskrun.engines.nodes import Nodes  # only where others lend workers

MEMORY_SECONDS: Final = 0.1  # between two looks at how much workers use

bases = count(os.getpid() << 16)  # of one machine's pools


class Bare(ForkServerContext):
    """For workers that have nothing of this process: neither ``__main__`` nor, as forks have, the
    state of libraries with threads of their own, such as OpenMP's, which hang in a fork."""


class Supply(Protocol):
    """Where the workers of a Pool come from, with what they are told and given.

    ``method`` is the start method, ``hard`` how many bytes of memory a worker is stopped at,
    ``base`` what is added to the numbers of calls; ``lent``: others have them, and say how many.
    """

    lent: bool

    @property
    def method(self) -> str: ...

    @property
    def hard(self) -> int | None: ...

    @property
    def base(self) -> int: ...

    @property
    def told(self) -> remote.Start: ...

    def workers(
        self, recipe_ids: Iterator[int], grace: float, state: Callable[[], tuple[Any, bytes]]
    ) -> PoolWorkers:
        """The engine."""

    def in_main(self, function: Any) -> bool:
        """Whether a function of ``__main__`` is found there by its name in workers."""

    def launch(self, fd: int, ours: int) -> int:
        """See ``Nursery``."""

    def close(self) -> None:
        """Let go of what workers inherit."""


class PoolWorkers(PoolEngine):
    """The engine of a Pool: workers that write where this process does."""

    def __init__(
        self,
        start: Supply,
        recipe_ids: Iterator[int],
        grace: float,
        state: Callable[[], tuple[Any, bytes]],
        *,
        slots: int = 1,
        nodes: Nodes | None = None,
    ) -> None:
        """``slots`` and ``nodes`` are as for a PoolEngine."""
        super().__init__(
            start_method=start.method, grace=grace, recipe_ids=recipe_ids, state=state,
            slots=slots, nodes=nodes,
        )  # fmt: skip
        self._starter = start
        self.resized: Callable[[int, int], None]
        """Called where others lend the workers: how many can be had, and how many there are
        places for now."""

    def start(self, reactor: Reactor, post: Callable[[Event], None], observer: Observer) -> None:
        """See ``engines.base``."""
        super().start(reactor, post, observer)
        if self._starter.hard is not None:
            self._check_memory(self._starter.hard)

    @property
    def settled(self) -> bool:
        """Whether no worker is about to start."""
        local = self._local
        if local is None or local.is_gone:
            return True
        return not local.busy and all(link.ready for link in self._links.values())

    def started(self) -> list[Link]:
        """The workers that have started."""
        return [link for link in list(self._links.values()) if link.pid or link.ready]

    def _begin_blobs(self, notice: Any) -> Place:
        return super()._begin_blobs(None)  # trouble is told by Python's warnings

    def _make_settings(self) -> Settings:
        made = super()._make_settings()
        return made._replace(environment={}, pool=self._starter.told)

    def _check_memory(self, most: int) -> None:
        """Stop workers whose call takes too much memory; again and again."""
        for link in self._links.values():
            if link.pid is None or link.rejected or not link.assigned:
                continue
            size = memory.used(link.pid)
            if size > most:
                used, allowed = memory.shown(size), memory.shown(most)
                link.rejected = f"stopped, because it used {used} of memory and maxrss is {allowed}"
                link.signal(SIGKILL)
        if not self._closing:
            self._later(MEMORY_SECONDS, lambda: self._check_memory(most))

    def _launch(self) -> Launch:
        return self._starter.launch


class Starter:
    """One start method, with what the workers are told and given."""

    lent = False

    def __init__(self, context: Any, setup: remote.Setup, limits: memory.Limits) -> None:
        """Raises what pickling ``setup`` raises, where workers start afresh."""
        method = context.get_start_method()
        # One that is not multiprocessing's own, such as loky's, has fresh interpreters.
        self.method: str = method if method in (FORK, FORKSERVER) else SPAWN
        self.hard = limits.hard
        self.base = next(bases) << 48
        self._has_main = self.method == FORK or (
            not isinstance(context, Bare) and _main_is_imported()
        )
        self._setup = setup
        self._fds: list[int] = []
        if self.method == FORK:
            self.told = remote.Start(self.method, None, None, None)
        else:
            self.told = self._told()
        default = None if isinstance(context, Bare) else self.method
        self.told = self.told._replace(maxrss=limits.soft, base=self.base, default=default)
        self.in_main = known_names(self.method) if self._has_main else _nothing_is_known

    def workers(
        self, recipe_ids: Iterator[int], grace: float, state: Callable[[], tuple[Any, bytes]]
    ) -> PoolWorkers:
        """The engine."""
        return PoolWorkers(self, recipe_ids, grace, state)

    def launch(self, fd: int, ours: int) -> int:
        """See ``Nursery``."""
        return self._fork(fd, ours) if self.method == FORK else self._launch_fresh(fd)

    def close(self) -> None:
        """Let go of what workers inherit."""
        while self._fds:
            os.close(self._fds.pop())

    # -- fork -------------------------------------------------------------------------

    def _fork(self, fd: int, ours: int) -> int:
        remote.flush_streams()
        with warnings.catch_warnings():
            # From 3.12 on: other threads exist.  The child touches nothing of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                os.close(ours)  # or it would never see that we are gone
                remote.inherited = self._setup
                remote.forget_other_imports()
                sock = socket.socket(fileno=os.dup(fd))
                os.close(fd)
                template.serve(sock)
            finally:
                os._exit(1)
        return pid

    # -- fresh interpreters -----------------------------------------------------------

    def _told(self) -> remote.Start:
        from multiprocessing import context, get_all_start_methods, resource_tracker, spawn
        from multiprocessing.reduction import ForkingPickler

        spawn._check_not_importing_main()  # type: ignore[attr-defined]
        name = f"{self.method}-pool"
        context.set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            preparation = spawn.get_preparation_data(name)
            preparation.pop("name")
            if not self._has_main:
                preparation.pop("init_main_from_path", None)
                preparation.pop("init_main_from_name", None)
            if preparation["start_method"] not in get_all_start_methods():
                preparation["start_method"] = self.method
            buffer = io.BytesIO()
            ForkingPickler(buffer).dump(preparation)
            setup = ForkingPickler.dumps(self._setup)
        except BaseException:
            self.close()
            raise
        finally:
            context.set_spawning_popen(None)
        tracker = resource_tracker._resource_tracker._fd  # type: ignore[attr-defined]
        if tracker is not None:
            tracker = self.duplicate_for_child(tracker)
        return remote.Start(self.method, buffer.getvalue(), bytes(setup), tracker)

    def duplicate_for_child(self, fd: int) -> int:
        """As of multiprocessing's Popen: the number that ``fd`` has in every worker."""
        own = os.dup(fd)
        self._fds.append(own)
        return own

    @property
    def DupFd(self) -> Callable[[int], Any]:  # multiprocessing's name
        """As of multiprocessing's Popen."""
        from multiprocessing.popen_spawn_posix import _DupFd

        made: Callable[[int], Any] = _DupFd
        return made

    def _launch_fresh(self, fd: int) -> int:
        for own in self._fds:
            os.set_inheritable(own, True)
        try:
            return launch_fresh(fd, writes=True)
        finally:
            for own in self._fds:
                os.set_inheritable(own, False)


def known_names(method: str) -> Callable[[Any], bool]:
    """Whether a function of ``__main__`` is found there by its name in workers."""
    main = sys.modules["__main__"]
    if method == FORK:
        # What is there now; later another one may have its name, and even its address.
        named = {name: value for name, value in vars(main).items() if isinstance(value, NAMED)}
        known = WeakValueDictionary(named)
        return lambda function: _named(known, function) is function
    imported = _main_is_imported()
    return lambda function: imported and _named(vars(main), function) is function


def _named(known: Any, function: Any) -> Any:
    """What has the name of ``function``, perhaps in a class; None: nothing has."""
    first, *rest = function.__qualname__.split(".")
    found = known.get(first)
    for name in rest:
        found = getattr(found, name, None)
    return found


def _nothing_is_known(function: Any) -> bool:
    return False


def _main_is_imported() -> bool:
    """Whether a fresh interpreter has our ``__main__``: not what was read from a terminal or a
    pipe, and not the ``__main__`` of a package, which multiprocessing leaves alone."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name).rpartition(".")[2] != "__main__"
    file = getattr(main, "__file__", None)
    return file is not None and os.path.exists(file)
