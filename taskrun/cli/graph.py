"""``taskrun graph``: which task needs which, as a text tree, for Graphviz or for Mermaid."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import click

from taskrun.cli.options import CONTEXT, exclude, load_words, words_argument
from taskrun.model import Each, Result, Task
from taskrun.planning import choose, in_order, with_needs

Edge: TypeAlias = tuple[Task, Task, str]
"""(what is needed, who needs it, how: each, result or after)"""


@click.command("graph", context_settings=CONTEXT)
@words_argument("[FILE] [TASK]...")
@click.option("--dot", is_flag=True, help="For Graphviz.")
@click.option("--mermaid", is_flag=True, help="For Mermaid.")
@click.pass_context
def graph(context: click.Context, /, words: tuple[str, ...], **forms: bool) -> None:
    """Show which task of FILE needs which; of all tasks, or of the TASKs named
    and what they need."""
    exclude(context, forms, "dot", "mermaid")
    loaded, targets = load_words(words)
    names = with_needs(loaded, choose(loaded, targets, {})) if targets else loaded.tasks
    tasks = in_order(loaded.tasks[name] for name in loaded.tasks if name in names)
    if forms["dot"]:
        lines = dot_lines(tasks)
    elif forms["mermaid"]:
        lines = mermaid_lines(tasks)
    else:
        lines = tree_lines(tasks, _draws_boxes())
    for line in lines:
        click.echo(line)


def needs(task: Task) -> list[tuple[Task, str]]:
    """What ``task`` needs and how, each task once: ``each``, ``result`` or ``after``."""
    found: dict[int, tuple[Task, str]] = {}
    for source in task.params.values():
        if isinstance(source, Each | Result) and source.task is not None:
            how = "each" if isinstance(source, Each) else "result"
            found.setdefault(id(source.task), (source.task, how))
    for other in task.options.after:
        found.setdefault(id(other), (other, "after"))
    return list(found.values())


def _edges(tasks: Sequence[Task]) -> Iterator[Edge]:
    for task in tasks:
        for other, how in needs(task):
            yield other, task, how


# -- text -----------------------------------------------------------------------------


def _draws_boxes() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "ascii").lower().startswith("utf")


def tree_lines(tasks: Sequence[Task], boxes: bool = True) -> Iterator[str]:
    """A tree per task that no other needs, its needs below it; what was shown above is
    only named again.  Not recursive: a chain may be thousands of tasks long."""
    tee, last, bar = ("├── ", "└── ", "│   ") if boxes else ("|-- ", "`-- ", "|   ")
    needed = {id(other) for other, _, _ in _edges(tasks)}
    shown: set[int] = set()
    for root in tasks:
        if id(root) in needed:
            continue
        waiting = [(root, "", "", "")]
        while waiting:
            task, before, branch, how = waiting.pop()
            below = needs(task)
            again = " (see above)" if below and id(task) in shown else ""
            yield f"{before}{branch}{task.name}{f' [{how}]' if how else ''}{again}"
            if again:
                continue
            shown.add(id(task))
            indent = before + {tee: bar, last: "    "}.get(branch, "")
            arms = [tee] * (len(below) - 1) + [last]
            children = zip(below, arms, strict=False)
            waiting += reversed([(one, indent, arm, how) for (one, how), arm in children])


# -- for other programs ---------------------------------------------------------------


def dot_lines(tasks: Sequence[Task]) -> Iterator[str]:
    """The graph in Graphviz's language."""
    yield "digraph taskrun {"
    yield "  rankdir=LR;"
    yield "  node [shape=box];"
    yield from (f"  {_dot(task.name)};" for task in tasks)
    for other, task, how in _edges(tasks):
        style = " style=dashed" if how == "after" else ""
        yield f"  {_dot(other.name)} -> {_dot(task.name)} [label={_dot(how)}{style}];"
    yield "}"


def _dot(name: str) -> str:
    # Only the quote can be escaped in an ID, but labels read a backslash as an escape.
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def mermaid_lines(tasks: Sequence[Task]) -> Iterator[str]:
    """The graph in Mermaid's language."""
    ids = {id(task): f"t{number}" for number, task in enumerate(tasks)}
    yield "flowchart LR"
    yield from (f'  {ids[id(task)]}["{_mermaid(task.name)}"]' for task in tasks)
    for other, task, how in _edges(tasks):
        arrow = "-.->" if how == "after" else "-->"
        yield f"  {ids[id(other)]} {arrow}|{how}| {ids[id(task)]}"


def _mermaid(name: str) -> str:
    return "".join(
        letter if letter.isalnum() or letter in " _-.,:+/" else f"#{ord(letter)};"
        for letter in name
    )
