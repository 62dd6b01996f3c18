"""What the first request of a connection may ask for: ``(ignored, name, args, kwds)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskrun.manager import hosted
from taskrun.manager.calls import Reply, complaint
from taskrun.manager.objects import Objects


class Administration:
    """The requests that are about objects, not to one."""

    def __init__(self, objects: Objects, shut_down: Callable[[], object] | None) -> None:
        """``shut_down`` is called where a client asks for it; None refuses."""
        self._objects = objects
        self._shut_down = shut_down
        self._known: dict[str, Callable[..., Any]] = {
            "accept_connection": self._accept_connection,
            "create": self._create,
            "debug_info": self._debug_info,
            "decref": self._decref,
            "dummy": self._dummy,
            "get_methods": self._get_methods,
            "incref": self._incref,
            "number_of_objects": self._number_of_objects,
            "shutdown": self._shutdown,
        }

    def is_quick(self, request: Any) -> bool:
        """Whether the loop may execute this; it may also be no request at all."""
        try:
            _, name, args, _ = request
            if name == "create":
                return self._objects.is_quick(args[0])
            if name == "decref":
                return self._is_quickly_dropped(args[0])
        except (TypeError, ValueError, LookupError):
            return True  # to be told so does not take long
        return bool(name != "debug_info")

    def _is_quickly_dropped(self, ident: str) -> bool:
        entry = self._objects.find(ident)
        if entry is None or entry.references > 1:
            return True
        return entry.inline and not hosted.takes_long(entry.value, "", ())

    def execute(self, request: Any, *, inline: bool, pid: int | None) -> Reply:
        """The reply to a first request."""
        try:
            _, name, args, kwds = request
            if name not in self._known:
                raise AttributeError(f"{name!r} is not a request")
            return "#RETURN", self._known[name](inline, pid, *args, **kwds)
        except Exception:
            return complaint()

    # -- one method for each; the first two arguments are not the client's ------------

    def _accept_connection(self, inline: bool, pid: int | None, /, name: str) -> None:
        """The connection becomes one for calls; whoever executes this sees to it."""

    def _dummy(self, inline: bool, pid: int | None, /) -> None:
        """Says that the server is there, and that the client has its key."""

    def _create(
        self, inline: bool, pid: int | None, typeid: str, /, *args: Any, **kwds: Any
    ) -> tuple[str, tuple[str, ...]]:
        entry, exposed = self._objects.create(typeid, args, kwds, inline=inline, pid=pid)
        return entry.ident, exposed

    def _incref(self, inline: bool, pid: int | None, /, ident: str) -> None:
        self._objects.incref(ident, pid)

    def _decref(self, inline: bool, pid: int | None, /, ident: str) -> None:
        self._objects.decref(ident, pid)

    def _get_methods(self, inline: bool, pid: int | None, /, token: Any) -> tuple[str, ...]:
        entry = self._objects.find(token.id)
        if entry is None:
            raise KeyError(token.id)
        return tuple(entry.exposed)

    def _number_of_objects(self, inline: bool, pid: int | None, /) -> int:
        return len(self._objects.counted())

    def _debug_info(self, inline: bool, pid: int | None, /) -> str:
        return "\n".join(
            f"  {entry.ident}:       refcount={entry.references}\n    {str(entry.value)[:75]}"
            for entry in self._objects.counted()
        )

    def _shutdown(self, inline: bool, pid: int | None, /) -> None:
        if self._shut_down is None:
            raise PermissionError("this server does not shut down at a client's request")
        self._shut_down()
