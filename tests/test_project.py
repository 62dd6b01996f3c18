"""The project as a whole: how its modules depend on each other, what it ships, and that
what its documents say is there."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from graphlib import CycleError, TopologicalSorter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pytest

import taskrun
from taskrun import errors
from taskrun.api import TaskOptions
from taskrun.cli.group import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")])


def module_name(path: Path) -> str:
    """``workers/execute.py`` is taskrun.workers.execute."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("taskrun", *parts) if parts[0] == "workers" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for top in ("taskrun", "workers")
           for path in ROOT.glob(f"{top}/**/*.py")}  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """All that a file imports, also inside functions and for type checking only."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, f"{path}: relative imports are not the style"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in SOURCES else node.module


IMPORTS = {name: set(imported(path)) for name, path in SOURCES.items()}
OURS = {name: {other for other in found if other in SOURCES} for name, found in IMPORTS.items()}


def reaches(name: str) -> set[str]:
    """Our modules that ``name`` imports, directly or not."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        for other in OURS[todo.pop()] - seen:
            seen.add(other)
            todo.append(other)
    return seen


# -- layers ---------------------------------------------------------------------------


def test_imports_go_downwards_only() -> None:
    try:
        list(TopologicalSorter(OURS).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("taskrun.workers")])
def test_a_worker_knows_nothing_of_the_coordinator(name: str) -> None:
    above = ("taskrun.cli", "taskrun.core", "taskrun.reporting")
    found = {
        other
        for other in reaches(name)
        if other in ("taskrun", "taskrun.coordinator") or other.startswith(above)
    }
    assert not found


def test_nothing_below_the_command_line_imports_it() -> None:
    for name, found in OURS.items():
        if not name.startswith("taskrun.cli") and name != "taskrun.__main__":
            assert not [other for other in found if other.startswith("taskrun.cli")], name


@pytest.mark.parametrize(
    "name", [*(name for name in SOURCES if name.startswith("taskrun.core")), "taskrun.calls"]
)
def test_the_core_does_no_input_or_output(name: str) -> None:
    outside = {"asyncio", "io", "multiprocessing", "os", "selectors", "signal", "socket",
               "subprocess", "tempfile", "threading", "time"}  # fmt: skip
    assert not IMPORTS[name] & outside


# -- what is shipped ------------------------------------------------------------------


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_is_listed_in_setup_cfg() -> None:
    listed = setup()["options"]["packages"].split()
    there = {module_name(path) for path in SOURCES.values() if path.name == "__init__.py"}
    assert set(listed) == there
    assert there >= {name.rpartition(".")[0] for name in SOURCES if "." in name}


