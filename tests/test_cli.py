"""The command line: by click's runner, and as a process where exit statuses matter."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from harness import TASKRUN

from taskrun.cli.graph import tree_lines
from taskrun.cli.group import COMMANDS
from taskrun.cli.main import main
from taskrun.cli.words import task_names
from taskrun.settings import Settings, cores_here

FILE = '''
from taskrun import task, each, result, per_worker

@task
def urls(seed: str = "http://x/", depth: int = 2):
    """List the pages.

    All of them.
    """

@task
def fetch(url=each(urls)): ...

@task(after=[urls])
def total(pages=result(fetch, errors="skip"), client=per_worker(dict)):
    """Add up."""

@task
def work(x: int): ...

def double(x: int): return 2 * x

def pair(x, y): ...

class Thing: ...
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "tasks.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TASKRUN_")]:
        monkeypatch.delenv(name)
    modules, path = dict(sys.modules), list(sys.path)
    yield tmp_path
    for name in set(sys.modules) - set(modules):
        if not name.startswith("taskrun."):  # parts of it are there already
            del sys.modules[name]
    sys.path[:] = path


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the coordinator: keeps what it was asked to do."""
    asked: list[Any] = []

    def execute(plan: Any, settings: Any, *, stdout: int | None) -> int:
        asked.append((plan, settings))
        return 1

    def execute_map(
        loaded: Any, task: Any, arguments: Any, settings: Any, keep_order: bool, *, stdout: int
    ) -> int:
        values = [argument.value for argument in arguments]
        asked.append((task, values, settings, keep_order))
        return 0

    fake = types.ModuleType("taskrun.coordinator")
    vars(fake).update(Settings=types.SimpleNamespace, execute=execute, execute_map=execute_map)
    monkeypatch.setitem(sys.modules, "taskrun.coordinator", fake)
    return asked


def run(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "taskrun", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **more)


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.startswith("taskrun: error: ") and err.count("\n") == 1
    return err.removeprefix("taskrun: error: ").strip()


def output_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


# -- the command itself ---------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["exec"], ["map"], ["list"], ["graph"], ["completion"]])
def test_help_fits_one_screen(command: list[str]) -> None:
    done = run(*command, "--help")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) <= 24 and max(map(len, lines)) <= 80


