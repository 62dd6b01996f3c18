from work import DURATIONS, spin

from taskrun import each, result, task


@task
def spun(seconds=each(DURATIONS)):
    spin(seconds)
    return 1


@task
def total(ones=result(spun)):
    print(sum(ones))
