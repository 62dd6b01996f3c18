"""What a worker knows of a task: where its function is, and how its arguments are made."""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from taskrun.errors import ArgumentError, LoadError
from taskrun.failures import guarded
from taskrun.messages import SAY_BEGAN
from taskrun.model import Each, Options, PerWorker, Result, Task
from taskrun.values import decode, encode_failure, loads_arguments
from taskrun.workers import native
from taskrun.workers.settings import Preloaded

PLAIN: Final = "plain"
GENERATOR: Final = "generator"
ASYNC: Final = "async"
ASYNC_GENERATOR: Final = "async generator"

Arguments = tuple[tuple[Any, ...] | list[Any], dict[str, Any]]
PerWorkerValue = Callable[[Callable[[], Any]], Any]

_AS_THEY_ARE: Final = frozenset((int, str, float, bool, type(None)))


class Known:
    """A TASK record, and the task it is about, which is looked up when it is first called."""

    def __init__(self, record: tuple[Any, ...], home: Home) -> None:
        _, self.id, self.name, self.reference, self._blob, self.names, constants, flags = record
        self.flags: int = flags
        self.says_began = bool(flags & SAY_BEGAN)
        self._constants: dict[str, Any] = constants
        self._home = home
        self._task: Task | None = None
        self._finding = native.RLock()
        self.found = False
        self.quick = False  # its only argument, and nothing else, is passed by position
        self.style = PLAIN

    @property
    def task(self) -> Task:
        """The task itself.  Raises LoadError where it is not to be had in this worker."""
        return self._task or self.find()

    def find(self) -> Task:
        """Look the task up, once, whichever of the worker's threads needs it first."""
        with self._finding:
            if self._task is not None:
                return self._task
            task = self._home.find(self.reference, self._blob)
            self.function = task.function
            self.style = _style(task)
            self._learn_parameters(task)
            self._blob = None
            self._task, self.found = task, True  # the last, since other threads go by them
            return task

    def _learn_parameters(self, task: Task) -> None:
        parameters = inspect.signature(task.function).parameters
        by_position = [
            name
            for name, parameter in parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        self._positions = by_position
        self._leading = [
            parameter
            for parameter in parameters.values()
            if parameter.kind is parameter.POSITIONAL_ONLY
        ]
        self._made = [
            (name, source.make)
            for name, source in task.params.items()
            if isinstance(source, PerWorker)
        ]
        names = self.names
        self._in_order = names is not None and list(names) == by_position[: len(names)]
        self._bare = not (self._constants or self._made or self._leading)
        plain = self._in_order and not (self._constants or self._made or self._leading)
        labelled = task.options.label is not None  # that takes all the arguments
        self.quick = plain and len(names or ()) == 1 and self.style == PLAIN and not labelled

    # -- arguments --------------------------------------------------------------------

    def arguments(self, args: Any, per_worker: PerWorkerValue) -> Arguments:
        """The arguments of a call.  Raises ArgumentError where they cannot be unpickled."""
        if self.names is None:
            return self._submitted(args, per_worker)
        positional = [
            value if type(value) in _AS_THEY_ARE else self._decode(name, value)
            for name, value in zip(self.names, args, strict=True)
        ]
        keywords = self._fill({}, per_worker)
        if self._in_order and not self._leading:
            return positional, keywords
        keywords.update(zip(self.names, positional, strict=True))
        return self._lead([], keywords), keywords

    def _submitted(self, args: Any, per_worker: PerWorkerValue) -> Arguments:
        blob, links = args
        try:
            positional, keywords = loads_arguments(blob, links)
        except ArgumentError:
            raise  # it was known before that nothing could be made of them
        except (Exception, SystemExit) as error:
            raise self._unreadable("the arguments", error) from error
        if self._bare:
            return positional, keywords
        taken = {**dict.fromkeys(self._positions[: len(positional)]), **keywords}
        filled = {**keywords, **self._fill(taken, per_worker)}
        return self._lead(list(positional), filled), filled

    def _fill(self, taken: dict[str, Any], per_worker: PerWorkerValue) -> dict[str, Any]:
        """The values of run parameters and per_worker(), where the call does not give them."""
        filled = {
            name: self._decode(name, value)
            for name, value in self._constants.items()
            if name not in taken
        }
        for name, make in self._made:
            if name not in taken:
                filled[name] = per_worker(make)
        return filled

    def _lead(self, positional: list[Any], keywords: dict[str, Any]) -> list[Any]:
        """Move what is positional-only out of ``keywords``."""
        for parameter in self._leading[len(positional) :]:
            if parameter.name in keywords:
                positional.append(keywords.pop(parameter.name))
            elif parameter.default is not parameter.empty:
                positional.append(parameter.default)
            else:
                break  # the function itself says what is missing
        return positional

    def _decode(self, name: str, encoded: Any) -> Any:
        try:
            return decode(encoded)
        except Exception as error:
            raise self._unreadable(f"argument {name!r}", error) from error

    def _unreadable(self, what: str, error: BaseException) -> ArgumentError:
        return ArgumentError(
            f"{what} of {self.name} cannot be unpickled in the worker: "
            f"{type(error).__name__}: {error}"
        )

    def label(self, positional: Any, keywords: dict[str, Any]) -> str | None:
        """The call's label, filled in; None where the task has none, or where these values do
        not fit it: the call says so, and is done under its name."""
        template = self.task.options.label
        if template is None:
            return None
        bound = inspect.signature(self.function).bind(*positional, **keywords)
        bound.apply_defaults()
        try:
            return template.format(**bound.arguments)
        except Exception as error:
            why = f"{type(error).__name__}: {guarded(error, str)}"
            print(f"the label {template!r} cannot be filled in: {why}", file=sys.stderr)
            return None


def _style(task: Task) -> str:
    if task.is_generator:
        return ASYNC_GENERATOR if task.is_async else GENERATOR
    return ASYNC if task.is_async else PLAIN


class Home:
    """Where this worker finds tasks: the task file, other modules, pickles."""

    def __init__(self, module: str | None, preloaded: Preloaded) -> None:
        self._module = module
        self._failure = preloaded.failure
        # Raises why no task can be executed in this worker, if that is so.
        self.check: Callable[[], None] = lambda: None

    def find(self, reference: tuple[str, str] | bytes, blob: bytes | None) -> Task:
        """The task of ``reference``.  Raises LoadError, or what ``check`` raises."""
        self.check()
        try:
            if isinstance(reference, bytes):
                if self._module is None and self._failure is not None:
                    raise LoadError(*self._failure)
                assert blob is not None
                found = pickle.loads(blob)
            else:
                found = self._by_name(*reference)
        except LoadError:
            raise
        except Exception as error:
            name = "by value" if isinstance(reference, bytes) else ":".join(reference)
            failure = encode_failure(error)
            raise LoadError(
                f"a worker cannot find the task {name}: {failure.headline}", failure.traceback
            ) from error
        return found if isinstance(found, Task) else _as_task(found)

    def _by_name(self, module: str, qualname: str) -> Any:
        if module == self._module and self._failure is not None:
            raise LoadError(*self._failure)
        found: Any = sys.modules.get(module)
        if found is None:
            found = __import__(module, fromlist=["*"])
        for part in qualname.split("."):
            found = getattr(found, part)
        return found


def _as_task(function: Any) -> Task:
    if not callable(function):
        raise LoadError(f"{function!r} is no task and no function")
    return Task(function, Options(getattr(function, "__name__", "call")), {})


def missing_arguments(task: Task, given: frozenset[str], args: Any, kwargs: Any) -> str | None:
    """Why a submitted call's arguments do not fit its task; None: they do.

    ``given``: the parameters that ``-p`` set.
    """
    return _misfit(task, given, len(args), tuple(kwargs))


@lru_cache(maxsize=1024)
def _misfit(task: Task, given: frozenset[str], count: int, keywords: tuple[str, ...]) -> str | None:
    # How arguments bind depends on how many and which there are, not on their values.
    try:
        signature = inspect.signature(task.function)
        bound = signature.bind_partial(*[None] * count, **dict.fromkeys(keywords)).arguments
    except TypeError as error:
        return str(error)
    lacking = [name for name, source in task.params.items()
               if name not in bound and name not in given and _must_be_given(source)]  # fmt: skip
    if not lacking:
        return None
    names = ", ".join(map(repr, lacking))
    from_tasks = [name for name in lacking if isinstance(task.params[name], Each | Result)]
    hint = "; each() and result() fill in nothing in a submitted call" if from_tasks else ""
    return f"missing {'arguments' if len(lacking) > 1 else 'argument'} {names}{hint}"


def _must_be_given(source: Any) -> bool:
    if isinstance(source, Each | Result):
        return True
    return not isinstance(source, PerWorker) and source.default is inspect.Parameter.empty
