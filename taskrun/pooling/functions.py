"""How functions and arguments travel to the workers of a Pool.

A function that is found by its name goes by reference, once to each worker.  One that is
not (a lambda, a closure) goes by cloudpickle, as it is at the time of the call: with the
arguments of its first call, and from the second on once to each worker, too.  What has a state
of its own (a bound method, a partial) is pickled with the arguments, or unpickled for each chunk.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final, SupportsFloat, SupportsIndex
from weakref import finalize

from taskrun import places
from taskrun.blobs import THRESHOLD, Draft, Portable, Seen, Shared
from taskrun.bunch import TINY
from taskrun.messages import SAY_BEGAN
from taskrun.model import Recipe
from taskrun.places import Place
from taskrun.pooling import remote
from taskrun.pooling.remote import (
    PROTOCOL,
    Afresh,
    Apply,
    ApplyAny,
    ApplyOnce,
    Map,
    MapAny,
    Starmap,
)

REMEMBERED: Final = 1024  # recipes, and functions that may get one
BY_VALUE: Final = 64  # of these recipes, those that have with them what a closure has captured

Kind = type[Apply] | type[Map] | type[Starmap]
Found = Callable[[Any], bool]

NAMED: Final = (FunctionType, BuiltinFunctionType, type)
SCALARS: Final = frozenset((int, float, str, bool, bytes, type(None)))  # any pickler does


class Recipes:
    """The recipes of one Pool.  ``in_main`` says which functions of ``__main__`` the workers
    find there; ``forget`` is told, by the collector, of a recipe by value that nobody has any
    more."""

    def __init__(self, ids: Iterator[int], in_main: Found, forget: Callable[[int], None]) -> None:
        self._ids = ids
        self._in_main = in_main
        self._forget = forget
        self._known: OrderedDict[Any, Recipe] = OrderedDict()
        self._values: OrderedDict[Any, Recipe] = OrderedDict()  # by what they are pickled as
        self._met: OrderedDict[bytes, None] = OrderedDict()  # digests of functions by value
        self.by_name: dict[Any, Recipe] = {}  # for single calls of functions that have a name

    def for_call(
        self, kind: Kind, function: Any, timeout: float | None, retries: int
    ) -> tuple[Recipe, tuple[Any, ...]]:
        """The recipe for one call, and the arguments before the call's own.

        A closure that was never met may be made for this call alone; a recipe, with all that it
        has captured, would stay here and in the workers.
        """
        found = self._with_name(kind, function, timeout, retries)
        if found is not None:
            return found, ()
        return self._by_value(kind, function, timeout, retries, few=True)

    def _is_new(self, digest: bytes) -> bool:
        if digest in self._met:
            return False
        self._met[digest] = None
        if len(self._met) > REMEMBERED:
            self._met.popitem(last=False)
        return True

    def _with_name(
        self, kind: Kind, function: Any, timeout: float | None, retries: int
    ) -> Recipe | None:
        if not isinstance(function, NAMED):
            return None
        key = (kind, function, timeout, retries)
        known = self._known.get(key)
        if known is not None:
            if kind is Apply and timeout is None and not retries:
                self.by_name[function] = known
            return known
        if not self._is_found(function):
            return None
        blob = pickle.dumps(kind(function), PROTOCOL)
        return self._learn(key, self._made(function, blob, timeout, retries))

    def _by_value(
        self,
        kind: Kind,
        function: Any,
        timeout: float | None,
        retries: int,
        *,
        few: bool = False,
    ) -> tuple[Recipe, tuple[Any, ...]]:
        blob = _in_one(kind(function), self._in_main)
        digest = _digest(blob)
        key = (digest, timeout, retries)
        known = self._values.get(key)
        if known is not None:
            self._values.move_to_end(key)
            return known, ()
        if few and self._is_new(digest):
            once = self.any(timeout, retries, ApplyOnce)
            return replace(once, name=remote.name_of(function)), (blob,)
        if not is_stateless(function):
            blob = pickle.dumps(Afresh(blob), PROTOCOL)
        made = self._values[key] = self._made(function, blob, timeout, retries)
        finalize(made, self._forget, made.id).atexit = False
        if len(self._values) > BY_VALUE:
            self._values.popitem(last=False)
        return made, ()

    def for_items(
        self, kind: type[Map], function: Any, timeout: float | None, retries: int, *, few: bool
    ) -> tuple[Recipe, tuple[Any, ...]]:
        """The recipe for calls with some items each, and the arguments before the items.
        ``few``: the calls are, so that the function may go with each."""
        found = self._with_name(kind, function, timeout, retries)
        if found is not None:
            return found, ()
        # What is large in it is there once, as long as there are calls; not in each call,
        # nor in each worker for ever.
        pickled = dumps_call(function, found=self._in_main)
        if isinstance(pickled, Shared):
            return self._apart(kind is Starmap, timeout, retries), (pickled,)
        return self._by_value(kind, function, timeout, retries, few=few)

    def for_each(
        self, function: Any, timeout: float | None, retries: int
    ) -> tuple[Recipe, tuple[Any, ...]]:
        """The recipe for calls with one item each, and the function, where that goes with them."""
        if not is_stateless(function):
            return self.any(timeout, retries), (self.carried(function),)
        found = self._with_name(Apply, function, timeout, retries)
        if found is not None:
            return found, ()
        pickled = dumps_call(function, found=self._in_main)
        if isinstance(pickled, Shared):
            return self.any(timeout, retries), (pickled,)
        return self._by_value(Apply, function, timeout, retries)

    def _apart(self, star: bool, timeout: float | None, retries: int) -> Recipe:
        key = (MapAny, star, timeout, retries)
        if key not in self._known:
            blob = pickle.dumps(MapAny(star), PROTOCOL)
            self._learn(key, self._made(ApplyAny, blob, timeout, retries))
        return self._known[key]

    def any(
        self,
        timeout: float | None = None,
        retries: int = 0,
        kind: type[ApplyAny] | type[ApplyOnce] = ApplyAny,
    ) -> Recipe:
        """The recipe for calls whose function comes with the arguments."""
        key = (kind, None, timeout, retries)
        if key not in self._known:
            blob = pickle.dumps(kind(), PROTOCOL)
            self._learn(key, self._made(ApplyAny, blob, timeout, retries))
        return self._known[key]

    def _made(self, function: Any, blob: bytes, timeout: float | None, retries: int) -> Recipe:
        return Recipe(
            id=next(self._ids),
            name="call" if function is ApplyAny else remote.name_of(function),
            reference=_digest(blob),
            blob=blob,
            retries=retries,
            timeout=timeout,
            flags=0 if timeout is None else SAY_BEGAN,
        )

    def _learn(self, key: Any, recipe: Recipe) -> Recipe:
        self._known[key] = recipe
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
            self.by_name.clear()
        return recipe

    def carried(self, function: Any) -> Any:
        """What stands for the function among the arguments of many calls: itself, or its pickle
        where workers would not find what is behind it."""
        if self._is_foreign(function):
            with suppress(Exception):  # each call says why it cannot be pickled
                return dumps_by_value(function, places.own(), self._in_main)
        return function

    def dumps_with(self, function: Any, call: Any) -> Portable:
        """As :func:`dumps_call`, for a call that has its function with it."""
        if self._is_foreign(function):
            return dumps_by_value(call, places.own(), self._in_main)
        return dumps_call(call, found=self._in_main)

    def _is_foreign(self, function: Any) -> bool:
        """Whether a function, or what is behind a method, partial or object, is of the script, and
        the workers do not have it: they were forked before it was made, as in a notebook."""
        while isinstance(function, partial):
            function = function.func
        function = getattr(function, "__func__", function)
        kind = function if isinstance(function, NAMED) else type(function)
        in_script = getattr(kind, "__module__", None) == "__main__"
        return in_script and not self._in_main(kind)

    def _is_found(self, function: Any) -> bool:
        module = getattr(function, "__module__", None)
        if module == "__main__":
            return self._in_main(function)
        found: Any = sys.modules.get(module or "")
        for part in function.__qualname__.split("."):
            found = getattr(found, part, None)
        return found is function


def is_small(function: Any, args: Any, keywords: Any, timeout: float | None, retries: int) -> bool:
    """Whether a call can go with others: of a function with a name, and plain arguments."""
    return (
        type(function) is FunctionType
        and type(args) is tuple
        and not (keywords or retries != 0 or timeout is not None)
        # One argument is the usual case, and to look at it alone takes a quarter of the time.
        and (type(args[0]) in TINY if len(args) == 1 else TINY.issuperset(map(type, args)))
    )


def checked(timeout: Any, retries: Any) -> tuple[float | None, int]:
    """The two options of a call, where one was given.  Raises TypeError and ValueError where
    the core could not calculate with it: that would be the end of the pool."""
    if timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, SupportsFloat):
            raise TypeError(
                f"timeout= of a pool's call must be a number of seconds, not {timeout!r}; "
                f"leave it out for no limit"
            )
        timeout = float(timeout)
        if not 0 < timeout < math.inf:
            raise ValueError(
                f"timeout= of a pool's call is in seconds and must be more than 0 and finite, "
                f"not {timeout:g}; leave it out for no limit"
            )
    if isinstance(retries, bool) or not isinstance(retries, SupportsIndex):
        raise TypeError(
            f"retries= of a pool's call must be a whole number, not {retries!r}; "
            f"leave it out for none"
        )
    retries = retries.__index__()
    if retries < 0:
        raise ValueError(
            f"retries= of a pool's call must be 0 or more, not {retries}; leave it out for none"
        )
    return timeout, retries


def is_stateless(function: Any) -> bool:
    """Whether a function is the same at every call: one with a name, not a bound method."""
    if type(function) is FunctionType:
        return True
    if isinstance(function, BuiltinFunctionType):
        return function.__self__ is None or isinstance(function.__self__, type(sys))
    return isinstance(function, type)


def dumps_scalar(args: tuple[Any, ...]) -> Portable:
    """As :func:`dumps_call`, for one argument that is of ``SCALARS``."""
    blob = pickle.dumps((args, {}), PROTOCOL)
    return blob if len(blob) < THRESHOLD else dumps_call((args, {}))


def dumps_call(obj: Any, seen: Seen | None = None, found: Found | None = None) -> Portable:
    """What goes to a worker for one call, pickled; ``seen``: see ``Draft.sealed``; ``found``: see
    ``byvalue.Pickler``.

    Raises what pickling it raises.
    """
    try:
        return remote.dumps(obj, places.own(), seen)
    except Exception as error:
        return _rescued(obj, error, found)


def _rescued(obj: Any, error: Exception, found: Found | None) -> Portable:
    """By cloudpickle, which knows more; where that fails, too, the first error is raised."""
    try:
        return dumps_by_value(obj, places.own(), found)
    except Exception:
        raise error from None


def dumps_by_value(obj: Any, to: Place | None = None, found: Found | None = None) -> Portable:
    """A pickle with all functions and classes in it that are not found by their names.

    ``to``: where its large parts go; in a worker usually where its results do; ``found``: see
    ``byvalue.Pickler``.  Raises what pickling it raises.
    """
    from taskrun.byvalue import Pickler  # slow to import, seldom needed

    draft = Draft()
    Pickler(draft, PROTOCOL, buffer_callback=draft.keep, found=found).dump(obj)
    return draft.sealed(to)


def _digest(blob: bytes) -> bytes:
    return blake2b(blob, digest_size=16).digest()


def _in_one(obj: Any, found: Found) -> bytes:
    from taskrun.byvalue import dumps

    return dumps(obj, found)
