"""Addresses: which ones are refused at once, and what is left of sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transport_support import KEY

from taskrun import addresses, connect, places
from taskrun.cli.main import main
from taskrun.errors import StateLost, UsageError

# -- how they are written -------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "192.168..1:7077", ".example:1", f"{'x' * 64}.example:1", "tls://a..b:1", "a\0b:1",
        "a b:1", "a/b:1", ":1", "host", f"host:{'1' * 5000}", "host:65536", "host:-1",
    ],
)  # fmt: skip
def test_what_no_host_and_no_port_can_be_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="an address is HOST:PORT, tls://HOST:PORT or unix:PATH"):
        addresses.parse(text)


@pytest.mark.parametrize("text", ["example.org.:7077", "bücher.example:1", "[fe80::1%eth0]:1"])
def test_what_a_host_can_be_called_is_an_address(text: str) -> None:
    assert addresses.shown(addresses.parse(text)) == f"tls://{text}"


def test_port_0_is_for_those_who_listen_only() -> None:
    assert addresses.parse("127.0.0.1:0", to_listen=True) == ("127.0.0.1", 0)
    with pytest.raises(UsageError, match="nobody can be reached at port 0"):
        addresses.parse("127.0.0.1:0")


def test_a_path_that_no_socket_has_is_refused() -> None:
    assert addresses.parse("unix:/" + "x" * 106) == "/" + "x" * 106
    for text in ("unix:/" + "x" * 107, "/" + "x" * 107):
        with pytest.raises(UsageError, match="at most 107 bytes"):
            addresses.parse(text)
    with pytest.raises(UsageError, match="only with the PATH"):
        addresses.parse("unix:")


@pytest.mark.parametrize("address", ["a..b:1", "127.0.0.1:0", "unix:"])
@pytest.mark.parametrize("command", ["status", "worker", "state"])
def test_a_command_refuses_an_address_that_can_never_be_right(
    command: str, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, address]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_pair_whose_host_has_no_name_that_can_be_looked_up_is_not_found() -> None:
    with pytest.raises(StateLost, match="cannot be found: no host can have this name"):
        connect(("a..b", 1), KEY)


def test_to_listen_at_any_port_with_a_certificate_is_no_mistake(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "--listen", "127.0.0.1:0", "--tls-cert", "x"]) == 2
    assert "is for TLS, and at 127.0.0.1:0 there is none" in capsys.readouterr().err


# -- what is left behind --------------------------------------------------------------


def gone() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    return process.pid


def made_in(socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this user's sockets, made there."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(socket_folder))
    folder = Path(addresses.runtime_folder())
    folder.mkdir(mode=0o700)
    return folder


def test_the_next_run_removes_the_sockets_of_those_that_were_killed_and_no_others(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_in(socket_folder, monkeypatch)
    dead, here = gone(), os.getpid()
    left = [f"run-{dead}.sock", f"run-{dead}-1.sock", f"serve-{dead}-r2.sock"]
    others = [f"serve-{here}-r1.sock", "mine.sock", f"run-{dead}.txt"]
    for name in (*left, *others):
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(folder / name))
    with addresses.listen_for_run():
        assert sorted(os.listdir(folder)) == sorted([*others, f"run-{here}.sock"])


def test_looking_for_live_runs_leaves_one_that_is_about_to_listen_its_socket(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_in(socket_folder, monkeypatch)
    starting, dead = folder / f"run-{os.getpid()}.sock", folder / f"run-{gone()}.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(starting))
        assert addresses.live_runs() == [] and starting.exists() and not dead.exists()
        made.listen()
        assert addresses.live_runs() == [str(starting)]


def test_a_private_socket_of_a_killed_process_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_own", None)
    # Neither has room for a socket's path.
    monkeypatch.setenv("TASKRUN_SHM", str(tmp_path / "no memory"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 80)))
    code = """
import os, signal
from taskrun.addresses import listen_privately
print(listen_privately().getsockname(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=30)
    left = Path(os.fsdecode(killed.stdout.strip()))
    assert left.is_socket() and len(str(left)) < 108
    with addresses.listen_privately() as made:
        path = Path(made.getsockname())
        assert path.stat().st_mode & 0o777 == 0o600
        assert not left.parent.exists()
    addresses.forget_private(str(path))
    assert not path.parent.exists()
