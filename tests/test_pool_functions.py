"""What functions of a script, and what they belong to, are in the workers of a Pool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
