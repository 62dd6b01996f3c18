"""What ``import taskrun`` adds to the standard library: the serializer ``"tls"``.

``multiprocessing.managers`` finds it in a table of its own.  To import that module only to
make an entry would cost everybody who imports taskrun some ten milliseconds; so the entry
is made when somebody else imports it.
"""

from __future__ import annotations

import sys
from typing import Any

_MODULE = "multiprocessing.managers"


def register() -> None:
    """Make the entry, now or when the module is imported."""
    if _MODULE in sys.modules:
        _enter(sys.modules[_MODULE])
    elif not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter(module: Any) -> None:
    module.listener_client["tls"] = (_listen, _connect)


def _listen(*args: Any, **kwds: Any) -> Any:
    from taskrun.transport.stock import refuse_to_listen

    refuse_to_listen(*args, **kwds)


def _connect(*args: Any, **kwds: Any) -> Any:
    from taskrun.transport.stock import connect

    return connect(*args, **kwds)


class _Finder:
    """Finds the one module, as it would be found anyway."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(self, spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """Loads it as its own loader does, and makes the entry."""

    def __init__(self, finder: _Finder, loader: Any) -> None:
        self._finder = finder
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _enter(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
