"""``taskrun list``: the tasks of a file."""

from __future__ import annotations

import click

from taskrun.cli.options import CONTEXT, complete_file, load_words, words_argument
from taskrun.errors import UsageError
from taskrun.loading import Loaded
from taskrun.model import Parameter, Task, describe
from taskrun.planning import choose, left_out, needs_flags, with_needs
from taskrun.reporting import text


@click.command("list", context_settings=CONTEXT)
@words_argument("[FILE]", complete_file)
def list_(words: tuple[str, ...]) -> None:
    """Show the tasks of FILE (of the nearest tasks.py, upwards): what runs when
    none is named (*), what they do, and where their parameters come from."""
    loaded, rest = load_words(words)
    if rest:
        raise UsageError(f"list takes a FILE (.py) only, not {' '.join(rest)}")
    click.echo(list_text(loaded))


def list_text(loaded: Loaded) -> str:
    """Two lines a task: its name and what it does; its parameters and their sources."""
    runs = with_needs(loaded, choose(loaded, (), {}))
    lacking = left_out(loaded, {})
    wide = min(text.WIDEST, max(text.columns(name) for name in loaded.tasks))
    lines = []
    for name, task in loaded.tasks.items():
        mark = "*" if name in runs else " "
        lines.append(f"{mark} {text.padded(name, wide)}  {_first_line(task)}".rstrip())
        notes = [_signature(task)] if task.params else []
        if name in lacking:
            notes.append(needs_flags(lacking[name]))
        lines += [f"  {'':{wide}}  {note}" for note in notes]
    return "\n".join(lines)


def _first_line(task: Task) -> str:
    lines = (task.__doc__ or "").strip().splitlines()
    return lines[0].strip() if lines else ""


def _signature(task: Task) -> str:
    return ", ".join(
        describe(source) if isinstance(source, Parameter) else f"{name}={describe(source)}"
        for name, source in task.params.items()
    )
