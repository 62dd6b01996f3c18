"""Calls of a task with ``lane="thread"`` are threads of one worker process, up to 32 at a
time. They share its memory, so what they all change needs a lock, and they wait at the same
time but compute in turns. Use them for blocking code that waits: for a database, a disk, a
library that knows no coroutines.
"""

import os
import threading
import time

from taskrun import each, result, task

balance = 0  # of the process, so of all its threads
guard = threading.Lock()


@task(lane="thread")
def deposit(amount: int = each(range(1, 21))) -> tuple[int, int, int]:
    """Wait, as for a slow answer, then change what all threads share."""
    global balance
    time.sleep(0.1)
    with guard:  # without it two threads could read the same balance, and one deposit be lost
        before = balance
        time.sleep(0.001)
        balance = before + amount
        return os.getpid(), threading.get_ident(), balance


@task
def report(deposits: list[tuple[int, int, int]] = result(deposit)) -> None:
    """Say how many threads it took, and what they have added up to."""
    pids, threads, balances = map(set, zip(*deposits, strict=True))
    print(f"{len(deposits)} calls in {len(threads)} threads of {len(pids)} process")
    print(f"balance {max(balances)}, and no deposit is lost")
