"""Servers and clients of different Pythons; the clients have nothing but Python."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pythons import environment, python

SECONDS = 60
SERVERS = ["3.11", "3.12", "3.13"]
CLIENTS = ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13", "3.14"]

SERVER = """
import sys
from taskrun.manager import SyncManager
class Greeter:
    def greet(self, name):
        return "hello " + name
SyncManager.register("Greeter", Greeter)
server = SyncManager(address=eval(sys.argv[1]), authkey=b"between versions").get_server()
print(repr(server.address), flush=True)
server.serve_forever()
"""


@contextmanager
def server(path: str, folder: Path, address: object) -> Iterator[str]:
    process = subprocess.Popen(
        [path, "-c", SERVER, repr(address)],
        env=environment(folder),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
        assert process.wait(20) == 0  # the client has asked it to end
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


@pytest.mark.parametrize("family", ["tcp", "unix"])
@pytest.mark.parametrize("client_version", CLIENTS)
@pytest.mark.parametrize("server_version", SERVERS)
def test_every_client_uses_everything_of_every_server(
    server_version: str, client_version: str, family: str, tmp_path: Path
) -> None:
    server_path, client_path = python(server_version), python(client_version)
    for path, version in ((server_path, server_version), (client_path, client_version)):
        if path is None:
            pytest.skip(f"there is no Python {version} here")
    if family == "unix" and server_version != client_version:
        pytest.skip("the family makes no difference to the versions")
    assert server_path and client_path
    address = ("127.0.0.1", 0) if family == "tcp" else None
    with server(server_path, tmp_path, address) as found:
        done = subprocess.run(
            [client_path, "-I", "-S", Path(__file__).with_name("client.py"), found],
            env={**os.environ, "PYTHONPATH": ""},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip() == "all of it works"
