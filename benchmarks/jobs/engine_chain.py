"""100 MB through three calls that depend on each other; prints by how many MB the coordinator
grew meanwhile.

    python engine_chain.py dask|ray
"""

import sys

from taskrun import result, run, task

SIZE = 100_000_000


@task
def first():
    return bytes(SIZE)


@task
def second(data=result(first)):
    return data[:-1] + b"2"


@task
def third(data=result(second)):
    return data[:-2] + b"32"


@task
def last(data=result(third)):
    return len(data), data[-2:]


@task
def small():
    return 1


def peak():
    """Bytes that this process has had at most since it last forgot about it."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


if __name__ == "__main__":
    options = {"engine": sys.argv[1], "jobs": 2, "output": "quiet"}
    assert run(small, **options) == 1  # what it needs is imported
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = peak()
    assert run(last, **options) == (SIZE, b"32")
    print((peak() - before) / 1e6)
