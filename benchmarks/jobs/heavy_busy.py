from work import DURATIONS, STEPS, spin

from taskrun import each, result, task


@task
def spun(seconds=each(DURATIONS)):
    spin(round(seconds / 0.020 * STEPS))
    return 1


@task
def total(ones=result(spun)):
    print(sum(ones))
