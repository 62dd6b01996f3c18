"""A worker on another machine: what a `Link` is over the conversation with its node."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from signal import SIGKILL
from typing import Any, Final

from taskrun.blobs import Shared
from taskrun.engines.capture import Attempt
from taskrun.engines.links import Link
from taskrun.errors import WireError
from taskrun.messages import CALL, DELIVER, NESTED
from taskrun.network import channels as ch
from taskrun.network.conversation import Conversation, Data
from taskrun.network.parcels import Parcels
from taskrun.workers.settings import SLOTS

_ARGUMENTS: Final = 5  # their place in a CALL
_MAY_BE_LARGE: Final = frozenset((bytes, Shared, list, tuple, dict))
_NOBODY: Final = (-1, -1)

Copy = tuple[int, bytes]


class RemoteLink(Link):
    """One worker of a node.

    What it is executing is known as of some tenths of a second ago; so whether it is
    signalled is left to the node, which knows.
    """

    def __init__(
        self,
        worker: int,
        node: str,
        conversation: Conversation,
        parcels: Parcels,
        emit: Callable[..., None],
        lane: str,
        expect_end: Callable[[RemoteLink], object],
    ) -> None:
        """``expect_end`` is called when the worker is killed: its node has to say so."""
        super().__init__(worker, f"{node}/w{worker}", emit)
        self.lane, self.slots = lane, SLOTS[lane]
        self.node = node
        self._conversation = conversation
        self._parcels = parcels
        self._needs: list[int] = []
        self._moment = 0
        self._copy: Copy | None = None  # of its ledger, not looked at yet
        self._listening = True
        self._expect_end = expect_end

    # -- to the worker ----------------------------------------------------------------

    def queue(self, record: tuple[Any, ...]) -> None:
        kind = record[0]
        if kind is CALL or kind is NESTED:
            for argument in record[_ARGUMENTS]:
                if type(argument) in _MAY_BE_LARGE:
                    record = self._wrapped(record, _ARGUMENTS, record[1])
                    break
        elif kind is DELIVER and record[1] is not None:
            record = self._wrapped(record, 2, record[1])
        self._outgoing.append(record)

    def _wrapped(self, record: tuple[Any, ...], place: int, call: int) -> tuple[Any, ...]:
        value = self._parcels.wrap(record[place], call, self._needs)
        return (*record[:place], value, *record[place + 1 :])

    def send_calls(self, frame: Data) -> None:
        key = ch.of_worker(self.id)
        if self._needs:
            self._conversation.send(key, ch.NEEDING, ch.pack_needs(self._needs, frame))
            self._needs = []
        else:
            self._conversation.send(key, ch.CALLS, frame)

    def send_control(self, frame: Data) -> None:
        self._conversation.send(ch.of_control(self.id), ch.CONTROL, frame)

    def signal(self, number: int, executing: Attempt | None = None) -> None:
        data = ch.SIGNALLED.pack(number, *(executing or _NOBODY))
        if number == SIGKILL and executing is None:
            self._expect_end(self)
        self._conversation.send(ch.of_control(self.id), ch.SIGNAL, data)

    # -- from the worker --------------------------------------------------------------

    def hear(self, channel: int, data: Data) -> None:
        """Take a message that is about the worker rather than from it.

        Raises what reading it raises: then it comes from no node.
        """
        if channel == ch.MOMENT:
            (self._moment,) = ch.WORD.unpack(data)
        elif channel == ch.OUTPUT:
            attempt, stream, written = pickle.loads(data)
            self._emit(attempt, stream, written)
        elif channel == ch.LEDGER:
            (generation,) = ch.GENERATION.unpack_from(data)
            self._copy = generation, bytes(data[ch.GENERATION.size :])

    def hear_the_last(self, data: Data) -> str:
        """Take the message that the worker has ended; gives how.  Raises WireError."""
        how, moment, copied, denied = pickle.loads(data)
        if type(moment) is not int or not (copied is None or _is_copy(copied)):
            raise WireError("a worker's end is told in no known form")
        self._moment, self._copy, self.denied = moment, copied, denied is True
        return str(how)

    @property
    def is_heard(self) -> bool:
        """Whether it still is a worker."""
        return self._listening

    @property
    def moment(self) -> int:
        return self._moment

    def copy(self) -> Copy | None:
        """As of a Ledger: what the node has seen in it."""
        copied, self._copy = self._copy, None
        return copied

    def look(self) -> list[tuple[Any, ...]]:
        return self.intake.look(self)

    def read_the_last(self) -> Iterator[list[tuple[Any, ...]]]:
        yield self.look()

    def read_the_last_output(self) -> None:
        """It came before the end."""

    def read_output_of(self, call: int, attempt: int) -> None:
        """It came before the end of the attempt."""

    def stop_listening(self) -> None:
        self._listening = False


def _is_copy(copied: Any) -> bool:
    """Whether this is a generation and what a ledger held."""
    return type(copied) is tuple and list(map(type, copied)) == [int, bytes]
