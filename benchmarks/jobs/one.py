from work import double

from taskrun import task


@task
def one():
    print(double(21))
