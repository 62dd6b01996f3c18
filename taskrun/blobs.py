"""Large data between the processes of one machine: written once, mapped, never sent.

What is large in a pickle (the buffers of arrays, long bytes, a long stream) goes into files
of shared memory, each a *blob*; what travels is a ``Shared``, which names them.  Who
unpickles it maps the blobs privately: nothing is copied, and what is written to a copy
changes nothing for others.

Who removes a blob: it belongs to the process that made it until its ``Shared`` is pickled,
and from then on to the coordinator, the process in whose folder it is: it goes with the last
reference to it there.  A mapping stays as long as it is used.  What a worker leaves behind is
removed when it ends; the rest is told in ``places``.

Where there is no room in the shared memory, a file on disk is used; where there is none
either, the data travel in the pickle.  That is said once.
"""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO, FileIO
from typing import Any, Final, TypeAlias

from taskrun import places
from taskrun.places import Place

THRESHOLD: Final = 512 * 1024  # bytes from which on a file is cheaper than a Pipe
PROTOCOL: Final = pickle.HIGHEST_PROTOCOL

_MOST_MAPPED: Final = 8192  # blobs at a time; the kernel allows 65,530 mappings
_STEP: Final = 256 * 1024  # bytes compared at a time: they stay in the processor's cache
_SAMPLES: Final = 32
_KEEPS_FD: Final = sys.version_info < (3, 13)  # a mapping keeps a descriptor of its own

Portable: TypeAlias = "bytes | Shared"
"""A pickle as it travels on this machine."""

Piece: TypeAlias = "bytes | bytearray | memoryview"
"""What a pickler writes at a time."""

Seen: TypeAlias = "dict[int, tuple[Any, Blob | bytes]]"
"""By id, objects (which it keeps alive) and the blobs that have their data."""


# -- what travels ---------------------------------------------------------------------


class Blob:
    """A file of shared memory; ``owned``: it is removed with this object."""

    __slots__ = ("__weakref__", "_pid", "owned", "path", "size")

    def __init__(self, path: str, size: int, *, owned: bool) -> None:
        self.path = path
        self.size = size
        self.owned = owned
        self._pid = os.getpid()

    def __reduce__(self) -> Any:
        if _far:
            return bytes, (bytes(_mapped(self)),)
        if not places.is_own(self.path):
            self.owned = False  # it is the coordinator's from now on
        return _arrived, (self.path, self.size)

    def __del__(self, _remove: Any = os.unlink, _getpid: Any = os.getpid) -> None:
        if self.owned and self._pid == _getpid():
            try:
                _remove(self.path)
            except FileNotFoundError:
                pass  # the whole folder went, at the end of the process


class Shared:
    """A pickle in parts: ``stream``, in order, and its out-of-band ``buffers``.

    ``trouble``: why some of it is not in shared memory.
    """

    __slots__ = ("buffers", "stream", "trouble")

    def __init__(
        self,
        stream: tuple[bytes | Blob, ...],
        buffers: tuple[bytes | bytearray | Blob, ...],
        trouble: str | None = None,
    ) -> None:
        self.stream = stream
        self.buffers = buffers
        self.trouble = trouble

    def __reduce__(self) -> Any:
        return _received, (self.stream, self.buffers, self.trouble)


_far = False


@contextmanager
def far() -> Iterator[None]:
    """For what is pickled meanwhile, which goes to another machine: blobs go as bytes."""
    global _far
    _far = True
    try:
        yield
    finally:
        _far = False


def hashed(prefix: bytes, data: Portable, size: int) -> Any:
    """A blake2b, with digests of ``size`` bytes, that has been fed both; reads all the data."""
    from hashlib import blake2b  # slow to import, seldom needed

    if not isinstance(data, Shared):
        return blake2b(prefix + data, digest_size=size)
    fed = blake2b(prefix, digest_size=size)
    for part in (*data.stream, *data.buffers):
        fed.update(_mapped(part) if isinstance(part, Blob) else part)
    return fed


