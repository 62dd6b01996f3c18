"""CPython's own tests of ProcessPoolExecutor, run against ours where a Python has them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from pythons import python
from test_pool_conformance import environment

VERSIONS = ["3.12", "3.13"]  # in 3.11 they are not a package yet
METHODS = ["fork", "spawn", "forkserver"]
MODULES = ["process_pool", "wait", "as_completed", "init", "shutdown", "deadlock"]
SECONDS = 30  # for one test
SOAK = bool(os.environ.get("TASKRUN_SOAK"))

_PROCESSES = "looks at executor._processes"

# Tests that look at the standard library's insides, or ask for what ours does better.
DIFFERENT = {
    "test_killed_child": _PROCESSES,
    "test_saturation": _PROCESSES,
    "test_idle_process_reuse_one": _PROCESSES,
    "test_idle_process_reuse_multiple": _PROCESSES,
    "test_processes_terminate": _PROCESSES,
    "test_context_manager_shutdown": _PROCESSES,
    "test_shutdown_no_wait": _PROCESSES,
    "test_max_tasks_per_child": "refuses fork; looks at executor._processes",
    "test_max_tasks_per_child_defaults_to_spawn_context": "looks at executor._mp_context",
    "test_del_shutdown": "looks at executor._executor_manager_thread",
    "test_shutdown_deadlock_pickle": "looks at executor._executor_manager_thread",
    "test_python_finalization_error": "counts the threads that are started",
    "test_initializer": "looks at executor._broken",
    "test_interpreter_shutdown": "imports the class by its name from the standard library",
    "test_submit_after_interpreter_shutdown": "imports it by its name, too",
}
# Of the others some take ten seconds.
CASES = [
    (module, method, version)
    for module in MODULES
    for method in METHODS
    for version in VERSIONS
    if SOAK or (method == "fork" and module not in ("process_pool", "wait", "deadlock"))
]


@pytest.mark.parametrize(("module", "method", "version"), CASES)
def test_the_standard_librarys_executor_tests_pass(
    module: str, method: str, version: str, tmp_path: Path
) -> None:
    path = python(version)
    if path is None:
        pytest.skip(f"there is no Python {version} here")
    code = "import test.test_concurrent_futures.util"
    if subprocess.run([path, "-c", code], capture_output=True, timeout=60).returncode:
        pytest.skip(f"{path} came without these tests")
    runner = Path(__file__).with_name("executor_runner.py")
    done = subprocess.run(
        [path, runner, f"test_{module}", str(SECONDS), method],
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS * 10,
    )
    starts = [line.find('["test') for line in done.stdout.splitlines()]
    lines = zip(done.stdout.splitlines(), starts, strict=True)
    outcomes = [json.loads(line[start:]) for line, start in lines if start >= 0]
    failed = [
        f"{name}: {text}"
        for name, how, text in outcomes
        if how == "failed" and name not in DIFFERENT
    ]
    assert not failed, "\n".join(failed)
    assert outcomes and done.returncode == 0, done.stdout + done.stderr
