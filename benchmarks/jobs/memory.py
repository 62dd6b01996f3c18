"""How much memory the coordinator holds when many calls have ended that nobody waits for."""

import os

from work import CALLS

from taskrun import each, task


def show_memory():
    """The bytes that are the coordinator's own, not shared with other processes."""
    with open(f"/proc/{os.environ['COORDINATOR']}/smaps_rollup") as file:
        kilobytes = [int(line.split()[1]) for line in file if line.startswith("Private_")]
    print(1024 * sum(kilobytes))


@task
def work(number=each(range(CALLS))):
    return number


@task(after=[work])
def fan_out():
    show_memory()


@task
def link(left):
    if left:
        link.submit(left - 1)
    else:
        show_memory()


@task
def chain():
    link.submit(CALLS)
