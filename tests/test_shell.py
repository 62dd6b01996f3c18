"""sh(): what bash gets, what comes back, and that nothing is left of it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from taskrun import shell
from taskrun.quoting import fill, plain_words
from taskrun.shell import kill_groups, sh

pytestmark = pytest.mark.timeout(60)

NASTY = [
    "; rm -rf /", "a b", "", "two\nlines\n", "it's", '"double"', "$HOME", "$(echo no)", "`echo no`",
    "\\", "\\'", "a\\", "!!", "*", "~", "-n", "#no", "{a,b}", "é☃", "\t", "&&", "|", "%s", "\x01",
    "'\"'\"'", "')", "EOF", "x=1", "🙂 \u202e",
]  # fmt: skip


def eventually(holds: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether ``holds()`` within ``seconds``; for what no event tells of."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert not shell._groups
    assert sorted(os.listdir("/proc/self/fd")) == before


# -- what bash gets -------------------------------------------------------------------


@pytest.mark.parametrize("value", NASTY)
@pytest.mark.parametrize(
    "template",
    [
        "printf %s {value}",
        "printf %s '{value}'",
        'printf %s "{value}"',
        "printf %s $'{value}'",
        'printf %s "$(printf %s {value}; echo .)" | head -c -1',
        """printf %s "$(printf %s "{value}"; echo ')' >/dev/null; echo .)" | head -c -1""",
        "# it's a comment\nprintf %s {value}",
        "cat <<'EOF' >/dev/null\nit's\nEOF\nprintf %s {value}",
        'cat <<< "it\'s" > /dev/null; printf %s {value}',
        "(printf %s '' {value})",
    ],
)
def test_a_value_arrives_as_it_is_wherever_it_stands(template: str, value: str) -> None:
    assert sh(template).stdout == value


def test_lists_become_words() -> None:
    names = ["a b", "", "c'd", 3, Path("/e f")]  # noqa: F841
    assert sh("printf '<%s>' {names}").stdout == "<a b><><c'd><3></e f>"
    assert sh("printf '<%s>' \"x{names}y\"").stdout == "<xa b><><c'd><3></e fy>"
    assert sh("printf '<%s>' x {names} y", names=()).stdout == "<x><y>"


def test_names_come_from_keywords_then_from_the_callers_locals() -> None:
    word, other = "local", "too"  # noqa: F841
    assert sh("echo {word} {other}", word="keyword").stdout == "keyword too\n"
    assert [sh("echo {i}").stdout for i in range(2)] == ["0\n", "1\n"]


def test_attributes_and_items_can_be_taken() -> None:
    page = SimpleNamespace(url="u v", parts=[{"key": "k w"}])  # noqa: F841
    assert sh("echo {page.url} {page.parts[0][key]} {page.parts[-1]}").stdout == (
        "u v k w {'key': 'k w'}\n"
    )
    with pytest.raises(AttributeError, match="nope"):
        sh("echo {page.nope}")


def test_bytes_are_decoded_as_file_names_are() -> None:
    assert sh("printf %s {name}", name=b"a b").stdout == "a b"


@pytest.mark.parametrize(
    "text",
    [
        "echo {a,b} {1..3} {}",
        "echo ${HOME} ${HOME:-x} ${#HOME} ${{word}}",
        "awk '{print $1}' {} 'BEGIN{while(1){x++}}'",
        "docker ps --format '{{.Names}} {{json .}}'",
        'echo \'{"a": {"b": 1}}\'',
        "if true; then { echo x; }; fi",
    ],
)
def test_other_braces_are_bashs(text: str) -> None:
    assert fill(text, lambda name: pytest.fail(name)) == text


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{{word}}", "{word}"),
        ("{{{word}}}", "{W}"),
        ("{{{{word}}}}", "{{word}}"),
        ("{{word},{word}}", "{W,W}"),
        ("awk '{print {word}}'", "awk '{print W}'"),
        ("${HOME:-{word}}", "${HOME:-W}"),
        ("awk '{{print}}'", "awk '{print}'"),
        ("cat <<EOF\n{{word}}\nEOF\n{word}", "cat <<EOF\n{word}\nEOF\nW"),
        ("echo $((1 << 2))\n{word} $((1 << n))\n{word}", "echo $((1 << 2))\nW $((1 << n))\nW"),
        ("# don't {word}\n{word}", "# don't {word}\nW"),
        ("echo a#b'{word}'", "echo a#b'W'"),
        ('"{word}"', '"W"'),
    ],
)
def test_doubled_braces_around_a_name_are_single_ones(text: str, filled: str) -> None:
    assert fill(text, lambda name: "W") == filled


def test_a_name_without_value_is_an_error_that_suggests() -> None:
    pattern = "x"  # noqa: F841
    with pytest.raises(NameError) as caught:
        sh("grep {patern} file")
    assert str(caught.value) == (
        "sh() has no value for {patern} (did you mean {pattern}?): "
        "pass patern=..., or write {{patern}} if bash is to get these braces"
    )
    with pytest.raises(NameError, match=r"no value for \{print\}: pass print=\.\.\., or write"):
        sh("awk '{print}'")


def test_where_bash_cannot_quote_a_value_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\{x\} in a here-document .*: use input="):
        sh("cat <<EOF > /dev/null\n{x}\nEOF", x="a")
    with pytest.raises(ValueError, match=r"\{x\} in backticks .*: use \$\(\.\.\.\)"):
        sh('echo "`echo {x}`"', x="a")
    with pytest.raises(ValueError, match="NUL"):
        sh("echo {x}", x="a\0b")


def test_a_list_is_not_a_command() -> None:
    with pytest.raises(TypeError, match="one str, not a list"):
        sh(["ls", "-l"])  # type: ignore[arg-type]


# -- what comes back ------------------------------------------------------------------


def test_both_outputs_come_back_and_are_copied(capfd: pytest.CaptureFixture[str]) -> None:
    done = sh("echo out; echo err >&2")
    assert isinstance(done, subprocess.CompletedProcess)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 0)
    assert done.args == "echo out; echo err >&2"
    assert tuple(capfd.readouterr()) == ("out\n", "err\n")


def test_what_python_printed_before_comes_before(tmp_path: Path) -> None:
    script = "from taskrun.shell import sh; print('one'); sh('echo two'); print('three')"
    with (tmp_path / "out").open("wb") as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\n"


def test_a_closed_stdout_does_not_matter() -> None:
    script = """
