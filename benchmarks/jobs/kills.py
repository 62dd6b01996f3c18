"""Calls that write down which worker executes them, for someone who kills workers."""

import os

from work import CALLS, chore

from taskrun import each, result, task

DIARY = os.open(os.environ["DIARY"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@task(retries=20, backoff=0)
def done(number=each(range(CALLS))):
    os.write(DIARY, b"begin %d\n" % os.getpid())
    chore(number)
    os.write(DIARY, b"end %d\n" % os.getpid())
    return number


@task
def total(numbers=result(done)):
    print(sum(numbers))