def test_every_module_is_in_the_installed_package(tmp_path: Path) -> None:
    # From elsewhere: in the checkout, taskrun.workers is not below taskrun/.
    code = (
        "import importlib.util, json, sys\n"
        "print([name for name in json.load(sys.stdin) if not importlib.util.find_spec(name)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(sorted(SOURCES)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_package_says_that_it_is_typed() -> None:
    spec = importlib.util.find_spec("taskrun")
    assert spec is not None and spec.origin is not None
    assert (Path(spec.origin).parent / "py.typed").exists()


def test_the_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version("taskrun") == taskrun.__version__
    assert f"## [{taskrun.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# -- the top-level surface ------------------------------------------------------------

SURFACE = {
    "Executor", "Future", "Pool", "Retry", "Skip", "TaskrunError", "as_completed", "connect",
    "current", "each", "limit",
    "per_worker", "result", "run", "sh", "sh_async", "state", "task",
}  # fmt: skip


def test_the_surface_is_these_names() -> None:
    assert set(taskrun.__all__) == SURFACE


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_each_name_of_the_surface_is_there_and_documented(name: str) -> None:
    found = getattr(taskrun, name)
    assert found.__doc__
    assert name in dir(taskrun)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tasks'"):
        taskrun.tasks  # noqa: B018


HEAVY = {"asyncio", "click", "cloudpickle", "inspect", "json", "multiprocessing", "subprocess",
         "tempfile", "tqdm"}  # fmt: skip


def test_importing_taskrun_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; before = {*sys.modules}; import taskrun; print(*{*sys.modules} - before)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert "taskrun" in loaded, done.stderr
    assert not loaded & HEAVY


# -- the documents --------------------------------------------------------------------


def documents_say(pattern: str) -> set[tuple[Path, str]]:
    return {
        (path, found)
        for path in DOCUMENTS
        for found in re.findall(pattern, path.read_text(), re.MULTILINE)
    }


def test_the_readme_opens_with_the_two_commands() -> None:
    commands = re.findall(r"make [\w-]+", (ROOT / "README.md").read_text())
    assert commands[:2] == ["make run", "make test"]


def test_every_make_command_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path, target in documents_say(r"(?:`|^ {4})make ([\w-]+)"):
        assert target in targets, f"{path.name}: make {target}"


def test_every_link_to_a_file_leads_somewhere() -> None:
    for path, link in documents_say(r"\]\((?!https?:)([^)#]+)"):
        assert (path.parent / link).exists(), f"{path.relative_to(ROOT)}: {link}"


def anchors(text: str, level: str = "##+") -> set[str]:
    """What the headings of a document are linked by."""
    headings = re.findall(rf"^{level} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_to_a_heading_leads_to_one() -> None:
    for path, link in documents_say(r"\]\((?!https?:)([^)]*#[^)]+)"):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert anchor in anchors(target.read_text()), f"{path.relative_to(ROOT)}: {link}"


@pytest.mark.parametrize("name", ["tasks.md", "cli.md"])
def test_a_table_of_contents_names_all_sections(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    contents = text.partition("\n## ")[0]
    assert set(re.findall(r"\]\(#([^)]+)\)", contents)) == anchors(text, "##")


def test_every_file_that_the_documents_name_exists() -> None:
    for path, name in documents_say(r"`((?:taskrun|workers|examples|tests|docs)/[\w/.]+)"):
        assert (ROOT / name).exists(), f"{path.relative_to(ROOT)}: {name}"


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a document."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_in_the_documents_is_python(path: Path) -> None:
    for block in blocks(path, "python"):
        ast.parse(block)


def test_the_documents_name_all_options_of_a_task_and_no_others() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text()
    table = text.partition("\n## Options of a task\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `(\w+)=", table, re.MULTILINE))
    assert named == set(TaskOptions.__annotations__)


def test_the_exceptions_in_the_documents_exist() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text()
    named = re.findall(r"^\| `([A-Z]\w+)` \|", text, re.MULTILINE)
    assert len(named) > 5
    for name in named:
        assert issubclass(getattr(errors, name), errors.CallError)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a small web site: a folder of three pages, with an index."""
    pages = tmp_path / "site"
    pages.mkdir()
    for number in range(3):
        (pages / f"{number}.html").write_text("word " * number)
    handler = partial(QuietHandler, directory=pages)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join(10)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def run_the_readme(folder: Path, seed: str) -> subprocess.CompletedProcess[str]:
    (folder / "tasks.py").write_text(blocks(ROOT / "README.md", "python")[0])
    return subprocess.run(
        [sys.executable, "-m", "taskrun", "exec", "-p", f"seed={seed}", "-j", "2"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_task_file_of_the_readme_runs(tmp_path: Path, site: str) -> None:
    done = run_the_readme(tmp_path, site)
    assert done.returncode == 0, done.stderr
    assert "3 words on 3 pages" in done.stdout


def test_the_task_file_of_the_readme_does_without_some_of_the_pages(
    tmp_path: Path, site: str
) -> None:
    (tmp_path / "site" / "gone.html").symlink_to("nowhere")  # listed, and cannot be read
    done = run_the_readme(tmp_path, site)
    assert done.returncode == 0, done.stderr
    assert "3 words on 3 pages" in done.stdout and "failed (tolerated)" in done.stderr


def test_the_task_file_of_the_readme_fails_where_its_seed_cannot_be_reached(tmp_path: Path) -> None:
    done = run_the_readme(tmp_path, "http://127.0.0.1:1/")  # nobody listens there
    assert done.returncode == 1, done.stderr
    assert "words on" not in done.stdout and "refused" in done.stderr


def test_the_documents_name_all_commands_and_options_and_no_others() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    options = {"--help", "--version"}
    with click.Context(cli) as context:
        for name in cli.list_commands(context):
            assert f"taskrun {name}" in text
            command = cli.get_command(context, name)
            assert command is not None
            options |= {option for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named == {option for option in options if option.startswith("--")}