import os, sys
from taskrun.quoting import plain_words
from taskrun.shell import sh
for fd in (0, 1): os.close(fd)
done = sh("echo out; cat; echo err >&2", input="in")
assert (done.stdout, done.stderr) == ("out\\nin", "err\\n"), done
assert sh("echo again").stdout == "again\\n"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stderr == b"err\n"


def test_what_is_not_utf8_is_replaced() -> None:
    assert sh(r"printf 'a\xffb\r\n'").stdout == "a\ufffdb\r\n"


@pytest.mark.parametrize(
    ("command", "status"),
    [("exit 3", 3), ("false | cat", 1), ("false; true", 1), ("kill -9 $$", -9), ("nosuch", 127)],
)
def test_a_failure_is_raised_with_command_status_and_outputs(command: str, status: int) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        sh(f"echo out; echo err >&2; {command}")
    error = caught.value
    assert error.returncode == status
    assert error.stdout == "out\n" and error.stderr.startswith("err\n")
    assert repr(f"echo out; echo err >&2; {command}") in str(error)
    assert sh(command, check=False).returncode == status


def test_it_runs_in_the_given_folder(tmp_path: Path) -> None:
    folder = tmp_path / "it's a\nfolder"
    folder.mkdir()
    assert sh("pwd", cwd=folder).stdout == f"{folder}\n"
    assert sh("pwd").stdout == f"{Path.cwd()}\n"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sh("pwd", cwd=tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError):
        sh("pwd", cwd="/etc/passwd")


def test_env_is_added_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "kept")
    assert sh("echo $KEPT $NEW", env={"NEW": "new"}).stdout == "kept new\n"
    assert "NEW" not in os.environ


def test_input_is_read_and_without_it_there_is_none() -> None:
    assert sh("cat", input="é\n").stdout == "é\n"
    assert sh("wc -c", input=b"\xff\x00").stdout.strip() == "2"
    assert sh("cat").stdout == sh("cat", input="").stdout == ""
    with pytest.raises(TypeError, match="input= takes str or bytes, not int"):
        sh("cat", input=3)  # type: ignore[arg-type]


def test_input_that_is_not_read_is_no_error() -> None:
    assert sh("head -c 3", input="abc" * 1_000_000).stdout == "abc"
    assert sh("exec <&-; echo x", input="abc" * 1_000_000).stdout == "x\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("true", ["true"]),
        ("gcc -O2 -c a.c -o=b.o", ["gcc", "-O2", "-c", "a.c", "-o=b.o"]),
        ("A=1 true", None),
        ("cd /tmp", None),
        ("echo a", None),
        ("ls *.c", None),
        ("ls ~", None),
        ("a|b", None),
        ("a;b", None),
        ("a  b", None),
        ("ls $HOME", None),
        ("ls 'a b'", None),
        ("ls {a,b}", None),
        ("ls a\nls b", None),
        ("", None),
    ],
)
def test_a_shell_is_spared_only_where_nothing_means_anything_to_it(
    command: str, words: list[str] | None
) -> None:
    assert plain_words(command) == words


