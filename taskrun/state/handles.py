"""Handles: names of shared objects, with the methods of what they name.

A handle holds no data and no connection.  It can be made anywhere, also at module level of
a task file, pickled, and used as a key; each use asks where it is (see ``home``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, ClassVar, NamedTuple, TypeVar

from taskrun.state.clients import Changes, Client, TimeUp, place, refuse_to_block
from taskrun.state.home import current
from taskrun.state.stored import from_stored, loaded, to_stored
from taskrun.state.wire import CHANGE, Reply, Request

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "<missing>"})()
"""Stands for a default that was not given."""

Self = TypeVar("Self", bound="Handle")


class Change(NamedTuple):
    """What ``watch()`` yields.

    ``action``: ``set`` (of a dict, a list's index, a counter), ``deleted``, ``added`` and
    ``removed`` (of a set), ``cleared``, ``changed`` (a list, from index ``key`` on), or
    ``missed``: whoever watches was too slow, and ``value`` changes were left out.  For a value
    that cannot be loaded here there is an ``Unloadable``.
    """

    name: str
    action: str
    key: Any = None
    value: Any = None


class Handle:
    """A shared object, by its name."""

    kind: ClassVar[str]

    def __init__(self, name: str, *options: Any, client: Client | None = None) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"the name of a shared object is a str, not {name!r}")
        self.name = str.__str__(name)  # of a subclass the coordinator knows nothing
        self._options = options or None
        self._bound = client

    # -- being a name -----------------------------------------------------------------

    def __hash__(self) -> int:
        return hash((self.kind, self.name))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Handle):
            return NotImplemented
        return (self.kind, self.name, self._bound) == (other.kind, other.name, other._bound)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._bound is not None:
            raise TypeError(
                f"{self.kind} {self.name!r} belongs to a connection of this process, and "
                "cannot be pickled: pass its name"
            )
        return type(self), (self.name, *(self._options or ()))

    def __repr__(self) -> str:
        try:
            return f"<state {self.kind} {self.name!r}, {self._described()}>"
        except Exception as error:  # it is shown where things have gone wrong already
            return f"<state {self.kind} {self.name!r}, {type(error).__name__}>"

    def _described(self) -> str:
        raise NotImplementedError

    # -- operations -------------------------------------------------------------------

    @property
    def _client(self) -> Client:
        return self._bound or current()

    def _request(self, operation: str, *args: Any) -> Request:
        return f"{self.kind}.{operation}", self.name, self._options, args

    def _do(self, operation: str, *args: Any) -> Any:
        return self._client.call((f"{self.kind}.{operation}", self.name, self._options, args))

    def _wait(self, operation: str, *args: Any, timeout: float | None, twin: str) -> Any:
        refuse_to_block(f"{self.kind} {self.name!r}: waiting", twin)
        return self._client.wait(self._request(operation, *args), timeout)

    async def _await(self, operation: str, *args: Any, timeout: float | None) -> Any:
        return await self._client.wait_async(self._request(operation, *args), timeout)

    # -- watching ---------------------------------------------------------------------

    def watch(self) -> Watch:
        """The changes from now on, as they happen; ends when the run does.

        In an async task: ``async for change in d.watch()``.
        """
        return Watch(self._client, ("state.watch", self.name, self._options, (self.kind,)))


class Watch:
    """An iterator of :class:`Change`; also an async one.  ``close()`` ends it."""

    def __init__(self, client: Client, request: Request) -> None:
        self._client = client
        self._request = request
        self._replies: Changes | None = None
        self._async: AsyncIterator[Change] | None = None
        import sys

        asyncio = sys.modules.get("asyncio")
        if asyncio is None or asyncio._get_running_loop() is None:
            self._replies = client.watch(request)  # from now on, not from the first next()

    def __iter__(self) -> Watch:
        return self

    def __next__(self) -> Change:
        refuse_to_block("watch()", "write `async for change in ....watch()`")
        if self._replies is None:
            self._replies = self._client.watch(self._request)
        return _change(self._request[1], next(self._replies))

    def close(self) -> None:
        """Watch no more; on any thread, also while another waits for the next change."""
        if self._replies is not None:
            self._replies.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[Change]:
        return self._changes()

    async def _changes(self) -> AsyncIterator[Change]:
        async for reply in self._client.watch_async(self._request):
            yield _change(self._request[1], reply)


def _change(watched: str, reply: Reply) -> Change:
    if reply[0] != CHANGE:
        return Change(watched, "missed", value=reply[1])
    name, _, action, key, value = reply[1]
    return Change(name, action, key, loaded(value))


# -- a number -------------------------------------------------------------------------


class Counter(Handle):
    """A number that everybody adds to."""

    kind = "counter"

    def add(self, amount: float = 1) -> Any:
        """Add ``amount``; gives what the counter has become."""
        return self._do("add", _plain(amount))

    def get(self) -> Any:
        """What it is now."""
        return self._do("get")

    def set(self, value: float) -> Any:
        """Set it; gives what it was before."""
        return self._do("set", _plain(value))

    def _described(self) -> str:
        return str(self.get())


def _plain(number: Any) -> Any:
    """An int or float; those of numpy, for example, become one.  Raises TypeError."""
    if type(number) in (int, float):
        return number
    from numbers import Integral, Real

    if not isinstance(number, Real):
        raise TypeError(f"a counter takes numbers, not {type(number).__name__}")
    return int(number) if isinstance(number, Integral) else float(number)


# -- what can be waited for -----------------------------------------------------------


def _option(number: int | None) -> tuple[Any, ...]:
    """None: the object has it already.  Whatever is no number the store refuses."""
    if number is None:
        return ()
    return (int(number),) if hasattr(number, "__index__") else (number,)


class Queue(Handle):
    """Values, first in, first out.  With ``maxsize``, ``put`` waits while it is full."""

    kind = "queue"

    def __init__(
        self, name: str, maxsize: int | None = None, *, client: Client | None = None
    ) -> None:
        super().__init__(name, *_option(maxsize), client=client)

    def put(self, value: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put a value in; raises queue.Full where that is not possible (in time)."""
        import queue

        stored = to_stored(value)
        try:  # where there is room, an event loop may do so too
            self._do("put", stored, False)
            return
        except queue.Full:
            if not block:
                raise
        try:
            self._wait("put", stored, True, timeout=timeout, twin="await q.put_async(...)")
        except TimeUp:
            raise _full(self) from None

    async def put_async(self, value: Any, timeout: float | None = None) -> None:
        """As :meth:`put`, for coroutines."""
        try:
            await self._await("put", to_stored(value), True, timeout=timeout)
        except TimeUp:
            raise _full(self) from None

    def put_nowait(self, value: Any) -> None:
        self.put(value, block=False)

    def put_many(self, values: Any) -> None:
        """Put all values in, in one round trip; raises queue.Full, and puts none in, where
        there is no room for all."""
        self._do("put_many", [to_stored(value) for value in values])

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the first value out; raises queue.Empty where there is none (in time)."""
        try:
            if block:
                stored = self._wait("get", True, timeout=timeout, twin="await q.get_async()")
            else:
                stored = self._client.wait(self._request("get", False), None)
        except TimeUp:
            raise _empty(self) from None
        return from_stored(stored)

    async def get_async(self, timeout: float | None = None) -> Any:
        """As :meth:`get`, for coroutines."""
        try:
            return from_stored(await self._await("get", True, timeout=timeout))
        except TimeUp:
            raise _empty(self) from None

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def qsize(self) -> int:
        return int(self._do("size"))

    def empty(self) -> bool:
        return self.qsize() == 0

    def full(self) -> bool:
        """Whether ``put`` would have to wait."""
        return bool(self._do("full"))

    __len__ = qsize

    def __bool__(self) -> bool:
        return True

    def _described(self) -> str:
        return items(self.qsize())


def _empty(handle: Handle) -> Exception:
    import queue

    return queue.Empty(f"nothing came into the queue {handle.name!r} in time")


def _full(handle: Handle) -> Exception:
    import queue

    return queue.Full(f"the queue {handle.name!r} stayed full")


class _Held(Handle):
    """What is acquired and released: by a call's attempt, which loses it when it ends."""

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take it; False where that is not possible (in time)."""
        client = self._client
        if not blocking:
            request = self._request("acquire", client.owner(), place(), False)
            return bool(client.call(request))
        try:
            return bool(self._wait("acquire", client.owner(), place(), True, timeout=timeout,
                                   twin=f"write `async with state.{self.kind}(...)`"))  # fmt: skip
        except TimeUp:
            return False

    async def acquire_async(self, timeout: float | None = None) -> bool:
        """As :meth:`acquire`, for coroutines."""
        owner = self._client.owner()
        try:
            return bool(await self._await("acquire", owner, place(), True, timeout=timeout))
        except TimeUp:
            return False

    def release(self) -> None:
        """Give it back; raises RuntimeError where it is not held here."""
        self._do("release", self._client.owner(), place())

    def locked(self) -> bool:
        """Whether somebody who comes now would have to wait."""
        return bool(self._do("locked"))

    def __enter__(self: Self) -> Self:
        self.acquire()  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    async def __aenter__(self: Self) -> Self:
        await self.acquire_async()  # type: ignore[attr-defined]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def _described(self) -> str:
        return "locked" if self.locked() else "free"


class Lock(_Held):
    """One holder at a time.  The thread, or coroutine, that holds it may take it again, and
    releases it as often."""

    kind = "lock"


class Semaphore(_Held):
    """So many holders at a time."""

    kind = "semaphore"

    def __init__(
        self, name: str, permits: int | None = None, *, client: Client | None = None
    ) -> None:
        super().__init__(name, *_option(permits), client=client)


class Event(Handle):
    """A flag, which can be waited for."""

    kind = "event"

    def set(self) -> None:
        self._do("set")

    def clear(self) -> None:
        self._do("clear")

    def is_set(self) -> bool:
        return bool(self._do("is_set"))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; False where that did not happen in time."""
        try:
            return bool(self._wait("wait", timeout=timeout, twin="await e.wait_async()"))
        except TimeUp:
            return False

    async def wait_async(self, timeout: float | None = None) -> bool:
        """As :meth:`wait`, for coroutines."""
        try:
            return bool(await self._await("wait", timeout=timeout))
        except TimeUp:
            return False

    def _described(self) -> str:
        return "set" if self.is_set() else "not set"


class Barrier(Handle):
    """So many parties wait for each other, again and again."""

    kind = "barrier"

    def __init__(
        self, name: str, parties: int | None = None, *, client: Client | None = None
    ) -> None:
        super().__init__(name, *_option(parties), client=client)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until all are there; gives 0 to the first who came, and so on.

        Raises TimeoutError; the others go on waiting.
        """
        try:
            return int(self._wait("wait", timeout=timeout, twin="await b.wait_async()"))
        except TimeUp:
            raise _late(self) from None

    async def wait_async(self, timeout: float | None = None) -> int:
        """As :meth:`wait`, for coroutines."""
        try:
            return int(await self._await("wait", timeout=timeout))
        except TimeUp:
            raise _late(self) from None

    def n_waiting(self) -> int:
        """How many wait now."""
        return int(self._do("waiting"))

    def _described(self) -> str:
        return f"{self.n_waiting()} waiting"


def _late(handle: Handle) -> TimeoutError:
    return TimeoutError(f"not all came to the barrier {handle.name!r} in time")


def items(count: int) -> str:
    return f"{count:,} item" + "s" * (count != 1)