def test_help_has_a_line_for_every_command_and_imports_none() -> None:
    code = (
        "import sys; from taskrun.cli.main import main; main(['--help']); "
        "print([m for m in sys.modules if m.startswith('taskrun.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    listed = re.findall(r"^  (\w[\w, ]+?)  ", done.stdout.partition("Commands:")[2], re.M)
    assert ", ".join(listed).split(", ") == list(COMMANDS)
    assert done.stdout.splitlines()[-1].count("taskrun.cli.") == 2  # main and group


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Commands:" in output_of(capsys)


def test_the_version_is_shown_and_no_variable_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskrun import __version__

    assert run("--version").stdout == f"taskrun {__version__}\n"
    monkeypatch.setenv("TASKRUN_VERSION", "7")
    assert "urls" in run("list").stdout


WRONG_COMMANDS = [
    (["run", "tasks.py"], "no such command 'run'; did you mean 'exec'?"),
    (["lst"], "no such command 'lst'; did you mean 'list'?"),
    (["tasks.py"], "did you mean 'exec tasks.py'?"),
    (
        ["zzz"],
        "there are exec, map, list, graph, status, explain, stack, cancel, tell, ",
    ),
    (["exec", "--keep-gonig"], "'--keep-going'"),
    (["exec", "-j", "x"], "'x' is not a valid integer"),
    (["exec", "-j", "0"], "-j 0 leaves nobody to do the work"),
    (
        ["exec", "-j", "0", "--inline", "--listen", "127.0.0.1:0"],
        "-j 0 leaves the work to nodes, and with --inline there are none",
    ),
    (
        ["map", "tasks.py:double", "-j", "0", "--engine", "fake", "--listen", "127.0.0.1:0"],
        "and with --engine fake there are none; say -j 1 or more",
    ),
    (["exec", "-j", "-2"], "-j is a number of workers, 1 or more, not -2"),
    (["worker", "127.0.0.1:7", "-j", "0"], "nobody to do the work; say -j 1 or more\n"),
    (["worker", "127.0.0.1:7", "-j", "-1"], "-j is a number of workers, 1 or more, not -1"),
    (["serve", "-j", "-1"], "-j is a number of workers, 0 or more, not -1"),
    (["exec", "-k", "--fail-fast"], "--keep-going and --fail-fast exclude each other"),
    (["exec", "--inline", "--engine", "dask"], "--inline and --engine exclude each other"),
    (["exec", "--output", "grop"], "'grop' is not one of"),
    (["exec", "--start-method", "fork"], "'fork' is not one of"),
    (["exec", "--resource", "gpu"], "--resource takes NAME=AMOUNT"),
    (["exec", "--resource", "gpu=x"], "gpu must be a number, not 'x'"),
    (["exec", "--resource", "gpu=1.5"], "gpu must be a whole number, at most 100,000"),
    (["exec", "--resource", "gpu=1000000000"], "at most 100,000"),
    (["exec", "--resource", "cpu=3"], "is said by -j"),
    (["exec", "--joblog", "no/where.tsv"], "there is no folder no"),
    (["exec", "-n", "--json"], "--dry-run has no --json form"),
    (["exec", "gone.py"], "there is no file gone.py"),
    (["exec", "taks.py"], "did you mean tasks.py?"),
    (["exec", "totl"], "no task 'totl' in tasks.py; did you mean 'total'?"),
    (["exec", "./"], "./ is a folder: name a file in it; did you mean tasks.py?"),
    (["exec", "-p", "dpth=3"], "did you mean 'depth'?"),
    (["exec", "-p", "depth=x"], "urls: depth='x' does not fit; expected int"),
    (["exec", "-p", ".depth=3"], "-p takes name=value or task.name=value, not '.depth=3'"),
    (["exec", "-p", "depth.=3"], "-p takes name=value or task.name=value, not 'depth.=3'"),
    (["exec", "-p", "=3"], "-p takes name=value or task.name=value, not '=3'"),
    (["exec", "-p", "depth"], "-p takes name=value or task.name=value, not 'depth'"),
    (["exec", "work"], "work (named on the command line) needs a value for x: -p x=..."),
    (["list", "total"], "list takes a FILE (.py) only, not total"),
    (["graph", "totl"], "did you mean 'total'?"),
    (["graph", "--dot", "--mermaid"], "--dot and --mermaid exclude each other"),
    (["map"], "missing argument 'FILE:FUNC'"),
    (["map", "double", "1"], "map takes FILE:FUNC such as tasks.py:fetch, not 'double'"),
    (["map", "tasks.py:duble", "1"], "no function 'duble' in tasks.py; did you mean 'double'?"),
    (["map", "tasks.py:Thing", "1"], "Thing cannot be mapped: a task is a function"),
    (["map", "tasks.py:pair", "1"], "map gives pair one argument, but it needs 'y' too"),
    (["map", "tasks.py:double", "1", "x"], "double: x='x' does not fit; expected int"),
    (["completion", "csh"], "'csh' is not one of 'bash', 'zsh', 'fish'"),
]


@pytest.mark.parametrize(
    ("args", "says"), WRONG_COMMANDS, ids=[" ".join(a) for a, _ in WRONG_COMMANDS]
)
def test_a_mistake_is_one_line_on_stderr_and_exit_status_two(
    capsys: pytest.CaptureFixture[str], executed: list[Any], args: list[str], says: str
) -> None:
    assert says in error_of(capsys, *args) + "\n"
    assert executed == []


IDLE_OPTIONS = [
    (["exec", "--tls-cert", "c.pem"], "--tls-cert does nothing without --listen or --address"),
    (["exec", "--tls-key", "k.pem"], "--tls-key does nothing without --listen or --address"),
    (["exec", "--tls-ca", "ca.pem"], "--tls-ca does nothing without --listen or --address"),
    (["exec", "--insecure-plain"], "--insecure-plain does nothing without --listen or --address"),
    (["exec", "--lease", "3"], "--lease does nothing without --listen or --address"),
    (["exec", "--bundle", "*"], "--bundle does nothing without --listen, --address or --engine"),
    (["map", "tasks.py:double", "--bundle", "*"], "does nothing without --listen or --engine"),
    (["serve", "--tls-cert", "c.pem"], "--tls-cert does nothing without --listen: say that too"),
    (
        ["exec", "--listen", "127.0.0.1:0", "--tls-ca", "ca.pem"],
        "--tls-ca is for TLS, and at 127.0.0.1:0 there is none: say tls://127.0.0.1:0",
    ),
    (
        ["exec", "--address", "127.0.0.1:9", "--tls-cert", "c.pem"],
        "--tls-cert is for TLS, and at 127.0.0.1:9 there is none: say tls://127.0.0.1:9",
    ),
    (
        ["serve", "--listen", "0.0.0.0:0", "--insecure-plain", "--tls-ca", "ca.pem"],
        "--tls-ca is for TLS, and at 0.0.0.0:0 there is none: leave out --insecure-plain",
    ),
    (
        ["worker", "unix:/no/where", "--tls-ca", "ca.pem"],
        "--tls-ca is for TLS, and at unix:/no/where there is none: leave it out",
    ),
    *(
        ([*command, "127.0.0.1:9", "--tls-ca", "ca.pem"], "--tls-ca is for TLS, and at 127.0.0.1:9")
        for command in (["worker"], ["status"], ["state"], ["attach", "r1"])
    ),
]


@pytest.mark.parametrize(
    ("args", "says"), IDLE_OPTIONS, ids=[" ".join(args) for args, _ in IDLE_OPTIONS]
)
def test_an_option_that_would_do_nothing_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], executed: list[Any], args: list[str], says: str
) -> None:
    assert says in error_of(capsys, *args)
    assert executed == []


