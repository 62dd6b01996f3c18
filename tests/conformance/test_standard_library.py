"""CPython's own tests of managers, run against ours on every Python of this machine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from pythons import THIS, environment, has_tests, python

VERSIONS = ["3.11", "3.12", "3.13"]
SECONDS = 30  # for one test
CLASSES = [
    "WithManagerTestBarrier",
    "WithManagerTestCondition",
    "WithManagerTestContainers",
    "WithManagerTestEvent",
    "WithManagerTestLock",
    "WithManagerTestManagerRestart",
    "WithManagerTestMyManager",
    "WithManagerTestPool",
    "WithManagerTestQueue",
    "WithManagerTestRemoteManager",
    "WithManagerTestSemaphore",
    "TestInitializers",
    "TestManagerExceptions",  # of 3.12.1 and later
    "TestSyncManagerTypes",
]
SOAK = bool(os.environ.get("TASKRUN_SOAK"))
# They wait for seconds, and no version of Python has anything of its own there: without
# TASKRUN_SOAK with the one that runs these tests only.
SLOW = {"WithManagerTestBarrier", "WithManagerTestCondition", "WithManagerTestPool"}
CASES = [
    (name, version)
    for name in CLASSES
    for version in VERSIONS
    if SOAK or name not in SLOW or version == THIS
]

# Tests that look at the standard library's insides, with what they look at.
PRIVATE: dict[str, str] = {}


@pytest.mark.parametrize(("name", "version"), CASES)
def test_the_standard_librarys_tests_pass(name: str, version: str, tmp_path: Path) -> None:
    check(name, version, tmp_path)


@pytest.mark.skipif(not SOAK, reason="slow: set TASKRUN_SOAK=1")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_they_pass_with_spawn_as_well(name: str, version: str, tmp_path: Path) -> None:
    check(name, version, tmp_path, "spawn")


def check(name: str, version: str, folder: Path, start_method: str = "fork") -> None:
    path = python(version)
    if path is None:
        pytest.skip(f"there is no Python {version} here")
    if not has_tests(path):
        pytest.skip(f"{path} came without the test package")
    runner = Path(__file__).with_name("runner.py")
    done = subprocess.run(
        [path, runner, name, str(SECONDS), start_method],
        env=environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS * 20,
    )
    if f"LookupError: {name}" in done.stderr:
        pytest.skip(f"Python {version} has no {name}")
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    failed = [
        f"{method}: {text}"
        for method, how, text in outcomes
        if how == "failed" and method not in PRIVATE
    ]
    assert not failed, "\n".join(failed)
    assert outcomes and done.returncode == 0, done.stdout + done.stderr
