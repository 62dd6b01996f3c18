"""The examples: their functions called plainly, and their task files executed."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from taskrun import Skip

EXAMPLES = Path(__file__).parent.parent / "examples"
INSTANCES = os.environ.get("TASKRUN_WFINSTANCES")
SECONDS = 120  # the deadline of each run


def load(path: Path) -> ModuleType:
    """Import an example's file under a name of its own."""
    name = f"example_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def census() -> ModuleType:
    return load(EXAMPLES / "census" / "tasks.py")


@pytest.fixture(scope="module")
def workflow() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES / "workflow")
        yield load(EXAMPLES / "workflow" / "tasks.py")
        sys.modules.pop("wfformat", None)


def execute(name: str, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    file = EXAMPLES / name / "tasks.py"
    return subprocess.run(
        [sys.executable, "-m", "taskrun", "exec", str(file), "-j", "2", *options],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


# -- census ---------------------------------------------------------------------------

SOURCE = """\
import os.path, json
from collections.abc import Mapping
from . import neighbour


class Shelf:
    def count(self, id):
        return len(self.books) + len(id)

    async def sort(self):
        return sorted(self.books, key=id)


def total(shelves): return sum(map(len, shelves))
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small library: two good files, one that is not Python, and what must be left out."""
    root = tmp_path / "library"
    files = {
        "shelf.py": SOURCE,
        "pack/__init__.py": "import os\n",
        "pack/test/bad.py": "print 'two'\n",
        "site-packages/other.py": "import os\n",
        "notes.txt": "import os\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_survey_counts_what_a_file_holds(census: Any, library: Path) -> None:
    survey = census.survey(library / "shelf.py")
    assert (survey.lines, survey.functions, survey.classes) == (14, 3, 1)
    assert survey.imports == {"os", "json", "collections"}


def test_a_name_that_the_file_binds_is_not_counted_as_a_builtin(census: Any, library: Path) -> None:
    survey = census.survey(library / "shelf.py")
    assert survey.builtins == Counter(len=3, sorted=1, sum=1, map=1)


@pytest.mark.parametrize(
    "name",
    ["list = []", "def list(): 0", "class list: 0", "import list", "from a import b as list",
     "for list in 'ab': 0", "lambda list: 0", "try: 0\nexcept OSError as list: 0"],
)  # fmt: skip
def test_every_way_to_bind_a_name_shadows_the_builtin(census: Any, name: str) -> None:
    nodes = list(ast.walk(ast.parse(f"{name}\nlist(), tuple()")))
    assert "list" not in census.used_builtins(nodes)
    assert "tuple" in census.used_builtins(nodes)


@pytest.mark.parametrize(
    "source", [b"print 'two'", b"# coding: no-such\n", b"'\xff'\n", b"a = 1\0\n"]
)
def test_a_file_that_is_not_python_is_skipped(census: Any, tmp_path: Path, source: bytes) -> None:
    (tmp_path / "bad.py").write_bytes(source)
    with pytest.raises(Skip, match=r"bad\.py is not valid Python"):
        census.survey(tmp_path / "bad.py")


def test_a_file_with_a_declared_encoding_is_read(census: Any, tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\nname = '\xe9'\n")
    assert census.survey(tmp_path / "latin.py").lines == 2


def test_files_leaves_out_what_is_not_the_library(census: Any, library: Path) -> None:
    names = [path.relative_to(library).as_posix() for path in census.files(library)]
    assert names == ["pack/__init__.py", "pack/test/bad.py", "shelf.py"]
    names = [path.name for path in census.files(library, tests=False)]
    assert names == ["__init__.py", "shelf.py"]


def test_a_folder_without_python_files_is_an_error(census: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Python file in"):
        census.files(tmp_path)


def test_equal_counts_are_ordered_by_name(census: Any) -> None:
    assert census.top(Counter(b=1, c=2, a=1)) == [("c", 2), ("a", 1), ("b", 1)]


def test_the_report_counts_what_could_not_be_read(
    census: Any, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = census.files(library)
    surveys = [census.survey(paths[0]), Skip("bad"), census.survey(paths[2])]
    census.report(library, paths, surveys)
    written = capsys.readouterr().out.splitlines()
    assert written[1] == "3 files (1 could not be read), 15 lines, 3 functions, 1 classes"
    assert [line.split() for line in written[4:6]] == [
        ["shelf", "14", "os", "2", "len", "3"],
        ["pack", "1", "collections", "1", "map", "1"],
    ]


def test_the_census_runs(library: Path, tmp_path: Path) -> None:
    done = execute("census", "-p", f"folder={library}", "--output", "raw", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 files (1 could not be read), 15 lines, 3 functions, 1 classes" in done.stdout


def test_the_census_of_the_standard_library_runs(tmp_path: Path) -> None:
    done = execute("census", "-p", "tests=false", "--output", "raw", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "most used builtins" in done.stdout
    assert re.search(r"^\S+ +[\d,]+ +sys +\d+ +\S+ +[\d,]+$", done.stdout, re.MULTILINE)


# -- workflow -------------------------------------------------------------------------


def instance(**tasks: list[str]) -> dict[str, Any]:
    """A document in WfFormat: task=[its parents]."""
    children = {id: [child for child in tasks if id in tasks[child]] for id in tasks}
    specified = [
        {"name": id, "id": id, "parents": tasks[id], "children": children[id]} for id in tasks
    ]
    timed = [{"id": id, "runtimeInSeconds": 1} for id in tasks]
    return {
        "name": "small",
        "schemaVersion": "1.5",
        "workflow": {"specification": {"tasks": specified}, "execution": {"tasks": timed}},
    }


def write(folder: Path, document: Any) -> Path:
    file = folder / "instance.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


def test_jobs_are_read_parents_first(workflow: Any, tmp_path: Path) -> None:
    document = instance(last=["left", "right"], left=["first"], right=["first"], first=[])
    jobs = workflow.load(write(tmp_path, document)).jobs
    assert jobs[0].id == "first"
    assert jobs[-1] == ("last", ("left", "right"), 1.0, 1.0)


def test_a_parent_named_only_by_its_children_list_is_a_parent(
    workflow: Any, tmp_path: Path
) -> None:
    document = instance(first=[], last=["first"])
    document["workflow"]["specification"]["tasks"][1]["parents"] = []
    assert workflow.load(write(tmp_path, document)).jobs[-1].parents == ("first",)


def cut(*path: Any) -> Any:
    """A good document without the entry at that path."""
    document = inner = instance(first=[], last=["first"])
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return document


def put(value: Any, *path: Any) -> Any:
    """A good document with another value at that path."""
    document = inner = instance(first=[], last=["first"])
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return document


SPECIFIED = ("workflow", "specification", "tasks")
TIMED = ("workflow", "execution", "tasks")


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ("hello", "is not JSON"),
        ([], "the file is not an object"),
        ({}, "the file has no 'schemaVersion'"),
        (put("1.4", "schemaVersion"), "schemaVersion is '1.4', only '1.5' can be read"),
        (cut("workflow", "specification"), "workflow has no 'specification'"),
        (cut("workflow", "execution"), "workflow has no 'execution'"),
        (put([], *SPECIFIED), "workflow.specification.tasks is empty"),
        (put("all", *SPECIFIED), "'tasks' of workflow.specification cannot be 'all'"),
        (cut(*SPECIFIED, 0, "id"), "workflow.specification.tasks[0] has no 'id'"),
        (put("first", *SPECIFIED, 1, "id"), "workflow.specification.tasks has an id more than"),
        (put(["nobody"], *SPECIFIED, 0, "parents"), "task 'first' names 'nobody', which is not"),
        (put(["last"], *SPECIFIED, 0, "parents"), "the tasks form a cycle: "),
        (cut(*TIMED, 1), "workflow.execution.tasks has no task 'last'"),
        (cut(*TIMED, 0, "runtimeInSeconds"), "first has no 'runtimeInSeconds'"),
        (put(-1, *TIMED, 0, "runtimeInSeconds"), "task 'first' cannot have taken -1 s"),
        (put("2 s", *TIMED, 0, "runtimeInSeconds"), "'runtimeInSeconds' of first cannot be '2 s'"),
    ],
)
def test_a_file_that_is_not_wfformat_is_named_with_what_is_wrong(
    workflow: Any, tmp_path: Path, document: Any, complaint: str
) -> None:
    file = write(tmp_path, document)
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        workflow.load(file)
    assert str(file) in str(caught.value)


def test_a_job_that_began_before_its_parent_had_ended_is_found(
    workflow: Any, tmp_path: Path
) -> None:
    known = workflow.load(write(tmp_path, instance(first=[], last=["first"])))
    runs = {"first": workflow.Ran("first", 0.0, 2.0), "last": workflow.Ran("last", 1.5, 3.0)}
    with pytest.raises(AssertionError, match=r"last began 0\.500000 s before first had ended"):
        workflow.check_order(known, runs)


def test_the_critical_path_is_the_longest_chain(workflow: Any, tmp_path: Path) -> None:
    document = instance(first=[], short=["first"], long=["first"], last=["short", "long"])
    known = workflow.load(write(tmp_path, document))
    spans = {"first": (0, 1), "short": (1, 2), "long": (1, 5), "last": (5, 6)}
    runs = {id: workflow.Ran(id, *span) for id, span in spans.items()}
    assert workflow.critical_path(known, runs) == ["first", "long", "last"]


def test_a_replay_outside_a_run_replays_at_once(
    workflow: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, instance(first=[], last=["first"]))
    futures = workflow.replay(file, scale=0.001)
    workflow.report(file, [future.result() for future in futures])
    assert "small: 2 jobs, each after all of its parents" in capsys.readouterr().out


def test_the_workflow_runs(tmp_path: Path) -> None:
    done = execute("workflow", "--output", "raw", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "orchard: 18 jobs, each after all of its parents" in done.stdout
    assert float(re.search(r"speed-up +([\d.]+)", done.stdout)[1]) > 1.2  # type: ignore[index]


def test_a_run_of_a_file_that_is_not_wfformat_fails_and_says_why(tmp_path: Path) -> None:
    file = write(tmp_path, put("1.4", "schemaVersion"))
    done = execute("workflow", "-p", f"instance={file}", cwd=tmp_path)
    assert done.returncode == 1
    assert "schemaVersion is '1.4', only '1.5' can be read" in done.stdout + done.stderr


@pytest.mark.skipif(
    not INSTANCES, reason="TASKRUN_WFINSTANCES does not name a folder of WfFormat instances"
)
def test_real_instances_run(workflow: Any, tmp_path: Path) -> None:
    files = sorted(Path(INSTANCES or "").glob("*.json"))
    assert files
    for file in files:
        jobs = workflow.load(file).jobs
        scale = 2 / sum(job.seconds for job in jobs)  # two seconds of work in all
        done = execute(
            "workflow", "-p", f"instance={file}", "-p", f"scale={scale}", "--output", "raw",
            cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"{len(jobs)} jobs, each after all of its parents" in done.stdout
