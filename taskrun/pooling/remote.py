"""What the workers of a Pool do: begin as its users expect, and call their functions.

Everything here runs in a worker, or in the template that workers are forked from.  A
function comes once to each worker, wrapped in one of the callables below; what it returns
is pickled here, so that a result which cannot be is the call's own error.
"""

from __future__ import annotations

import atexit
import os
import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from taskrun import blobs, failures
from taskrun.arrays import Reducers
from taskrun.blobs import Draft, Portable, Seen
from taskrun.errors import LoadError
from taskrun.places import Place

PROTOCOL: Final = pickle.HIGHEST_PROTOCOL
PLAIN: Final = frozenset((type(None), bool, float))
SHORT: Final = 256  # characters of a str that travels as itself
_INT_MAX: Final = 1 << 62


class InitializerFailed(LoadError):
    """Raised by every call in a worker whose initializer failed; its cause is why."""


class Setup(NamedTuple):
    """What each worker does first."""

    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...]


class Start(NamedTuple):
    """What the workers of a Pool are told.

    ``method``: ``fork``, ``forkserver`` or ``spawn``.  ``preparation``: what
    ``multiprocessing.spawn.prepare`` is given, and ``setup`` a Setup, both pickled as for a
    child of multiprocessing; None where workers are forked and inherit them.  ``tracker``: a
    descriptor of the resource tracker.  ``maxrss``: bytes of memory from which on a worker
    retires.  ``base`` is added to the numbers of calls wherever several pools share a state.
    ``captured``: what calls write goes to the process that has the pool.  ``default``: the start
    method that multiprocessing has in workers, unless it is to be that of an interpreter alone.
    """

    method: str
    preparation: bytes | None
    setup: bytes | None
    tracker: int | None
    maxrss: int | None = None
    base: int = 0
    captured: bool = False
    default: str | None = None


# What a forked template inherits, and what a fresh one unpickles.
inherited: Setup | None = None
_failure: BaseException | None = None


def prepare(start: Start, file: str | None) -> None:
    """In a fresh interpreter: take over what a child of multiprocessing takes over; on another
    machine the main module, out of ``file``."""
    if start.preparation is None and file is None:
        return
    from multiprocessing import process, resource_tracker, spawn

    if start.tracker is not None:
        resource_tracker._resource_tracker._fd = start.tracker  # type: ignore[attr-defined]
    current: Any = process.current_process()
    current._inheriting = True  # a Pool() that is made without a __main__ guard is refused
    try:
        if start.preparation is None:
            spawn.prepare({"init_main_from_path": file})
        else:
            spawn.prepare(pickle.loads(start.preparation))
    except BaseException as error:
        _fail(error)
    finally:
        del current._inheriting


def begin(start: Start, number: int, parent: int) -> None:
    """In a new worker: be the process that users expect, a child of ``parent``, then call the
    initializer."""
    from multiprocessing import context, process, util

    failures.shares_main = True
    if start.method != "spawn":
        util._finalizer_registry.clear()  # type: ignore[attr-defined]
        util._run_after_forkers()  # type: ignore[attr-defined]
    ours: Any = process  # what is private there
    ours._parent_process = _parent(parent)
    ours._current_process = _Process(start.method, number, parent)
    if start.default is not None:
        context._force_start_method(start.default)
    if _failure is not None:
        return
    try:
        setup = inherited if start.setup is None else pickle.loads(start.setup)
        if setup is not None and setup.initializer is not None:
            setup.initializer(*setup.initargs)
    except BaseException as error:
        _fail(error)


def end(start: Start, *, waits: bool) -> None:
    """In a worker that was told to quit: what a child of multiprocessing does at its end, in the
    order in which it does it.  ``waits``: for threads, those of thread executors included."""
    from multiprocessing import util

    util._exit_function()  # type: ignore[attr-defined]
    if waits:
        threading._shutdown()  # type: ignore[attr-defined]
    if start.method == "spawn" or start.default is None:  # to its user it is no fork
        atexit._run_exitfuncs()


def _fail(error: BaseException) -> None:
    global _failure
    _failure = error


def _parent(pid: int) -> Any:
    """What ``multiprocessing.parent_process()`` gives in a worker: the process that has the pool,
    and not the template in between."""
    from multiprocessing import process

    try:
        sentinel = os.pidfd_open(pid)
    except (AttributeError, OSError):
        # Not on this system.  One that never tells: the worker ends when its parent does.
        sentinel, _ = os.pipe()
    made: Any = process._ParentProcess  # type: ignore[attr-defined]
    return made(process.current_process().name, pid, sentinel)


def _Process(method: str, number: int, parent: int) -> Any:
    """What ``multiprocessing.current_process()`` gives in a worker."""
    from multiprocessing import process

    current: Any = process.current_process()
    made: Any = process.BaseProcess.__new__(process.BaseProcess)
    made.__dict__.update(current.__dict__)
    kind = {"fork": "Fork", "spawn": "Spawn", "forkserver": "ForkServer"}[method]
    made._identity = (*getattr(current, "_identity", ()), number)
    made._config = {**current._config, "daemon": False}
    made._name = f"{kind}PoolWorker-{number}"
    made._parent_pid = parent
    made._popen = None
    made._closed = False
    process._children = set()  # type: ignore[attr-defined]
    return made


