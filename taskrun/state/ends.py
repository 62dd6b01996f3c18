"""The two ends of a call's channel, for tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from taskrun.errors import ChannelClosed
from taskrun.state.channels import CALL, SUBMITTER, of_call, of_child
from taskrun.state.clients import Client, TimeUp
from taskrun.state.handles import Handle
from taskrun.state.home import current
from taskrun.state.stored import from_stored, to_stored


class Ends(Handle):
    """One end of a channel: ``future.channel``, or ``current().channel``.

    Messages are any picklable values.  An iterator gives them until the other end is closed.
    """

    kind = "channel"

    def __init__(self, name: str, side: int, client: Client | None = None) -> None:
        super().__init__(name, client=client)
        self._side = side

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self._side)

    def send(self, message: Any) -> None:
        """Send a message; never waits.  Raises ChannelClosed where an end is closed."""
        self._do("send", self._side, to_stored(message))

    def recv(self, timeout: float | None = None) -> Any:
        """The next message; waits for it, and lends this call's slot meanwhile.

        Raises ChannelClosed where none will come, TimeoutError after ``timeout`` seconds.
        """
        twin = "await channel.recv_async()"
        try:
            stored = self._wait("recv", self._side, True, timeout=timeout, twin=twin)
        except TimeUp:
            raise _late() from None
        return from_stored(stored)

    async def recv_async(self, timeout: float | None = None) -> Any:
        """As :meth:`recv`, for coroutines."""
        try:
            stored = await self._await("recv", self._side, True, timeout=timeout)
        except TimeUp:
            raise _late() from None
        return from_stored(stored)

    def close(self) -> None:
        """Close this end; the other one notices when it has received what was sent."""
        self._do("close", self._side)

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                yield self.recv()
            except ChannelClosed:
                return

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            try:
                yield await self.recv_async()
            except ChannelClosed:
                return

    def _described(self) -> str:
        return "the call's end" if self._side == CALL else "the submitter's end"


def _late() -> TimeoutError:
    return TimeoutError("no message came in time")


def channel_to(key: bytes) -> Ends:
    """The submitter's end of the channel to a call that the running call has submitted."""
    return Ends(of_child(_running(current()), key), SUBMITTER)


def channel_here() -> Ends:
    """The running call's end of its channel."""
    return Ends(of_call(_running(current())), CALL)


def _running(client: Client) -> int:
    owner = client.owner()
    return int(owner[1]) if owner[0] == "attempt" else -1
