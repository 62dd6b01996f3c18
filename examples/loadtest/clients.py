"""The clients: coroutines that keep a server busy, or hold as many sockets open as they can."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from urllib.parse import urlsplit

from figures import Held, Load

try:
    import aiohttp
except ModuleNotFoundError:
    aiohttp = None  # only a web server needs it

LATE = 10.0  # seconds after which an answer counts as an error
AT_ONCE = 200  # connections that are being made at a time
PARTS = 3

Ask = Callable[[], Awaitable[None]]
"""Sends one request and checks the answer; raises what is wrong with it."""


class WrongAnswer(Exception):
    """The server has answered something else than it was sent, or nothing."""


# -- one request after the other ------------------------------------------------------


async def load(target: str, connections: int, seconds: float, tell: Callable[[Load], None]) -> Load:
    """Keep ``connections`` busy for so long: each sends when its last answer has come.

    ``tell`` is called every half second with the figures so far.
    """
    found = Load()
    began = time.monotonic()
    dial = dial_http if target.startswith("http") else dial_echo
    async with asyncio.TaskGroup() as group:
        teller = group.create_task(every(0.5, lambda: tell(found)))
        workers = [
            group.create_task(converse(dial(target), began + seconds, found))
            for _ in range(connections)
        ]
        await asyncio.wait(workers)
        teller.cancel()
    found.seconds = time.monotonic() - began
    return found


async def converse(dialled: AbstractAsyncContextManager[Ask], deadline: float, found: Load) -> None:
    """One connection, until the deadline or the first error."""
    try:
        async with dialled as ask:
            while (began := time.monotonic()) < deadline:
                async with asyncio.timeout(LATE):
                    await ask()
                found.latencies.record(time.monotonic() - began)
                found.requests += 1
    except (OSError, WrongAnswer) as error:  # TimeoutError is an OSError
        found.errors[what(error)] += 1


@asynccontextmanager
async def dial_echo(target: str) -> AsyncIterator[Ask]:
    """A connection to an echo server, on which each request is a line."""
    reader, writer = await asyncio.open_connection(*place(target))

    async def ask() -> None:
        message = b"%020d" % time.monotonic_ns() + b" hello\n"
        writer.write(message)
        check(await reader.readline(), message)

    try:
        yield ask
    finally:
        writer.close()


@asynccontextmanager
async def dial_http(target: str) -> AsyncIterator[Ask]:
    """A connection to a web server, kept alive from one GET to the next."""
    if aiohttp is None:
        raise ModuleNotFoundError("a URL needs aiohttp: pip install 'taskrun[examples]'")

    async def ask() -> None:
        try:
            async with session.get(target) as response:
                await response.read()
                if response.status >= 400:
                    raise WrongAnswer(f"status {response.status}")
        except aiohttp.ClientError as error:
            raise WrongAnswer(type(error).__name__) from error

    async with aiohttp.ClientSession() as session:
        yield ask


async def every(seconds: float, call: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        call()


# -- very many sockets at once --------------------------------------------------------

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def open_all(target: str, count: int, held: Held) -> list[Connection]:
    """So many connections, all open at the end; ``held`` gets what has failed."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def dial() -> Connection | None:
        try:
            async with gate, asyncio.timeout(LATE):
                return await asyncio.open_connection(*place(target))
        except OSError as error:
            held.errors[what(error)] += 1
            return None

    dialled = await asyncio.gather(*[dial() for _ in range(count)])
    return [connection for connection in dialled if connection is not None]


async def talk(connections: list[Connection], held: Held) -> None:
    """All send the first part of a message, all the second, all the third; then all read.

    So the server has every message in pieces at the same time, and must not mix them up.
    """
    messages = [f"I am number {n} and say this in {PARTS} parts\n" for n in range(len(connections))]
    for part in range(PARTS):
        for (_, writer), message in zip(connections, messages, strict=True):
            third = -(-len(message) // PARTS)
            writer.write(message[part * third : (part + 1) * third].encode())
        await asyncio.sleep(0.1)

    async def read(reader: asyncio.StreamReader, message: str) -> None:
        try:
            async with asyncio.timeout(3 * LATE):
                check(await reader.readline(), message.encode())
            held.right += 1
        except (OSError, WrongAnswer) as error:
            held.errors[what(error)] += 1

    pairs = zip(connections, messages, strict=True)
    await asyncio.gather(*[read(reader, message) for (reader, _), message in pairs])


async def close_all(connections: list[Connection]) -> None:
    for _, writer in connections:
        writer.close()
    closed = [writer.wait_closed() for _, writer in connections]
    await asyncio.gather(*closed, return_exceptions=True)  # what is wrong with them is known


# -- small things ---------------------------------------------------------------------


def place(target: str) -> tuple[str, int]:
    """Host and port of ``tcp://HOST:PORT``."""
    parts = urlsplit(target)
    return parts.hostname or "", parts.port or 0


def check(answer: bytes, message: bytes) -> None:
    if not answer:
        raise WrongAnswer("the server has hung up")
    if answer != message:
        raise WrongAnswer("wrong answer")


def what(error: Exception) -> str:
    """A name for the error, under which equal ones are counted."""
    match error:
        case WrongAnswer():
            return str(error)
        case TimeoutError():
            return f"no answer in {LATE:g} s"
        case ConnectionResetError() | BrokenPipeError():
            return "the server has hung up"
        case OSError(strerror=str(reason)):
            return reason
    return type(error).__name__


def summed(errors: Counter[str]) -> str:
    """``3 x wrong answer, 1 x ...``, the most frequent first."""
    return ", ".join(f"{count:,} x {name}" for name, count in errors.most_common())
