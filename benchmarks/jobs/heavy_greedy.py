"""The ideal: no framework, two processes that each take the next call when they are free."""

import os

from work import DURATIONS, spin


def take_turns(tickets):
    calls = DURATIONS
    while ticket := os.read(tickets, 1):  # a pipe gives each byte to one reader
        spin(calls[ticket[0]])


if __name__ == "__main__":
    tickets, sell = os.pipe()
    os.write(sell, bytes(range(len(DURATIONS))))
    os.close(sell)
    child = os.fork()
    take_turns(tickets)
    if child:
        os.waitpid(child, 0)
        print(len(DURATIONS))
