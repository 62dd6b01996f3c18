"""Every call knows the number of its process (pid) and of that process's parent (ppid).
Workers are children of one template process that has imported the task file, and what a
call starts is a child of its worker. Use the numbers to find a call in ps or top, to send
it a signal, or to see where memory goes.
"""

import os
from typing import NamedTuple

from taskrun import current, each, result, sh, task


class Process(NamedTuple):
    """A process that executed a call, its parent, and the parent of a shell it started."""

    call: str
    pid: int
    parent: int
    parent_of_shell: int


@task
def look(n: int = each(range(4))) -> Process:
    """Look at the numbers from inside a call, and from a shell that it starts."""
    me = current()
    assert (me.pid, me.ppid) == (os.getpid(), os.getppid())
    return Process(me.call, me.pid, me.ppid, int(sh("echo $PPID").stdout))


@task
def tree(seen: list[Process] = result(look)) -> None:
    """Draw the family."""
    for parent in sorted({process.parent for process in seen}):
        print(f"template {parent}")
        for pid in sorted({process.pid for process in seen if process.parent == parent}):
            print(f"   worker {pid}")
            for process in seen:
                if process.pid == pid:
                    print(
                        f"      {process.call} and its shell, a child of {process.parent_of_shell}"
                    )
