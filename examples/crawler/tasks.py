"""Crawls a site: gets every page, follows every link, and tells which are broken.

Each page is two calls: one that waits for the server, in a lane where hundreds can wait in
one process, and one that reads the page, which computes and so belongs in a process of its
own.  ``crawl`` ties them together, a coroutine per page.
"""

import asyncio
import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urljoin, urlsplit
from urllib.robotparser import RobotFileParser

from taskrun import current, each, limit, per_worker, state, task

from fetching import AGENT, Answer, Fetch, by_urllib, client
from reading import links
from serving import chosen, serving

seen = state.set("seen")  # every link of the site that anybody has found
pages = state.dict("pages")  # URL -> Page; see it grow by taskrun state watch pages
away = state.set("away")  # links to other sites, which are not followed
done = state.event("done")

TRIES = 3
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Page(NamedTuple):
    """What is known of a page, and on which other page its link was found first."""

    found_on: str
    status: int
    links: int
    size: int
    seconds: float
    problem: str = ""


# -- a page ---------------------------------------------------------------------------


def host(url: str) -> str:
    return urlsplit(url).netloc


def guest(url: str) -> str:
    """Whom we must not ask often: other machines.  On this one each page counts for itself."""
    return url if urlsplit(url).hostname in LOOPBACK else host(url)


politely = {
    "limits": [limit(20, key=host), limit(2, per="1s", key=guest)],  # at once; a second
    "retries": TRIES - 1,
    "retry_on": OSError,
    "backoff": 0.2,
    "label": "{url}",
    "default": False,  # only where it is submitted: -p url= is for the site
}


@task(lane="green", **politely)
def fetch_green(url: str) -> Answer:
    """Get a page by plain, blocking urllib."""
    try:
        return by_urllib(url)
    except OSError as error:
        return given_up(url, error)


@task(lane="async", **politely)
async def fetch_async(url: str, fetch: Fetch = per_worker(client)) -> Answer:
    """Get a page by aiohttp."""
    try:
        return await fetch(url)
    except OSError as error:
        return given_up(url, error)


def given_up(url: str, error: OSError) -> Answer:
    """After the last try no answer is an answer, too."""
    if current().attempt < TRIES:
        raise error
    return Answer(url, 0, str(error) or type(error).__name__, 0, b"", 0.0)


@task
def read(url: str, found_on: str, answer: Answer) -> list[str]:
    """Note what a page is like; gives the links to this site that nobody has found before."""
    is_page = answer.status == 200 and answer.kind == "text/html" and host(answer.url) == host(url)
    found = links(answer.body, answer.url) if is_page else []
    problem = answer.kind if answer.status == 0 else http.client.responses.get(answer.status, "")
    size, seconds = answer.size, answer.seconds
    pages[url] = Page(found_on, answer.status, len(found), size, seconds, problem)
    away.add_many([link for link in found if host(link) != host(url)])
    return seen.add_many([link for link in found if host(link) == host(url)])


# -- the site -------------------------------------------------------------------------


@task(lane="thread")
def site(url: str = "", folder: Path | None = None, delay: float = 0.0) -> Iterator[str]:
    """Yield where to begin; without a URL start a server, and keep it until all is done."""
    if url:
        yield checked(url)
        return
    with chosen(folder) as pages_here, serving(pages_here, delay) as here:
        yield here
        done.wait()


def checked(url: str) -> str:
    """The URL; raises ValueError where it is none that leads to a site."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
        why = "no http:// or https:// URL"
    except ValueError as error:  # such as a port that is no number
        why = str(error)
    raise ValueError(f"nothing can be crawled at {url!r} ({why}); set -p url=http://HOST/")


@task
async def crawl(
    start: str = each(site), lane: Literal["async", "green"] = "async", most: int = 300
) -> None:
    """Follow the links from the first page, at most to so many pages."""
    fetch = fetch_async if lane == "async" else fetch_green
    room = iter(range(most - 1))

    async def follow(url: str, found_on: str) -> None:
        for link in await read.submit(url, found_on, fetch.submit(url)):
            if rules.can_fetch(AGENT, link) and next(room, None) is not None:
                group.create_task(follow(link, url))

    try:  # whatever happens, the site is told
        if most < 1:
            raise ValueError(f"most={most}: a crawl gets one page at least")
        rules = robots(await fetch.submit(urljoin(start, "/robots.txt")))
        seen.add(start)
        async with asyncio.TaskGroup() as group:
            group.create_task(follow(start, ""))
    finally:
        done.set()


def robots(answer: Answer) -> RobotFileParser:
    """The site's rules for programs like this one."""
    rules = RobotFileParser()
    rules.allow_all = answer.status in range(400, 500)
    rules.disallow_all = answer.status in (401, 403)
    rules.parse(answer.body.decode("utf-8", "replace").splitlines())
    return rules


@task(after=[crawl], always=True)
def report() -> None:
    """What was found; runs also when the crawl was interrupted."""
    found: dict[str, Page] = pages.copy()
    broken = {url: page for url, page in found.items() if page.status != 200}
    print(
        f"{len(found)} pages, {sum(page.links for page in found.values()):,} links on them, "
        f"{len(broken)} broken, {len(away)} lead to other sites, "
        f"{kilobytes(sum(page.size for page in found.values()))} in all"
    )
    for url, page in sorted(broken.items()):
        print(f"broken   {page.status or 'no answer'} {page.problem}: {url}")
        if page.found_on:
            print(f"         linked from {page.found_on}")
    for url, page in top(found, "seconds"):
        print(f"slowest  {1000 * page.seconds:8,.0f} ms  {url}")
    for url, page in top(found, "size"):
        print(f"largest  {kilobytes(page.size)}  {url}")


def top(found: dict[str, Page], field: str, rows: int = 5) -> list[tuple[str, Page]]:
    """The pages with the largest values."""
    return sorted(found.items(), key=lambda item: (-getattr(item[1], field), item[0]))[:rows]


def kilobytes(size: int) -> str:
    return f"{size / 1000:8,.1f} KB"
