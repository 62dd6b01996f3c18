"""Large values, which travel to a node once, however many of its calls use them.

To the coordinator such a value is bytes, or files in its shared memory, that it never
opens.  In a frame for a worker of the node, a `Parcel` stands in its place; when the worker
unpickles the frame, the parcel becomes the data again, out of a file that the node keeps.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from taskrun import blobs
from taskrun.blobs import Blob, Shared
from taskrun.network import channels as ch
from taskrun.network.conversation import Conversation, Data

LARGE: Final = 128 * 1024  # bytes; what is smaller travels with its call
MOST_KEPT: Final = 512 * 1024 * 1024  # bytes at a node; beyond, the longest unused go

_MAY_BE_LARGE: Final = frozenset((bytes, Shared, tuple, list, dict))


class Parcel:
    """Stands for data that a node has, in the file ``path``: bytes, or a blob to be mapped."""

    __slots__ = ("_mapped", "_path", "_size")

    def __init__(self, path: str, size: int, *, mapped: bool) -> None:
        self._path = path
        self._size = size
        self._mapped = mapped

    def __reduce__(self) -> tuple[Any, ...]:
        if self._mapped:
            return blobs.blob_at, (self._path, self._size)
        return read_parcel, (self._path,)


def read_parcel(path: str) -> bytes:
    """What a Parcel of bytes becomes in a worker."""
    with open(path, "rb") as file:
        return file.read()


class _Sent(NamedTuple):
    """Data that a node has; ``data`` keeps its identity taken.  ``calls``: who uses it."""

    number: int
    data: bytes | bytearray | Blob
    size: int
    calls: set[int]


class Parcels:
    """The coordinator's side: what a node has.

    ``in_use`` is asked whether a call that was sent there has not ended.
    """

    def __init__(
        self,
        conversation: Conversation,
        folder: str,
        in_use: Callable[[int], bool],
        most: int = MOST_KEPT,
    ) -> None:
        self._conversation = conversation
        self._folder = folder
        self._in_use = in_use
        self._most = most
        self._kept = 0
        self._made = 0
        self._sent: OrderedDict[int, _Sent] = OrderedDict()  # by identity

    def wrap(self, value: Any, call: int, needs: list[int]) -> Any:
        """``value``, what is large in it sent and replaced; adds to ``needs`` the numbers of
        the data that the call needs."""
        kind = type(value)
        if kind is bytes:
            return self._wrapped(value, call, needs, mapped=False)
        if kind is Shared:
            return Shared(
                tuple([self._wrapped(part, call, needs, mapped=True) for part in value.stream]),
                tuple([self._wrapped(part, call, needs, mapped=True) for part in value.buffers]),
                value.trouble,
            )
        if kind is tuple or kind is list:
            if _MAY_BE_LARGE.isdisjoint(map(type, value)):
                return value  # many small values, which a fan-out leaves to the call behind it
            return kind([self.wrap(item, call, needs) for item in value])
        if kind is dict:
            return {key: self.wrap(item, call, needs) for key, item in value.items()}
        return value

    def _wrapped(self, part: Any, call: int, needs: list[int], *, mapped: bool) -> Any:
        if not isinstance(part, Blob) and len(part) < LARGE:
            return part
        sent = self._sent.get(id(part))
        if sent is None:
            sent = self._send(part)
        else:
            self._sent.move_to_end(id(part))
        sent.calls.add(call)
        needs.append(sent.number)
        return Parcel(path_of(self._folder, sent.number), sent.size, mapped=mapped)

    def _send(self, part: bytes | bytearray | Blob) -> _Sent:
        data = blobs.data_of(part)
        self._make_room(len(data))
        sent = self._sent[id(part)] = _Sent(self._made, part, len(data), set())
        self._made += 1
        self._kept += sent.size
        self._conversation.send(ch.of_value(sent.number), ch.VALUE, data)
        return sent

    def _make_room(self, size: int) -> None:
        for identity, sent in list(self._sent.items()):
            if self._kept + size <= self._most:
                return
            if not any(map(self._in_use, sent.calls)):
                del self._sent[identity]
                self._kept -= sent.size
                self._conversation.send(ch.of_value(sent.number), ch.FORGET, b"")


class Shelf:
    """The node's side: the values that are there, as files."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._there: set[int] = set()

    def put(self, number: int, data: Data) -> None:
        """Keep a value.  Raises OSError."""
        with open(path_of(self.folder, number), "wb") as file:
            file.write(data)
        self._there.add(number)

    def forget(self, number: int) -> None:
        """It is not needed any more."""
        self._there.discard(number)
        os.unlink(path_of(self.folder, number))

    def has(self, numbers: list[int]) -> bool:
        """Whether all these values are there."""
        return self._there.issuperset(numbers)


def path_of(folder: str, number: int) -> str:
    """Where a value is."""
    return os.path.join(folder, f"value-{number}")
