"""Values on engines: large ones stay where they were made, and results are the same everywhere."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Runs, started

pytestmark = pytest.mark.timeout(180)

CENSUS = Path(__file__).parent.parent / "examples" / "census" / "tasks.py"
PROCESSES = "concurrent.futures:ProcessPoolExecutor"


def needed(engine: str, package: str) -> object:
    missing = importlib.util.find_spec(package) is None
    skip = pytest.mark.skipif(missing, reason=f"{package} is not installed")
    return pytest.param(engine, marks=skip)


DASK, RAY = needed("dask", "distributed"), needed("ray", "ray")


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


@pytest.mark.parametrize("engine", [PROCESSES, DASK, RAY])
def test_the_census_is_the_same_to_the_byte(runs: Runs, engine: str) -> None:
    import email

    library = Path(email.__file__).parent  # a part of it, and the same table
    words = "exec", str(CENSUS), "-p", f"folder={library}", "-j", "2", "--output", "raw"
    own = runs.run(*words, deadline=60).check()
    other = runs.run(*words, "--engine", engine, deadline=90).check()
    assert "largest modules" in own.out
    assert other.out == own.out


CHAIN = """
import resource
from taskrun import run, task, result

@task
def first(): return bytes(100_000_000)

@task
def second(data=result(first)): return data[:-1] + b"2"

@task
def third(data=result(second)): return data[:-2] + b"32"

@task
def last(data=result(third)): return len(data), data[-2:]

@task
def small(): return 1

if __name__ == "__main__":
    import sys
    engine = sys.argv[1]
    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    options = dict(engine=engine, jobs=2, output="quiet")
    assert run(small, **options) == 1
    with open("/proc/self/clear_refs", "w") as file: file.write("5")
    before = peak()
    assert run(last, **options) == (100_000_000, b"32")
    print("grew", peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("engine", [DASK, RAY])
def test_a_large_value_does_not_pass_through_the_coordinator(runs: Runs, engine: str) -> None:
    ended = runs.script(CHAIN, engine, deadline=120).check()
    (grew,) = [int(line.split()[1]) for line in ended.out.splitlines() if "grew" in line]
    assert grew < 20_000, f"{grew} KB"


VALUES = """
from taskrun import run, task, each

@task
def large(n=each([1, 2])): return bytes([n]) * 300_000

if __name__ == "__main__":
    import sys
    one, two = run(large, engine=sys.argv[1], jobs=2, output="quiet")
    print("got", len(one), one[0], two[-1])
"""


@pytest.mark.parametrize("engine", ["fake", PROCESSES, DASK, RAY])
def test_values_that_are_asked_for_come_home_in_the_end(runs: Runs, engine: str) -> None:
    ended = runs.script(VALUES, engine, deadline=90).check()
    assert "got 300000 1 2" in ended.out


@pytest.mark.parametrize("engine", [PROCESSES, DASK])
def test_a_value_whose_worker_died_is_named(runs: Runs, engine: str) -> None:
    if engine == PROCESSES:
        pytest.skip("an executor keeps no values")
    ended = runs.json(
        """
        @task
        def data(): return bytes(3_000_000), os.getpid()

        @task
        def kill(data=result(data)): os.kill(data[1], signal.SIGKILL)

        @task(after=[])
        def use(data=result(data), after=result(kill, errors="keep")): return len(data[0])
        """,
        "--engine", engine, "-j", "1", "-k", deadline=60,
    )  # fmt: skip
    assert ended.states["data"] == "ok"
    assert ended.failure("kill")["type"] == "WorkerLost"
    assert ended.failure("use")["type"] in ("WorkerLost", "EngineError")