def test_what_the_environment_says_may_do_nothing(
    executed: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TASKRUN_TLS_CA", "ca.pem")
    monkeypatch.setenv("TASKRUN_LEASE", "3")
    monkeypatch.setenv("TASKRUN_DOT", "1")
    assert main(["exec", "--listen", "127.0.0.1:0"]) == main(["exec"]) == 1
    assert [settings.tls_ca for _, settings in executed] == ["ca.pem", "ca.pem"]
    assert output_of(capsys, "graph", "--mermaid").startswith("flowchart")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "soon"])
@pytest.mark.parametrize(
    "command", [["exec", "--lease"], ["map", "--lease"], ["serve", "--lease"],
                ["worker", "127.0.0.1:9", "--idle-exit"]], ids=" ".join,
)  # fmt: skip
def test_seconds_are_a_number_that_ends(
    capsys: pytest.CaptureFixture[str], command: list[str], value: str
) -> None:
    assert f"invalid value for '{command[-1]}': " in error_of(capsys, *command, value)


def test_a_file_or_folder_that_is_named_where_a_task_was_meant_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "build").mkdir()
    (folder / "notes.txt").touch()
    (folder / "tasks.py").rename(folder / "pipeline.py")
    for command in ("exec", "list", "graph"):
        assert error_of(capsys, command, "pipeline").endswith("did you mean pipeline.py?")
    assert "build is a folder" in error_of(capsys, "exec", "build")
    assert "notes.txt is not a Python file" in error_of(capsys, "exec", "notes.txt")
    (folder / "pipeline.py").rename(folder / "tasks.py")
    assert "build is a folder" in error_of(capsys, "exec", "build")
    assert "did you mean tasks.py?" in error_of(capsys, "exec", "tasks")
    assert "notes.txt is not a Python file" in error_of(capsys, "exec", "notes.txt")


def test_a_task_counts_before_a_folder_of_its_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "total").mkdir()
    assert "named on the command line" in output_of(capsys, "exec", "total", "-n")


def test_a_file_that_fails_to_import_shows_its_traceback_and_ours_not(folder: Path) -> None:
    (folder / "bad.py").write_text("def f():\n    1 / 0\nf()\n")
    done = run("exec", "bad.py")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Traceback") and "taskrun/" not in done.stderr
    assert done.stderr.endswith(
        "taskrun: error: bad.py cannot be imported: ZeroDivisionError: division by zero\n"
    )


def test_an_exception_that_cannot_be_shown_is_named_all_the_same(folder: Path) -> None:
    (folder / "bad.py").write_text(
        "class Odd(BaseException):\n    def __str__(self): return 1 / 0\nraise Odd\n"
    )
    done = run("list", "bad.py")
    assert done.returncode == 2 and "taskrun/" not in done.stderr
    assert done.stderr.endswith(
        "bad.py cannot be imported: Odd: <str() of this Odd raised ZeroDivisionError>\n"
    )


