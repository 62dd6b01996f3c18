"""Calls on an engine; prints the seconds from the begin of the first to the end of the last, and
how many there were."""

import os
import time

from taskrun import each, result, task

CALLS = int(os.environ.get("CALLS", "1"))
SECONDS = 0.02


@task(default=False)
def trivial(n=each(range(CALLS))):
    return time.time()


@task(default=False)
def sleep(n=each(range(CALLS))):
    began = time.time()
    time.sleep(SECONDS)
    return began


@task(default=False)
def trivials(began=result(trivial)):
    print(time.time() - min(began), len(began))


@task(default=False)
def sleeps(began=result(sleep)):
    print(time.time() - min(began), len(began))
