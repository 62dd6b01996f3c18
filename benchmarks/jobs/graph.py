"""An irregular graph, made by the calls themselves, with futures as arguments."""

from work import CALLS, FAN_IN

from taskrun import result, task


@task
def root():
    return 1


@task
def leaf(base, number):
    return base + number


@task
def pair(left, right):
    return left + right


@task
def added(numbers):
    return sum(numbers)


@task
def graph():
    base = root.submit()
    leaves = [leaf.submit(base, number) for number in range(CALLS)]
    level = [pair.submit(leaves[at - 1], leaves[at]) for at in range(CALLS)]
    while len(level) > 1:
        level = [added.submit(level[at : at + FAN_IN]) for at in range(0, len(level), FAN_IN)]
    return level[0]


@task(default=True)
def answer(number=result(graph)):
    print(number)
