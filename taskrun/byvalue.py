"""Pickles with all that is not found by its name: by cloudpickle, and with the places of code.

Newer versions of cloudpickle leave out which file code comes from: a traceback would show
``<dynamic-code>`` instead of the user's line.
"""

from __future__ import annotations

import io
import pickle
from types import CodeType
from typing import Any, ClassVar

import cloudpickle

from taskrun.arrays import Reducers

_NOWHERE = "<dynamic-code>"
_reduce_code = cloudpickle.Pickler.dispatch_table[CodeType]


def _with_its_file(code: CodeType) -> Any:
    make, parts = _reduce_code(code)
    return make, tuple([code.co_filename if part == _NOWHERE else part for part in parts])


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """A ``cloudpickle.Pickler`` that tells where code comes from."""

    dispatch_table: ClassVar[Any] = Reducers(
        {CodeType: _with_its_file}, cloudpickle.Pickler.dispatch_table
    )


def dumps(obj: Any) -> bytes:
    """``obj`` pickled.  Raises what pickling it raises."""
    file = io.BytesIO()
    Pickler(file, pickle.HIGHEST_PROTOCOL).dump(obj)
    return file.getvalue()
