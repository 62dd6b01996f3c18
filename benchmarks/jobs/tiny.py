from work import CALLS, double

from taskrun import each, result, task


@task
def doubled(number=each(range(CALLS))):
    return double(number)


@task
def total(numbers=result(doubled)):
    print(sum(numbers))
