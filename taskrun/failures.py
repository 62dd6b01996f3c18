"""Exceptions as they travel between processes, as ``model.Failure``: text, and a pickle.

The pickle is tried out where it is made, so that an exception which cannot be rebuilt is
known at once; the text then stands for it.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import dropwhile
from types import (
    BuiltinFunctionType,
    MemberDescriptorType,
    MethodDescriptorType,
    SimpleNamespace,
    TracebackType,
    WrapperDescriptorType,
)
from typing import Any, TypeAlias, TypeVar

from taskrun import errors
from taskrun.model import Failure

PROTOCOL = pickle.HIGHEST_PROTOCOL
MESSAGE_LIMIT = 16 * 1024  # characters
TRACEBACK_LIMIT = 64 * 1024
CHAIN_LIMIT = 100  # exceptions linked by __cause__ and __context__ that are kept
FRAME_LIMIT = 200  # frames of one traceback that are kept

AFrame = TypeVar("AFrame")

shares_main = False  # whether whoever unpickles has the same __main__


def encode_failure(
    exc: BaseException, kind: str = "error", *, message: str | None = None
) -> Failure:
    """``exc`` as it travels; ``message`` replaces what the exception itself says.

    Never raises, whatever the exception's own methods do.  ``pickled`` is None when the
    exception cannot be rebuilt from a pickle; ``decode_failure`` then gives a RemoteError
    that carries the text.
    """
    text = guarded(exc, str) if message is None else message
    # An Interrupted would interrupt whoever gets it: it travels as the error of its kind.
    interrupted = isinstance(exc, errors.Interrupted)
    return Failure(
        kind,
        class_name(_KINDS[kind] if interrupted and kind in _KINDS else type(exc)),
        _clipped(text, MESSAGE_LIMIT),
        _clipped(_traceback_text(exc), TRACEBACK_LIMIT),
        None if interrupted else _pickled_exception(exc),
    )


def decode_failure(failure: Failure) -> BaseException:
    """The exception that ``failure`` stands for.

    Where there is none, or it cannot be rebuilt here, the error that ``failure.kind`` names,
    or a RemoteError with the original's type name, message and traceback.
    """
    if failure.pickled is not None:
        try:
            return _load_exception(failure.pickled)
        except Exception as error:
            rebuilt = _stand_in(failure)
            why = f"{class_name(type(error))}: {guarded(error, str)}"
            rebuilt.add_note(f"It could not be rebuilt from its pickle here: {why}")
            return rebuilt
    return _stand_in(failure)


_KINDS = {
    "lost": errors.WorkerLost,
    "timeout": errors.CallTimeout,
    "cancelled": errors.CallCancelled,
    "skipped": errors.CallSkipped,
    "blocked": errors.CallBlocked,
}


def _stand_in(failure: Failure) -> BaseException:
    if failure.kind in _KINDS:
        return _KINDS[failure.kind](failure.message)
    said = f"{failure.type_name}: {failure.message}" if failure.message else failure.type_name
    error = errors.RemoteError(said, failure.type_name, failure.traceback)
    if failure.traceback:
        error.add_note(f"Where it was raised:\n{failure.traceback.rstrip()}")
    return error


# What an exception's own methods raise says nothing about the failure that is being
# reported, and not even SystemExit may come between it and its report: hence BaseException.


def guarded(obj: Any, convert: Callable[[Any], str]) -> str:
    """``convert(obj)``, whatever it raises; a plain str, which can be unpickled anywhere."""
    try:
        return "".join((convert(obj),))
    except BaseException as error:
        return f"<{convert.__name__}() of this {type(obj).__name__} raised {type(error).__name__}>"


def _pickled_exception(exc: BaseException) -> bytes | None:
    for base, with_chain in _picklers():
        try:
            data = _dump_exception(exc, _pickler(base), with_chain)
            if base is pickle.Pickler and b"__main__" in data and not shares_main:
                continue  # nothing there can be found by name in another process
            if type(_load_exception(data)) is type(exc):
                return data
        except BaseException:
            continue  # the last resort is the text, see above
    return None


def _picklers() -> Iterator[tuple[Any, bool]]:
    """What to try in turn: a pickler, and whether the chain comes along."""
    yield pickle.Pickler, True
    try:
        from taskrun.byvalue import Pickler  # slow to import, seldom needed
    except Exception:
        return  # perhaps that there are no descriptors left is what is to be told
    yield Pickler, True
    yield Pickler, False


def class_name(kind: type) -> str:
    """A class's name as the interpreter's tracebacks write it; our own errors' without module."""
    if kind.__module__ in ("builtins", "__main__", "__mp_main__", errors.__name__):
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _clipped(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


# -- tracebacks as text ---------------------------------------------------------------


def _traceback_text(exc: BaseException) -> str:
    for render in (_render, _render_plainly):
        try:
            return render(exc)
        except BaseException:
            continue  # groups nested too deeply, a __cause__ that raises: see guarded
    return f"{class_name(type(exc))}: {guarded(exc, str)}\n"


def _render(exc: BaseException) -> str:
    """As the interpreter shows it, with causes and groups, without our own frames."""
    import traceback  # heavy, and needed for failures only

    if len(list(_chain(exc))) > CHAIN_LIMIT:
        return _render_plainly(exc)
    shown = traceback.TracebackException.from_exception(exc, compact=True)
    queue: list[Any] = [shown]
    while queue:
        one = queue.pop()
        one.stack[:] = _users(one.stack, lambda frame: frame.filename)
        queue += filter(None, [one.__cause__, one.__context__, *(one.exceptions or ())])
    return "".join(shown.format())


def _render_plainly(exc: BaseException) -> str:
    """The nearest links of a chain that is too long or too deep to be shown in full."""
    import traceback

    chain = list(_chain(exc))
    parts = [f"[... {CHAIN_LIMIT} or more exceptions, of which the last ones: ...]\n\n"]
    for one in reversed(chain[: CHAIN_LIMIT // 10]):
        stack = traceback.extract_tb(one.__traceback__)
        stack[:] = _users(stack, lambda frame: frame.filename)
        parts += ["Traceback (most recent call last):\n", *stack.format()]
        parts += [f"{class_name(type(one))}: {guarded(one, str)}\n\n"]
    return "".join(parts[len(chain) <= CHAIN_LIMIT :])


def _chain(exc: BaseException) -> Iterator[BaseException]:
    """``exc`` and what the interpreter shows above it, nearest first, up to the limit."""
    seen: set[int] = set()
    one: BaseException | None = exc
    while one is not None and id(one) not in seen and len(seen) <= CHAIN_LIMIT:
        yield one
        seen.add(id(one))
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _users(frames: Sequence[AFrame], filename: Callable[[AFrame], str]) -> list[AFrame]:
    """``frames`` without taskrun's own, and without the pickler's that it called.

    Nobody looks for a mistake in the insides of what they call: a ``KeyError`` of a shared
    dict is shown where the dict was asked, an error of a future where its result was.
    """
    # Both packages may lie elsewhere, and may come later.
    found = [name for name in ("taskrun.workers", "cloudpickle") if name in sys.modules]
    above = _folders(tuple(found))
    inner = list(dropwhile(lambda frame: filename(frame).startswith(above), frames))
    own = _folders(tuple(found[:1]) if "taskrun.workers" in found else ())
    return [frame for frame in inner if not filename(frame).startswith(own)]


@cache
def _folders(packages: tuple[str, ...]) -> tuple[str, ...]:
    folders = [__file__.rpartition(os.sep)[0]]
    for package in packages:
        folders += sys.modules[package].__path__
    return tuple(folder + os.sep for folder in folders)


# -- exceptions as pickles ------------------------------------------------------------
#
# The standard way to pickle an exception calls its class with ``args``, which fails for
# every class whose __init__ takes something else, and loses the traceback, the chain and
# what C code keeps outside __dict__.  So exceptions that do not say themselves how to be
# pickled are rebuilt without their own __init__ and __new__, and the chain is pickled link
# by link, because to follow it recursively would overflow the stack.


def _dump_exception(exc: BaseException, pickler_class: Any, with_chain: bool) -> bytes:
    file = io.BytesIO()
    pickler = pickler_class(file)
    pickler.dump(exc)
    dumped = 0
    while with_chain and dumped < min(len(pickler.found), CHAIN_LIMIT):
        one = pickler.found[dumped]
        for link in (one.__cause__, one.__context__):
            if link is not None:
                pickler.dump(link)
        dumped += 1
    pickler.dump(_bonds(pickler.found))
    return file.getvalue()


def _bonds(found: list[BaseException]) -> list[tuple[Any, ...]]:
    """What each exception was bound to from outside, with the links that were dumped."""
    known = {id(one) for one in found}
    return [
        (
            one,
            one.__cause__ if id(one.__cause__) in known else None,
            one.__context__ if id(one.__context__) in known else None,
            one.__suppress_context__,
            one.__traceback__,
            getattr(one, "__notes__", None),
        )
        for one in found
    ]


def _load_exception(data: bytes) -> BaseException:
    load = pickle.Unpickler(io.BytesIO(data)).load
    exc: BaseException = load()
    bonds = load()
    while type(bonds) is not list:  # the links of the chain, to be found in the bonds
        bonds = load()
    # Not plain assignment: a frozen dataclass refuses it.
    bind = BaseException.__setattr__
    for one, cause, context, suppress, traceback, notes in bonds:
        bind(one, "__cause__", cause)
        bind(one, "__context__", context)
        bind(one, "__suppress_context__", suppress)
        bind(one, "__traceback__", traceback)
        if notes is not None:
            bind(one, "__notes__", notes)
    return exc


@cache
def _pickler(base: Any) -> Any:
    """A pickler, on top of ``base``, for exceptions and tracebacks; ``found`` lists the former."""

    class FailurePickler(base):  # type: ignore[misc]
        def __init__(self, file: io.BytesIO) -> None:
            super().__init__(file, PROTOCOL)
            self.found: list[BaseException] = []

        def reducer_override(self, obj: Any) -> Any:
            if issubclass(type(obj), BaseException):
                self.found.append(obj)
                return _reduce_exception(obj)
            if type(obj) is TracebackType:
                return _rebuild_traceback, (_frames(obj),)
            override = getattr(super(), "reducer_override", None)
            return override(obj) if override else NotImplemented

    return FailurePickler


def _reduce_exception(exc: BaseException) -> Any:
    cls = type(exc)
    if (
        cls.__reduce_ex__ is not object.__reduce_ex__
        or not isinstance(cls.__reduce__, MethodDescriptorType)
        or cls.__setstate__ is not BaseException.__setstate__
    ):
        return exc.__reduce_ex__(PROTOCOL)  # it says itself how
    if isinstance(exc, BaseExceptionGroup):
        made_from: Any = (exc.message, exc.exceptions)
    else:
        made_from = exc.__reduce__()[1]
    return (
        _rebuild_exception,
        (cls, _builtin_base(cls), made_from),
        (exc.args, _state(exc)),
        None,
        None,
        _set_state,
    )


def _builtin_base(cls: Any) -> Any:
    """The class in C that ``cls`` is built on: its constructor runs no user code."""
    while not (
        isinstance(cls.__init__, WrapperDescriptorType)
        and isinstance(cls.__new__, BuiltinFunctionType)
    ):
        cls = cls.__base__
    return cls


def _rebuild_exception(cls: Any, base: Any, made_from: tuple[Any, ...]) -> BaseException:
    exc: BaseException = base.__new__(cls, *made_from)
    base.__init__(exc, *made_from)
    return exc


def _state(exc: BaseException) -> dict[str, Any]:
    """The attributes of ``exc``, those in slots and C structures included."""
    state = dict(exc.__dict__)
    for cls in type(exc).__mro__:
        if cls in (BaseException, BaseExceptionGroup):
            break
        for name, member in vars(cls).items():
            # AttributeError.obj may be anything, big or unpicklable; the standard library
            # leaves it behind as well.
            if isinstance(member, MemberDescriptorType) and name != "obj":
                value = getattr(exc, name, None)
                if value is not None:  # OSError shows a file name that was *set* to None
                    state[name] = value
    return state


def _set_state(exc: BaseException, state: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    args, attributes = state
    bind = BaseException.__setattr__
    bind(exc, "args", args)
    for name, value in attributes.items():
        bind(exc, name, value)


Frame: TypeAlias = tuple[str, str, int, dict[str, str]]
"""File name, function name, line, and the globals that tracebacks are read by."""


def _frames(traceback: TracebackType | None) -> list[Frame]:
    """The frames from the outermost in, without our own; of very many the ends."""
    frames: list[Frame] = []
    while traceback is not None:
        code, names = traceback.tb_frame.f_code, traceback.tb_frame.f_globals
        kept = {
            name: names[name] for name in ("__name__", "__file__") if type(names.get(name)) is str
        }
        frames.append((code.co_filename, code.co_name, traceback.tb_lineno or 0, kept))
        traceback = traceback.tb_next
    frames = _users(frames, lambda frame: frame[0])
    if len(frames) > FRAME_LIMIT:
        frames[FRAME_LIMIT // 2 : -FRAME_LIMIT // 2] = []
    return frames


def _rebuild_traceback(frames: list[Frame]) -> TracebackType | None:
    """A real traceback through ``frames``; only their local variables are gone."""
    try:
        from tblib import Traceback  # slow to import, and needed for failures only
    except OSError:
        return None  # as above; who gets it will have it
    linked: Any = None
    for filename, name, line, names in reversed(frames):
        code = SimpleNamespace(co_filename=filename, co_name=name)
        frame = SimpleNamespace(f_globals=names, f_locals={}, f_code=code, f_lineno=line)
        linked = SimpleNamespace(tb_frame=frame, tb_lineno=line, tb_next=linked)
    return _without_columns(Traceback(linked).as_traceback()) if linked else None


def _without_columns(traceback: TracebackType) -> TracebackType | None:
    # The columns of the stubs would underline the wrong part of the source line.
    entries: list[TracebackType] = []
    entry: TracebackType | None = traceback
    while entry is not None:
        entries.append(entry)
        entry = entry.tb_next
    rebuilt: TracebackType | None = None
    for one in reversed(entries):
        rebuilt = TracebackType(rebuilt, one.tb_frame, -1, one.tb_lineno)
    return rebuilt
