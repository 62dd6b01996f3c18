"""The ideal: no framework, two processes that each do half."""

import os

from work import CALLS, STEPS, spin


def half(which):
    for _ in range(which, CALLS, 2):
        spin(STEPS)


if __name__ == "__main__":
    child = os.fork()
    half(0 if child else 1)
    if child:
        os.waitpid(child, 0)
        print(CALLS * STEPS)
