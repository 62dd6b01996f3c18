"""A census of Python's own standard library.

Three tasks: find the files, survey each of them, report.  The surveys run on all cores;
a file that is not valid Python ends its survey as skipped, and the report counts it.
"""

import ast
import builtins
import platform
import sysconfig
import warnings
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from taskrun import Skip, each, result, task

STDLIB = Path(sysconfig.get_path("stdlib"))
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
TESTS = {"test", "tests", "idle_test"}
BUILTINS = {name for name in dir(builtins) if not name.startswith("_")}


class Survey(NamedTuple):
    """What one file holds; of the builtins, how often each is used."""

    lines: int
    functions: int
    classes: int
    imports: set[str]
    builtins: Counter[str]


@task
def files(folder: Path = STDLIB, tests: bool = True) -> list[Path]:
    """Every Python file of the library, with or without its own tests."""
    unwanted = NOT_THE_LIBRARY if tests else NOT_THE_LIBRARY | TESTS
    found = sorted(
        path for path in folder.rglob("*.py") if not unwanted & {*path.relative_to(folder).parts}
    )
    if not found:
        raise FileNotFoundError(f"no Python file in {folder}; set -p folder=...")
    return found


@task
def survey(path: Path = each(files)) -> Survey:
    """Count what is in one file."""
    source = path.read_bytes()
    try:
        nodes = parse(source)
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes, bad encodings
        raise Skip(f"{path.name} is not valid Python: {error}") from error
    kinds = Counter(type(node) for node in nodes)
    return Survey(
        lines=len(source.splitlines()),
        functions=kinds[ast.FunctionDef] + kinds[ast.AsyncFunctionDef],
        classes=kinds[ast.ClassDef],
        imports=imported(nodes),
        builtins=Counter(used_builtins(nodes)),
    )


@task
def report(
    folder: Path = STDLIB,
    paths: list[Path] = result(files),
    surveys: list[Survey] = result(survey, errors="keep"),
) -> None:
    """Join the surveys into one table."""
    read = {
        module(path, folder): found
        for path, found in zip(paths, surveys, strict=True)
        if not isinstance(found, Exception)
    }
    lines = Counter({name: found.lines for name, found in read.items()})
    imports: Counter[str] = Counter()
    uses: Counter[str] = Counter()
    for found in read.values():
        imports.update(found.imports)
        uses.update(found.builtins)

    print(f"Python {platform.python_version()}, {folder}")
    print(
        f"{len(paths):,} files ({len(paths) - len(read)} could not be read), "
        f"{lines.total():,} lines, "
        f"{sum(found.functions for found in read.values()):,} functions, "
        f"{sum(found.classes for found in read.values()):,} classes\n"
    )
    for row in table(
        ("largest modules", "lines", top(lines)),
        ("most imported", "files", top(imports)),
        ("most used builtins", "uses", top(uses)),
    ):
        print(row)


# -- plain functions ------------------------------------------------------------------


def parse(source: bytes) -> list[ast.AST]:
    with warnings.catch_warnings(action="ignore"):  # invalid escapes and the like
        return list(ast.walk(ast.parse(source)))


def imported(nodes: list[ast.AST]) -> set[str]:
    """Top-level modules that a file imports; relative imports stay in their package."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def used_builtins(nodes: list[ast.AST]) -> list[str]:
    """Every use of a builtin by name; a name that the file itself binds is not one."""
    loaded, bound = [], set()
    for node in nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                loaded.append(name)
            case (
                ast.Name(id=name)
                | ast.arg(arg=name)
                | ast.alias(asname=str(name))
                | ast.alias(name=name)
                | ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.ExceptHandler(name=str(name))
            ):
                bound.add(name)
    return [name for name in loaded if name in BUILTINS - bound]


def module(path: Path, folder: Path) -> str:
    """``json/tool.py`` is the module ``json.tool``, ``json/__init__.py`` is ``json``."""
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or folder.name


def top(counts: Counter[str], rows: int = 12) -> list[tuple[str, int]]:
    """The largest counts; equal ones by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:rows]


def table(*columns: tuple[str, str, list[tuple[str, int]]]) -> list[str]:
    """Titled lists of (name, count), side by side."""
    blocks = []
    for title, unit, items in columns:
        cells = [(title, unit), *((name, f"{count:,}") for name, count in items)]
        wide = max(len(name) for name, _ in cells)
        high = max(len(count) for _, count in cells)
        blocks.append([f"{name:<{wide}}  {count:>{high}}" for name, count in cells])
    rows = zip_longest(*blocks, fillvalue="")
    widths = [len(block[0]) for block in blocks]
    return [
        "    ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
