"""Two ways to get a page: blocking, by urllib, and as a coroutine, by aiohttp.

They give the same answers, also to what goes wrong: a status of the server is an answer, and
everything else, such as a connection that breaks, is an OSError.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from email.parser import BytesHeaderParser
from http.client import HTTPException
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

try:
    import aiohttp
except ModuleNotFoundError:
    aiohttp = None  # then a few lines of our own must do

LATE = 20.0  # seconds until a page must have come
AGENT = "taskrun-example-crawler"


class Answer(NamedTuple):
    """What a server has answered; ``url`` is where redirects have led to."""

    url: str
    status: int
    kind: str  # its content type
    size: int
    body: bytes  # empty where it is not text
    seconds: float


Fetch = Callable[[str], Awaitable[Answer]]


def is_text(kind: str) -> bool:
    """Whether to read on: links are in text, and what else a site offers may be large."""
    return kind.startswith("text/")


# -- blocking -------------------------------------------------------------------------


def by_urllib(url: str) -> Answer:
    """Get a page; raises OSError."""
    began = time.monotonic()
    try:
        with urlopen(Request(url, headers={"User-Agent": AGENT}), timeout=LATE) as response:
            kind = response.headers.get_content_type()
            body = response.read() if is_text(kind) else b""
            size = int(response.headers["Content-Length"] or len(body))
            seconds = time.monotonic() - began
            return Answer(response.url, response.status, kind, size, body, seconds)
    except HTTPError as error:
        return Answer(url, error.code, "", 0, b"", time.monotonic() - began)
    except (HTTPException, ValueError) as error:
        raise OSError(f"no HTTP: {error!r}") from error


# -- coroutines -----------------------------------------------------------------------


def client() -> Iterator[Fetch]:
    """What gets pages in one worker: its connections stay open from one page to the next."""
    if aiohttp is None:
        yield by_streams
        return
    patience = aiohttp.ClientTimeout(total=LATE)
    session = aiohttp.ClientSession(timeout=patience, headers={"User-Agent": AGENT})

    async def fetch(url: str) -> Answer:
        began = time.monotonic()
        try:
            async with session.get(url) as response:
                kind = response.content_type
                body = await response.read() if is_text(kind) else b""
                size = response.content_length or len(body)
                seconds = time.monotonic() - began
                return Answer(str(response.url), response.status, kind, size, body, seconds)
        except (aiohttp.ClientError, ValueError) as error:
            raise OSError(str(error) or type(error).__name__) from error

    loop = asyncio.get_running_loop()
    yield fetch
    loop.run_until_complete(session.close())  # the worker ends, and its calls have ended


async def by_streams(url: str) -> Answer:
    """Get a page without aiohttp, by HTTP/1.0; no TLS, no redirects.  Raises OSError."""
    began = time.monotonic()
    place = urlsplit(url)
    if place.scheme != "http":
        raise OSError(f"{place.scheme} needs aiohttp: pip install 'taskrun[examples]'")
    path = f"{place.path or '/'}?{place.query}" if place.query else place.path or "/"
    request = f"GET {path} HTTP/1.0\r\nHost: {place.netloc}\r\nUser-Agent: {AGENT}\r\n\r\n"
    async with asyncio.timeout(LATE):
        reader, writer = await asyncio.open_connection(place.hostname, place.port or 80)
        try:
            writer.write(request.encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
    first, _, headers = head.partition(b"\r\n")
    if not first.startswith(b"HTTP/"):
        raise OSError(f"no HTTP: {first[:40]!r}")
    kind = BytesHeaderParser().parsebytes(headers).get_content_type()
    return Answer(url, int(first.split()[1]), kind, len(body), body, time.monotonic() - began)
