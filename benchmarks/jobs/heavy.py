import time

from work import DURATIONS

from taskrun import each, result, task


@task
def slept(seconds=each(DURATIONS)):
    time.sleep(seconds)
    return 1


@task
def total(ones=result(slept)):
    print(sum(ones))
