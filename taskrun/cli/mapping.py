"""``taskrun map``: one call of a function per argument, or per line of stdin."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from taskrun.cli.options import (
    CONTEXT,
    check_needed,
    reserved_stdout,
    run_options,
    settings_from,
)
from taskrun.errors import UsageError
from taskrun.loading import Loaded, load, shown
from taskrun.model import MISSING, Each, Parameter, PerWorker, Result, Task, describe, nearest

if TYPE_CHECKING:
    from taskrun.feed import Argument


def _complete_function(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[Any]:
    from taskrun.cli.words import functions_for  # only when TAB is pressed

    return functions_for(incomplete)


@click.command("map", context_settings=CONTEXT)
@click.argument("function", metavar="FILE:FUNC", shell_complete=_complete_function)
@click.argument("arguments", nargs=-1, metavar="[ARG]...")
@click.option("--keep-order", is_flag=True, help="Print results in the order of the arguments.")
@run_options
@click.pass_context
def map_(
    context: click.Context,
    /,
    function: str,
    arguments: tuple[str, ...],
    keep_order: bool,
    **options: Any,
) -> int:
    """Call FUNC of FILE once per ARG, or once per line of stdin; print what it
    returns. Put -- before arguments that start with a dash."""
    check_needed(context)
    stdout = reserved_stdout(context)  # for results only
    loaded, task = find_function(function)
    parameter = only_parameter(task)
    settings = settings_from(context, options)
    from taskrun.coordinator import execute_map
    from taskrun.feed import Argument

    if arguments:
        found = iter([Argument(one, _convert(task, parameter, one)) for one in arguments])
    else:
        found = _arguments_of(_stdin(), task, parameter)
    return execute_map(loaded, task, found, settings, keep_order, stdout=stdout)


def find_function(place: str) -> tuple[Loaded, Task]:
    """The task or function that ``FILE:FUNC`` names, as a task."""
    file, colon, name = place.rpartition(":")
    if not (colon and file and name):
        raise UsageError(f"map takes FILE:FUNC such as tasks.py:fetch, not {place!r}")
    loaded = load(file, may_be_empty=True)
    names = vars(loaded.namespace)
    found = loaded.tasks.get(name, names.get(name))
    if found is None:
        callables = [one for one, value in names.items() if callable(value)]
        near = nearest(name, callables)
        hint = f"; did you mean {near!r}?" if near else ""
        raise UsageError(f"there is no function {name!r} in {shown(file)}{hint}")
    return loaded, found if isinstance(found, Task) else _as_task(found, name, file)


def _as_task(found: Any, name: str, file: str) -> Task:
    from taskrun.api import task

    if not callable(found):
        raise UsageError(f"{shown(file)}:{name} is no function, but of type {type(found).__name__}")
    try:
        made: Callable[..., Task] = task
        return made(found, name=name)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{shown(file)}:{name} cannot be mapped: {error}") from None


def only_parameter(task: Task) -> Parameter:
    """The parameter that map fills, the first; raises UsageError where that is not enough."""
    signature = inspect.signature(task.function)
    places = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind not in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
    ]
    if not places:
        raise UsageError(f"map gives {task.name} one argument, but it takes none")
    first = places[0]
    for name, source in task.params.items():
        if name != first.name:
            _check_other(task, name, source)
    default = MISSING if isinstance(first.default, Each | Result | PerWorker) else first.default
    return Parameter(first.name, default, first.annotation)


def _check_other(task: Task, name: str, source: Any) -> None:
    if isinstance(source, Each | Result):
        raise UsageError(
            f"map gives {task.name} one argument; its {name!r} comes from "
            f"{describe(source)}, which only exec runs"
        )
    if isinstance(source, Parameter) and source.default is MISSING:
        raise UsageError(f"map gives {task.name} one argument, but it needs {name!r} too")


def _stdin() -> int:
    """The descriptor to read arguments from."""
    if sys.stdin is None:
        raise UsageError("there is no stdin to read arguments from")
    if sys.stdin.isatty():
        click.echo("taskrun: one argument per line, Ctrl-D ends", err=True)
    return sys.stdin.fileno()


def _arguments_of(fd: int, task: Task, parameter: Parameter) -> Iterator[Argument]:
    """An argument per line.  Others have been used by the time one turns out not to fit, or not
    to be had, so that is no mistake of the command line any more: its call fails, as others may."""
    from taskrun.feed import Argument

    number = 0
    try:
        for number, line in enumerate(_read_lines(fd), 1):
            text = os.fsdecode(line)
            try:
                yield Argument(text, _convert(task, parameter, text))
            except UsageError as error:
                yield Argument(text, unfit=f"line {number} of stdin: {error}")
    except OSError as error:
        why = f"stdin cannot be read after line {number}: {error.strerror}"
        yield Argument("stdin", unfit=why)


def _read_lines(fd: int) -> Iterator[bytes]:
    # Not from sys.stdin: this is a thread that may wait here when the process ends, and Python
    # aborts if it then holds a file's lock.
    rest: list[bytes] = []
    while data := os.read(fd, 65536):
        first, *lines = data.split(b"\n")
        rest.append(first)
        if lines:
            yield b"".join(rest)
            rest = [lines.pop()]
            yield from lines
    if any(rest):
        yield b"".join(rest)


def _convert(task: Task, parameter: Parameter, text: str) -> Any:
    if parameter.annotation is MISSING and parameter.default is MISSING:
        return text
    from taskrun.parameters import convert_for

    return convert_for(task, parameter, text)