# -- calls ----------------------------------------------------------------------------


def check() -> None:
    """Raises InitializerFailed where this worker cannot execute calls."""
    if _failure is not None:
        said = failures.guarded(_failure, str)
        raise InitializerFailed(f"{type(_failure).__name__}: {said}") from _failure


class Apply:
    """Calls a function with the arguments that come."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = name_of(function)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        value = self.function(*args, **kwargs)
        kind = type(value)
        if kind in PLAIN or (kind is int and -_INT_MAX < value < _INT_MAX):
            return value
        return _pickled(value)


class Submit(Apply):
    """For an Executor: a result that cannot be pickled raises what pickling it raised."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        value = self.function(*args, **kwargs)
        kind = type(value)
        if kind in PLAIN or (kind is int and -_INT_MAX < value < _INT_MAX):
            return value
        return dumps(value)


class ApplyAny:
    """Calls the function that comes with its arguments, one that may change between calls, or
    with those of many calls, pickled by itself."""

    __name__ = "call"

    def __call__(self, function: Any, args: Any, kwargs: Any) -> Any:
        found = function if callable(function) else blobs.loads(function)
        return _pickled(found(*args, **kwargs))


class SubmitAny(ApplyAny):
    """The same, for an Executor."""

    def __call__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return dumps(function(*args, **kwargs))


class Map:
    """Calls a function once for each of some items."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = name_of(function)

    def __call__(self, items: Sequence[Any]) -> Any:
        return _pickled(list(map(self.function, items)))


class ApplyOnce:
    """Calls an Apply, Map or the like that comes before its arguments, pickled by itself: there
    may be no other call of that function."""

    def __call__(self, pickled: bytes, /, *args: Any, **kwargs: Any) -> Any:
        return pickle.loads(pickled)(*args, **kwargs)


class Afresh:
    """Calls an Apply, Map or the like, unpickled anew for each call: what has a state of its own
    has it as it came, whatever calls before did to it."""

    def __init__(self, pickled: bytes) -> None:
        self.pickled = pickled

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return pickle.loads(self.pickled)(*args, **kwargs)


class MapAny:
    """Calls the function that comes with its items, pickled by itself: one that is large."""

    __name__ = "call"

    def __init__(self, star: bool) -> None:
        self.star = star

    def __call__(self, function: Portable, items: Sequence[Any]) -> Any:
        found = blobs.loads(function)
        return _pickled([found(*item) if self.star else found(item) for item in items])


class Starmap(Map):
    """Calls a function once for each of some tuples of arguments."""

    def __call__(self, items: Sequence[Any]) -> Any:
        function = self.function
        return _pickled([function(*item) for item in items])


def name_of(function: Any) -> str:
    """How a function is called in messages."""
    return str(getattr(function, "__name__", None) or type(function).__name__)


# -- pickles --------------------------------------------------------------------------


class _Shown:
    """Stands for a result in a MaybeEncodingError, which shows it by its repr()."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _pickled(value: Any) -> Portable:
    try:
        return dumps(value)
    except Exception as error:
        from multiprocessing import pool as standard

        shown = failures.guarded(value, repr)
        if len(shown) > 1000:
            shown = f"{shown[:1000]}..."
        encoding_error: Any = standard.MaybeEncodingError  # type: ignore[attr-defined]
        raise encoding_error(error, _Shown(shown)) from None


_table: Any = None


def dumps(obj: Any, to: Place | None = None, seen: Seen | None = None) -> Portable:
    """A pickle, with what multiprocessing knows to pickle beside the rest; its large parts
    go ``to`` a place of blobs, in a worker to the worker's (see ``Draft.sealed``)."""
    global _table
    if _table is None:
        import copyreg
        import multiprocessing.connection  # noqa: F401 - it registers its own
        from multiprocessing.reduction import ForkingPickler

        extra = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        _table = Reducers(extra, copyreg.dispatch_table)
    draft = Draft()
    pickler = pickle.Pickler(draft, PROTOCOL, buffer_callback=draft.keep)
    pickler.dispatch_table = _table
    pickler.dump(obj)
    return draft.sealed(to, seen)


def forget_other_imports() -> None:
    """In a fork: what other threads were importing nobody imports here, nor lets go of.

    Python knows that of its one lock for all imports, but not of those of single modules.
    """
    from importlib import _bootstrap

    own = threading.get_ident()
    locks: dict[str, Any] = _bootstrap._module_locks  # type: ignore[attr-defined]
    for name, reference in list(locks.items()):
        lock = reference()
        if lock is not None and lock.owner not in (None, own):
            del locks[name]
            sys.modules.pop(name, None)  # half of it is there


def flush_streams() -> None:
    """Before a fork: nothing is to be written twice."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()
