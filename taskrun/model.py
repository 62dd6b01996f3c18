"""What a task file says, as data: tasks, their options, and where parameters come from.

This is the ground floor: beside ``context`` it imports nothing of ours, and everything
may import it.
A ``Task`` is what ``@task`` makes of a function.  Each of its parameters has a
*source*, said by the parameter's default (docs/tasks.md): ``Each``, ``Result``,
``PerWorker``, or a plain run ``Parameter``.

What crosses a Pipe is *encoded* (see ``values.py``): scalars as they are, all else
as bytes that only workers unpickle.  The coordinator moves encoded values about and
never looks inside.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from taskrun.context import active

Errors: TypeAlias = Literal["fail", "skip", "keep"]
LANES = ("process", "thread", "async", "green")
MISSING: Any = inspect.Parameter.empty
"""A run parameter's default when it has none."""
MOST_ITEMS = 10_000_000
"""More items than this, literal or of a value, are taken for an endless iterable."""


# -- where a parameter comes from -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Each:
    """One call per item: of ``task``'s calls or items, or of the literal ``items``.

    ``identity`` says which fan-out a literal belongs to: two ``each`` over the same
    iterable object advance together.
    """

    task: Task | None = None
    items: tuple[Any, ...] = ()
    flat: bool = False
    identity: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """The whole result of ``task``; of a fan-out the list, in item order."""

    task: Task
    errors: Errors = "fail"


@dataclass(frozen=True, slots=True)
class PerWorker:
    """``make()``, called once per worker; a generator is finished when the worker ends."""

    make: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A run parameter, set by ``-p``; ``default`` is MISSING where it has none."""

    name: str
    default: Any = MISSING
    annotation: Any = MISSING


Source: TypeAlias = Each | Result | PerWorker | Parameter


# -- limits ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Limit:
    """At most ``count`` calls at once; with ``per``, at most so many starts in ``per``
    seconds.  ``key(...)``: a limit of its own for each value that it gives.

    ``identity`` says which limit it is, in every process.
    """

    count: int
    per: float | None = None
    key: Callable[..., Any] | None = None
    identity: str = ""

    @property
    def bound(self) -> Bound:
        """What the scheduler needs to know of it."""
        return Bound(self.identity, self.count, self.per, self.key is not None)


class Bound(NamedTuple):
    """A limit, without its key function."""

    identity: str
    most: int
    per: float | None
    keyed: bool

    def __str__(self) -> str:
        per = "at once" if self.per is None else f"per {self.per:g} s"
        return f"limit({self.most}) {per}"


# -- tasks ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    """The options of ``@task``; see :func:`taskrun.task` for their meaning."""

    name: str
    label: str | None = None
    after: tuple[Task, ...] = ()
    retries: int | None = None
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    backoff: float = 0.0
    timeout: float | None = None
    lane: str = "process"
    limits: tuple[Limit, ...] = ()
    priority: float = 0
    resources: dict[str, float] = field(default_factory=dict)
    always: bool = False
    default: bool | None = None
    cancellable: bool = False

    @property
    def says_began(self) -> bool:
        """Whether its calls report at once that they have begun: their time counts from there,
        and they may have a label."""
        return self.timeout is not None or bool(self.label)


class Task:
    """A function marked ``@task``.  Calling it calls the function, as ever.

    Attributes: ``function`` (the plain function), ``options``, ``params`` (parameter
    name -> Source, in the order of the signature), ``module`` and ``qualname`` (by which
    a worker finds it again).
    """

    def __init__(
        self, function: Callable[..., Any], options: Options, params: dict[str, Source]
    ) -> None:
        self.function = function
        self.options = options
        self.params = params
        self.module: str = getattr(function, "__module__", "") or ""
        self.qualname: str = getattr(function, "__qualname__", options.name)
        self.__name__ = options.name
        self.__qualname__ = self.qualname
        self.__module__ = self.module
        self.__doc__ = getattr(function, "__doc__", None)
        self.__wrapped__ = function

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function) or inspect.isasyncgenfunction(
            self.function
        )

    @property
    def is_generator(self) -> bool:
        return inspect.isgeneratorfunction(self.function) or inspect.isasyncgenfunction(
            self.function
        )

    def inputs(self) -> Iterable[Task]:
        """The tasks that this one's static calls need, each once, in order."""
        seen: dict[int, Task] = {}
        for source in self.params.values():
            if isinstance(source, Each | Result) and source.task is not None:
                seen.setdefault(id(source.task), source.task)
        for task in self.options.after:
            seen.setdefault(id(task), task)
        return seen.values()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **fill_per_worker(self, args, kwargs))

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        """Make a new call of this task and return its Future (outside a run: run it at once)."""
        return active().submit(self, args, kwargs)

    def __repr__(self) -> str:
        return f"<task {self.name}>"

    def __reduce__(self) -> Any:
        # By reference where it can be: a worker finds it in its own copy of the module.
        # Else by value: cloudpickle carries the function (a notebook, a closure).
        if is_importable(self, self):
            return (_find, (self.module, self.qualname))
        return (_rebuild, (self.function, self.options, self.params))


def is_importable(task: Task, what: object) -> bool:
    """Whether ``what`` is found under the module and name of ``task``, in every process."""
    found: Any = sys.modules.get(task.module)
    for part in task.qualname.split("."):
        found = getattr(found, part, None)
    return found is what and task.module != "__main__"


