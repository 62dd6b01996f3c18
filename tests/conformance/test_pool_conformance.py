"""CPython's own tests of multiprocessing.Pool, run against ours on every Python of this machine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import cloudpickle
import pytest
import tblib
from pythons import THIS, has_tests, python

import taskrun.workers

VERSIONS = ["3.11", "3.12", "3.13"]
METHODS = ["fork", "spawn", "forkserver"]
SECONDS = 30  # for one test
CLASSES = [
    "WithProcessesTestPool",
    "WithProcessesTestPoolWorkerErrors",
    "WithProcessesTestPoolWorkerLifetime",
]
SOAK = bool(os.environ.get("TASKRUN_SOAK"))


def environment(folder: Path) -> dict[str, str]:
    """The variables with which any Python can import this taskrun and what it needs."""
    package = folder / "taskrun"
    package.mkdir()
    for path in Path(taskrun.__file__).parent.iterdir():
        (package / path.name).symlink_to(path)
    if not (package / "workers").exists():  # the checkout has them elsewhere
        (package / "workers").symlink_to(Path(taskrun.workers.__path__[0]))
    for library in (cloudpickle, tblib):  # pure Python, good for every version
        assert library.__file__
        (folder / library.__name__).symlink_to(Path(library.__file__).parent)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def cases() -> list[tuple[str, str, str]]:
    """All classes with fork on every Python; of the other start methods one that is quick each,
    with the Python that runs these tests.  All of them with TASKRUN_SOAK."""
    every = [(name, method, version) for version in VERSIONS for method in METHODS
             for name in CLASSES]  # fmt: skip
    quick = {
        ("WithProcessesTestPoolWorkerErrors", "spawn", THIS),
        ("WithProcessesTestPoolWorkerLifetime", "forkserver", THIS),
    }
    return [case for case in every if SOAK or case[1] == "fork" or case in quick]


@pytest.mark.parametrize(("name", "method", "version"), cases())
def test_the_standard_librarys_pool_tests_pass(
    name: str, method: str, version: str, tmp_path: Path
) -> None:
    path = python(version)
    if path is None:
        pytest.skip(f"there is no Python {version} here")
    if not has_tests(path):
        pytest.skip(f"{path} came without the test package")
    runner = Path(__file__).with_name("pool_runner.py")
    done = subprocess.run(
        [path, runner, name, str(SECONDS), method],
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS * 10,
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    failed = [f"{method}: {text}" for method, how, text in outcomes if how == "failed"]
    assert not failed, "\n".join(failed)
    assert outcomes and done.returncode == 0, done.stdout + done.stderr
