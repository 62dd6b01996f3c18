"""Shared state in the calls of a Pool: it is that of the process that made the pool.

What a call does to ``state.dict("seen")`` is seen there, and in all its other pools.  In a
pool that a worker has made, state is what it is in the worker itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from taskrun import context
from taskrun.reactor import Reactor
from taskrun.state.service import Service

if TYPE_CHECKING:
    from taskrun.state.store import Store


class PoolState:
    """The state of one pool's calls, served on its loop.

    ``base``: what is added to the numbers of its calls.  ``used`` is called when the first
    client is about to use it.
    """

    def __init__(self, reactor: Reactor, base: int, used: Callable[[], object]) -> None:
        self._base = base
        self._used = used
        self._elsewhere = context.state_address
        self._service = Service(
            reactor, is_running=_always, notice=_unheard, find_store=self._find_store
        )

    def start(self) -> None:
        """Listen, where this process has the state.  Raises UsageError for a bad key file."""
        if self._elsewhere is None:
            self._service.start()
            # Guests run the loop as well as its thread: whoever answers posts it to the loop.
            self._service.thread = 0

    def close(self) -> None:
        """End all connections."""
        if self._elsewhere is None:
            self._service.close()

    def address(self) -> tuple[Any, bytes]:
        """Where workers find it, and the key."""
        return self._elsewhere or (self._service.address, self._service.authkey)

    def attempt_ended(self, call: int, attempt: int) -> None:
        """What it held is free."""
        self._service.attempt_ended(self._base + call, attempt)

    def _find_store(self) -> Store:
        from taskrun.state.local import own_client

        self._used()
        return own_client().store


def _always(call: int, attempt: int) -> bool:
    return True


def _unheard(text: str) -> None:
    """That others cannot find this pool concerns nobody."""
