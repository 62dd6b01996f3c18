"""Pickles with all that is not found by its name: by cloudpickle, and with the places of code.

Newer versions of cloudpickle leave out which file code comes from: a traceback would show
``<dynamic-code>`` instead of the user's line.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any, ClassVar

import cloudpickle

from taskrun.arrays import Reducers

_NOWHERE = "<dynamic-code>"
_reduce_code = cloudpickle.Pickler.dispatch_table[CodeType]


def _with_its_file(code: CodeType) -> Any:
    make, parts = _reduce_code(code)
    return make, tuple([code.co_filename if part == _NOWHERE else part for part in parts])


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """A ``cloudpickle.Pickler`` that tells where code comes from.

    ``found`` says which functions and classes of ``__main__`` the reader finds there: these go by
    name, or he would have another class than those he knows, and globals that are not his.
    """

    dispatch_table: ClassVar[Any] = Reducers(
        {CodeType: _with_its_file}, cloudpickle.Pickler.dispatch_table
    )

    def __init__(
        self,
        file: Any,
        protocol: int | None = None,
        buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None,
        found: Callable[[Any], bool] | None = None,
    ) -> None:
        super().__init__(file, protocol, buffer_callback)
        self._found = found

    def reducer_override(self, obj: Any) -> Any:
        """As cloudpickle's; NotImplemented: as pickle does it."""
        if self._found is not None:
            if isinstance(obj, FunctionType | type):
                if obj.__module__ == "__main__" and self._found(obj):
                    return NotImplemented
            elif isinstance(obj, MethodType):
                owner, name = obj.__self__, obj.__name__
                if getattr(owner, name, None) == obj:
                    return getattr, (owner, name)
        return super().reducer_override(obj)


def dumps(obj: Any, found: Callable[[Any], bool] | None = None) -> bytes:
    """``obj`` pickled; ``found`` is as for a Pickler.  Raises what pickling it raises."""
    file = io.BytesIO()
    Pickler(file, pickle.HIGHEST_PROTOCOL, found=found).dump(obj)
    return file.getvalue()
