"""What functions of a script, and what they belong to, are in the workers of a Pool."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from taskrun import Pool

pytestmark = pytest.mark.timeout(120)

SECONDS = 60.0

SCRIPT = """
import sys
from functools import partial
from multiprocessing import get_context
from taskrun import Pool

model = None

def begin(value):
    global model
    model = value

def work(y, x):
    return model

class Thing:
    def method(self, x):
        return model, self

    @classmethod
    def of_class(cls, x):
        return model, cls()

    @staticmethod
    def static(x):
        return model, Thing()

    class Inner:
        def __call__(self, x):
            return model, self

def main():
    with Pool(1, begin, (7,), context=get_context(sys.argv[1])) as pool:
        for function in (
            partial(work, 1), lambda x: work(1, x), Thing().method, Thing.of_class, Thing.static,
            Thing.Inner(), lambda x: (work(1, x), Thing()),
        ):
            found = [
                *pool.map(function, range(2)), *pool.imap(function, range(2)),
                *pool.imap(function, range(2), chunksize=2), pool.apply(function, (1,)),
            ]
            assert len(found) == 7
            for value in found:
                value, thing = value if isinstance(value, tuple) else (value, Thing())
                assert value == 7, function
                assert isinstance(thing, (Thing, Thing.Inner)), function
    print("all")

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_what_has_a_name_in_the_script_is_in_workers_what_it_is_there(
    method: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), method],
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("all\n", "")


LATER = """
from functools import partial
from multiprocessing import get_context
from taskrun import Executor, Pool

pool = Pool(2, context=get_context("fork"))
executor = Executor(2, get_context("fork"))

def work(y, x):
    return x + y

class Thing:
    def method(self, x):
        return x + 1

    def __call__(self, x):
        return x + 1

for function in (partial(work, 1), Thing().method, Thing(), partial(Thing().method)):
    assert pool.map(function, [1, 2]) == [2, 3]
    assert list(pool.imap(function, [1, 2])) == [2, 3]
    assert list(pool.imap(function, [1, 2], chunksize=2)) == [2, 3]
    assert pool.apply(function, (1,)) == 2
    assert executor.submit(function, 1).result() == 2
    assert list(executor.map(function, [1, 2])) == [2, 3]
assert list(executor.map(work, [1, 2], [1, 1])) == [2, 3]
executor.shutdown()
pool.terminate()
print("all")
"""


def test_what_is_defined_after_the_workers_were_forked_is_called(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATER], cwd=tmp_path,
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("all\n", "")


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(1, context=multiprocessing.get_context("fork")) as made:
        yield made
    made.join()


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: int) -> int:
        self.count += 1
        return self.count


def lengthen(found: list[int], x: int) -> int:
    found.append(x)
    return len(found)


@pytest.mark.parametrize("function", [Counter(), Counter().__call__, partial(lengthen, [])])
def test_every_chunk_begins_with_the_state_that_its_function_has(pool: Pool, function: Any) -> None:
    for _ in range(3):  # it is known from the second on
        assert pool.map(function, range(4), chunksize=2) == [1, 2, 1, 2]
        assert pool.starmap(function, [(0,), (1,), (2,)], chunksize=2) == [1, 2, 1]
        assert list(pool.imap(function, range(4), chunksize=2)) == [1, 2, 1, 2]
        assert list(pool.imap(function, range(2))) == [1, 1]
        assert [pool.apply(function, (0,)) for _ in range(2)] == [1, 1]
        assert pool.map(function, range(40), chunksize=1) == [1] * 40
