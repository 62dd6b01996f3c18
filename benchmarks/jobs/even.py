from work import CALLS, chore

from taskrun import each, result, task


@task
def done(number=each(range(CALLS))):
    return chore(number)


@task
def total(numbers=result(done)):
    print(sum(numbers))
