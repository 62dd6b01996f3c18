"""A crawl: a page that is found is a call of the lane that the environment names."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import aiohttp

from taskrun import each, limit, per_worker, result, state, task

LANE = os.environ["LANE"]
PAGES = os.environ["CALLS"]
at_once = [limit(500)]  # sockets, of which a process may often have 1,024


def session():
    loop = asyncio.get_running_loop()
    made = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    yield made
    loop.run_until_complete(made.close())


if LANE == "async":

    @task(limits=at_once)
    async def fetch(url, session=per_worker(session)):
        async with session.get(url) as response:
            return links(await response.read())

else:

    @task(lane=LANE, limits=at_once)
    def fetch(url):
        with urlopen(url) as response:
            return links(response.read())


def links(page):
    return re.findall('href="([^"]+)"', page.decode())


@task(lane="thread")
def site():
    program = [sys.executable, str(Path(__file__).with_name("crawl_site.py")), PAGES]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        state.event("done").wait()
        process.communicate(timeout=10)  # closes its input


@task
async def crawl(host=each(site)):
    pages = 0

    async def follow(path):
        nonlocal pages
        for link in await fetch.submit(host + path):
            group.create_task(follow(link))
        pages += 1

    async with asyncio.TaskGroup() as group:
        group.create_task(follow("/"))
    state.event("done").set()
    return pages


@task(default=True)
def answer(pages=result(crawl)):
    print(*pages)
