"""What a shell completes: files, and names that a task file has.

Pressing TAB never runs a task file: names are read from its text, as far as that tells.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from click.shell_completion import CompletionItem

from taskrun.cli.split import split_words
from taskrun.errors import UsageError
from taskrun.loading import find_file

OURS = ("task", "each", "result", "per_worker")

Function = ast.FunctionDef | ast.AsyncFunctionDef


# -- what follows ---------------------------------------------------------------------


def a_file(incomplete: str) -> list[CompletionItem]:
    """Have the shell complete files."""
    return [CompletionItem(incomplete, type="file")]


def words_for(words: Sequence[str], incomplete: str) -> list[CompletionItem]:
    """What can follow ``words`` as FILE or TASK: names of tasks, else files."""
    file, _ = split_words(words)
    return _starting(task_names(file), incomplete) or ([] if words else a_file(incomplete))


def functions_for(incomplete: str) -> list[CompletionItem]:
    """What FILE:FUNC can be: a file, then a function of it."""
    file, colon, _ = incomplete.rpartition(":")
    if not colon:
        return a_file(incomplete)
    return _starting([f"{file}:{function.name}" for function in _functions(file)], incomplete)


def params_for(words: Sequence[str], incomplete: str) -> list[CompletionItem]:
    """What ``-p`` can set: parameters by their names; by task behind a task's name and a dot."""
    file, _ = split_words(words)
    found = [(task, name) for task, names in _tasks(file).items() for name in names]
    if "." in incomplete:
        return _starting([f"{task}.{name}=" for task, name in found], incomplete)
    return _starting([f"{name}=" for _, name in found], incomplete)


def task_names(file: str | None) -> list[str]:
    """The names of the tasks in a file; none where it is broken."""
    return list(_tasks(file))


def _starting(names: Sequence[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in dict.fromkeys(names) if name.startswith(incomplete)]


# -- what a file's text tells ---------------------------------------------------------


def _parse(file: str | None) -> ast.Module:
    try:
        return ast.parse(Path(file or find_file()).read_bytes())
    except (UsageError, OSError, SyntaxError, ValueError, RecursionError):
        return ast.Module([], [])  # there is nowhere to tell: the prompt is being typed


def _functions(file: str | None) -> list[Function]:
    return [node for node in _parse(file).body if isinstance(node, Function)]


def _tasks(file: str | None) -> dict[str, list[str]]:
    """The name of each task -> those of its run parameters."""
    tree = _parse(file)
    ours = _our_names(tree)
    tasks = {}
    for node in tree.body:
        if not isinstance(node, Function):
            continue
        for decorator in node.decorator_list:
            if ours.get(_called(decorator)) == "task":
                tasks[_name_of(node, decorator)] = list(_run_parameters(node, ours))
    return tasks


def _our_names(tree: ast.Module) -> dict[str, str]:
    """What the file calls that which taskrun calls ``task``, ``each`` and so on."""
    names = {name: name for name in OURS} | {f"taskrun.{name}": name for name in OURS}
    for node in tree.body:
        if isinstance(node, ast.Import):
            modules = [one.asname for one in node.names if one.name == "taskrun" and one.asname]
            names |= {f"{module}.{name}": name for module in modules for name in OURS}
        elif isinstance(node, ast.ImportFrom) and node.module == "taskrun":
            names |= {one.asname or one.name: one.name for one in node.names if one.name in OURS}
    return names


def _called(node: ast.expr) -> str:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def _name_of(function: Function, decorator: ast.expr) -> str:
    given = decorator.keywords if isinstance(decorator, ast.Call) else []
    named = [one.value.value for one in given
             if one.arg == "name" and isinstance(one.value, ast.Constant)]  # fmt: skip
    return str(named[0]) if named else function.name


def _run_parameters(function: Function, ours: dict[str, str]) -> Iterator[str]:
    """The parameters that nothing else fills, and that are not filled by position only."""
    given = function.args
    names = given.posonlyargs + given.args
    defaults = [*[None] * (len(names) - len(given.defaults)), *given.defaults]
    by_name = list(zip(names, defaults, strict=True))[len(given.posonlyargs) :]
    by_name += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    for parameter, default in by_name:
        if not (isinstance(default, ast.Call) and _called(default) in ours):
            yield parameter.arg