def test_a_program_without_a_shell_fails_as_it_does_in_one() -> None:
    with pytest.raises(subprocess.CalledProcessError) as plain:
        sh("false")
    assert plain.value.returncode == 1
    missing = sh("no-such-program-here", check=False)
    assert missing.returncode == 127 and "no-such-program-here" in missing.stderr


def test_a_script_without_a_first_line_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "old-script"
    script.write_text("echo from $0\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sh("old-script").stdout == f"from {script}\n"


def program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def test_a_program_named_by_its_path_is_that_one_and_none_of_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    program(tmp_path / "id", "#!/bin/sh\necho here $0\n")
    program(tmp_path / "bin" / "id", "#!/bin/sh\necho of path\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert sh("./id").stdout == "here ./id\n"
    assert sh("bin/id").stdout == "of path\n"
    shutil.copy("/bin/echo", "id")
    assert sh("./id a").stdout == "a\n"
    assert sh("./no-such-program", check=False).returncode == 127


def test_a_program_is_looked_for_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("bin", "one/bin", "other/bin"):
        (tmp_path / folder).mkdir(parents=True)
    path = {"PATH": f"bin:{tmp_path / 'bin'}:{os.environ['PATH']}"}
    assert sh("id -u", env=path).stdout == f"{os.getuid()}\n"
    shutil.copy("/bin/echo", tmp_path / "bin" / "id")
    assert sh("id -u", env=path).stdout == "-u\n"
    (tmp_path / "bin" / "id").unlink()
    program(tmp_path / "bin" / "id", "echo a script\n")
    assert sh("id -u", env=path).stdout == "a script\n"
    for folder in ("one", "other"):
        program(tmp_path / folder / "bin" / "id", f"#!/bin/sh\necho {folder}\n")
        monkeypatch.chdir(tmp_path / folder)
        assert sh("id -u", env=path).stdout == f"{folder}\n"


def test_what_cannot_be_executed_is_left_to_bash_which_looks_on_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("id", "bash"):
        (tmp_path / name).mkdir()
    program(tmp_path / "broken", "#!/no/such/interpreter\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sh("id -u").stdout == f"{os.getuid()}\n"
    broken = sh("broken", check=False)
    assert broken.returncode in (126, 127) and "broken: " in broken.stderr


def test_a_missing_bash_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(FileNotFoundError, match="needs bash"):
        sh("true")


def test_a_command_that_is_too_long_says_what_to_do() -> None:
    with pytest.raises(OSError) as caught:
        sh("echo {text}", text="x" * 3_000_000)
    assert "input=" in caught.value.__notes__[0]


def test_sigpipe_and_sigint_are_as_commands_expect_them() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert sh("set +o pipefail; yes | head -n 1").stdout == "y\n"
        assert sh("kill -INT $$; sleep 60", check=False).returncode == -signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


# -- much of it -----------------------------------------------------------------------


def quietly(script: str, timeout: float = 50) -> subprocess.CompletedProcess[str]:
    """Run Python code that uses sh, its copied output thrown away but for the last line."""
    return subprocess.run(
        [sys.executable, "-c", f"from taskrun.shell import *\n{script}"],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_fifty_megabytes_through_each_output() -> None:
    done = quietly(
        "import sys\n"
        "done = sh('head -c 50000000 /dev/zero & head -c 50000000 /dev/zero >&2; wait')\n"
        "sys.exit(f'{len(done.stdout)} {len(done.stderr)}')"
    )
    assert done.stderr.lstrip("\0") == "50000000 50000000\n"
    assert len(done.stdout) == 50_000_000


def test_ten_megabytes_of_input_while_output_flows() -> None:
    done = quietly(
        "import sys\n"
        "data = 'line of text\\n' * 800_000\n"
        "sys.exit(str(sh('tee /dev/stderr', input=data).stdout == data))"
    )
    assert done.stderr.endswith("True\n")
    assert len(done.stdout) == 10_400_000


def test_commands_run_side_by_side_in_threads() -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        results[number] = sh("sleep 0.1; echo {number}").stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {number: f"{number}\n" for number in range(20)}


# -- how it ends ----------------------------------------------------------------------


def test_a_background_process_that_keeps_the_pipes_does_not_hang_it() -> None:
    began = time.monotonic()
    done = sh("(trap '' PIPE; exec sleep 30) & echo $!")
    assert time.monotonic() - began < 5
    pid = int(done.stdout)
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_what_a_background_process_writes_at_once_is_still_read() -> None:
    assert sh("(sleep 0.05; echo late) & echo early").stdout == "early\nlate\n"


def test_closed_outputs_are_not_the_end() -> None:
    done = sh("exec >&- 2>&-; sleep 0.1; exit 7", check=False)
    assert done.returncode == 7


def started(command: str) -> tuple[threading.Thread, dict[str, Any], int]:
    """``command`` in a thread, once it has written the pid that it writes first."""
    result: dict[str, Any] = {}
    reader, writer = os.pipe()

    def work() -> None:
        try:
            result["done"] = sh(command, fd=f"/proc/{os.getpid()}/fd/{writer}", check=False)
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=work)
    thread.start()
    assert select.select([reader], [], [], 30)[0]
    pid = int(os.read(reader, 100))
    os.close(reader)
    os.close(writer)
    return thread, result, pid


def test_kill_groups_ends_grandchildren_too() -> None:
    thread, result, pid = started("(sleep 1000 & echo $! > {fd}; wait); echo never")
    assert alive(pid)
    began = time.monotonic()
    kill_groups()
    thread.join(10)
    assert time.monotonic() - began < 5
    assert result["done"].returncode == -signal.SIGTERM and result["done"].stdout == ""
    assert eventually(lambda: not alive(pid))


def test_kill_groups_kills_what_ignores_sigterm() -> None:
    thread, result, pid = started("trap '' TERM; sleep 1000 & echo $! > {fd}; wait")
    kill_groups()
    thread.join(10)
    assert result["done"].returncode == -signal.SIGKILL
    assert eventually(lambda: not alive(pid))


def test_kill_groups_without_a_group_does_nothing() -> None:
    began = time.monotonic()
    kill_groups()
    assert time.monotonic() - began < 0.2


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "])
def test_an_exception_that_leaves_sh_ends_its_group_first(trap: str, tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    before = signal.signal(signal.SIGUSR1, stop)
    note, parent = tmp_path / "pid", os.getpid()
    try:
        with pytest.raises(Stop):
            sh(f"{trap}sleep 1000 & echo $! > {{note}}; kill -USR1 {parent}; wait")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert eventually(lambda: not alive(int(note.read_text())))


def test_interrupts_at_any_moment_leave_no_process() -> None:
    class Stop(BaseException):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    def interrupt(delay: float) -> None:
        time.sleep(delay)
        signal.pthread_kill(main, signal.SIGUSR1)

    main = threading.get_ident()
    others = psutil.Process().children(recursive=True)
    before = signal.signal(signal.SIGUSR1, stop)
    stopped = 0
    try:
        for microseconds in range(0, 3000, 60):
            thread = threading.Thread(target=interrupt, args=(microseconds / 1e6,))
            try:
                thread.start()
                sh("sleep 1000")
            except Stop:
                stopped += 1
            thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stopped == 50
    assert set(psutil.Process().children(recursive=True)) <= set(others)


def test_a_status_that_someone_else_took_is_an_error() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(ChildProcessError, match="exit status of sh"):
            sh("true")
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_it_works_where_the_end_of_a_process_cannot_be_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    assert sh("echo x; sleep 0.05; exit 4", check=False).returncode == 4
    assert sh("exec >&- 2>&-; sleep 0.05; exit 5", check=False).returncode == 5
    assert sh("sleep 5 & echo $!; kill $!").returncode == 0


def test_a_child_that_was_forked_amid_another_threads_command_can_run_one() -> None:
    # In a process of its own: a process with threads had better not fork.
    code = """
import os, signal, threading
from taskrun import shell

waiting, others = os.waitpid, threading.Event()

def waitpid(pid, options):
    if threading.current_thread() is not threading.main_thread() and not others.is_set():
        begun.set()
        others.wait(20)  # as at any moment when the interpreter's lock is free
    return waiting(pid, options)

begun = threading.Event()
os.waitpid = waitpid
thread = threading.Thread(target=lambda: shell.sh("true"))
thread.start()
assert begun.wait(20)
child = os.fork()
if not child:
    signal.alarm(10)
    shell.kill_groups()  # they are not the child's
    print(shell.sh("echo $((6 * 7))").stdout, end="", flush=True)
    os._exit(0)
others.set()
thread.join()
assert waiting(child, 0)[1] == 0
"""
    command = [sys.executable, "-W", "ignore", "-c", code]  # Python 3.12 warns of the fork
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "42" in done.stdout
