"""Fixtures that several test files use."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from workshop import make, shop

from taskrun import authkey

__all__ = ["make", "shop"]

# A shell starts what runs in the background with SIGINT ignored, and so would we start what
# is tested here, which then could not be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def own_runs_only() -> Iterator[None]:
    """A command that takes the only live run must not meet those of other processes' tests."""
    folder = tempfile.mkdtemp(prefix="taskrun-tests-", dir="/tmp")  # a socket's path is short
    os.environ["XDG_RUNTIME_DIR"] = folder
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """An XDG_RUNTIME_DIR of this test's own, at a path that is short: those of sockets must be."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def no_key_of_another_test() -> Iterator[None]:
    """A key that was taken from the environment stays in memory, and the variable does not."""
    yield
    authkey._taken.clear()
