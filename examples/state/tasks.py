"""Shared state: a crawl frontier, a live leaderboard, and a counter that all workers add to."""

from __future__ import annotations

import random

from taskrun import current, each, result, state, task

# Names; what they name is made in the coordinator when it is first used.
seen = state.set("seen")
links = state.counter("links")
board = state.dict("leaderboard")
shots = state.counter("shots")
every_add = state.counter("every add")

PAGES = 300
PLAYERS = ("ada", "grace", "linus", "margaret")


# -- a crawl frontier -----------------------------------------------------------------


def links_of(page: int) -> list[int]:
    """A small web, the same every time: each page links to seven others."""
    chance = random.Random(page)
    return [(page + 1) % PAGES, *(chance.randrange(PAGES) for _ in range(6))]


@task(default=False)
def visit(page: int) -> int:
    """Visit the pages that this one links to and nobody has seen; gives how many that were."""
    found = links_of(page)
    links.add(len(found))
    new = seen.add_many(found)  # of all who find a page, one is told that it is new
    return 1 + sum(future.result() for future in [visit.submit(other) for other in new])


@task
def crawl(start: int = 0) -> int:
    """Visit every page that can be reached from the first, each once."""
    seen.add(start)
    return visit.submit(start).result()


# -- a live leaderboard ---------------------------------------------------------------


@task
def play(game: int = each(range(40))) -> None:
    """Play a game: a few shots, and the winner gets a point."""
    chance = random.Random(game)
    shots.add(chance.randrange(1, 10))
    winner = chance.choice(PLAYERS)
    # Reads, computes and sets in one step, whoever else does so at the same time.
    board.update_at(winner, lambda entry: {"wins": entry["wins"] + 1}, {"wins": 0})
    current().progress(1, 1)


# -- one counter, every worker --------------------------------------------------------


@task
def add(worker: int = each(range(8))) -> None:
    """Add a thousand times."""
    for _ in range(1000):
        every_add.add(1)


# -- what must come out ---------------------------------------------------------------


@task(after=[play, add])
def check(visited: int = result(crawl)) -> None:
    """All of it, exactly."""
    assert visited == len(seen) == PAGES, (visited, len(seen))
    assert links.get() == 7 * PAGES, links.get()
    wins = {name: entry["wins"] for name, entry in board.items()}
    assert wins == expected_wins(), wins
    assert every_add.get() == 8 * 1000, every_add.get()
    leaders = sorted(wins.items(), key=lambda item: -item[1])
    print(f"{visited} pages visited once each, {links.get()} links followed")
    print("leaderboard:", ", ".join(f"{name} {count}" for name, count in leaders))
    print(f"8 workers added up to {every_add.get()}")


def expected_wins() -> dict[str, int]:
    """The leaderboard, worked out by one process alone."""
    wins: dict[str, int] = {}
    for game in range(40):
        chance = random.Random(game)
        chance.randrange(1, 10)
        winner = chance.choice(PLAYERS)
        wins[winner] = wins.get(winner, 0) + 1
    return wins
