from work import CALLS, STEPS, spin

from taskrun import each, result, task


@task
def spun(number=each(range(CALLS))):
    return spin(STEPS)


@task
def total(steps=result(spun)):
    print(sum(steps))
