"""NumPy's arrays in pickles: who unpickles one may write to it, also where it was read-only.

It is a copy for him alone, and with the protocol of multiprocessing he may; protocol 5 keeps a
read-only buffer read-only.
"""

from __future__ import annotations

import pickle
import sys
from collections import ChainMap
from collections.abc import Callable
from typing import Any

Reducer = Callable[[Any], Any]


class Reducers(ChainMap[type, Reducer]):
    """A pickler's dispatch table of these ``tables``, and for arrays; NumPy may be imported later,
    or never."""

    def __init__(self, *tables: Any) -> None:
        super().__init__({}, *tables)

    def __missing__(self, kind: type) -> Reducer:
        if kind.__name__ != "ndarray" or kind.__module__ != "numpy":
            raise KeyError(kind)
        self[kind] = reduced
        return reduced


def reduced(array: Any) -> Any:
    """How an array is to be pickled."""
    flags = array.flags
    # In all other cases NumPy itself copies it.
    kind = array.dtype
    if not flags.writeable and flags.forc and kind.itemsize and not kind.hasobject:
        view = sys.modules["numpy"].asarray(_Writable(array))
        array = view if view.dtype == kind else view.view(kind)
    return array.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


class _Writable:
    """The memory of an array, for a pickler, which does not write to it."""

    def __init__(self, array: Any) -> None:
        self.array = array  # whose memory it is
        interface = array.__array_interface__
        address, _ = interface["data"]
        self.__array_interface__ = {**interface, "data": (address, False)}
