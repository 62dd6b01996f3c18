"""Values that stay with the engine: in the core a token, in a worker the value itself.

While somebody may ask for a value, the core holds its token, and the token what the engine
knows it by (a Dask future, a Ray reference): letting go of the one lets go of the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from taskrun.model import MISSING, Kept, Left, Taken


class Store(Protocol):
    """Where values are kept."""

    def fetch(self, place: Any) -> Mapping[Any, Any]: ...


class Keeping:
    """The tokens of a run."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tokens: weakref.WeakSet[Kept] = weakref.WeakSet()

    def leave(self, record: tuple[Any, ...], place: Any) -> tuple[Any, ...]:
        """An ENDED record with tokens for the values that its worker left at ``place``."""
        payload, items = record[4], record[5]
        if type(payload) is not Left and not items:
            return record
        if items:
            items = [self._token(item, place) for item in items]
        return (*record[:4], self._token(payload, place), items, *record[6:])

    def _token(self, encoded: Any, place: Any) -> Any:
        if type(encoded) is not Left:
            return encoded
        token = Kept(place, encoded.part)
        self._tokens.add(token)
        return token

    def take(self, arguments: Any) -> tuple[Any, list[Any]]:
        """A call's arguments as its worker gets them, and the places of the values in them."""
        places: list[Any] = []
        return _taken(arguments, places), places

    def bring_home(self) -> None:
        """Fetch the values that somebody still has a token of; those that are lost stay so."""
        brought: dict[int, Mapping[Any, Any]] = {}
        for token in list(self._tokens):
            if id(token.place) not in brought:
                brought[id(token.place)] = self._fetch(token.place)
            token.value = brought[id(token.place)].get(token.part, MISSING)

    def _fetch(self, place: Any) -> Mapping[Any, Any]:
        try:
            return self._store.fetch(place)
        except LookupError:
            return {}


def _taken(encoded: Any, places: list[Any]) -> Any:
    kind = type(encoded)
    if kind is Kept:
        for number, place in enumerate(places):
            if place is encoded.place:
                return Taken(number, encoded.part)
        places.append(encoded.place)
        return Taken(len(places) - 1, encoded.part)
    if kind is tuple and any(type(item) in _CONTAINERS for item in encoded):
        return tuple([_taken(item, places) for item in encoded])
    if kind is list:
        return [_taken(item, places) for item in encoded]
    if kind is dict:
        return {key: _taken(item, places) for key, item in encoded.items()}
    return encoded


_CONTAINERS = frozenset((Kept, tuple, list, dict))