def test_an_interrupt_while_importing_is_quiet(folder: Path) -> None:
    (folder / "slow.py").write_text(
        "import signal\nprint('importing', flush=True)\nsignal.pause()\n"
    )
    command = [sys.executable, "-m", "taskrun", "exec", "slow.py"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "taskrun", "list"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert done.returncode == 141 and done.stderr == b""


def test_an_output_that_cannot_show_a_name_shows_its_escape(folder: Path) -> None:
    (folder / "names.py").write_text(
        "from taskrun import task\n@task(name='snow ☃')\ndef a(): ...\n", encoding="utf-8"
    )
    done = run("graph", "names.py", env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "snow \\u2603\n", "")


# -- exec -----------------------------------------------------------------------------


def test_exec_hands_the_plan_and_the_settings_to_the_coordinator(executed: list[Any]) -> None:
    args = ["exec", "tasks.py", "total", "-j", "3", "-p", "depth=4", "-k", "--resource", "gpu=2"]
    args += ["--resource", "memory=4G", "--output", "group", "--json", "--joblog", "log.tsv"]
    assert main([*args, "--inline", "--start-method", "spawn"]) == 1
    [(plan, settings)] = executed
    assert [task.name for task in plan.tasks] == ["urls", "fetch", "total"]
    assert plan.constants == {"urls": {"depth": 4}} and plan.targets == {"total"}
    assert settings == Settings(
        jobs=3,
        policy="keep-going",
        resources={"gpu": 2.0, "memory": 4e9},
        output="group",
        json=True,
        joblog="log.tsv",
        start_method="spawn",
        inline=True,
    )


def test_exec_has_defaults(executed: list[Any]) -> None:
    main(["exec"])
    [(plan, settings)] = executed
    assert plan.file == str(Path("tasks.py").absolute())
    assert settings.jobs == cores_here() >= 1
    assert (settings.policy, settings.output) == ("stop", "line")
    assert (settings.start_method, settings.joblog, settings.json) == ("forkserver", None, False)


def test_every_option_can_be_a_variable(
    executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKRUN_JOBS", "5")
    monkeypatch.setenv("TASKRUN_KEEP_GOING", "1")
    monkeypatch.setenv("TASKRUN_RESOURCE", "gpu=2 tpu=1")
    monkeypatch.setenv("TASKRUN_PARAM", "depth=4 seed=s")
    monkeypatch.setenv("TASKRUN_START_METHOD", "spawn")
    main(["exec"])
    main(["exec", "--fail-fast", "-j", "1"])
    (plan, first), (_, second) = executed
    assert plan.constants == {"urls": {"depth": 4, "seed": "s"}}
    assert (first.jobs, first.policy, first.start_method) == (5, "keep-going", "spawn")
    assert first.resources == {"gpu": 2.0, "tpu": 1.0}
    assert (second.jobs, second.policy) == (1, "fail-fast")  # what is typed counts more
    monkeypatch.setenv("TASKRUN_ENGINE", "dask")
    main(["exec", "--inline"])
    assert executed[2][1].inline and executed[2][1].engine is None


def test_a_dry_run_says_what_would_run_how_often_and_why(
    capsys: pytest.CaptureFixture[str], executed: list[Any]
) -> None:
    assert output_of(capsys, "exec", "total", "-n").splitlines() == [
        "urls   1 call              needed by total",
        "fetch  1 per item of urls  needed by total",
        "total  1 call              named on the command line",
    ]
    assert executed == []


def test_a_dry_run_says_what_is_left_out_for_want_of_a_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert output_of(capsys, "exec", "-n").splitlines()[-1] == "work   left out: needs -p x=..."
    assert "left out" not in output_of(capsys, "exec", "-n", "-p", "x=1")
    assert "left out" not in output_of(capsys, "exec", "-n", "total")


# -- map ------------------------------------------------------------------------------


def test_map_converts_its_arguments(executed: list[Any]) -> None:
    assert main(["map", "tasks.py:double", "--keep-order", "-j", "2", "--", "1", "-2"]) == 0
    [(task, lines, settings, keep_order)] = executed
    assert (task.name, lines, settings.jobs, keep_order) == ("double", [1, -2], 2, True)
    assert task.function(4) == 8


def test_map_takes_tasks_and_whatever_their_first_parameter_comes_from(
    executed: list[Any],
) -> None:
    main(["map", "tasks.py:fetch", "http://a"])
    assert executed[0][0].name == "fetch" and executed[0][1] == ["http://a"]


MAPPED = """
import os, sys, types
fake = types.ModuleType("taskrun.coordinator")
fake.Settings = types.SimpleNamespace
def execute_map(loaded, task, arguments, settings, keep_order, *, stdout):
    for argument in arguments:
        os.write(stdout, (argument.unfit or repr(argument.value)).encode() + b"\\n")
    return 0
fake.execute_map = execute_map
sys.modules["taskrun.coordinator"] = fake
from taskrun.cli.main import main
from taskrun.settings import Settings, cores_here
sys.exit(main(sys.argv[1:]))
"""


def mapped(function: str, **streams: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", MAPPED, "map", function]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **streams)


def test_map_reads_stdin_line_by_line_as_it_comes() -> None:
    process = mapped("tasks.py:double")
    assert process.stdin is not None and process.stdout is not None
    for number in (b"1", b"2"):
        process.stdin.write(number + b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == number + b"\n"
    process.stdin.close()
    assert process.wait(60) == 0


def test_map_names_the_line_that_does_not_fit_and_reads_on() -> None:
    out, _ = mapped("tasks.py:double").communicate(b"1\nx\n3\n", timeout=60)
    unfit = b"line 2 of stdin: double: x='x' does not fit; expected int"
    assert out.splitlines() == [b"1", unfit, b"3"]


def test_map_takes_lines_that_are_no_text_as_file_names_do(folder: Path) -> None:
    (folder / "names.py").write_text("def size(path): ...\n")
    out, _ = mapped("names.py:size").communicate(b"\xff.txt\n\nlast", timeout=60)
    assert out == b"'\\udcff.txt'\n''\n'last'\n"


# -- list, graph ----------------------------------------------------------------------


def test_list_shows_what_there_is_and_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert output_of(capsys, "list").splitlines() == [
        "* urls   List the pages.",
        "         seed='http://x/', depth=2",
        "* fetch",
        "         url=each(urls)",
        "* total  Add up.",
        "         pages=result(fetch, errors='skip'), client=per_worker(dict)",
        "  work",
        "         x",
        "         needs -p x=...",
    ]


def test_a_long_name_does_not_push_all_others_aside(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"@task(name='{name}')\ndef {fun}(): 'Do.'" for name, fun in (("n" * 99, "f"), ("名", "g"))
    ]
    (folder / "tasks.py").write_text("\n".join(["from taskrun import task", *lines]))
    long, wide = output_of(capsys, "list").splitlines()
    assert long == f"* {'n' * 99}  Do."
    assert wide == f"* 名{' ' * 38}  Do."  # two columns wide


@pytest.mark.parametrize("command", [["list"], ["--help"], ["exec", "--dry-run"]])
@pytest.mark.parametrize("unbuffered", ["1", ""])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_stdout_is_an_error_of_one_line(command: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "taskrun", *command], stdout=full, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, timeout=60,
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr == b"taskrun: error: cannot write to stdout: No space left on device\n"


def test_an_error_is_not_written_to_stdout_where_stderr_is_closed(tmp_path: Path) -> None:
    words = [str(os.getpid()), str(tmp_path / "socket"), "p1", "1"]
    command = f"exec {sys.executable} -m taskrun.cli.lent {' '.join(words)} 2>&-"
    ended = subprocess.run(
        ["sh", "-c", command], stdout=subprocess.PIPE, timeout=60, check=False,
        env={**os.environ, "TASKRUN_AUTHKEY_FILE": str(tmp_path / "no key")},
    )  # fmt: skip
    assert ended.returncode != 0
    assert ended.stdout == b""


def test_graph_draws_a_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert output_of(capsys, "graph", "total").splitlines() == [
        "total",
        "├── fetch [result]",
        "│   └── urls [each]",
        "└── urls [after]",
    ]


def test_a_tree_names_what_was_shown_only_again() -> None:
    from taskrun import task

    a = task(lambda: 1, name="a")
    b = task(lambda: 1, name="b", after=[a])
    c = task(lambda: 1, name="c", after=[b])
    d = task(lambda: 1, name="d", after=[b, c])
    assert list(tree_lines([a, b, c, d], boxes=False)) == [
        "d",
        "|-- b [after]",
        "|   `-- a [after]",
        "`-- c [after]",
        "    `-- b [after] (see above)",
    ]


def test_graph_escapes_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "odd.py").write_text(
        "from taskrun import task\n@task(name='a\"b\\\\c #<1>')\ndef a(): ...\n"
        "@task(after=a)\ndef b(): ...\n"
    )
    assert '"a\\"b\\\\c #<1>" -> "b" [label="after" style=dashed];' in output_of(
        capsys, "graph", "odd.py", "--dot"
    )
    mermaid = output_of(capsys, "graph", "odd.py", "--mermaid")
    assert 't0["a#34;b#92;c #35;#60;1#62;"]' in mermaid and "t0 -.->|after| t1" in mermaid


# -- completion -----------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(shell: str) -> None:
    from taskrun.cli.group import cli

    done = CliRunner().invoke(cli, ["completion", shell])
    assert done.exit_code == 0 and "_TASKRUN_COMPLETE" in done.output


def completed(words: str, count: int) -> list[str]:
    wanted = {"_TASKRUN_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    return run(env={**os.environ, **wanted}).stdout.splitlines()


def test_commands_and_tasks_are_completed() -> None:
    assert completed("taskrun ma", 1) == ["plain,map"]
    assert completed("taskrun exec to", 2) == ["plain,total"]
    assert completed("taskrun exec tasks.py f", 3) == ["plain,fetch"]
    assert completed("taskrun exec zz", 2) == ["file,zz"]
    assert completed("taskrun exec tasks.py zz", 3) in ([], [""])


def test_list_completes_a_file_and_map_a_file_and_its_functions() -> None:
    assert completed("taskrun list ", 2) == ["file,"]
    assert completed("taskrun list tasks.py ", 3) in ([], [""])
    assert completed("taskrun map ta", 2) == ["file,ta"]
    assert completed("taskrun map tasks.py:d", 2) == ["plain,tasks.py:double"]


def test_run_parameters_are_completed_and_no_others() -> None:
    assert completed("taskrun exec -p ", 3) == ["plain,seed=", "plain,depth=", "plain,x="]
    assert completed("taskrun exec tasks.py -p de", 4) == ["plain,depth="]
    assert completed("taskrun exec tasks.py -p urls.", 4) == [
        "plain,urls.seed=",
        "plain,urls.depth=",
    ]


@pytest.mark.parametrize("command", ["exec", "worker", "serve", "status", "state", "key"])
def test_the_options_that_name_files_complete_files(command: str) -> None:
    assert completed(f"taskrun {command} --authkey-file ke", 3) == ["file,ke"]
    if command != "key":
        assert completed(f"taskrun {command} --tls-ca ca", 3) == ["file,ca"]


@pytest.mark.parametrize(
    ("imported", "prefix"),
    [
        ("import taskrun as tr", "tr."),
        ("import os, taskrun", "taskrun."),
        ("from taskrun import task as t, each as every", ""),
    ],
)
def test_tasks_are_completed_by_whatever_names_the_file_has_for_ours(
    folder: Path, imported: str, prefix: str
) -> None:
    task, each = (f"{prefix}task", f"{prefix}each") if prefix else ("t", "every")
    (folder / "tasks.py").write_text(
        f"{imported}\n@{task}\ndef a(one={each}([1]), /, two=2, *, three={each}([3]), four): ...\n"
        f"@{task}(name='b')\nasync def c(): ...\n"
    )
    assert task_names(None) == ["a", "b"]
    assert completed("taskrun exec -p ", 3) == ["plain,two=", "plain,four="]


def test_completing_never_runs_the_file(folder: Path) -> None:
    (folder / "tasks.py").write_text("print('ran')\n@task(name='x')\ndef a(): ...\n1 / 0\n")
    assert completed("taskrun exec ", 2) == ["plain,x"]


@pytest.mark.parametrize("content", [b"def broken(:", b"x = '\0'", b"\xff\xfe", b"(" * 10_000])
def test_completing_is_quiet_about_broken_files(folder: Path, content: bytes) -> None:
    (folder / "tasks.py").write_bytes(content)
    assert task_names(None) == []


def test_an_error_that_cannot_be_said_keeps_its_exit_status(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [TASKRUN, "exec", str(tmp_path / "missing.py")],
            stderr=full, env=environment, timeout=60, check=False,
        )  # fmt: skip
    assert ended.returncode == 2
