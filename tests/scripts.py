"""What tasks do in the simulation, as data: scripts of steps that end in an outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from taskrun.calls import Call
from taskrun.model import Options, Task


@dataclass(frozen=True, slots=True)
class Run:
    """Computes; a deaf one does not obey an interrupt and is killed after a grace."""

    seconds: float
    deaf: bool = False


@dataclass(frozen=True, slots=True)
class Submit:
    """Makes a call of ``task``, with the futures ``needs`` among its arguments."""

    key: str
    task: Task
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WaitFor:
    """Waits for futures; a failure among them ends the attempt, unless it is caught."""

    keys: tuple[str, ...]
    any_of: bool = False
    timeout: float | None = None
    catch: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    key: str


@dataclass(frozen=True, slots=True)
class Yield:
    """A generator delivers items."""

    items: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Value:
    """Returns; the call's name, where no value is said."""

    value: Any = None
    items: Sequence[Any] = ("a", "b", "c")


@dataclass(frozen=True, slots=True)
class Held:
    """Returns futures."""

    keys: tuple[str, ...]
    items: bool = False


@dataclass(frozen=True, slots=True)
class Error:
    """Raises; ``items``: what a generator yielded just before."""

    message: str = "bad"
    retryable: bool = True
    items: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Again:
    """``raise Retry(after=...)``."""

    after: float = 0.0


@dataclass(frozen=True, slots=True)
class Skipped:
    reason: str = "nothing to do"


@dataclass(frozen=True, slots=True)
class Dies:
    """Takes its worker with it."""


Step: TypeAlias = (
    Run | Submit | WaitFor | Cancel | Yield | Value | Held | Error | Again | Skipped | Dies
)
Script: TypeAlias = Sequence[Step]
Behaviour: TypeAlias = "Script | Callable[[Call], Script]"

USUAL: Script = (Run(0.01), Value())


def tries(*scripts: Script) -> Behaviour:
    """Another script for each attempt; the last one for all that follow."""
    return lambda call: scripts[min(call.attempt, len(scripts)) - 1]


def by_index(scripts: dict[Any, Script], otherwise: Script = USUAL) -> Behaviour:
    """Another script for some calls of a fan-out."""
    return lambda call: scripts.get(call.index, otherwise)


def a_task(name: str, sources: dict[str, Any] | None = None, **options: Any) -> Task:
    """A task as data: where its parameters come from, and its options."""

    def function() -> None:
        raise AssertionError("the simulation executes scripts, not functions")

    return Task(function, Options(name=name, **options), sources or {})