def fill_per_worker(task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` with what a plain call of ``task`` leaves out and a default can supply.

    Raises TypeError where a parameter that comes from another task is left out.
    """
    if not any(not isinstance(source, Parameter) for source in task.params.values()):
        return kwargs
    filled = dict(kwargs)
    for position, (name, source) in enumerate(task.params.items()):
        if position < len(args) or name in kwargs or isinstance(source, Parameter):
            continue
        if isinstance(source, PerWorker):
            filled[name] = active().per_worker(source.make)
        else:
            raise TypeError(
                f"{task.name}() needs {name!r}: in a run it comes from "
                f"{describe(source)}, in a plain call pass it yourself"
            )
    return filled


def describe(source: Source) -> str:
    """How a source is written in the task file, for messages: ``each(urls)``."""
    if isinstance(source, Each):
        inner = source.task.name if source.task else f"[{len(source.items)} items]"
        return f"each({inner}, flat=True)" if source.flat else f"each({inner})"
    if isinstance(source, Result):
        errors = "" if source.errors == "fail" else f", errors={source.errors!r}"
        return f"result({source.task.name}{errors})"
    if isinstance(source, PerWorker):
        return f"per_worker({getattr(source.make, '__name__', source.make)})"
    return source.name if source.default is MISSING else f"{source.name}={source.default!r}"


def _find(module: str, qualname: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def find_task(reference: tuple[str, str] | bytes, blob: bytes | None) -> Task:
    """The task that a :class:`Recipe` refers to.  Raises LookupError, ImportError, or what
    unpickling raises."""
    found: Any = None
    if isinstance(reference, tuple):
        found = _find(*reference)
    elif blob is not None:
        import cloudpickle  # noqa: F401 - what it pickled needs it

        found = pickle.loads(blob)
    if not isinstance(found, Task):
        raise LookupError(f"there is no task {reference!r}")
    return found


def _rebuild(function: Any, options: Options, params: dict[str, Source]) -> Task:
    return Task(function, options, params)


# -- what a run is to do --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run executes: made by ``loading`` from a task file and a command line.

    ``tasks``: all that take part, each after its inputs.  ``targets``: the names that were
    asked for.  ``constants``: task name -> {run parameter: converted value}; only what was
    set, a function supplies its own defaults.  ``reasons``: task name -> why it takes part.
    ``file`` and ``module``: where workers find the functions (None: by cloudpickle).
    ``left_out``: tasks that would run too if these parameters of theirs had a value.
    """

    tasks: tuple[Task, ...]
    targets: frozenset[str]
    constants: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    file: str | None = None
    module: str | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Recipe:
    """What the scheduler and the workers need to know of a task to run calls of it.

    One recipe is shared by all the static calls of a task, another by its submitted ones.
    ``reference`` and ``names``: see ``messages``.  ``blob``: the Task by cloudpickle, where
    ``reference`` is a digest.  ``retry_timeouts``: whether ``retry_on`` covers CallTimeout.
    """

    id: int
    name: str
    reference: tuple[str, str] | bytes
    blob: bytes | None = None
    names: tuple[str, ...] | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    flags: int = 0
    retries: int | None = None
    retry_timeouts: bool = True
    backoff: float = 0.0
    timeout: float | None = None
    priority: float = 0
    resources: dict[str, float] = field(default_factory=dict)
    always: bool = False
    lane: str = "process"
    limits: tuple[Bound, ...] = ()
    cancellable: bool = False


# -- what crosses a Pipe --------------------------------------------------------------

Encoded: TypeAlias = Any
"""A value as it travels; see ``values.py``:

None, bool, int, float or a short str   itself
bytes                                   a pickle
blobs.Shared                            a pickle whose large parts are in files
(pickle | None, {key: Encoded})         a pickle that holds futures, by key, and their
                                        values; None: the value *is* the one future's
Failure                                 an exception kept in a value's place
list                                    the values of a fan-out, each encoded
Kept                                    a value that stays with the engine
"""


class Kept:
    """A value that stays where it was made; the engine knows by ``place`` where that is.

    ``part`` says which of the values at that place it is.  Letting go of the last Kept of a
    place lets go of its values.  ``value`` is there once the engine has brought it here.
    """

    __slots__ = ("__weakref__", "part", "place", "value")

    def __init__(self, place: Any, part: tuple[int, int | None]) -> None:
        self.place = place
        self.part = part
        self.value: Encoded = MISSING

    def brought(self) -> Encoded:
        """The value.  Raises LookupError where it could not be brought."""
        if self.value is MISSING:
            raise LookupError("this value was lost with the engine, or with its worker there")
        return self.value


@dataclass(frozen=True, slots=True)
class Left:
    """In a worker's record: the value with this part is left with the engine."""

    part: tuple[int, int | None]


@dataclass(frozen=True, slots=True)
class Taken:
    """In a call's arguments: a value that the engine itself brings to the worker, by the
    number of the place among the chunk's inputs, and its part."""

    input: int
    part: tuple[int, int | None]


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception as it travels: readable by all, rebuilt only by who needs it.

    ``kind`` is how the attempt ended: ``error``, ``lost``, ``timeout``, ``cancelled``,
    ``skipped`` or ``blocked``.  ``traceback`` is formatted text without our own frames.
    ``pickled`` rebuilds the exception (None: it cannot be; see ``values.decode_failure``).
    """

    kind: str
    type_name: str
    message: str
    traceback: str = ""
    pickled: bytes | None = None

    @property
    def headline(self) -> str:
        """One line: ``ValueError: bad row``; without the last output that it may quote."""
        first = self.message.strip().splitlines()[0] if self.message.strip() else ""
        first = first.removesuffix("; its last output:")
        return f"{self.type_name}: {first}" if first else self.type_name


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The closest of ``names`` to a mistyped ``name``, if one is close enough."""
    import difflib  # heavy, and needed for errors only

    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return close[0] if close else None
