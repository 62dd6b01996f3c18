"""A crawl of a site on this machine whose pages take 100 ms each, in one lane or another."""

from __future__ import annotations

from functools import cache

from measure import expect, taskrun

PAGES = 1000


def rate(lane: str) -> float:
    """Pages a second of a crawl with two workers in the lane ``process``, one in any other."""
    return (PAGES - 1) / (seconds(lane, PAGES) - seconds(lane, 1))


@cache
def process_rate() -> float:
    """That of the lane ``process``, measured once: it takes a minute, nearly all of it waiting."""
    return rate("process")


def seconds(lane: str, pages: int) -> float:
    """How long a crawl of so many pages takes."""
    return expect(taskrun("crawl", LANE=lane, CALLS=pages), pages).seconds
