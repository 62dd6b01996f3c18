"""Text from a command line, made into the value that a parameter is annotated with.

What a command line can make: int, float, bool, str, Path, an Enum, a Literal, a list of
those (comma separated), and unions of those.
"""

from __future__ import annotations

import enum
import inspect
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from taskrun.errors import UsageError
from taskrun.model import MISSING, Parameter, Task

_BOOLS = {"true": True, "yes": True, "on": True, "1": True} | {
    "false": False, "no": False, "off": False, "0": False
}  # fmt: skip
MOST_UNITS = 100_000  # of a resource: each has a number
_SUFFIXES = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


class Misfit(ValueError):
    """Raised when a text does not fit an annotation; the message says what would."""


class Unsupported(TypeError):
    """Raised when an annotation is none that text can be made into."""


# -- a parameter of a task ------------------------------------------------------------


def convert_for(task: Task, parameter: Parameter, text: str) -> Any:
    """The value of ``text`` for a run parameter of ``task``; raises UsageError."""
    place = f"{task.name}: {parameter.name}={text!r}"
    try:
        return convert(text, annotation_of(task.function, parameter))
    except Misfit as misfit:
        raise UsageError(f"{place} does not fit; expected {misfit}") from None
    except Unsupported as unsupported:
        raise UsageError(f"{place} cannot be converted: {unsupported}") from None


def annotation_of(function: Callable[..., Any], parameter: Parameter) -> Any:
    """What a parameter's text is to become: its annotation, else the type of its default.

    Raises Unsupported where the annotation is a text that names nothing.
    """
    annotation = parameter.annotation
    if annotation is MISSING or annotation is Any:
        known = type(parameter.default) in (int, float, bool, str)
        return type(parameter.default) if known else str
    # One name is looked up, not all of the function's: the others may exist for type
    # checkers only.
    holder = types.SimpleNamespace(__annotations__={parameter.name: annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return typing.get_type_hints(holder, globalns=names)[parameter.name]
    except Exception as error:
        raise Unsupported(f"its annotation {annotation!r} is not known ({error})") from error


# -- text to value --------------------------------------------------------------------


def convert(text: str, kind: Any) -> Any:
    """``text`` as a ``kind``; raises Misfit where it is not one, Unsupported where no text is."""
    kind = _unwrapped(kind)
    origin = typing.get_origin(kind)
    if kind is Any or kind is str:
        return text
    if kind is None or kind is types.NoneType:
        return _chosen(text.lower(), {"none": None}, kind)
    if kind is bool:
        return _chosen(text.lower(), _BOOLS, kind)
    if origin is typing.Literal:
        return _chosen(text, {str(value): value for value in typing.get_args(kind)}, kind)
    if origin in (typing.Union, types.UnionType):
        return _first_fit(text, kind)
    if kind is list or origin is list:
        return _list(text, *(typing.get_args(kind) or (str,)))
    if isinstance(kind, type):
        return _instance(text, kind)
    raise Unsupported(f"text cannot be made into {describe_kind(kind)}")


def describe_kind(kind: Any) -> str:
    """How an annotation is called in messages: ``int``, ``'a' or 'b'``, ``list of Path``."""
    kind = _unwrapped(kind)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is None or kind is types.NoneType:
        return "none"
    if kind is bool:
        return "true, false, yes, no, on, off, 1 or 0"
    if origin is typing.Literal:
        return _either([str(value) for value in inner])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_kind(one) for one in inner)
    if kind is list or origin is list:
        return f"a comma separated list of {describe_kind(inner[0] if inner else str)}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _either(list(kind.__members__))
    return getattr(kind, "__name__", None) or str(kind)


def _instance(text: str, kind: type) -> Any:
    if issubclass(kind, enum.Enum):
        by_value = {str(member.value): member for member in reversed(list(kind))}
        return _chosen(text, by_value | dict(kind.__members__), kind)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise Misfit(describe_kind(kind)) from None
    if issubclass(kind, PurePath):
        return kind(text)
    raise Unsupported(f"text cannot be made into {describe_kind(kind)}")


def _first_fit(text: str, union: Any) -> Any:
    # Any text is a str, and almost any a Path: those are tried last.
    kinds = sorted(map(_unwrapped, typing.get_args(union)), key=lambda one: (one is str) * 2
                   + (one is Path))  # fmt: skip
    supported = 0
    for kind in kinds:
        try:
            return convert(text, kind)
        except Misfit:
            supported += 1
        except Unsupported:
            continue
    if not supported:
        raise Unsupported(f"text cannot be made into {describe_kind(union)}")
    raise Misfit(describe_kind(union))


def _list(text: str, kind: Any) -> list[Any]:
    try:
        return [convert(part.strip(), kind) for part in text.split(",")] if text else []
    except Misfit:
        raise Misfit(describe_kind(list[kind])) from None


def _chosen(text: str, choices: dict[str, Any], kind: Any) -> Any:
    if text not in choices:
        raise Misfit(describe_kind(kind))
    return choices[text]


def _either(names: list[str]) -> str:
    quoted = [repr(name) for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else quoted[0]


def _unwrapped(kind: Any) -> Any:
    """What a NewType or a ``type X = ...`` stands for."""
    while True:
        if isinstance(kind, typing.NewType):
            kind = kind.__supertype__
        elif type(kind).__name__ == "TypeAliasType":  # Python 3.12 has it
            kind = kind.__value__
        else:
            return kind


# -- amounts of resources -------------------------------------------------------------


def amount(name: str, value: object) -> float:
    """How much of the resource ``name`` is meant by ``value``; raises ValueError.

    A number of 0 or more.  ``memory`` is in bytes and takes a size as well: K, M, G, T and
    P are powers of 1000, Ki, Mi, Gi, Ti and Pi powers of 1024; a B may follow and case
    does not matter (``4G``, ``512MB``, ``1.5GiB``).
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{name} must be a number, not {value!r}")
    number = _size(name, value) if isinstance(value, str) else float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be a number, 0 or more, not {value!r}")
    return number


def capacity(name: str, value: object, said: str) -> float:
    """How much there is to be of the resource ``name``; ``said``: where that is said, for the
    message.  Raises UsageError where it is no such amount."""
    if name == "cpu":
        raise UsageError(f"{said}: how many cores are used is said by -j")
    try:
        much = amount(name, value)
    except ValueError as error:
        raise UsageError(f"{said}: {error}") from None
    if name != "memory" and (much != int(much) or much > MOST_UNITS):
        raise UsageError(f"{said}: {name} must be a whole number, at most {MOST_UNITS:,}")
    return much


def _size(name: str, text: str) -> float:
    digits = text.strip().rstrip("BbIiKkMmGgTtPp")
    suffix = text.strip()[len(digits) :].upper().removesuffix("B")
    power = _SUFFIXES.get(suffix.removesuffix("I"))
    wrong = power is None or suffix == "I" or (text.strip() != digits and name != "memory")
    try:
        number = float(digits)
    except ValueError:
        wrong = True
    if wrong:
        allowed = "a number or a size such as 512M, 4G or 1.5GiB"
        raise ValueError(f"{name} must be {allowed if name == 'memory' else 'a number'}, "
                         f"not {text!r}")  # fmt: skip
    return number * (1024.0 if suffix.endswith("I") else 1000.0) ** (power or 0)
