"""Key files: how they are made, and which are refused; a refusal never shows the key."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from taskrun import authkey
from taskrun.cli.main import main
from taskrun.errors import UsageError

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this user's own key is to be; there is nothing there yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("TASKRUN_AUTHKEY", "TASKRUN_AUTHKEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(authkey, "_taken", {})
    return tmp_path / "config" / "taskrun"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_key_makes_a_private_file_in_a_private_folder_and_prints_its_path(
    own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["key"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == own_folder / "authkey"
    assert (mode(path), mode(own_folder)) == (0o600, 0o700)
    assert re.fullmatch(r"[0-9a-f]{64}\n", path.read_text())
    before = path.read_text()
    assert main(["key"]) == 0
    assert path.read_text() == before


def test_key_makes_the_file_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "new" / "one", tmp_path / "two"
    assert main(["key", "--authkey-file", str(first)]) == 0
    monkeypatch.setenv("TASKRUN_AUTHKEY_FILE", str(second))
    assert main(["key"]) == 0
    assert capsys.readouterr().out.split() == [str(first), str(second)]
    assert mode(first) == mode(second) == 0o600 and mode(first.parent) == 0o700
    assert authkey.authkey() == second.read_bytes().strip()


def test_a_key_is_not_made_where_others_could_replace_it(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(UsageError, match="can be changed by others: chmod 700"):
        authkey.made_file(str(shared / "key"))
    assert list(shared.iterdir()) == []


def test_a_key_that_finds_no_room_leaves_nothing_behind(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))  # bytes, of any file
    try:
        with pytest.raises(UsageError, match="cannot be made: File too large"):
            authkey.made_file(str(tmp_path / "key"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("permissions", [0o770, 0o702])
def test_a_key_is_not_taken_from_where_others_could_replace_it(
    tmp_path: Path, permissions: int
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    path = shared / "key"
    path.write_text(KEY)
    path.chmod(0o600)
    shared.chmod(permissions)
    for take in (authkey.authkey, authkey.made_file):
        with pytest.raises(UsageError, match=f"the folder {shared} .* chmod 700 {shared}"):
            take(str(path))
    shared.chmod(0o1777)  # as /tmp: nobody can replace what is another's
    assert authkey.authkey(str(path)) == KEY.encode()


def test_a_link_to_a_key_that_others_could_replace_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    path, link = shared / "key", tmp_path / "link"
    path.write_text(KEY)
    path.chmod(0o600)
    link.symlink_to(path)
    assert authkey.authkey(str(link)) == KEY.encode()
    shared.chmod(0o777)
    with pytest.raises(UsageError, match=f"the folder {shared} .* can be changed by others"):
        authkey.authkey(str(link))


def test_a_key_file_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    pipe, folder, device = tmp_path / "pipe", tmp_path / "folder", Path(os.devnull)
    os.mkfifo(pipe, 0o600)
    folder.mkdir()
    for path in (pipe, folder, device):
        with pytest.raises(UsageError, match=f"the authkey file {path} is no regular file"):
            authkey.authkey(str(path))


def test_a_key_file_that_is_a_link_to_nothing_is_refused_with_what_it_leads_to(
    own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_folder.mkdir(parents=True, mode=0o700)
    own, named = own_folder / "authkey", tmp_path / "named"
    for path in (own, named):
        path.symlink_to(tmp_path / "gone")
    reason = f"is a link to {tmp_path}/gone, where no file is: put the key there"
    for given in (None, str(named)):
        for take in (authkey.authkey, authkey.made_file):
            with pytest.raises(UsageError, match=reason):
                take(given)
    assert main(["key"]) == main(["worker", "127.0.0.1:1"]) == 2
    assert capsys.readouterr().err.count(f"the authkey file {own} {reason}") == 2


def test_a_key_is_not_made_in_a_home_that_is_not_there_and_a_run_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["key"]) == 2
    assert f"there is no home folder {tmp_path}/home" in capfd.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.py").write_text("from taskrun import *\n@task\ndef hello(): print('here')")
    run = [sys.executable, "-m", "taskrun", "exec", "tasks.py"]
    assert "here" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert not (tmp_path / "home").exists()
    (tmp_path / "home").mkdir()
    assert main(["key"]) == 0


@pytest.mark.parametrize("before", ["\n ", "\ufeff", "\ufeff\r\n"])
def test_whitespace_around_a_key_and_a_byte_order_mark_before_it_are_ignored(
    tmp_path: Path, before: str
) -> None:
    path = tmp_path / "key"
    path.write_text(f"{before}{KEY} \r\n", encoding="utf-8")
    path.chmod(0o600)
    assert authkey.authkey(str(path)) == KEY.encode()


@pytest.mark.parametrize(
    ("content", "permissions", "reason"),
    [
        (KEY, 0o644, "can be read by others: chmod 600"),
        (KEY, 0o620, "can be read by others: chmod 600"),
        (KEY[:-1], 0o600, "has 15 bytes, and needs at least 16"),
        ("", 0o600, "is empty, and needs at least 16 bytes"),
        (" \n", 0o600, "is empty, and needs at least 16 bytes"),
        ("x" * 5000, 0o600, "has more than 4096 bytes"),
        (None, 0, "there is no authkey file"),
    ],
)
def test_a_refusal_names_the_path_and_the_reason_and_never_the_key(
    tmp_path: Path, content: str | None, permissions: int, reason: str
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
        path.chmod(permissions)
    with pytest.raises(UsageError, match=reason) as caught:
        authkey.authkey(str(path))
    assert str(path) in str(caught.value)
    assert KEY[:-1] not in str(caught.value)


@pytest.mark.parametrize(("permissions", "refused"), [(0o440, False), (0o644, True)])
def test_somebody_elses_key_file_may_be_a_groups_but_not_everybodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, permissions: int, refused: bool
) -> None:
    path = tmp_path / "key"
    path.write_text(KEY)
    path.chmod(permissions)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    if refused:
        with pytest.raises(UsageError, match="can be read by others"):
            authkey.authkey(str(path))
    else:
        assert authkey.authkey(str(path)) == KEY.strip().encode()


def test_commands_refuse_a_key_file_that_others_can_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "key"
    path.write_text(KEY)
    path.chmod(0o644)
    for command in (["key"], ["state", "tls://127.0.0.1:1"]):
        assert main([*command, "--authkey-file", str(path)]) == 2
        said = capsys.readouterr().err
        assert f"{path} can be read by others" in said and KEY not in said


def test_a_key_in_the_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKRUN_AUTHKEY", KEY)
    assert authkey.authkey() == KEY.encode()
    assert "TASKRUN_AUTHKEY" not in os.environ
    monkeypatch.setattr(authkey, "_taken", {})
    monkeypatch.setenv("TASKRUN_AUTHKEY", "short")
    with pytest.raises(UsageError, match="TASKRUN_AUTHKEY has 5 bytes"):
        authkey.authkey()


def test_a_program_may_give_the_key_itself_or_its_files_path_and_is_never_told_a_key(
    tmp_path: Path,
) -> None:
    file = tmp_path / "key"
    file.write_text("0123456789abcdef-of-a-file\n")
    file.chmod(0o600)
    assert authkey.given(file) == authkey.given(str(file)) == b"0123456789abcdef-of-a-file"
    assert authkey.given("fedcba9876543210-itself ") == authkey.given(b"fedcba9876543210-itself")
    with pytest.raises(UsageError, match=r"no authkey file .*nothing"):
        authkey.given(tmp_path / "nothing")
    with pytest.raises(UsageError, match="has 10 bytes") as caught:
        authkey.given("not-enough")
    assert "not-enough" not in str(caught.value)
    with pytest.raises(UsageError, match="is empty"):
        authkey.given("")  # and not whichever key is here
