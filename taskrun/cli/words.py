"""The task names that a shell completes.

Pressing TAB never runs a task file: names are read from its text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from click.shell_completion import CompletionItem

from taskrun.cli.split import split_words
from taskrun.errors import UsageError
from taskrun.loading import find_file


def words_for(words: Sequence[str], incomplete: str) -> list[CompletionItem]:
    """What can follow ``words`` as FILE or TASK: names of tasks, else files."""
    file, _ = split_words(words)
    names = [name for name in task_names(file) if name.startswith(incomplete)]
    if names:
        return [CompletionItem(name) for name in names]
    return [] if words else [CompletionItem(incomplete, type="file")]


def task_names(file: str | None) -> list[str]:
    """The names of the tasks in a file, as far as its text tells; none where it is broken."""
    try:
        tree = ast.parse(Path(file or find_file()).read_bytes())
    except (UsageError, OSError, SyntaxError, ValueError, RecursionError):
        return []  # there is nowhere to tell: the prompt is being typed
    return [name for node in tree.body for name in _names_in(node)]


def _names_in(node: ast.stmt) -> Iterator[str]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for decorator in node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if ast.unparse(called) not in ("task", "taskrun.task"):
            continue
        given = decorator.keywords if isinstance(decorator, ast.Call) else []
        named = [one.value.value for one in given
                 if one.arg == "name" and isinstance(one.value, ast.Constant)]  # fmt: skip
        yield str(named[0]) if named else node.name