def _arrived(path: str, size: int) -> Blob:
    """A blob that is unpickled: here it is kept, where this is the process that owns it."""
    own = places.is_own(path)
    blob = _kept.get(path) if own else None
    if blob is None:
        blob = Blob(path, size, owned=own)
        if own:
            _kept[path] = blob
    return blob


def _received(stream: Any, buffers: Any, trouble: str | None) -> Shared:
    if trouble is not None and not places.is_settled():
        places.complain(trouble)
    return Shared(stream, buffers, trouble)


# -- pickling -------------------------------------------------------------------------


class Draft:
    """A pickle in the making: the file that a pickler writes to, and its buffer callback.

    A pickler hands over what is long as it is, so that nothing has been copied yet.
    """

    __slots__ = ("buffers", "pieces", "write")

    def __init__(self) -> None:
        self.pieces: list[Piece | pickle.PickleBuffer] = []
        self.write = self.pieces.append
        self.buffers: list[memoryview] = []

    def keep(self, buffer: pickle.PickleBuffer) -> bool:
        """As ``buffer_callback``: whether the buffer is to stay in the stream."""
        try:
            view = buffer.raw()
        except BufferError:
            return True  # it is in no one piece
        if view.nbytes < THRESHOLD:
            return True
        self.buffers.append(view)
        return False

    def sealed(self, to: Place | None = None, seen: Seen | None = None) -> Portable:
        """The pickle that has been written, its large parts in files of ``to``.

        ``seen`` is filled with the objects that the blobs were made of, and where those come
        again their data count as unchanged.
        """
        first = self.pieces[0]
        if (
            type(first) is bytes
            and len(first) < THRESHOLD
            and not (self.buffers or self.pieces[1:])
        ):
            return first  # as nearly always
        pieces = [_as_bytes(piece) for piece in self.pieces]
        if not self.buffers and sum(map(len, pieces)) < THRESHOLD:
            return b"".join(pieces)
        writer = _Writer(places.current() if to is None else to, seen)
        stream = tuple(writer.keep(part) for part in _joined(pieces))
        return Shared(stream, tuple(map(writer.keep, self.buffers)), writer.trouble)


def sealed(data: bytes, draft: Draft, to: Place | None = None) -> Portable:
    """The same, where the whole stream is ``data``."""
    if not draft.buffers and len(data) < THRESHOLD:
        return data
    draft.write(data)
    return draft.sealed(to)


def _as_bytes(piece: Piece | pickle.PickleBuffer) -> Piece:
    """A buffer that stays in the stream is written as it is, too, where it is not short."""
    return piece.raw() if isinstance(piece, pickle.PickleBuffer) else piece


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """What is long by itself, the rest joined."""
    parts: list[Piece] = []
    short: list[Piece] = []
    for piece in pieces:
        if len(piece) < THRESHOLD:
            short.append(piece)
            continue
        parts += [b"".join(short), piece]
        short = []
    return [*parts, b"".join(short)] if short or not parts else parts


def loads(data: Portable) -> Any:
    """What was pickled.  Raises what unpickling it raises."""
    if type(data) is bytes:
        return pickle.loads(data)
    assert isinstance(data, Shared)
    buffers = [_mapped(part) if isinstance(part, Blob) else part for part in data.buffers]
    if len(data.stream) == 1 and type(data.stream[0]) is bytes:
        return pickle.loads(data.stream[0], buffers=buffers)
    with _Chain(data.stream) as chain:
        return pickle.Unpickler(chain, buffers=buffers).load()


class _Chain:
    """The parts of a stream, as the one file that an unpickler reads."""

    def __init__(self, parts: Sequence[bytes | Blob]) -> None:
        self._files: list[Any] = []
        try:
            for part in parts:
                opened = FileIO(part.path) if isinstance(part, Blob) else BytesIO(part)
                self._files.append(opened)
        except BaseException:
            self.__exit__()
            raise
        self._files.reverse()

    def __enter__(self) -> _Chain:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        done = 0
        while done < len(view) and self._files:
            count = self._files[-1].readinto(view[done:])
            if not count:
                self._files.pop().close()
            done += count
        return done

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: self.readinto(buffer)])

    def readline(self) -> bytes:
        line = bytearray()
        while byte := self.read(1):
            line += byte
            if byte == b"\n":
                break
        return bytes(line)


