"""``taskrun.Pool`` is a drop-in for ``multiprocessing.Pool``: the same methods, but a killed
worker is an error and no hang. ``apply`` waits for the value, ``apply_async`` gives a
result to ask later, and a callback is called in the process that asked. Use it in a script,
or inside a task, where a loop should use all cores and needs no graph.
"""

import os
import time

from taskrun import Pool, task


def work(seconds: float) -> int:
    """Take some time, in a process of the pool; gives its pid."""
    time.sleep(seconds)
    return os.getpid()


@task
def compare() -> None:
    """The same two calls in three ways; the pids say where things happen."""
    print(f"the pool is made in process {os.getpid()}")
    with Pool(2) as pool:
        began = time.monotonic()
        pids = [pool.apply(work, (0.2,)) for _ in range(2)]  # the second begins after the first
        say("apply", began, pids)

        began = time.monotonic()
        results = [pool.apply_async(work, (0.2,)) for _ in range(2)]  # both have begun
        pids = [result.get(timeout=10) for result in results]
        say("apply_async", began, pids)

        began = time.monotonic()
        told: list[int] = []
        callers: set[int] = set()

        def tell(pid: int) -> None:
            told.append(pid)
            callers.add(os.getpid())

        for result in [pool.apply_async(work, (0.2,), callback=tell) for _ in range(2)]:
            result.wait(timeout=10)  # the callback is called before
        say("callback", began, told)
        print(f"the callback was called in process {', '.join(map(str, callers))}")


def say(how: str, began: float, pids: list[int]) -> None:
    print(f"{how:11} {time.monotonic() - began:.1f} s in processes {', '.join(map(str, pids))}")
