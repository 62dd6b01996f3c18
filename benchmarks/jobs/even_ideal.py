"""The ideal: no framework, two processes that each do half."""

import os

from work import CALLS, chore


def half(which):
    for number in range(which, CALLS, 2):
        chore(number)


if __name__ == "__main__":
    child = os.fork()
    half(0 if child else 1)
    if child:
        os.waitpid(child, 0)
        print(sum(range(CALLS)))