# -- mapping --------------------------------------------------------------------------

_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_most = 0


def _mapped(blob: Blob) -> mmap.mmap | bytearray:
    """The data of a blob, this process's own: mapped, or where very many are, copied."""
    with FileIO(blob.path) as file:
        if len(_maps) >= _most_mapped():
            return _copied(blob)
        options: dict[str, Any] = {} if _KEEPS_FD else {"trackfd": False}
        made = mmap.mmap(file.fileno(), blob.size, access=mmap.ACCESS_COPY, **options)
    _maps.add(made)
    return made


def data_of(part: bytes | bytearray | Blob) -> memoryview:
    """What is in a part of a Shared, as bytes that can be sent."""
    return memoryview(_mapped(part) if isinstance(part, Blob) else part)


def blob_at(path: str, size: int) -> Blob:
    """A blob that somebody else has put there, and will remove."""
    return Blob(path, size, owned=False)


def _copied(blob: Blob) -> bytearray:
    copy = bytearray(blob.size)
    with _Chain((blob,)) as chain:
        chain.readinto(copy)
    return copy


def _most_mapped() -> int:
    global _most
    if not _most:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        few = _KEEPS_FD and soft != resource.RLIM_INFINITY
        _most = min(_MOST_MAPPED, soft // 4) if few else _MOST_MAPPED
    return _most


# -- writing --------------------------------------------------------------------------

_kept: weakref.WeakValueDictionary[str, Blob] = weakref.WeakValueDictionary()
_by_content: weakref.WeakValueDictionary[tuple[int, int], Blob] = weakref.WeakValueDictionary()


class _Writer:
    """Puts parts of pickles into files of ``to``."""

    def __init__(self, to: Place, seen: Seen | None) -> None:
        self._to = to
        self._seen = {} if seen is None else seen
        self._own = places.is_own_place(to)
        self.trouble: str | None = None

    def keep(self, part: Any) -> Any:
        """``part`` as a blob where it is long; one that has the very same data already, if
        this process keeps one."""
        view = memoryview(part).cast("B")
        if len(view) < THRESHOLD:
            return part if type(part) is bytes else bytes(part)
        source = part.obj if type(part) is memoryview else part
        if id(source) not in self._seen:
            self._seen[id(source)] = source, self._kept(view)
        return self._seen[id(source)][1]

    def _kept(self, view: memoryview) -> Blob | bytes:
        if not self._own:
            return self._write(view)
        key = len(view), _sample(view)
        known = _by_content.get(key)
        if known is not None and _is_same(known, view):
            return known
        made = self._write(view)
        if isinstance(made, Blob):
            _by_content[key] = _kept[made.path] = made
        return made

    def _write(self, view: memoryview) -> Blob | bytes:
        for folder in self._to.folders:
            try:
                path = places.write(folder, self._to.maker, view)
                return Blob(path, len(view), owned=True)
            except OSError as error:
                root = os.path.dirname(os.path.dirname(folder))
                self._note(f"large data cannot go to {root} ({error.strerror})")
        return bytes(view)

    def _note(self, trouble: str) -> None:
        self.trouble = self.trouble or trouble
        if self._own:
            places.complain(trouble)


def _sample(view: memoryview) -> int:
    """A number that most different data of one length differ in."""
    step = max(1, (len(view) - 64) // (_SAMPLES - 1))
    return hash(b"".join(view[at : at + 64] for at in range(0, len(view) - 63, step)))


def _is_same(blob: Blob, view: memoryview) -> bool:
    """Whether that is in it, as far as can be seen: there may be no descriptor to read it by."""
    buffer = bytearray(_STEP)
    try:
        file = FileIO(blob.path)
    except OSError:
        return False
    with file:
        for start in range(0, len(view), _STEP):
            part = view[start : start + _STEP]
            if len(part) < _STEP:
                buffer = bytearray(len(part))
            file.readinto(buffer)
            if buffer != part:
                return False
    return True


def forget(left: Place) -> None:
    """Remove what a worker that has ended made there and told nobody of."""
    places.remove_made(left, but=_kept)
